"""Mistakes that were found by trying to break the program: each test failed once."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
import eval as evaluation
import train

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


@pytest.mark.parametrize("name", ["row", "reason", "choice", "swapped", "x", "a", "b", "results"])
def test_a_files_name_never_overwrites_a_verdict(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in (f"{name}.csv", "other.csv"):
        with open(file, "w", newline="") as f:
            csv.writer(f).writerows([("x", "y_pred", "y_true"), ("q", file, "t")])

    def ask_for_verdict(url, model, timeout, pair):
        return pair | {"swapped": False, "choice": "b", "reason": "better"}

    monkeypatch.setattr(evaluation, "ask_for_verdict", ask_for_verdict)
    flags = dict(base_url="http://localhost:9", model="m", out="o.json")
    evaluation.judge(f"{name}.csv", "other.csv", **flags)
    (verdict,) = json.loads(Path("o.json").read_text())["results"]
    assert (verdict["row"], verdict["x"], verdict["choice"]) == (0, "q", "b")
    assert (verdict["a"], verdict["b"]) == (f"{name}.csv", "other.csv")


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
