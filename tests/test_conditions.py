"""The table is the only place that knows a condition, data.layout the only one that knows segments.

Answers, of whole rows and from caches, against a loop that decodes one row under the whole mask.
"""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

import data
import eval as evaluation
import train
from gist_mask import GIST, INPUT, PADDING, PROMPT, START, TABLE
from model import Cache, Llama, LlamaConfig
from t5 import T5, T5Config

from exercises import attention  # isort: skip

GIST_ID, PAD_ID, EOS_ID, START_ID = 30, 0, 1, 2
VOCAB = 31


class Tokenizer:
    gist_id, pad_id, eos_id = GIST_ID, PAD_ID, EOS_ID

    def decode(self, ids):
        return " ".join(map(str, ids))


def make_model(arch, seed, n_kv_heads=1):
    shape = dict(vocab_size=VOCAB, d_model=24, n_layers=2, n_heads=2, head_dim=12, d_ff=32)
    if arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=n_kv_heads, tie_embeddings=False))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=2, start_id=START_ID))
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, weight in model.named_parameters():  # answers that depend on what is seen where
            if "bias" in name or "wq" in name:
                weight.mul_(10)
    return model.eval()


def make_example(rng, arch, prompt, n_gist, after, start=False):
    """A row of random tokens with so many of each segment."""
    ids = [rng.randrange(3, GIST_ID) for _ in range(start + prompt + after)]
    segments = [START] * start + [PROMPT if n_gist else INPUT] * prompt
    gist = [GIST_ID] * n_gist
    before = ids[: start + prompt] + gist
    segments += [GIST] * n_gist + [INPUT] * after
    return data.Example(before, ids[start + prompt :], [EOS_ID], segments, {}, arch)


def random_examples(rng, arch, n_gist, start=False):
    """Ragged rows; the first has the shortest input that there can be, the last a long one."""
    lengths = [(rng.randint(1, 6), rng.randint(1, 5)) for _ in range(3)]
    lengths = [(lengths[0][0], 1), *lengths[1:], (1, 7)]
    return [make_example(rng, arch, p, n_gist, q, start) for p, q in lengths]


def may_see(table, query, key):
    if key in (PADDING, START):
        return key == START
    return query != START and bool(table[query - 1][key - 1])


def slow_mask(segments, table, causal):
    n = len(segments)
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            allowed = may_see(table, segments[q], segments[k]) and (k <= q or not causal)
            mask[0, 0, q, k] = allowed or q == k
    return mask


@torch.no_grad()
def slow_answer(model, example, table, max_new_tokens):
    """One row, one token at a time, everything computed anew under the whole mask."""
    source, segments = torch.tensor([example.prompt + example.input]), example.segments
    new = []
    for _ in range(max_new_tokens):
        if isinstance(model, T5):
            mask = slow_mask(segments, table, causal=False)
            seen = torch.tensor([may_see(table, INPUT, s) for s in segments])
            target = torch.tensor([[*new, PAD_ID]])  # the model shifts it: the last is not read
            logits = model(source, target, mask, cross_mask=seen[None, None, None])
        else:
            mask = slow_mask(segments + [INPUT] * len(new), table, causal=True)
            logits = model(torch.cat([source, torch.tensor([new], dtype=torch.int64)], dim=1), mask)
        token = logits[0, -1].argmax().item()
        if token == EOS_ID:
            break
        new.append(token)
    return " ".join(map(str, new))


def answer(model, examples, condition="random", cache=None, max_new_tokens=6):
    return evaluation.answer(model, Tokenizer(), examples, condition, max_new_tokens, cache)


def compress(model, examples, condition="random"):
    return evaluation.compress_prompts(
        model, *evaluation.prompts_of(examples, Tokenizer()), condition
    )


TABLES = []
for number in range(20):
    bits = random.Random(number)
    TABLES.append([[bits.randint(0, 1) for _ in range(3)] for _ in range(3)])
TABLES += [[[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("n_gist", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("number", range(len(TABLES)))
def test_answers_are_those_of_the_whole_mask(number, arch, n_gist, monkeypatch):
    """Of whole rows, and from caches wherever a cache can stand for a prompt."""
    table = TABLES[number]
    monkeypatch.setitem(TABLE, "random", table)
    model = make_model(arch, seed=number, n_kv_heads=1 + number % 2)
    rng = random.Random(f"{number} {arch} {n_gist}")
    examples = random_examples(rng, arch, n_gist, start=number % 3 == 0)
    expected = [slow_answer(model, e, table, 6) for e in examples]
    assert answer(model, examples) == expected
    if arch == "t5" and (table[0][2] or table[1][2]):  # prompt or gist sees the input
        with pytest.raises(ValueError, match="an encoder cannot read a prompt before its input"):
            compress(model, examples)
        return
    assert answer(model, examples, cache=compress(model, examples)) == expected
    # The same, compressed one by one and joined.
    joined = Cache.cat([compress(model, [e]) for e in examples])
    assert answer(model, examples, cache=joined) == expected


@pytest.mark.parametrize("n_gist", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition", TABLE)
def test_one_prompt_answers_many_inputs(arch, condition, n_gist):
    if arch == "t5" and condition == "pos_control":
        pytest.skip("an encoder cannot cache it")
    rng, model = random.Random(n_gist), make_model(arch, seed=4)
    first, *others = random_examples(rng, arch, n_gist)
    examples = [first] + [
        replace(
            e,
            prompt=first.prompt,
            segments=first.segments[: len(first.prompt)] + [INPUT] * len(e.input),
        )
        for e in others
    ]
    expected = [slow_answer(model, e, TABLE[condition], 6) for e in examples]
    cache = compress(model, examples[:1], condition)
    assert answer(model, examples, condition, cache) == expected
    assert answer(model, examples, condition) == expected
    with pytest.raises(ValueError, match="a cache of 2 prompts cannot answer 4 inputs"):
        answer(model, examples, condition, cache[[0, 0]])


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition", TABLE)
def test_a_batch_of_one_gives_the_same_answers(arch, condition):
    model = make_model(arch, seed=0)
    examples = random_examples(random.Random(0), arch, 2)
    alone = [answer(model, [e], condition)[0] for e in examples]
    assert answer(model, examples, condition) == alone


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_rows_without_gist_tokens_are_not_masked(arch):
    model = make_model(arch, seed=1)
    examples = random_examples(random.Random(1), arch, 0)
    everything = [[1, 1, 1]] * 3
    expected = [slow_answer(model, e, everything, 6) for e in examples]
    assert answer(model, examples, "neg_control") == expected


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition, kept", [("gist", [GIST, GIST]), ("neg_control", [])])
def test_a_cache_keeps_what_the_input_sees(arch, condition, kept):
    model = make_model(arch, seed=0)
    examples = [make_example(random.Random(0), arch, n, 2, 1) for n in (3, 1)]
    cache = compress(model, examples, condition)
    assert cache.segments.tolist() == [kept, kept] and cache.length == len(kept)
    if arch == "t5":  # all that stands before an input is at negative positions
        assert cache.positions.tolist() == [[-2, -1][: len(kept)]] * 2


def test_prompts_padded_on_the_right_are_refused():
    rows = data.pad([[PROMPT, PROMPT, GIST], [PROMPT, GIST]])
    with pytest.raises(ValueError, match="left"):
        evaluation.compress_prompts(make_model("llama", 0), rows, rows)


def test_an_unknown_condition_is_an_error_that_lists_those_there_are():
    examples = random_examples(random.Random(0), "llama", 1)
    with pytest.raises(ValueError, match="gist, pos_control, neg_control"):
        answer(make_model("llama", 0), examples, "magic")


# ---- Other layouts, by an edit of data.layout alone ----


def gist_after_input_too(e):
    """prompt G input G output: what the second gist tokens see and who sees them, TABLE says."""
    n = e.segments.count(GIST)
    return replace(e, input=e.input + [GIST_ID] * n, segments=e.segments + [GIST] * n)


def first_token_in_sight(label, e):
    return replace(e, segments=[label, *e.segments[1:]])


def input_first(e):
    """The input before the prompt: input prompt G output."""
    prompt, given = e.prompt, e.input
    segments = [INPUT] * len(given) + e.segments[: len(prompt)]
    return replace(e, prompt=given, input=prompt, segments=segments)


NO_CACHE = (
    "an encoder cannot read a prompt before its input",
    "a cache cannot stand for this prompt",
    "part of the prompt is labeled INPUT",
)
LAYOUTS = {
    "the gist after the input, too": gist_after_input_too,
    "the first token is START": partial(first_token_in_sight, START),
    "the first token is INPUT": partial(first_token_in_sight, INPUT),
    "the input first": input_first,
}


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition", TABLE)
def test_another_layout_is_trained_and_answered_by_its_own_mask(layout, arch, condition):
    for seed in range(3):
        model = make_model(arch, seed)
        examples = [LAYOUTS[layout](e) for e in random_examples(random.Random(seed), arch, 2)]
        expected = [slow_answer(model, e, TABLE[condition], 6) for e in examples]
        assert answer(model, examples, condition) == expected
        # In a batch with padding, every row has the loss that it has alone.
        losses = [train.batch_loss(model, data.collate([e], PAD_ID), condition) for e in examples]
        together = train.batch_loss(model, data.collate(examples, PAD_ID), condition)
        torch.testing.assert_close(together, sum(losses), atol=1e-4, rtol=1e-4)
        # From a cache, the answers are the same, or there is an error that says why.
        try:
            cache = compress(model, examples, condition)
            from_cache = answer(model, examples, condition, cache)
        except ValueError as error:
            assert any(says in str(error) for says in NO_CACHE)
        else:
            assert from_cache == expected


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_gist_after_the_input_sees_what_no_cache_has_kept(arch):
    """It is a gist token, so it sees the prompt; a cache of the first gist has no prompt."""
    model = make_model(arch, 0)
    examples = [gist_after_input_too(e) for e in random_examples(random.Random(0), arch, 1)]
    cache = compress(model, examples, "gist")
    with pytest.raises(ValueError, match="|".join(NO_CACHE)):
        answer(model, examples, "gist", cache)


def test_a_cache_ends_where_the_input_begins():
    """A gist in the input's half has positions that the prompt's tokens in the cache have, too."""
    model = make_model("llama", 0)
    examples = [make_example(random.Random(n), "llama", n, 1, 3) for n in (2, 4)]
    late = [replace(e, prompt=e.prompt[:-1], input=[GIST_ID, *e.input]) for e in examples]
    prompts = [replace(e, segments=[PROMPT] * len(e.prompt)) for e in late]
    with pytest.raises(ValueError, match="a cache ends where the input begins"):
        answer(model, late, "pos_control", compress(model, prompts, "pos_control"))


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_new_entry_of_the_table_is_a_condition_everywhere(arch, tmp_path, monkeypatch, capsys):
    """The prompt sees only itself, a gist token its prompt and not itself: trained, evaluated,
    compressed, drawn."""
    monkeypatch.setitem(TABLE, "blind", [[1, 0, 0], [1, 0, 0], [0, 1, 1]])
    records = data.builtin(60, 6)
    for split in ("train", "unseen"):
        name = "a_train.json" if split == "train" else f"a_validation_{split}.json"
        (tmp_path / name).write_text(json.dumps(records[split]))
    out = tmp_path / "run"
    train.train(
        train.Config(
            n_gist=2,
            condition="blind",
            arch=arch,
            data=str(tmp_path),
            out_dir=str(out),
            d_model=16,
            n_layers=2,
            n_heads=2,
            batch_size=4,
            vocab_size=400,
            max_steps=2,
            device="cpu",
        )
    )
    evaluation.evaluate_runs([str(out)], device="cpu")
    evaluation.compress(str(out), instruction="Say a.", input=["b"], device="cpu")
    attention.draw(str(out), "Say a.", str(tmp_path / "a.png"), device="cpu")
    evaluation.plot([str(out)], out=str(tmp_path / "b.png"))
    printed = capsys.readouterr().out
    assert data.read_json(out / "metrics.json")["condition"] == "blind"
    assert "answer  " in printed and (tmp_path / "b.png").stat().st_size > 1000
