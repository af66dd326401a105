"""Training, small: the loop, the optimizers, the files of a run, and what a user can do wrong."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import gist_mask
import train

ROOT = Path(__file__).parent.parent
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "batch_size": 4, "vocab_size": 400}
SMALL = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
SMALL += ["--device", "cpu"]


def command(*args, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def small(folder, **changes):
    """A filled-in configuration of a small model."""
    settings = SIZES | {"data": str(folder), "device": "cpu", "max_steps": 6} | changes
    return train.fill_in(train.Config(**settings))


def losses(out):
    lines = (Path(out) / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gist-2"
    flags = ["--n_gist", 2, "--max_steps", 6, "--save_every", 4, "--eval_every", 4]
    done = command(*SMALL, "--data", folder, "--out_dir", out, *flags)
    assert done.returncode == 0, done.stderr
    return out, done


# ---- A run ----


def test_a_run_leaves_all_its_files_and_a_table(run):
    out, done = run
    names = {"config.json", "model.safetensors", "tokenizer.model", "train_log.jsonl", "loss.png"}
    names |= {"metrics.json", "outputs-unseen.csv", "outputs-human.csv", "checkpoint.pt"}
    assert {f.name for f in out.iterdir()} == names
    assert len(losses(out)) == 6
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["condition"], metrics["n_gist"], metrics["arch"]) == ("gist", 2, "llama")
    assert metrics["steps"] == 6 and metrics["seconds"] > 0
    assert metrics["unseen"]["n"] == 6 and metrics["human"]["n"] == 3 and "seen" not in metrics
    assert "unseen" in done.stdout
    assert "loss=" in done.stderr


def test_validation_losses_in_the_log_are_those_of_the_evaluation(run):
    out, _ = run
    entries = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss_unseen" in entry] == [4, 6]
    metrics = json.loads((out / "metrics.json").read_text())
    for split in ("unseen", "human"):
        assert entries[-1][f"loss_{split}"] == pytest.approx(metrics[split]["loss"], rel=1e-5)
        assert entries[3][f"loss_{split}"] != entries[-1][f"loss_{split}"]
    assert "loss_seen" not in entries[-1]  # there is no such file


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_gist_token_of_a_new_model_starts_as_the_mean_of_the_others(folder, arch):
    model, tokenizer = train.make_model(small(folder, arch=arch), data.builtin(200, 1)["train"])
    for table in filter(None, (model.embedding, model.output)):
        *others, gist = table.weight
        assert tokenizer.gist_id == len(others)
        torch.testing.assert_close(gist, sum(others) / len(others))


def test_config_json_says_how_the_run_was_made(run, folder):
    gisting = data.read_config(run[0])["gisting"]
    assert {field.name for field in fields(train.Config)} <= gisting.keys()
    assert gisting["data"] == str(folder) and gisting["lr"] == 3e-3 and gisting["steps"] == 6


def test_the_same_seed_gives_the_same_weights_from_a_notebook_too(run, folder, tmp_path):
    """And the evaluation runs when nothing of the training is in memory any more."""
    config = train.Config(**SIZES, data=str(folder), n_gist=2, max_steps=6, device="cpu")
    assert train.train(replace(config, out_dir=str(tmp_path / "again")))[-1] is None
    ours, theirs = tmp_path / "again" / "model.safetensors", run[0] / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "again" / "metrics.json").exists()


def test_a_run_cut_short_is_resumed_to_the_same_weights(run, folder, tmp_path, monkeypatch):
    """Stopped after step 5 of 6, one past its checkpoint."""
    config = small(folder, n_gist=2, out_dir=str(tmp_path), save_every=4, eval_every=4)
    calls, accumulate = [], train.accumulate_gradients

    def fail_at_step_6(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return accumulate(*args)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", fail_at_step_6)
        train.train(config)
    assert len(losses(tmp_path)) == 5
    train.train(replace(config, resume=True))
    whole = run[0] / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == whole.read_bytes()
    logs = [(out / "train_log.jsonl").read_text() for out in (tmp_path, run[0])]
    assert logs[0] == logs[1]


def test_a_signal_saves_at_once_and_the_resumed_log_is_that_of_a_whole_run(
    run, folder, tmp_path, monkeypatch
):
    """Stopped in step 5 of 6. The losses of validation, which take long, are not due there."""
    config = small(folder, n_gist=2, out_dir=str(tmp_path), save_every=4, eval_every=4)
    calls, accumulate = [], train.accumulate_gradients

    def stop_in_step_5(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", stop_in_step_5)
        assert train.train(config)[-1] == signal.SIGTERM
    assert (tmp_path / "checkpoint.pt").exists() and len(losses(tmp_path)) == 5
    assert train.train(replace(config, resume=True))[-1] is None
    logs = [(out / "train_log.jsonl").read_text() for out in (tmp_path, run[0])]
    assert logs[0] == logs[1] and logs[0].count("loss_unseen") == 2


def test_the_loop_trains_with_a_loss_of_ones_own_and_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small(folder)
    records = data.load_instructions(str(folder))["train"]
    model, tokenizer = train.make_model(config, records)
    examples, _ = data.make_examples(records, tokenizer, 1)
    before = weights(model).clone()
    seen = []

    def loss(model, batch, condition):
        seen.append((sorted(batch), condition))
        return sum(p.square().sum() for p in model.parameters())

    assert train.fit(model, tokenizer, examples, config, loss) is None
    assert seen == [(["segments", "targets", "tokens"], "gist")] * 6
    assert weights(model).norm() < before.norm() and not any(tmp_path.iterdir())


def test_a_condition_added_to_the_table_is_a_choice_of_the_flag(monkeypatch, capsys):
    monkeypatch.setitem(gist_mask.TABLE, "blind", [[1, 1, 0], [1, 1, 0], [0, 1, 0]])
    monkeypatch.setattr(sys, "argv", ["train.py", "--condition", "blind"])
    assert train.read_flags().condition == "blind"


def test_every_flag_has_an_explanation_and_its_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.read_flags()
    text = capsys.readouterr().out
    for field in fields(train.Config):
        flag = text.split(f"  --{field.name}")[1].split("\n  --")[0]
        if field.type != "bool" and field.default is not None:
            assert f"(default: {field.default})" in " ".join(flag.split())


def test_data_without_validation_files_trains_all_the_same(folder, tmp_path):
    record = (folder / "a_train.json").read_text().splitlines()[0]
    (tmp_path / "train.json").write_text(record)  # one example, too
    out = tmp_path / "run"
    train.train(small(tmp_path, out_dir=str(out), max_steps=1, eval_every=1))
    assert len(losses(out)) == 1


def test_no_steps_leave_a_model_that_can_be_evaluated(folder, tmp_path):
    out = tmp_path / "none"
    train.train(small(folder, out_dir=str(out), max_steps=0))
    evaluation.evaluate_runs([str(out)], device="cpu")
    assert json.loads((out / "metrics.json").read_text())["steps"] == 0


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_model_is_tuned_from_a_checkpoint(arch, folder, tmp_path):
    config = small(folder, arch=arch, out_dir=str(tmp_path / "first"))
    train.train(config)
    tuned = train.Config(data=str(folder), device="cpu", max_steps=2)
    tuned = replace(tuned, init_from=str(tmp_path / "first"), out_dir=str(tmp_path / "second"))
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    train.train(tuned)
    gisting = data.read_config(tmp_path / "second")["gisting"]
    assert (gisting["arch"], gisting["optimizer"], gisting["lr"]) == (arch, "adamw", 2e-5)
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "second" / "model.safetensors").read_bytes() != before


# ---- The optimizers ----


def test_orthogonalize_moves_singular_values_close_to_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 16), (2, 8, 24), (24, 8)):
        x = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(train.orthogonalize(x))
        assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(6, 6), (12, 3), (3, 12)])
def test_muon_moves_weights_by_their_orthogonalized_momentum(shape):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros(shape) for _ in params]
    optimizer = train.Muon(params, {"lr": 0.1, "momentum": 0.9})
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(shape, generator=generator)
            momenta[i] = 0.9 * momenta[i] + p.grad
            update = train.orthogonalize(p.grad + 0.9 * momenta[i])
            expected[i] -= 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * update
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        assert torch.allclose(p, e, atol=1e-5)


def test_muon_makes_its_state_once(monkeypatch):
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    optimizer = train.Muon(params, {"lr": 0.1, "momentum": 0.9})
    made, zeros_like = [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x: made.append(1) or zeros_like(x))
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(4, 4)
        optimizer.step()
    assert len(made) == 3


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_has_one_optimizer_and_muon_has_the_layers_matrices(arch, optimizer, folder):
    config = small(folder, arch=arch, optimizer=optimizer)
    model, _ = train.make_model(config, data.load_instructions(str(folder))["train"])
    optimizers = train.make_optimizers(model, config)
    params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    names = {p: name for name, p in model.named_parameters()}
    assert all(group["betas"] == (0.9, 0.95) for group in optimizers[0].param_groups)
    if optimizer == "muon":
        for group in optimizers[1].param_groups:
            assert all("layers." in names[p] and p.ndim == 2 for p in group["params"])


def test_learning_rates_rise_and_fall_as_the_flags_say():
    def factors(**changes):
        settings = {"max_steps": 100, "warmup": 0.1, "schedule": "constant"}
        config = train.Config(**settings | changes)
        return [train.lr_factor(step, config) for step in range(config.max_steps)]

    up = [(step + 1) / 10 for step in range(10)]
    straight_down = [(90 - i) / 90 for i in range(90)]
    half_a_wave = [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert factors() == pytest.approx(up + [1.0] * 90)
    assert factors(schedule="linear") == pytest.approx(up + straight_down)
    assert factors(schedule="cosine") == pytest.approx(up + half_a_wave)
    assert factors(warmup=0.0, max_steps=1) == [1.0]
    assert all(0 < factor <= 1 for factor in factors(schedule="linear", warmup=1.0))


def test_batches_depend_on_the_step_alone(folder):
    config = small(folder, max_steps=40, batch_size=7)
    examples = [range(n) for n in torch.randint(5, 50, (60,)).tolist()]
    all_of_them = list(train.batches(examples, config, 0))
    assert len(all_of_them) == 40
    for start in (1, 8, 9, 10, 39, 40):
        assert list(train.batches(examples, config, start)) == all_of_them[start:]
    for epoch in range(4):
        rows = all_of_them[9 * epoch : 9 * epoch + 9]
        assert sorted(i for batch in rows for i in batch) == list(range(60))


@pytest.mark.parametrize("name", train.HYPERPARAMETERS)
def test_hyperparameters_are_the_papers_and_the_command_line_overrides_them(name, monkeypatch):
    def flags(*more):
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", name, *more])
        return train.read_flags()

    t5 = (16000, 16, 5e-5, "constant", 128, 256, 384, 384, 128)
    paper = {
        "llama-7b": (3000, 128, 2e-5, "cosine", 512, 256, 768, None, 512, "bfloat16"),
        "flan-t5-xxl": (*t5, "bfloat16"),
        "flan-t5-base": (*t5, "float32"),
    }
    config = flags()
    names = "max_steps batch_size lr schedule max_length max_target max_length_human "
    names += "max_target_human generation_max_length dtype"
    assert tuple(getattr(config, field) for field in names.split()) == paper[name]
    assert config.optimizer == "adamw" and config.weight_decay == 0
    assert config.beta2 == 0.999  # the paper's code sets no betas: AdamW's own
    assert flags("--lr", "1e-4", "--batch_size", "2").lr == 1e-4
    model = torch.nn.Linear(2, 2)
    (adamw,) = train.make_optimizers(model, config)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.999)


# ---- Mistakes, each one line and status 2 ----


@pytest.mark.parametrize(
    "args, says",
    [
        (["--data", "nowhere"], "nowhere: no such data directory"),
        (["--n_gist", "-1"], "--n_gist"),
        (["--max_length", "3", "--out_dir", "x"], "--max_length"),
        (["--d_model", "30"], "--d_model"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cpu:banana"], "cpu:banana"),
        (["--resume", "--out_dir", "x"], "nothing to resume"),
        (["--init_from", "nowhere", "--out_dir", "x"], "nowhere: no"),
        (["--condition", "gist", "--n_gist", "0"], "--n_gist"),
        (["--condition", "neg_control", "--n_gist", "0"], "--n_gist"),
        (["--condition", "tfidf"], "--condition"),
        (["--batch_size", "0"], "--batch_size"),
        (["--beta2", "1"], "--beta2"),
    ]
    + [
        ([f"--{name}", value], f"--{name}")
        for name in ("warmup", "weight_decay", "epochs", "lr", "decay", "grad_clip", "seed")
        for value in ("nan", "inf", "-1", "1e300", "")
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line_and_status_2(args, says, folder, tmp_path, monkeypatch, capsys):
    if "--data" not in args:
        args = [*args, "--data", str(folder)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as stop:
        data.run(train.main)
    assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_evaluation_after_the_training_has_its_device_and_dtype(
    dtype, folder, tmp_path, monkeypatch
):
    flags = [*SMALL, "--data", folder, "--max_steps", 1, "--dtype", dtype]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--out_dir", str(tmp_path)])
    asked = []
    monkeypatch.setattr(os, "execv", lambda program, command: asked.extend(command[2:]))
    train.main()
    assert asked == ["run", str(tmp_path), "--device", "cpu", "--dtype", dtype]


def test_bad_input_shows_no_traceback(folder, tmp_path):
    done = command("--data", "nowhere", "--out_dir", tmp_path / "run")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    done = command(*SMALL, "--data", folder, "--out_dir", tmp_path / "run", RANK="0")
    assert done.returncode == 2 and "RANK" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_a_table_that_hides_something_needs_gist_tokens(condition):
    config = train.Config(condition=condition, n_gist=0, device="cpu")
    if all(min(row) == 1 for row in gist_mask.TABLE[condition]):
        train.fill_in(config)
    else:
        with pytest.raises(data.DataError, match="--n_gist"):
            train.fill_in(config)


@pytest.mark.parametrize("changes", [{"lr": 1e6}, {"lr": 1e5, "weight_decay": 1e6}], ids=str)
def test_a_huge_learning_rate_ends_in_one_line_and_writes_no_weights_that_are_not_finite(
    changes, folder, tmp_path
):
    settings = {"optimizer": "adamw", "warmup": 0.0, "save_every": 1, "max_steps": 200}
    config = small(folder, out_dir=str(tmp_path), **settings | changes)
    with pytest.raises(data.DataError, match="^[^\n]*--lr$"):
        train.train(config)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("what, says", [("loss", "loss is nan"), ("weights", "weights inf")])
def test_what_is_not_finite_stops_the_run_and_is_not_written(
    what, says, folder, tmp_path, monkeypatch
):
    config = small(folder, save_every=2, max_steps=9, out_dir=str(tmp_path))
    calls, accumulate, update = [], train.accumulate_gradients, train.update

    def spoiled_loss(*args):
        calls.append(1)
        return accumulate(*args) * (math.nan if len(calls) > 5 else 1)

    def spoiled_update(optimizers, factor):
        update(optimizers, factor)
        calls.append(1)
        if len(calls) > 5:
            optimizers[0].param_groups[0]["params"][0].data[0] = math.inf

    if what == "loss":
        monkeypatch.setattr(train, "accumulate_gradients", spoiled_loss)
    else:
        monkeypatch.setattr(train, "update", spoiled_update)
    with pytest.raises(data.DataError, match=f"step 6 .*{says}"):
        train.train(config)
    content = data.unpickle(tmp_path / "checkpoint.pt")
    assert content["gisting"]["steps"] == 4
    monkeypatch.undo()
    train.train(replace(config, resume=True))  # what is there is whole
    assert weights(data.load_model(tmp_path)[0]).isfinite().all() and len(losses(tmp_path)) == 9


def test_a_batch_without_labels_has_no_loss_and_no_gradient(folder):
    config = small(folder)
    records = data.load_instructions(str(folder))["train"]
    model, tokenizer = train.make_model(config, records)
    examples, _ = data.make_examples(records[:3], tokenizer, 1)
    for example in examples:
        example.output = []
    assert train.accumulate_gradients(model, examples, tokenizer, config) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- What is in out_dir already ----


def contents(out):
    return {f.relative_to(out): f.read_bytes() for f in Path(out).rglob("*") if f.is_file()}


def test_an_out_dir_with_another_run_is_left_alone(run, folder):
    out, _ = run
    before = contents(out)
    config = small(folder, out_dir=str(out))
    with pytest.raises(data.DataError, match=f"--resume.*delete the folder {out}"):
        train.train(config)
    for other in ("", ".", "../" + out.name):  # other spellings of the same
        for resume in (False, True):
            same = replace(config, init_from=str(out / other), resume=resume)
            with pytest.raises(data.DataError, match="--init_from" if resume else "--out_dir"):
                train.train(same)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "tokenizer.model"])
def test_an_out_dir_with_files_of_others_is_left_alone(name, folder, tmp_path):
    (tmp_path / name).write_bytes(b"years of work")
    for resume in (False, True):
        with pytest.raises(data.DataError, match=str(tmp_path)):
            train.train(small(folder, out_dir=str(tmp_path), resume=resume))
    assert contents(tmp_path) == {Path(name): b"years of work"}


def test_an_empty_out_dir_is_used_behind_a_link_and_as_a_dot(folder, tmp_path, monkeypatch):
    for name in ("linked", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "here")
    for out in (tmp_path / "link", Path(".")):
        train.train(small(folder, out_dir=str(out), max_steps=1))
    assert len(losses(tmp_path / "linked")) == len(losses(tmp_path / "here")) == 1
    assert (tmp_path / "link").is_symlink()


def test_a_run_that_fails_in_its_first_step_does_not_block_the_next_try(folder, tmp_path):
    def broken(model, batch, *rest):
        raise ZeroDivisionError

    config = small(folder, out_dir=str(tmp_path / "run"), max_steps=1)
    with pytest.raises(ZeroDivisionError):
        train.train(config, broken)
    train.train(config)
    assert len(losses(tmp_path / "run")) == 1
