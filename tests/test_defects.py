"""Mistakes that were found by trying to break the program: each test failed once."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

import data
import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
RECORD = {"instruction": "Say a.", "input": "", "output": "a"}


def command(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


def test_a_data_file_belongs_to_one_split_and_may_be_json_lines(tmp_path):
    (tmp_path / "a_train.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "constrained_validation_unseen.json").write_text(json.dumps([RECORD] * 2))
    splits = data.load_instructions(str(tmp_path))
    assert [len(splits[split]) for split in ("train", "seen", "unseen", "human")] == [1, 0, 2, 0]


@pytest.mark.parametrize("condition", ["gist", "neg_control", "tfidf"])
def test_a_condition_without_gist_tokens_is_not_trained_under_another_name(condition, tmp_path):
    done = command("train.py", "--condition", condition, "--n_gist", "0", "--out_dir", tmp_path / "run")
    assert done.returncode == 2 and "--n_gist" in done.stderr.splitlines()[-1] and not (tmp_path / "run").exists()


def test_a_missing_run_is_answered_with_the_command_that_makes_it():
    done = command("eval.py", "run", "out/no-such-run")
    assert done.returncode == 2 and "python train.py" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_a_long_answer_is_read_again(tmp_path):
    evaluation.write_outputs(tmp_path / "long.csv", [("x", "word " * 50_000, "word")])
    assert len(evaluation.read_outputs(str(tmp_path / "long.csv"))[0]["y_pred"]) == 250_000


@pytest.mark.parametrize("name", ["row", "reason", "choice", "swapped", "x"])
def test_a_files_name_never_overwrites_a_verdict(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in (f"{name}.csv", "b.csv"):
        with open(file, "w", newline="") as f:
            csv.writer(f).writerows([("x", "y_pred", "y_true"), ("q", file, "t")])
    done = command(ROOT / "eval.py", "judge", tmp_path / f"{name}.csv", tmp_path / "b.csv", "--base_url", "http://localhost:9", "--model", "m",
                   "--out", tmp_path / "o.json", "--wait", "0.01", "--max_failures", "1")
    assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, ROOT / "eval.py", "judge", f"{name}.csv", "b.csv", "--base_url", "http://localhost:9", "--model", "m",
                           "--out", "o.json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"./{name}.csv" in done.stderr and len(done.stderr.splitlines()) == 1


def test_dollars_stay_dollars_in_pictures(tmp_path):
    figure, ax = evaluation.new_figure(3, 2)
    ax.set_title(evaluation.plain(r"Is $5 more than $3? \frac"))
    evaluation.save_figure(figure, str(tmp_path / "a.png"))
    assert ax.get_title() == r"Is \$5 more than \$3? \frac" and (tmp_path / "a.png").stat().st_size > 500


def test_drawing_the_loss_leaves_no_figure_open(tmp_path):
    (tmp_path / "train_log.jsonl").write_text("\n".join(json.dumps({"step": i, "loss": 1.0}) for i in (1, 2)))
    before = matplotlib.pyplot.get_fignums()
    for _ in range(3):
        train.draw_loss(tmp_path)
    assert matplotlib.pyplot.get_fignums() == before
