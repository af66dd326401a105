"""The main job end to end, small: train, evaluate, resume, and every mistake that a user can make."""
import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import gist_mask
import train

ROOT = Path(__file__).parent.parent
SMALL = ["--d_model", "16", "--n_layers", "2", "--n_heads", "2", "--batch_size", "4", "--vocab_size", "400", "--device", "cpu"]


def command(script, *args, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set in the Alpaca+ layout, without a seen split."""
    folder = tmp_path_factory.mktemp("data")
    records = data.builtin(60, 6)
    (folder / "a_train.json").write_text("\n".join(json.dumps(r) for r in records["train"]))
    (folder / "a_validation_unseen.json").write_text(json.dumps(records["unseen"]))
    (folder / "a_validation_human.json").write_text(json.dumps(records["human"][:3]))
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gist-2"
    done = command("train.py", *SMALL, "--data", folder, "--out_dir", out, "--n_gist", 2, "--max_steps", 6, "--save_every", 4)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_all_its_files_and_a_table(run):
    out, done = run
    names = {"config.json", "model.safetensors", "tokenizer.model", "train_log.jsonl", "loss.png", "train_state.pt", "metrics.json",
             "outputs-unseen.csv", "outputs-human.csv"}
    assert {f.name for f in out.iterdir()} == names
    assert len((out / "train_log.jsonl").read_text().splitlines()) == 6
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["condition"], metrics["n_gist"], metrics["arch"], metrics["steps"]) == ("gist", 2, "llama", 6)
    assert metrics["unseen"]["n"] == 6 and metrics["human"]["n"] == 3 and "seen" not in metrics
    assert all(0 <= metrics["unseen"][m] <= 1 for m in ("exact_match", "rouge1", "rouge2", "rougeL")) and metrics["unseen"]["loss"] > 0
    assert "exact match" in done.stdout and "unseen" in done.stdout


def test_the_same_seed_gives_the_same_weights(run, folder, tmp_path):
    out, _ = run
    flags = [*SMALL, "--data", folder, "--out_dir", tmp_path / "again", "--n_gist", 2, "--save_every", 4, "--no_eval"]
    assert command("train.py", *flags, "--max_steps", 6).returncode == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_run_cut_short_is_resumed_to_the_same_weights(run, folder, tmp_path, monkeypatch):
    """Stopped after step 5 of 6, one past its checkpoint."""
    out, _ = run
    flags = [*SMALL, "--data", str(folder), "--out_dir", str(tmp_path / "cut"), "--n_gist", "2", "--save_every", "4", "--max_steps", "6", "--no_eval"]
    calls, loss = [], train.batch_loss

    def fail_at_step_6(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(train, "batch_loss", fail_at_step_6)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(KeyboardInterrupt):
        train.main()
    assert len((tmp_path / "cut" / "train_log.jsonl").read_text().splitlines()) == 5
    assert command("train.py", *flags, "--resume").returncode == 0
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    log = lambda folder: [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert log(tmp_path / "cut") == log(out)


def test_outputs_files_hold_the_questions_and_references(run, folder):
    out, _ = run
    with open(out / "outputs-human.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for row, r in zip(rows, data.load_instructions(str(folder))["human"], strict=True):
        assert row["x"] == f"Instruction: {r['instruction']}\nInput: {r['input']}" and row["y_true"] == r["output"]


def test_run_and_score_agree(run, folder):
    out, done = run
    again = command("eval.py", "run", out)
    assert again.returncode == 0 and again.stdout == done.stdout[done.stdout.index(" " * len(str(out))):]
    scored = command("eval.py", "score", out / "outputs-unseen.csv")
    metrics = json.loads((out / "metrics.json").read_text())["unseen"]
    assert f"{100 * metrics['rougeL']:7.3f}" in scored.stdout


@pytest.fixture(scope="module")
def t5_run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "t5-gist-2"
    done = command("train.py", *SMALL, "--arch", "t5", "--data", folder, "--out_dir", out, "--n_gist", 2, "--max_steps", 6)
    assert done.returncode == 0 and "unseen" in done.stdout, done.stderr
    return out, done


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("condition", gist_mask.CONDITIONS)
def test_answers_are_those_of_a_whole_pass_under_the_conditions_mask(arch, condition, folder, request):
    """The evaluation reads each part by itself; the masks are what training saw."""
    out, _ = request.getfixturevalue("run" if arch == "llama" else "t5_run")
    model, tokenizer = data.load_model(out)
    examples, _ = data.make_examples(data.load_instructions(str(folder))["unseen"], tokenizer, 2, arch)
    tokens, valid = data.pad([e.prompt + e.input for e in examples], tokenizer.pad_id)
    masks = [gist_mask.decoder_mask] if arch == "llama" else [gist_mask.encoder_mask, gist_mask.cross_mask]
    masks = [make(tokens, tokenizer.gist_id, condition, valid) for make in masks]
    there = gist_mask.positions(tokens, tokenizer.gist_id)
    expected = model.generate(tokens, valid, *masks, there, max_new_tokens=8, eos_id=tokenizer.eos_id)
    assert evaluation.answer(model, tokenizer, examples, condition, 2, 8) == [tokenizer.decode(ids).strip() for ids in expected]


def test_orthogonalize_moves_singular_values_close_to_one():
    for shape in ((3, 16, 16), (2, 8, 24), (24, 8)):
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert 0.3 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("shape", [(6, 6), (12, 3), (3, 12)])
def test_muon_moves_weights_by_their_orthogonalized_momentum(shape):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    expected, momenta = [w.detach().clone() for w in weights], [torch.zeros(shape) for _ in weights]
    optimizer = train.Muon(weights, lr=0.1, momentum=0.9)
    for _ in range(3):
        for i, w in enumerate(weights):
            w.grad = torch.randn(shape, generator=generator)
            momenta[i] = 0.9 * momenta[i] + w.grad
            expected[i] -= 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * train.orthogonalize(w.grad + 0.9 * momenta[i])
        optimizer.step()
    for w, e in zip(weights, expected):
        assert torch.allclose(w, e, atol=1e-5)


def test_learning_rates_rise_and_fall_as_the_flags_say():
    def factors(**flags):
        args = argparse.Namespace(**dict(max_steps=100, warmup=0.1, schedule="constant", decay=0.5) | flags)
        return [train.lr_factor(step, args) for step in range(args.max_steps)]

    up = [(step + 1) / 10 for step in range(10)]
    assert factors() == pytest.approx(up + [1.0] * 90)
    assert factors(schedule="linear", decay=0.5) == pytest.approx(up + [1.0] * 45 + [(90 - i) / 45 for i in range(45, 90)])
    assert factors(schedule="cosine") == pytest.approx(up + [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)])
    assert factors(warmup=0.0, max_steps=1) == [1.0]


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_evaluation_gives_the_mean_loss_of_a_token_and_the_answers_in_order(arch, folder, request):
    out, _ = request.getfixturevalue("run" if arch == "llama" else "t5_run")
    model, tokenizer, flags = evaluation.open_run(str(out), argparse.Namespace(device="cpu", n_gist=None, base=None))
    examples, _ = data.make_examples(data.load_instructions(str(folder))["unseen"], tokenizer, 2, arch)
    single = [evaluation.evaluate(model, tokenizer, [e], flags, 1, 5, "") for e in examples]
    loss, answers = evaluation.evaluate(model, tokenizer, examples, flags, 4, 5, "")
    labels = [len(e.output) for e in examples]
    assert loss == pytest.approx(sum(one * n for (one, _), n in zip(single, labels)) / sum(labels), rel=1e-5)
    assert answers == [texts[0] for _, texts in single]
    e = examples[0]
    tokens = torch.tensor([e.prompt + e.input + e.output * (arch == "llama")])
    if arch == "llama":
        logits = model(tokens, gist_mask.decoder_mask(tokens, tokenizer.gist_id), gist_mask.positions(tokens, tokenizer.gist_id))[0, -labels[0] - 1:-1]
    else:
        masks = gist_mask.encoder_mask(tokens, tokenizer.gist_id), gist_mask.cross_mask(tokens, tokenizer.gist_id)
        logits = model(tokens, torch.tensor([[model.config.start_id, *e.output[:-1]]]), *masks)[0]
    assert single[0][0] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(e.output)).item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder, tmp_path, monkeypatch, capsys):
    calls, loss = [], train.batch_loss
    monkeypatch.setattr(train, "batch_loss", lambda *args: calls.append(1) or loss(*args) * (float("nan") if len(calls) > 5 else 1))
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--data", str(folder), "--out_dir", str(tmp_path / "nan"), "--save_every", "2"])
    with pytest.raises(SystemExit) as stop:
        data.run(train.main)
    assert stop.value.code == 2 and "at step 6 the loss is nan" in capsys.readouterr().err
    assert torch.load(tmp_path / "nan" / "train_state.pt", weights_only=True)["step"] == 4
    model, _ = data.load_model(tmp_path / "nan")
    assert all(p.isfinite().all() for p in model.parameters())


def test_data_without_validation_files_trains_all_the_same(folder, tmp_path):
    (tmp_path / "train.json").write_text((folder / "a_train.json").read_text().splitlines()[0])
    done = command("train.py", *SMALL, "--data", tmp_path, "--out_dir", tmp_path / "run", "--max_steps", 1)      # one example, too
    assert done.returncode == 0 and "nothing to evaluate" in done.stderr, done.stderr


def test_no_steps_leave_a_model_that_can_be_evaluated(folder, tmp_path):
    done = command("train.py", *SMALL, "--data", folder, "--out_dir", tmp_path / "none", "--max_steps", 0)
    assert done.returncode == 0 and json.loads((tmp_path / "none" / "metrics.json").read_text())["steps"] == 0, done.stderr


@pytest.mark.parametrize("script, args, says", [
    ("train.py", ["--data", "nowhere"], "nowhere: no such data directory"),
    ("train.py", ["--n_gist", "-1"], "--n_gist"),
    ("train.py", ["--max_length", "3", "--out_dir", "x"], "--max_length"),
    ("train.py", ["--d_model", "30"], "--d_model"),
    ("train.py", ["--device", "abacus"], "abacus"),
    ("train.py", ["--resume", "--out_dir", "x"], "nothing to resume"),
    ("train.py", ["--init_from", "nowhere", "--out_dir", "x"], "nowhere: no such directory"),
    ("eval.py", ["run", "nowhere"], "nowhere: no such directory"),
    ("eval.py", ["score", "nowhere.csv"], "nowhere.csv"),
    ("eval.py", ["run", "nowhere", "--batch_size", "0"], "--batch_size must be more than 0"),
    ("eval.py", [], "usage"),
])
def test_bad_input_ends_in_one_line_and_status_2(script, args, says, folder, tmp_path):
    if "--data" not in args and script == "train.py":
        args = [*args, "--data", folder]
    done = command(script, *args, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1 if says != "usage" else 0] and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_an_out_dir_with_another_run_is_left_alone(run, folder, tmp_path):
    out, _ = run
    done = command("train.py", *SMALL, "--data", folder, "--out_dir", out)
    assert done.returncode == 2 and "--resume" in done.stderr and "--overwrite" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "thesis.txt").write_text("years of work")
    done = command("train.py", *SMALL, "--data", folder, "--out_dir", tmp_path, "--overwrite")
    assert done.returncode == 2 and (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("content, says", [("x,y_true\na,b\n", "no column y_pred"), ("x,y_pred,y_true\n", "no rows"), ("", "no column"),
                                           ("x,y_pred,y_true\na,b\n", "too few columns")])
def test_an_outputs_file_of_another_shape_is_refused(tmp_path, content, says):
    (tmp_path / "o.csv").write_text(content)
    done = command("eval.py", "score", tmp_path / "o.csv")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
