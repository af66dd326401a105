"""The table is the only place that knows a condition: random tables against slow loops."""

import random

import pytest
import torch

import data
import eval as evaluation
import gist_mask
import train
from model import Llama, LlamaConfig
from t5 import T5, T5Config

from exercises import attention  # isort: skip

GIST, PAD, EOS, START = 30, 0, 1, 2
VOCAB = 31
PROMPT, GISTS, INPUT = 0, 1, 2  # the segments


class Tokenizer:
    gist_id, pad_id, eos_id = GIST, PAD, EOS

    def decode(self, ids):
        return " ".join(map(str, ids))


def make_model(arch, seed):
    shape = dict(vocab_size=VOCAB, d_model=24, n_layers=2, n_heads=2, head_dim=12, d_ff=32)
    if arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=1, tie_embeddings=False))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=2, start_id=START))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def random_examples(rng, n_gist):
    """Ragged rows; the first has the shortest input that there can be, the last a long one."""

    def ids(n):
        return [rng.randrange(3, GIST) for _ in range(n)]

    lengths = [(rng.randint(1, 6), rng.randint(1, 5)) for _ in range(3)]
    lengths = [(lengths[0][0], 1), *lengths[1:], (1, 7)]
    return [data.Example(ids(p) + [GIST] * n_gist, ids(q), [EOS], {}) for p, q in lengths]


def segments_of(example):
    n_gist = example.prompt.count(GIST)
    prompt = [PROMPT] * (len(example.prompt) - n_gist)
    return prompt + [GISTS] * n_gist + [INPUT] * len(example.input)


def slow_mask(segment, table, causal):
    n = len(segment)
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            allowed = table[segment[q]][segment[k]] and (k <= q or not causal)
            mask[0, 0, q, k] = bool(allowed) or q == k
    return mask


@torch.no_grad()
def slow_answer(model, example, table, max_new_tokens):
    """One row, one token at a time, everything computed anew under the whole mask."""
    source, segment = example.prompt + example.input, segments_of(example)
    new = []
    for _ in range(max_new_tokens):
        if isinstance(model, T5):
            mask = slow_mask(segment, table, causal=False)
            seen = [bool(table[INPUT][s]) for s in segment]
            target = torch.tensor([[START, *new]])
            cross_mask = torch.tensor(seen)[None, None, None]
            logits = model(torch.tensor([source]), target, mask, cross_mask)
        else:
            mask = slow_mask(segment + [INPUT] * len(new), table, causal=True)
            logits = model(torch.tensor([source + new]), mask)
        token = logits[0, -1].argmax().item()
        if token == EOS:
            break
        new.append(token)
    return " ".join(map(str, new))


TABLES = []
for number in range(20):
    bits = random.Random(number)
    TABLES.append([[bits.randint(0, 1) for _ in range(3)] for _ in range(3)])
TABLES += [[[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("n_gist", [1, 2])
@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("number", range(len(TABLES)))
def test_answers_are_those_of_the_whole_mask(number, arch, n_gist, monkeypatch):
    table = TABLES[number]
    monkeypatch.setitem(gist_mask.TABLE, "random", table)
    model = make_model(arch, seed=number)
    examples = random_examples(random.Random(f"{number} {arch} {n_gist}"), n_gist)
    expected = [slow_answer(model, e, table, 6) for e in examples]
    assert evaluation.answer(model, Tokenizer(), examples, "random", 6) == expected


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_a_batch_of_one_gives_the_same_answers(arch, condition):
    model = make_model(arch, seed=0)
    examples = random_examples(random.Random(0), 2)
    together = evaluation.answer(model, Tokenizer(), examples, condition, 6)
    alone = [evaluation.answer(model, Tokenizer(), [e], condition, 6)[0] for e in examples]
    assert together == alone


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_answers_stand_where_positions_says_as_in_training(arch, condition, monkeypatch):
    """The input ten positions further from the gist, by an edit of `positions` alone."""
    counted = gist_mask.positions

    def further(tokens, gist_id):
        is_input = gist_mask.segments(tokens, gist_id) == INPUT
        return counted(tokens, gist_id) + 10 * is_input

    monkeypatch.setattr(gist_mask, "positions", further)
    model = make_model(arch, seed=3)
    for name, weight in model.named_parameters():  # answers that depend on positions
        if "bias" in name or "wq" in name:
            weight.mul_(20)
    examples = random_examples(random.Random(3), 1)
    answers = evaluation.answer(model, Tokenizer(), examples, condition, 6)
    for example, answer in zip(examples, answers):
        new = [] if arch == "llama" else [START]
        for token in map(int, answer.split()):
            source = example.prompt + example.input
            row = torch.tensor([source + new if arch == "llama" else source])
            there = further(row, GIST)
            if arch == "llama":
                logits = model(row, gist_mask.decoder_mask(row, GIST, condition), there)
            else:
                mask = gist_mask.encoder_mask(row, GIST, condition)
                cross_mask = gist_mask.cross_mask(row, GIST, condition)
                logits = model(row, torch.tensor([new]), mask, cross_mask, positions=there)
            assert int(logits[0, -1].argmax()) == token
            if token == GIST:  # a gist token in an answer would begin another segment
                break
            new.append(token)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_rows_without_gist_tokens_are_not_masked(arch):
    model = make_model(arch, seed=1)
    examples = random_examples(random.Random(1), 0)
    answers = evaluation.answer(model, Tokenizer(), examples, "neg_control", 6)
    rows = [e.prompt + e.input for e in examples]
    expected = model.generate(*data.pad(rows, PAD, left=True), max_new_tokens=6, eos_id=EOS)
    assert answers == [" ".join(map(str, ids)) for ids in expected]


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition, kept", [("gist", 2), ("neg_control", 0)])
def test_a_cache_keeps_what_the_input_sees(arch, condition, kept):
    prompts = data.pad([[5, 6, 7, GIST, GIST], [8, GIST, GIST]], PAD, left=True)
    cache = evaluation.compress_prompts(make_model(arch, seed=0), *prompts, GIST, condition)
    assert cache.length == kept and cache.next_position.tolist() == [[2], [2]]


def test_prompts_padded_on_the_right_are_refused():
    tokens, attention_mask = data.pad([[5, 6, 7, GIST], [8, GIST]], PAD)
    with pytest.raises(AssertionError, match="left"):
        evaluation.compress_prompts(make_model("llama", 0), tokens, attention_mask, GIST)


def test_an_unknown_condition_is_an_error_that_lists_those_there_are():
    examples = random_examples(random.Random(0), 1)
    with pytest.raises(ValueError, match="gist, pos_control, neg_control"):
        evaluation.answer(make_model("llama", 0), Tokenizer(), examples, "magic", 2)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_new_entry_of_the_table_is_a_condition_everywhere(arch, tmp_path, monkeypatch, capsys):
    """The prompt sees only itself, a gist token its prompt and not itself: trained, evaluated,
    compressed, drawn."""
    monkeypatch.setitem(gist_mask.TABLE, "blind", [[1, 0, 0], [1, 0, 0], [0, 1, 1]])
    records = data.builtin(60, 6)
    for split in ("train", "unseen"):
        name = "a_train.json" if split == "train" else f"a_validation_{split}.json"
        data.write_file(tmp_path / name, evaluation.json.dumps(records[split]).encode())
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
    evaluation.run([str(out)], device="cpu")
    evaluation.compress(str(out), instruction="Say a.", input=["b"], device="cpu")
    attention.draw(str(out), "Say a.", str(tmp_path / "a.png"), device="cpu")
    evaluation.plot([str(out)], out=str(tmp_path / "b.png"))
    printed = capsys.readouterr().out
    assert data.read_json(out / "metrics.json")["condition"] == "blind"
    assert "answer  " in printed and (tmp_path / "b.png").stat().st_size > 1000
