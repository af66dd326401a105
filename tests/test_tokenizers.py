"""Tokenizers give the ids and the text of the reference implementations, on hard strings."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

import data
from model import Llama, LlamaConfig
from t5 import T5, T5Config

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
NAMES = ["llama", "t5", "plain", "digits", "llama3", "added", "tiktoken"]


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


def added(**rules):
    plain = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    end = plain | dict(id=0, content="<|end|>", special=True)
    think = plain | dict(id=421, content="<think>")
    return {"added_tokens": [end, think, think | dict(id=422, content="<other>") | rules]}


NOT_SUPPORTED = {  # kinds that we do not have are named, and nobody is sent to download them again
    "a pre-tokenizer": (step(type="Metaspace"), "Metaspace.* is not supported"),
    "a normalizer": ({"normalizer": {"type": "NFC"}}, "normalizer NFC is not supported"),
    "a prefix": (step(type="ByteLevel", add_prefix_space=True), "add_prefix_space.* not supported"),
    "a pattern": (step(**SPLIT, pattern={"Regex": "x*"}), r'"x\*".* is not supported'),
    "another order": (
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1, "ab": 3, "ba": 2},
                "merges": ["a b", "b a"],
            }
        },
        "order",
    ),
    "tokens that no merge makes": (
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}},
        "tokens that no merge makes are not supported",
    ),
    "a suffix": (
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": []}},
        "end_of_word_suffix '</w>' is not supported",
    ),
    "unigrams, as T5's": ({"model": {"type": "Unigram", "vocab": []}}, "of a T5, spiece.model"),
    "bytes for the rest, as LLaMA's": (
        {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}},
        "SentencePiece's kind.*add the model's own tokenizer.model",
    ),
    "lstrip": (added(lstrip=True), "lstrip of the token '<other>' is not supported"),
    "rstrip": (added(rstrip=True), "rstrip of the token '<other>' is not supported"),
    "single_word": (added(single_word=True), "single_word of the token '<other>'"),
    "normalized": (added(normalized=True), "normalized.* not supported"),
}
BROKEN = [
    {"pre_tokenizer": None},
    {"model": {"type": "BPE", "vocab": [], "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 2, "ab": 1}, "merges": ["b c"]}},
    {"model": 3},
    {"added_tokens": []},
]


def load_changed(plain, change):
    spec = data.read_json(plain / "tokenizer.json")
    (plain / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    return data.load_tokenizer(plain)


@pytest.fixture
def plain(tmp_path):
    return Path(shutil.copytree(GOLDEN / "plain", tmp_path / "plain"))


@pytest.mark.parametrize("what", NOT_SUPPORTED)
def test_a_kind_that_is_not_supported_is_named(plain, what):
    change, says = NOT_SUPPORTED[what]
    with pytest.raises(data.DataError, match=f"tokenizer.json: .*{says}") as error:
        load_changed(plain, change)
    assert "\n" not in str(error.value) and "again" not in str(error.value)


@pytest.mark.parametrize("change", BROKEN)
def test_a_tokenizer_json_that_is_broken_is_refused(plain, change):
    with pytest.raises(data.DataError, match="tokenizer.json: .*download it again") as error:
        load_changed(plain, change)
    assert "\n" not in str(error.value)


def test_a_file_of_before_the_models_had_a_type_is_read(plain):
    """As GPT-2's own."""
    model = data.read_json(plain / "tokenizer.json")["model"]
    del model["type"]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    tokenizer = load_changed(plain, {"model": model, "pre_tokenizer": byte_level})
    expected = json.loads((plain / "expected.json").read_text())
    assert all(tokenizer.encode(text) == ids for text, ids in expected["ids"])


def test_without_a_bos_token_none_is_put_in_front(plain):
    settings = data.read_json(plain / "tokenizer_config.json")
    (plain / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    tokenizer = data.load_tokenizer(plain)
    assert tokenizer.bos_id is None and tokenizer.pad_id == tokenizer.eos_id == 0


def test_a_t5_vocabulary_without_extra_ids_is_named_and_can_be_used(tmp_path):
    """100 ids are taken to follow T5's spiece.model; a tokenizer.model has none."""
    shutil.copy(GOLDEN / "t5" / "spiece.model", tmp_path)
    size = data.load_tokenizer(tmp_path).gist_id - 100
    model = T5(T5Config(vocab_size=size, d_model=16, n_layers=1, n_decoder_layers=1, n_heads=1))
    data.save_model(tmp_path, model)
    with pytest.raises(data.DataError, match="rename .*spiece.model .* tokenizer.model"):
        data.load_model(tmp_path)
    (tmp_path / "spiece.model").rename(tmp_path / "tokenizer.model")
    assert data.load_model(tmp_path)[1].gist_id == size


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(tmp_path):
    content = (GOLDEN / "tiktoken" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(b"\xef\xbb\xbf" + content)
    one, other = data.load_tokenizer(tmp_path), data.load_tokenizer(GOLDEN / "tiktoken")
    assert one.encode("Two words") == other.encode("Two words")


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
