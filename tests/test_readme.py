"""The README's commands parse with the flags that there are, and its pictures and files exist."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from make_table import FILE, rows

import data
import gist_mask

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = r"(?:\w+\.py|-m tests\.exercises\.\w+)"
COMMANDS = sorted({c.strip() for c in re.findall(rf"python {SCRIPT} [^`#;&\n]*", README)})
SHELL = {"$arch": "t5", "$c": "gist", "$n": "2", "$k": "2"}  # of the README's loops


def parse(command: str, monkeypatch) -> None:
    """Parse a command as its program does. A flag that there is not ends in SystemExit."""
    words = shlex.split(command)[1:]
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    args = words[2:] if words[0] == "-m" else words[1:]
    for name, value in SHELL.items():
        args = [arg.replace(name, value) for arg in args]
    monkeypatch.setattr(sys, "argv", [module, *[arg for arg in args if arg != "..."]])
    original = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_and_stop(parser):
        original(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    program = importlib.import_module(module)
    with pytest.raises(Parsed):
        if module == "profile":  # once imported, its `main` is the standard module's
            data.make_parser("", program.COMMANDS, {}).parse_args()
        else:
            program.main()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize("script", ["train.py", "eval.py run x", "profile.py run x"])
def test_a_flag_that_there_is_not_is_noticed(script, monkeypatch):
    with pytest.raises(SystemExit):
        parse(f"python {script} --no_such_flag", monkeypatch)


def test_there_are_commands_of_every_script():
    scripts = {command.split()[1] for command in COMMANDS}
    assert {"train.py", "eval.py", "profile.py", "-m"} <= scripts and len(COMMANDS) >= 14


def test_every_exercise_with_a_solution_is_named():
    for file in (ROOT / "tests" / "exercises").glob("*.py"):
        assert file.stem in README


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local and all((ROOT / target).exists() for target in local)


def test_the_map_names_every_file():
    named = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert named == {file.name for file in ROOT.glob("*.py")}


def test_the_masks_tables_are_those_of_the_code():
    names = ("prompt", "gist", "input")
    rows = re.findall(r"^\| (prompt|gist|input) \|(.+)\|$", README, re.MULTILINE)
    assert len(rows) >= 3
    for row, cells in rows:
        for condition, cell in zip(gist_mask.TABLE, cells.split("|"), strict=False):
            seen = set(names) if cell.strip() == "all" else set(cell.strip().split(", "))
            table = gist_mask.TABLE[condition][names.index(row)]
            assert seen == {name for name, may in zip(names, table, strict=True) if may}


def test_results_are_those_of_the_committed_runs():
    results = (ROOT / "assets" / "results.md").read_text()
    for (_, what), row in rows(json.loads(FILE.read_text())).items():
        in_readme = what.strip("`") in gist_mask.TABLE
        assert row in (README if in_readme else results)
