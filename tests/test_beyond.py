"""Beyond the paper: several gists in one context, worked examples in the prompt, gist pretraining."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import eval
import gist_mask
import train
from model import Cache, Llama, LlamaConfig
from t5 import T5, T5Config

G = 9                # the gist's id in rows made by hand


@pytest.fixture(scope="module")
def records():
    return data.builtin(80, 60, per_step=True)


@pytest.fixture(scope="module")
def tokenizer(records):
    return data.train_tokenizer(records["train"], 400)


def small(arch, vocab_size):
    shape = dict(vocab_size=vocab_size, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=64)
    model = Llama(LlamaConfig(**shape, n_kv_heads=1)) if arch == "llama" else T5(T5Config(**shape, n_decoder_layers=2, start_id=0))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


# ---- Several gists ----

def random_row(rng):
    """A row of one to three prompts with gist tokens, then an input; and for every token its segment, its pair, and its position."""
    tokens, labels, n_gist, n_pairs = [], [], rng.randint(1, 3), rng.randint(1, 3)
    for pair in range(n_pairs):
        p = rng.randint(0 if pair == 0 else 1, 4)
        tokens += [rng.randrange(G) for _ in range(p)] + [G] * n_gist
        labels += [("prompt", pair, pair * n_gist - p + i) for i in range(p)] + [("gist", pair, pair * n_gist + i) for i in range(n_gist)]
    q = rng.randint(0, 3)
    return tokens + [rng.randrange(G) for _ in range(q)], labels + [("input", None, n_pairs * n_gist + i) for i in range(q)]


@pytest.mark.parametrize("seed", range(30))
def test_masks_and_positions_of_several_pairs_are_those_of_the_rule(seed):
    tokens, labels = random_row(random.Random(seed))
    row = torch.tensor([tokens])
    assert gist_mask.positions(row, G)[0].tolist() == [position for _, _, position in labels]
    masks = {condition: gist_mask.encoder_mask(row, G, condition)[0, 0] for condition in gist_mask.CONDITIONS}
    for q, (query, query_pair, _) in enumerate(labels):
        for k, (key, key_pair, _) in enumerate(labels):
            if query == "input":
                sees = {"gist": key != "prompt", "neg_control": key == "input"}
            else:
                sees = dict.fromkeys(("gist", "neg_control"), key_pair == query_pair and key != "input")
            assert {c: masks[c][q, k].item() for c in masks} == sees | {"pos_control": True}


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("n_gist", [1, 3])
def test_prompts_compressed_apart_answer_as_under_the_mask(arch, n_gist, records, tokenizer):
    """Rows of one and of two prompts in one batch; every logit of the input from the joined caches is that of the whole row."""
    model = small(arch, tokenizer.vocab_size)
    some = sorted(records["train"], key=lambda r: -len(r["steps"]))[:4] + records["unseen"][:3]
    examples, _ = data.make_examples(some, tokenizer, n_gist, arch)
    assert {len(e.record["steps"]) for e in examples} == {1, 2}
    answers = eval.answer(model, tokenizer, examples, "gist", n_gist, 6)
    for e, text in zip(examples, answers):
        row = torch.tensor([e.prompt + e.input])
        positions, n = gist_mask.positions(row, tokenizer.gist_id), len(e.input)
        cache = eval.compress_apart(model, e.prompt, tokenizer.gist_id, n_gist)
        assert cache.length == n_gist * len(e.record["steps"])
        given = torch.tensor([e.input])
        if arch == "llama":
            mask = gist_mask.decoder_mask(row, tokenizer.gist_id)
            whole, cached = model(row, mask, positions)[:, -n:], model(given, cache=cache.with_room(n))
            expected = model.generate(row, mask=mask, positions=positions, max_new_tokens=6, eos_id=tokenizer.eos_id)
        else:
            masks = gist_mask.encoder_mask(row, tokenizer.gist_id), gist_mask.cross_mask(row, tokenizer.gist_id)
            target = torch.tensor([[0, *e.output]])
            whole, cached = model(row, target, *masks, positions=positions), model(given, target, cache=cache)
            expected = model.generate(row, None, *masks, positions, max_new_tokens=6, eos_id=tokenizer.eos_id)
        assert (whole - cached).abs().max() < 1e-4
        assert text == tokenizer.decode(expected[0]).strip()


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_training_sees_the_pairs_as_they_are_answered(arch, records, tokenizer):
    """The loss of a batch of rows with one and two prompts is that of the rows alone, from their joined caches."""
    model = small(arch, tokenizer.vocab_size)
    examples, _ = data.make_examples(sorted(records["train"], key=lambda r: len(r["steps"]))[-3:] + records["train"][:2], tokenizer, 2, arch)
    batch = data.collate(examples, tokenizer.pad_id, arch)
    loss = train.batch_loss(model, batch, tokenizer.gist_id, "gist")
    alone = 0.0
    for e in examples:
        cache = eval.compress_apart(model, e.prompt, tokenizer.gist_id, 2)
        if arch == "llama":
            given = torch.tensor([e.input + e.output[:-1]])
            logits = model(given, cache=cache.with_room(given.shape[1]))[0, -len(e.output):]
        else:
            logits = model(torch.tensor([e.input]), torch.tensor([[0, *e.output[:-1]]]), cache=cache)[0]
        alone += torch.nn.functional.cross_entropy(logits, torch.tensor(e.output), reduction="sum")
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_joined_caches_keep_their_order(tokenizer):
    model = small("llama", tokenizer.vocab_size)
    a, b = (model.compress(torch.tensor([[5, word, tokenizer.gist_id]]), tokenizer.gist_id, first=i) for i, word in enumerate((6, 7)))
    both = Cache.join([a, b])
    assert both.positions.tolist() == [[0, 1]] and both.next_position().item() == 2
    assert torch.equal(both.keys[:, :, :, :1], a.keys) and torch.equal(both.values[:, :, :, 1:], b.values)


def test_steps_of_the_built_in_instructions_leave_the_data_as_it_was():
    plain, steps = data.builtin(300, 20), data.builtin(300, 20, per_step=True)
    for split in ("train", "seen", "unseen"):
        assert plain[split] == [{key: value for key, value in r.items() if key != "steps"} for r in steps[split]]
    two = [r for r in steps["train"] if r["source"] == "two steps"]
    assert two and all(len(r["steps"]) == 2 and ", then " in r["instruction"] for r in two)


# ---- Worked examples ----

@pytest.mark.parametrize("n_shots", [1, 3])
def test_worked_examples_obey_the_instruction_and_stand_in_the_prompt(n_shots, tokenizer):
    for record in data.builtin(50, 5, n_shots=n_shots)["train"]:
        assert len(record["shots"]) == n_shots
        if record["source"] == "reverse":
            assert all(answer.split() == given.split()[::-1] for given, answer in record["shots"])
        prompt = tokenizer.decode(data.layout(record, tokenizer, 1).prompt)
        assert all(f"Input: {given}\nOutput: {answer}" in prompt for given, answer in record["shots"])


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_shots_compares_runs_and_draws_a_picture(arch, tokenizer, tmp_path):
    for n_shots in (4, 0):
        out, run = tmp_path / f"shots-{n_shots}", {"condition": "gist", "n_gist": 2, "arch": arch}
        data.save_model(out, small(arch, tokenizer.vocab_size), tokenizer, run | {"data": "builtin", "n_shots": n_shots, "max_length": 512})
        (out / "metrics.json").write_text(json.dumps({**run, "unseen": {"exact_match": 0.75 - n_shots / 10}}))
    command = [sys.executable, Path(data.__file__).with_name("profile.py"), "shots", *sorted(tmp_path.iterdir()), "--repeats", "1", "--batch_size", "9"]
    done = subprocess.run([*command, "--out", tmp_path / "shots.png"], capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:3]]
    assert [(row[0], row[2]) for row in rows] == [("0", "75.0"), ("4", "35.0")], done.stderr
    for n_shots, row in zip((0, 4), rows):
        lengths = [len(data.layout(r, tokenizer, 0, arch).prompt) for r in data.builtin(1000, 9, n_shots=n_shots)["unseen"]]
        assert float(row[1]) == pytest.approx(sum(lengths) / 9, abs=0.06)
    assert (tmp_path / "shots.png").stat().st_size > 5000
    (tmp_path / "shots-0" / "metrics.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "shots-0/metrics.json: no such file" in done.stderr and len(done.stderr.splitlines()) == 1


# ---- Gist pretraining ----

@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_pretraining_cuts_running_text_into_span_and_continuation(arch, tokenizer, tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(200))
    middle = text.index("line 90")
    (tmp_path / "a.txt").write_text(text[:middle])
    (tmp_path / "b.txt").write_text(text[middle:])
    running = [i for line in text.splitlines() for i in tokenizer.encode(line)]
    joined = " ".join(map(str, running * 3))
    examples = data.text_examples(str(tmp_path), tokenizer, 2, arch, 300)
    assert len(examples) == 300 and len({len(e.prompt) for e in examples}) > 30
    for e in examples:
        span = [i for i in e.prompt if i not in (tokenizer.bos_id, tokenizer.gist_id)]
        assert 4 <= len(span) <= 64 and len(e.output) == 32 and e.prompt[-2:] == [tokenizer.gist_id] * 2
        assert " ".join(map(str, span + e.output)) in joined


@pytest.mark.parametrize("content", [None, "", "too short"])
def test_too_little_text_is_told(content, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(data.DataError, match="text|read"):
        data.text_examples(str(tmp_path / "a.txt"), tokenizer, 1, "llama", 10)
