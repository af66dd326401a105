"""Mistakes that were found by trying to break the program: each test failed once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import train
from model import Llama, LlamaConfig

ROOT = Path(__file__).parent.parent


def command(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("condition", ["gist", "neg_control"])
def test_a_condition_without_gist_tokens_is_not_trained_under_another_name(condition, tmp_path):
    out_dir = tmp_path / "run"
    config = train.Config(condition=condition, n_gist=0, out_dir=str(out_dir), device="cpu")
    with pytest.raises(data.DataError, match="--n_gist"):
        train.train(config)
    assert not out_dir.exists()


def test_a_long_answer_and_half_a_letter_are_written_and_read_again(tmp_path):
    record = {"instruction": "\ud800", "input": "", "output": "a"}
    evaluation.write_outputs(tmp_path / "long.csv", [record], ["word " * 50_000])
    (row,) = evaluation.read_outputs(str(tmp_path / "long.csv"))
    assert len(row["y_pred"]) == 250_000 and row["x"] == "Instruction: ?"


def test_drawing_the_loss_leaves_no_figure_open(tmp_path):
    from matplotlib import pyplot

    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n' * 2)
    before = pyplot.get_fignums()
    for _ in range(3):
        train.draw_losses([tmp_path], tmp_path / "loss.png")
        evaluation.plot([str(tmp_path)], kind="loss", out=str(tmp_path / "a.png"))
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("name", ["condition", "arch", "optimizer", "schedule", "dtype"])
def test_a_choice_that_there_is_not_is_refused_from_a_notebook_too(name, tmp_path):
    config = train.Config(**{name: "sgd"}, out_dir=str(tmp_path / "run"), device="cpu")
    with pytest.raises(data.DataError, match=f"--{name} sgd: choose from"):
        train.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--warmup"])
def test_a_share_of_the_steps_is_at_most_one(flag, tmp_path):
    done = command("train.py", flag, "500", "--out_dir", tmp_path / "run")
    assert done.returncode == 2 and flag in done.stderr and not (tmp_path / "run").exists()


# ---- What is ours and what is the user's ----


SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "batch_size": 4, "vocab_size": 400}


def small(folder, out_dir, **changes):
    settings = SMALL | {"data": str(folder), "out_dir": str(out_dir), "device": "cpu"}
    return train.Config(**settings | {"max_steps": 6, "save_every": 2} | changes)


def train_to_step(n, config, monkeypatch, number=signal.SIGTERM):
    """A run that is stopped by a signal in step n."""
    calls, accumulate_gradients = [], train.accumulate_gradients

    def stop(*args):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), number)
        return accumulate_gradients(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", stop)
        assert train.train(config)[-1] == number


def test_what_a_user_keeps_beside_the_checkpoint_stays_and_is_not_resumed_from(
    folder, tmp_path, monkeypatch
):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    config = small(folder, out)
    train_to_step(3, config, monkeypatch)
    shutil.copytree(out, elsewhere)
    mine = [out / f"checkpoint-{name}" for name in ("3-keep", "5-backup2", "99", "5.tar.gz", "7")]
    for copy in mine[:3]:
        shutil.copytree(elsewhere, copy)
    mine[3].write_text("an archive")
    mine[4].symlink_to(elsewhere)
    assert train.train(replace(config, resume=True))[-1] is None
    assert all(path.exists() for path in mine) and (elsewhere / "checkpoint.pt").exists()


def test_results_that_are_older_than_the_weights_are_gone_when_a_run_goes_on(
    folder, tmp_path, monkeypatch
):
    config = small(folder, tmp_path)
    train_to_step(3, config, monkeypatch)
    results = [tmp_path / name for name in ("metrics.json", "outputs-unseen.csv")]
    mine = tmp_path / "outputs-unseen-best.csv"
    for file in (*results, mine):
        file.write_text("of step 3")
    train.train(replace(config, resume=True))
    assert not any(file.exists() for file in results) and mine.exists()
    for file in results:
        file.write_text("of step 6")
    train.train(replace(config, resume=True))  # nothing is left to do
    assert all(file.exists() for file in results)


def test_a_run_with_another_loss_is_not_resumed(folder, tmp_path, monkeypatch):
    def other_loss(*args):
        return train.batch_loss(*args)

    config = small(folder, tmp_path, resume=True)
    train_to_step(3, replace(config, resume=False), monkeypatch)
    with pytest.raises(data.DataError, match="loss batch_loss, not other_loss"):
        train.train(config, other_loss)
    assert train.train(config)[-1] is None


def test_a_run_of_other_flags_says_how_to_start_from_its_weights(folder, tmp_path):
    config = small(folder, tmp_path)
    train.train(config)
    with pytest.raises(data.DataError, match=f"max_steps 6, not 8.*--init_from {tmp_path}"):
        train.train(replace(config, resume=True, max_steps=8))


# ---- Signals, threads, frozen weights ----


def test_a_signal_ends_a_validation_between_two_batches(folder, tmp_path, monkeypatch):
    config = small(folder, tmp_path / "stopped", eval_every=3, micro_batch=1)
    train.train(replace(config, out_dir=str(tmp_path / "whole")))
    n_validated, batch_loss = [], train.batch_loss

    def stop_in_validation(*args):
        n_validated.append(1)
        if len(n_validated) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "batch_loss", stop_in_validation)
        assert train.train(config)[-1] == signal.SIGTERM
    assert len(n_validated) == 2  # of nine
    assert data.unpickle(tmp_path / "stopped" / "checkpoint.pt")["gisting"]["steps"] == 3
    assert train.train(replace(config, resume=True))[-1] is None
    stopped, whole = (tmp_path / run / "model.safetensors" for run in ("stopped", "whole"))
    assert stopped.read_bytes() == whole.read_bytes()


def test_training_works_in_a_thread(folder, tmp_path):
    results = []
    config = small(folder, tmp_path / "run")
    thread = threading.Thread(target=lambda: results.append(train.train(config)[-1]))
    thread.start()
    thread.join()
    assert results == [None] and (tmp_path / "run" / "model.safetensors").exists()


def model_and_examples(folder, config):
    records = data.load_instructions(str(folder))["train"]
    model, tokenizer = train.make_model(config, records)
    return model, tokenizer, data.make_examples(records, tokenizer, config.n_gist)[0]


def test_validation_has_no_dropout_and_training_goes_on_with_it(folder, tmp_path):
    config = train.fill_in(small(folder, tmp_path))
    model, tokenizer, examples = model_and_examples(folder, config)

    def drop_out(module, inputs, output):
        return torch.nn.functional.dropout(output, 0.5, module.training)

    model.train()
    plain = train.validation_losses(model, {"unseen": examples}, tokenizer, config)
    model.embedding.register_forward_hook(drop_out)
    losses = train.validation_losses(model, {"unseen": examples}, tokenizer, config)
    assert losses == plain
    train.train_step(model, examples[:4], tokenizer, [], 1, config, train.batch_loss)
    assert model.training and model.embedding.training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("trained", ["embedding", "layers.0.", "wq"])
def test_weights_that_are_frozen_stay_as_they_are(
    trained, optimizer, folder, tmp_path, monkeypatch
):
    def frozen_model(config):
        model, tokenizer, examples = model_and_examples(folder, config)
        for name, p in model.named_parameters():
            p.requires_grad = trained in name
        return model, tokenizer, examples

    config = train.fill_in(small(folder, tmp_path, optimizer=optimizer))
    model, tokenizer, examples = frozen_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(train, "batches", lambda *args, plain=train.batches: islice(plain(*args), 4))
        train.fit(model, tokenizer, examples, config, out_dir=tmp_path)
    (tmp_path / "model.safetensors").unlink()  # as if it had been killed
    model, tokenizer, examples = frozen_model(config)
    train.fit(model, tokenizer, examples, replace(config, resume=True), out_dir=tmp_path)
    whole = frozen_model(config)[0]
    train.fit(whole, tokenizer, examples, config)
    after = dict(data.load_model(tmp_path)[0].named_parameters())
    for name, p in whole.named_parameters():
        assert torch.equal(after[name], p), name
        assert torch.equal(after[name], before[name]) != (trained in name), name


# ---- The picture of the loss ----


def drawn_lines(folder, losses, monkeypatch):
    """The lines that draw_losses makes of a log with these losses."""
    folder.mkdir()
    entries = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(losses, 1)]
    (folder / "train_log.jsonl").write_text("\n".join(entries))
    figures, save_figure = [], data.save_figure
    monkeypatch.setattr(
        data, "save_figure", lambda *args: figures.append(args) or save_figure(*args)
    )
    train.draw_losses([folder], folder / "loss.png")
    (figure, _) = figures[0]
    return figure.axes[0].get_lines()


def test_the_picture_of_a_short_run_has_its_mean_loss(tmp_path, monkeypatch):
    losses = [8.0, 4.0, 3.0, 1.0]
    (mean,) = drawn_lines(tmp_path / "run", losses, monkeypatch)
    assert mean.get_xydata().tolist() == [[1, 8], [2, 6], [3, 5], [4, 4]]


def test_a_folder_may_be_called_what_matplotlib_takes_for_mathematics(tmp_path, monkeypatch):
    assert len(drawn_lines(tmp_path / r"a $\frac$ of it", [1.0, 2.0], monkeypatch)) == 1


def test_an_unfinished_run_of_an_older_version_is_not_begun_once_more(tmp_path):
    (tmp_path / "checkpoint-44").mkdir()
    (tmp_path / train.LOG).write_text("{}\n")
    with pytest.raises(data.DataError, match="older version"):
        train.check_out_dir(tmp_path, resume=True)
    assert (tmp_path / train.LOG).read_text() == "{}\n"


def test_a_model_that_is_frozen_altogether_is_refused_in_one_line():
    model = Llama(LlamaConfig(d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8))
    config = train.fill_in(train.Config(device="cpu"))
    with pytest.raises(data.DataError, match="no weight is to be trained"):
        train.make_optimizers(model.requires_grad_(False), config)


def test_muon_leaves_a_matrix_without_a_gradient_alone():
    model = Llama(LlamaConfig(d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8))
    model.init_weights(torch.Generator().manual_seed(0))
    unused = model.layers[0].attention.wq.weight
    optimizers = train.make_optimizers(model, train.fill_in(train.Config(device="cpu")))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    before, unused.grad = unused.clone(), None
    train.update(optimizers, 1.0)
    assert torch.equal(unused, before)


def test_a_folder_that_begins_with_an_underscore_is_named_in_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "_r1"
    run.mkdir()
    (run / train.LOG).write_text('\ufeff{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.draw_losses(["_r1"], tmp_path / "a.png")  # matplotlib warns of an empty legend
