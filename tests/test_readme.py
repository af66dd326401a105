"""The README's commands parse with the flags that there are, and its pictures and files exist."""
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("our_profile", ROOT / "profile.py")
profile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(profile)
PARSERS = {"train.py": train.make_parser, "eval.py": evaluation.make_parser, "profile.py": profile.make_parser}
COMMANDS = sorted({c.strip() for c in re.findall(r"python (?:train|eval|profile)\.py [^`#;&\n]+", README)})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    script, *args = shlex.split(command.removeprefix("python "))
    for name, value in {"$arch": "t5", "$c": "gist", "$n": "2", "$k": "2"}.items():
        args = [a.replace(name, value) for a in args]
    PARSERS[script]().parse_args([a for a in args if a != "..."])


def test_there_are_commands_of_every_script():
    assert {c.split()[1] for c in COMMANDS} == set(PARSERS) and len(COMMANDS) > 15


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [t for t in targets if not t.startswith("http")]
    assert local and all((ROOT / t).exists() for t in local)


def test_the_map_names_every_file():
    assert {name for name in re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE)} == {f.name for f in ROOT.glob("*.py")}


def test_the_masks_tables_are_those_of_the_code():
    import gist_mask
    names = ("prompt", "gist", "input")
    for row, cells in re.findall(r"^\| (prompt|gist|input) \|(.+)\|$", README, re.MULTILINE):
        for condition, cell in zip(gist_mask.CONDITIONS, cells.split("|")):
            seen = set(names) if cell.strip() == "all" else set(cell.strip().split(", "))
            assert seen == {name for name, may in zip(names, gist_mask.TABLE[condition][names.index(row)]) if may}, (row, condition)
