"""Tokenizers give the ids and the text of the reference implementations, on hard strings."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

import data
from model import Llama, LlamaConfig

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
NAMES = ["llama", "t5", "plain", "digits", "llama3", "tiktoken"]


@pytest.fixture(params=NAMES)
def golden(request):
    folder = GOLDEN / request.param
    return data.load_tokenizer(folder), json.loads((folder / "expected.json").read_text())


def test_ids_are_the_reference_tokenizers(golden):
    tokenizer, expected = golden
    for text, ids in expected["ids"]:
        assert tokenizer.encode(text) == ids, repr(text)


def test_text_is_the_reference_tokenizers_also_of_bytes_that_are_no_text(golden):
    tokenizer, expected = golden
    for text, ids in expected["texts"]:
        ours = tokenizer.decode(ids)
        if "spiece.model" in tokenizer.files:
            ours = ours.strip()  # the reference strips what T5 says
        assert ours == text


def test_no_text_gives_a_special_id_and_ids_of_no_text_are_dropped(golden):
    tokenizer, _ = golden
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.gist_id} - {None}
    assert tokenizer.gist_id == tokenizer.vocab_size - 1
    for text in ("</s> <s> <|end|> <|start|> <unk>", "\ud83d half a character"):
        assert not special & set(tokenizer.encode(text))
    ids = tokenizer.encode("two words")
    assert tokenizer.decode(ids + [*special]) == tokenizer.decode(ids)


def test_a_tokenizer_is_saved_as_it_was_read(golden, tmp_path):
    tokenizer, _ = golden
    shape = dict(d_model=16, n_layers=1, n_heads=1, n_kv_heads=1)
    data.save_model(tmp_path, Llama(LlamaConfig(tokenizer.vocab_size, **shape)), tokenizer)
    _, again = data.load_model(tmp_path)
    names = ("files", "gist_id", "bos_id", "eos_id", "pad_id", "vocab_size")
    for name in names:
        assert getattr(again, name) == getattr(tokenizer, name)


def test_bytes_without_a_token_are_dropped():
    tokenizer = data.load_tokenizer(GOLDEN / "plain")
    assert tokenizer.encode("the\x01re") == tokenizer.encode("the") + tokenizer.encode("re")
    assert tokenizer.encode("\x01") == []


# ---- Files that cannot be used ----


def step(**kind):
    return {"pre_tokenizer": {**kind}}


SPLIT = dict(type="Split", behavior="Isolated", invert=False)
REFUSED = [
    step(type="Metaspace"),
    {"pre_tokenizer": None},
    {"normalizer": {"type": "NFC"}},
    step(type="ByteLevel", add_prefix_space=True, use_regex=True),
    step(**SPLIT, pattern={"Regex": "("}),
    step(**SPLIT, pattern={"Regex": "a"}),
    {"model": {"type": "BPE", "vocab": [], "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 2, "ab": 1}, "merges": ["b c"]}},
    {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 3, "ba": 2},
            "merges": ["a b", "b a"],
        }
    },
    {"model": 3},
    {"added_tokens": []},
]


@pytest.fixture
def plain(tmp_path):
    return Path(shutil.copytree(GOLDEN / "plain", tmp_path / "plain"))


@pytest.mark.parametrize("change", REFUSED)
def test_a_tokenizer_json_that_cannot_be_used_is_refused(plain, change):
    spec = data.read_json(plain / "tokenizer.json")
    (plain / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(data.DataError, match="tokenizer.json: ") as error:
        data.load_tokenizer(plain)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["", "(?!)", "x*", "a|", "(a)(b)?"])
def test_a_pattern_that_matches_nothing_loses_no_text_or_is_refused(plain, pattern):
    spec = data.read_json(plain / "tokenizer.json")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = [{**SPLIT, "pattern": {"Regex": pattern}}, byte_level]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (plain / "tokenizer.json").write_text(json.dumps(spec))
    if pattern in ("x*", "a|"):
        with pytest.raises(data.DataError, match="matches nothing"):
            data.load_tokenizer(plain)
        return
    tokenizer = data.load_tokenizer(plain)
    for text in ("", "abc abab xxx", "süß"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_model_without_an_end_is_refused(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"] * 9),
            model_writer=f,
            vocab_size=12,
            hard_vocab_limit=False,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(data.DataError, match="tokenizer.model: .*end of a text"):
        data.load_tokenizer(tmp_path)
