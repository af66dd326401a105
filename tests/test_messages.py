"""What the programs say: in any console, started in any way, about inputs that leave nothing to do."""

import ast
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exercises import gist_library, learning_curve  # isort: skip

ROOT = Path(__file__).parent.parent
EXERCISES = sorted(
    file.stem for file in (ROOT / "tests" / "exercises").glob("*.py") if file.stem != "data"
)


def python(*args, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)


def test_a_console_that_lacks_a_letter_shows_its_number(tmp_path):
    file = tmp_path / "你好.csv"
    file.write_text("x,y_pred,y_true\na,b,c\n")
    done = python("eval.py", "score", file, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert rb"\u4f60\u597d.csv" in done.stdout


@pytest.mark.parametrize("name", ["attention", "count_flops"])
def test_an_exercise_that_is_started_as_a_file_says_how_it_is_started(name):
    done = python(f"tests/exercises/{name}.py")
    command = f"python -m tests.exercises.{name}"
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode().count("\n") == 1 and command in done.stderr.decode()


@pytest.mark.parametrize("name", EXERCISES)
def test_so_do_all_others_as_of_our_files_they_import_data_first(name):
    ours = {file.stem for file in ROOT.glob("*.py")} - {"profile"}  # that's found elsewhere, too
    tree = ast.parse((ROOT / "tests" / "exercises" / f"{name}.py").read_text())
    imported = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module)
    assert [module for module in imported if module in ours][:1] in ([], ["data"])


def test_distillation_has_a_help():
    done = python("-m", "tests.exercises.distillation", "--help")
    assert done.returncode == 0 and b"--teacher" in done.stdout and b"--max_steps" in done.stdout


def test_a_gist_of_an_empty_instruction_is_refused(tmp_path, monkeypatch, capsys):
    from test_compress import make_run

    import data

    run = make_run(tmp_path / "run", "llama", "gist", 1)
    monkeypatch.setattr(sys, "argv", ["x", str(run), str(tmp_path / "g"), "--instruction", ""])
    with pytest.raises(data.DataError, match="--instruction is empty"):
        gist_library.main()


def test_where_no_score_differs_there_is_no_share(tmp_path, monkeypatch, capsys):
    for name in ("gist", "pos_control", "neg_control"):
        (tmp_path / name).mkdir()
        metrics = {"steps": 1, "condition": name, "arch": "llama"}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
        with open(tmp_path / name / "outputs-unseen.csv", "w", newline="") as f:
            csv.writer(f).writerows([("x", "y_pred", "y_true"), ("q", "a", "a"), ("r", "b", "a")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "gist", "pos_control", "neg_control"])
    learning_curve.main()
    printed = capsys.readouterr()
    assert "nan" not in printed.out and "no better than neg_control" in printed.out
