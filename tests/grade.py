"""Grade the tasks of a handout: run their checks, and print how many pass and the points.

    python -m tests.grade              # all tasks
    python -m tests.grade 3 7          # some

A task's points are shared by its checks. A task that is not done yet hides no other: its functions
are replaced by the oracles of tests/checks.py while others are checked. Where a task builds on
another, as TASKS.md says, the other's functions stay, and it is told which it still needs. Oracles
are no answers: a file that uses tests/checks.py is not graded.

Ctrl-C ends the grading, says where the program was (in a loop without an end?), and prints what was
graded before. The exit status is 0 if all checks pass, 1 if not.
"""

import argparse
import copy
import functools
import importlib
import json
import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A handout's tasks; the project's are in tests/handout.py.
FILE = ROOT / "tests" / "tasks.json"


def load_tasks() -> dict[int, dict]:
    """The tasks by their numbers: dicts with title, functions, needs, checks and points."""
    if FILE.exists():
        return {int(number): task for number, task in json.loads(FILE.read_text()).items()}
    from tests.handout import TASKS, as_json

    return {number: as_json(TASKS[number]) for number in TASKS}


def file_of(name: str) -> tuple[str, str]:
    """The file of a function, and its name there: "model.py" and "Attention.forward".

    name: "model.Attention.forward", or "tests.exercises.own_condition.own_table".
    """
    parts = name.split(".")
    for n in range(1, len(parts)):
        file = "/".join(parts[:n]) + ".py"
        if (ROOT / file).exists():
            return file, ".".join(parts[n:])
    raise ValueError(f"no file has {name}")


def find(name: str):
    """The module or class that holds a function, and the function's name there."""
    file, function = file_of(name)
    holder = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    *classes, function = function.split(".")
    for name in classes:
        holder = getattr(holder, name)
    return holder, function


@contextmanager
def replaced(number, tasks):
    """Watch a task's own functions; replace all others that it does not build on by oracles."""
    from gist_mask import TABLE
    from tests.checks import ORACLES

    own = tasks[number]["functions"]
    needed = [name for n in tasks[number]["needs"] if n in tasks for name in tasks[n]["functions"]]
    functions = {name: ORACLES[name] for name in ORACLES.keys() - {*own, *needed}}
    functions |= {name: watched(getattr(*find(name))) for name in own if hasattr(*find(name))}
    table = copy.deepcopy(TABLE)
    before = []
    for name, function in functions.items():
        holder, attribute = find(name)
        before.append((holder, attribute, getattr(holder, attribute, None)))
        setattr(holder, attribute, function)
    try:
        yield
    finally:
        for holder, attribute, original in before:
            setattr(holder, attribute, original)
        TABLE.clear()
        TABLE.update(table)


def watched(function):
    """The function, which must not change its arguments nor TABLE: others still need them."""
    from gist_mask import TABLE

    @functools.wraps(function)
    def call(*arguments, **options):
        given = [*arguments, *options.values(), TABLE]
        before = [content(argument) for argument in given]
        result = function(*arguments, **options)
        after = [content(argument) for argument in given]
        assert after == before, (
            f"{function.__name__} must not change its arguments nor gist_mask.TABLE: make a copy"
        )
        return result

    return call


def content(argument):
    """A copy of an argument's numbers and texts; None for a model, and for a cache."""
    if hasattr(argument, "tolist"):  # a tensor
        return argument.tolist()
    if type(argument).__name__ == "Example":
        return content(vars(argument))
    if isinstance(argument, dict):
        return {key: content(value) for key, value in argument.items()}
    if isinstance(argument, list):
        return [content(item) for item in argument]
    return argument if isinstance(argument, (int, float, str)) else None


def grade(number: int, tasks: dict[int, dict]) -> dict[str, str]:
    """What every check of a task says: "" if it passes, else what is wrong."""
    from tests import checks

    files = {file_of(name)[0] for name in tasks[number]["functions"]}
    for file in sorted(files):
        if re.search(r"\btests\b.*\bchecks\b", (ROOT / file).read_text(encoding="utf-8")):
            says = f"{file} uses tests/checks.py: write an answer of your own"
            return dict.fromkeys(tasks[number]["checks"], says)
    with replaced(number, tasks):
        return {
            name: outcome(getattr(checks, name), number, files) for name in tasks[number]["checks"]
        }


def outcome(check, number, files):
    try:
        check()
    except NotImplementedError as error:
        hole = re.match(r"task (\d+)", str(error))
        if hole is None:
            return where(error, files)
        return "not done yet" if int(hole[1]) == number else f"needs task {hole[1]}"
    except AssertionError as error:
        return str(error) or where(error, files)
    except Exception as error:
        return where(error, files)
    return ""


def where(error, files=()):
    """An error, and the last line that it came through: of these files, else of the project's."""
    if isinstance(error, SyntaxError):  # knows its own place
        return f"{Path(error.filename).name}, line {error.lineno}: {error.msg}"
    lines = traceback.extract_tb(error.__traceback__)
    ours = [line for line in lines if Path(line.filename).is_relative_to(ROOT)]
    ours = [line for line in ours if "site-packages" not in line.filename]  # a .venv in the folder
    theirs = [line for line in ours if Path(line.filename).relative_to(ROOT).as_posix() in files]
    last = (theirs or ours)[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}"
    return f"{place}: {type(error).__name__}: {error}".removesuffix(": ")


def print_grades(outcomes: dict[int, dict[str, str]], tasks: dict[int, dict]) -> None:
    """A line for every task, their sum, and then what the checks that did not pass say."""
    earned, possible = 0, 0
    print(f"{'task':54}  checks     points")
    for number, says in outcomes.items():
        task = tasks[number]
        passed = list(says.values()).count("")
        points = task["points"] * passed // len(says)
        earned += points
        possible += task["points"]
        grades = f"{passed} of {len(says)}  {points:3} of {task['points']:2}"
        lacking = ", ".join(sorted({text for text in says.values() if is_lacking(text)}))
        print(f"{number:2}  {task['title']:50}  {grades}  {lacking}".rstrip())
    print(f"{'':54}  in all   {earned:3} of {possible}")
    for number, says in outcomes.items():
        for name, text in says.items():
            if text and not is_lacking(text):
                print(f"\ntask {number}, {name.replace('_', ' ')}:\n{text}")


def is_lacking(text):
    """Says an outcome that a function has no body yet, or that it was not graded to the end?"""
    return re.match("not done yet|needs task|stopped in", text) is not None


def main():
    parser = argparse.ArgumentParser(description="Grade the tasks of a handout.")
    parser.add_argument("numbers", nargs="*", type=int, metavar="TASK", help="default: all of them")
    numbers = parser.parse_args().numbers
    tasks = load_tasks()
    import data

    for number in numbers:
        if number not in tasks:
            known = ", ".join(map(str, tasks))
            raise data.DataError(f"there is no task {number}; there are {known}")
    outcomes = {}
    try:
        for number in numbers or tasks:
            outcomes[number] = grade(number, tasks)
    except KeyboardInterrupt as error:
        outcomes[number] = dict.fromkeys(tasks[number]["checks"], f"stopped in {where(error)}")
    print_grades(outcomes, tasks)
    all_pass = all(text == "" for says in outcomes.values() for text in says.values())
    sys.exit(0 if all_pass else 1)


if __name__ == "__main__":
    if not __package__:  # as a script, Python does not find the project's files
        print("start it in the project's folder: python -m tests.grade", file=sys.stderr)
        sys.exit(2)
    try:
        import data
        from tests import checks  # noqa: F401
    except Exception as error:  # in what a student has written
        sys.exit(f"{where(error)}; mend this first: as it is, nothing can be imported and graded")
    data.run(main)
