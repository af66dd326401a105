"""The handout: its checks tell right from wrong, and its files hold holes but no answers."""

import ast
import io
import json
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import redirect_stdout

import pytest

import data
import gist_mask
from tests import grade, handout
from tests.exercises import own_condition
from tests.handout import TASKS

GRADED = grade.load_tasks()

# Wrong answers that students might give: in a function, this code instead of that.
# fmt: off
WRONG = {
    1: [
        ("gist_mask.segments", "gists_so_far == gists_in_row", "gists_so_far > 0"),  # after the first gist token
        ("gist_mask.segments", "torch.where(is_gist, GIST, prompt_or_input)", "prompt_or_input"),  # the last gist token is input
        ("gist_mask.encoder_mask", "mask | itself", "mask"),  # a softmax over nothing
        ("gist_mask.encoder_mask", "sees[query, key]", "sees[key, query]"),
        ("gist_mask.encoder_mask", "sees[query, key]", "sees[query, key].tril()"),  # causal
        ("gist_mask.encoder_mask", "(mask | itself)", "(mask | itself) & (key > 0)"),
        ("gist_mask.decoder_mask", ".tril()", ""),  # sees what is to be predicted
        ("gist_mask.decoder_mask", ".tril()", ".tril(-1)"),  # a token does not see itself
        ("gist_mask.decoder_mask", "condition).tril()", "'gist').tril()"),  # one condition for all
        ("gist_mask.decoder_mask", "return ", "return (segments > 0)[:, None, None] & "),  # a softmax over nothing
        ("gist_mask.decoder_mask", "return ", "return ~((segments == GIST)[:, None, :, None] & (segments == PROMPT)[:, None, None]) & "),  # the gist's own row forgotten
    ],
    2: [
        ("gist_mask.positions", "columns - n_before", "(columns - n_before).clamp(min=0)"),  # nothing is negative
        ("gist_mask.positions", "segments == INPUT", "segments == GIST"),  # from the first gist token
        ("gist_mask.positions", "- n_before", "- n_before + 1"),  # off by one
        ("gist_mask.positions", "before_input.sum", "(segments != INPUT).sum"),  # left padding only
        ("gist_mask.positions", "before_input.sum", "(before_input & (segments > 0)).sum"),  # right padding only
    ],
    3: [
        ("gist_mask.cross_mask", "[INPUT]", "[GIST]"),  # the gist's row
        ("gist_mask.cross_mask", "[INPUT]", "[:, INPUT]"),  # the input's column
        ("gist_mask.cross_mask", "sees[segments]", "(segments >= GIST)"),  # right under `gist` only
    ],
    4: [
        ("data.collate", "(len(source) - 1)", "len(source)"),  # the token itself, not the next
        ("data.collate", "[IGNORE_INDEX] * (len(source) - 1)", "source[1:]"),  # learns the prompt
        ("data.collate", "[INPUT] * len(e.output)", "[0] * len(e.output)"),  # hides the output
        ("data.collate", "pad(targets, IGNORE_INDEX)", "pad(targets, pad_id)"),  # learns padding
        ("data.collate", "pad(rows, pad_id)", "pad(rows, pad_id, side='left')"),
        ("data.collate", "rows.append(source + e.output)", "e.input += e.output; rows.append(e.prompt + e.input)"),
        ("data.collate", 'e.arch == "t5"', "False"),  # as if T5 were a decoder
    ],
    5: [
        ("model.rotate", "x.float().chunk(2, dim=-1)", "(x[..., ::2].float(), x[..., 1::2].float())"),  # neighbors
        ("model.rotate", "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),  # clockwise
        ("model.rotate", ".type_as(x)", ""),
        ("model.Attention.queries_keys_values", "rotate(k, cos, sin)", "k"),
        ("model.Attention.queries_keys_values", "sin), v", "sin), rotate(v, cos, sin)"),
        ("model.Attention.forward", "attn_mask=mask", "is_causal=True"),
        ("model.Attention.forward", "attn_mask=mask", "attn_mask=mask, scale=1.0"),
        ("model.Attention.forward", "unflatten(2, (-1, group)).permute(0, 2, 1, 3, 4)", "unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4)"),  # neighbors share none
        ("model.Attention.forward", "mask.repeat_interleave(group, dim=2)", "mask.repeat(1, 1, group, 1)"),
        ("model.Attention.forward", "end=mask.shape[-1]", "end=x.shape[1]"),  # over what is cached
        ("model.Attention.forward", "self.wo(out.flatten(2))", "self.wo(out.transpose(1, 2).reshape(*x.shape[:2], -1))"),
    ],
    6: [
        ("train.batch_loss", '"sum"', '"mean"'),
        ("train.batch_loss", "logits, labels,", "logits, labels.roll(1),"),
        ("train.batch_loss", ", condition,", ", 'gist',"),  # one condition for all
        ("train.batch_loss", ", target=", ", target=None and "),  # T5 has nothing to read
        ("train.label_logits", 'targets"][', 'tokens"]['),  # the token before
        ("train.label_logits", "**masked", "**masked | {'mask': None}"),  # the prompt is seen
        ("train.label_logits", "logits.float()", "logits"),  # a loss in bfloat16
        ("train.label_logits", "logits.float()", "logits.detach().float()"),  # no gradient
        ("train.label_logits", "!= IGNORE_INDEX", "> 15"),  # an output token lost
        ("train.label_logits", "!= IGNORE_INDEX", "> 0"),  # the token 0 lost
    ],
    7: [
        ("eval.compress_prompts", "[:, 0, 0].any(dim=0)", "[:, 0, 0].all(dim=0)"),  # a ragged START is lost
        ("eval.compress_prompts", '"], keep', '"], None'),  # keeps the whole prompt
        ("eval.compress_prompts", "masking(model, segments, condition", "masking(model, segments"),  # the prompt read under `gist`
        ("eval.compress_prompts", "cross_mask(segments, condition", "cross_mask(segments"),
        ("eval.compress_prompts", "replace(cache, segments=segments[:, keep])", "cache"),  # no labels
        ("eval.compress_prompts", 'masked["mask"]', "None"),  # the prompt sees padding
        ("eval.compress_prompts", "segments[:, keep]", "segments[:, : int(keep.sum())]"),  # labels of the first columns
        ("eval.compress_prompts", "gist_mask.check_cache", "str"),  # nothing is refused
        ("eval.left_padded", 'side="left"', 'side="right"'),  # right padding only
        ("eval.answer", "condition, cache, n_new", "'gist', cache, n_new"),  # one condition for all
        ("eval.answer", "(e.input, e.segments[len(e.prompt) :]", "(e.prompt[-1:] + e.input, e.segments[len(e.prompt) - 1 :]"),  # the gist once more
        ("eval.answer", ".strip()", ""),
        ("eval.answer", "eos_id=tokenizer.eos_id", ""),  # never ends
        ("eval.answer", ", condition, cache,", ", condition,"),  # the mask of a row without a cache
        ("eval.answer", "cache=cache", "cache=None"),  # the gist is not read
    ],
    8: [
        ("eval.lcs_length", "max(above[j + 1], row[j])", "0"),  # side by side: a substring
        ("eval.lcs_length", "above[j] + 1", "row[j] + 1"),  # a word of a for several of b
        ("eval.lcs_length", "max(above[j + 1], row[j])", "row[j]"),  # the last word of a only
        ("eval.rouge", "Counter(a) & Counter(b)", "Counter({*a} & {*b})"),  # each word once
        ("eval.rouge", "both - 2", "both"),  # pairs are fewer than words
        ("eval.rouge", "lcs_length(a, b), both", "lcs_length(a, b), 2 * len(b)"),  # recall
        ("eval.rouge", "stems(", "str.split("),  # words as they are
    ],
    9: [
        ("profile.flops", "2 * new * weights", "new * weights"),  # multiply-adds
        ("profile.flops", "4 * new * keys * h", "4 * new * new * h"),  # the cache is not attended to
        ("profile.flops", "config.n_kv_heads * config.head_dim", "h"),  # as many heads of keys as of queries
        ("profile.flops", "2 * n_logits * d", "2 * new * d"),  # logits of every token
        ("profile.flops", "6 * d * h", "8 * d * h"),  # the source's keys once for every token
        ("profile.flops", "4 * keys * d * h", "4 * new * d * h"),  # the cached ones forgotten
        ("profile.flops", "4 * new * keys * h", "2 * new * keys * h"),  # scores, but no average
        ("profile.flops", "config.n_heads * config.head_dim", "d"),  # as if heads filled the width
        ("profile.flops", "n_decoder_layers *", "n_layers *"),
        ("profile.flops", "if config.gated", "if True"),
        ("profile.flops", "n_logits * (n_logits + keys)", "n_logits * keys"),  # no self-attention
    ],
    10: [
        ("t5.relative_buckets", "right=True", "right=False"),  # < for <=
        ("t5.relative_buckets", "if bidirectional else n_buckets", "if False else n_buckets"),
        ("t5.relative_buckets", "relative_position > 0", "relative_position >= 0"),
        ("t5.relative_buckets", "relative_position > 0", "relative_position < 0"),  # the sign
        ("t5.relative_buckets", " if bidirectional else torch.zeros_like(bucket)", ""),
        ("t5.relative_buckets", "math.ceil", "math.floor"),
    ],
    11: [
        (f"{handout.OWN}.own_table", "[0, 0, 0]", "[1, 1, 0]"),  # is `gist`
        (f"{handout.OWN}.own_table", "[0, 0, 0]", "[1, 1, 1]"),  # is `gist` in a decoder
        (f"{handout.OWN}.own_table", "[0, 1, 1]", "[0, 1]"),
        (f"{handout.OWN}.own_table", "return [", "gist_mask.TABLE['gist'][2][0] = 1\n    return ["),  # is no longer `gist`
        (f"{handout.OWN}.own_prediction", "return (", "return 'It learns.' or ("),  # says nothing
        (f"{handout.OWN}.own_prediction", "gist", "that"),  # compared with nothing
    ],
}
# fmt: on


def put_in(monkeypatch, name: str, source: str) -> None:
    """Replace a function by one of this source."""
    holder, function = grade.find(name)
    module = sys.modules[getattr(holder, "__module__", holder.__name__)]
    namespace = {}
    exec(compile(textwrap.dedent(source), module.__file__, "exec"), vars(module), namespace)
    monkeypatch.setattr(holder, function, namespace[function])


def source_of(name: str, files: dict[str, bytes]) -> str:
    """A function with its decorators, from these files."""
    file, function = handout.file_of(name)
    text = files[file].decode()
    node = handout.find_function(text, function)
    first = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno
    return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])


@pytest.fixture(scope="module")
def project():
    """The project's own files, as a handout without tasks."""
    return handout.make_handout({})


def test_the_projects_own_bodies_pass(project):
    for number in GRADED:
        assert set(grade.grade(number, GRADED).values()) == {""}, number


@pytest.mark.parametrize("number", TASKS)
def test_with_one_tasks_hole_its_checks_fail_and_all_others_pass(number, monkeypatch):
    """Or they say that they need it, if TASKS.md says that they build on it."""
    files = handout.make_handout({number: TASKS[number]})
    for name in TASKS[number].functions:
        put_in(monkeypatch, name, source_of(name, files))
    for other in GRADED:
        says = set(grade.grade(other, GRADED).values())
        if other == number:
            assert says == {"not done yet"}
        elif number in TASKS[other].needs:
            assert says == {"", f"needs task {number}"}
        else:
            assert says == {""}, other


@pytest.mark.parametrize(
    "number, name, right, wrong", [(n, *answer) for n in WRONG for answer in WRONG[n]]
)
def test_a_wrong_answer_fails(number, name, right, wrong, monkeypatch, project):
    source = source_of(name, project)
    assert source.count(right) >= 1, f"the project's {name} has no {right!r}: mend this test"
    put_in(monkeypatch, name, source.replace(right, wrong))
    says = "".join(grade.grade(number, GRADED).values())
    assert says and "not done" not in says and "needs" not in says


def test_a_mask_without_the_tokens_to_be_written_is_named(monkeypatch, project):
    source = source_of("eval.answer", project).replace(", n_new=n_new", "")
    put_in(monkeypatch, "eval.answer", source)
    assert "see `n_new`" in grade.grade(7, GRADED)["check_answers_of_whole_rows"]


def test_every_task_has_at_least_three_wrong_answers():
    assert WRONG.keys() == TASKS.keys() and min(map(len, WRONG.values())) >= 3


def test_an_answer_that_changes_its_arguments_spoils_no_other_check(monkeypatch, project):
    source = source_of("data.collate", project)
    wrong = "for e in examples:\n        e.prompt.append(3)\n        e.output.clear()"
    with monkeypatch.context() as patch:
        put_in(patch, "data.collate", source.replace("for e in examples:", wrong))
        assert "" not in grade.grade(4, GRADED).values()
    for number in (4, 6, 7):
        assert set(grade.grade(number, GRADED).values()) == {""}


def test_a_right_answer_may_be_written_in_another_way(monkeypatch):
    """A student's decoder mask looks up the table itself; the loss has no use for label_logits."""
    put_in(
        monkeypatch,
        "gist_mask.decoder_mask",
        """
        def decoder_mask(segments, condition="gist"):
            T = segments.shape[1]
            allowed = table(condition)[segments.unsqueeze(2), segments.unsqueeze(1)]
            causal = torch.arange(T)[:, None] >= torch.arange(T)
            return (allowed & causal | torch.eye(T).bool()).unsqueeze(1)
        """,
    )
    put_in(
        monkeypatch,
        "train.batch_loss",
        """
        def batch_loss(model, batch, condition):
            targets = batch["targets"]
            arguments = gist_mask.masking(model, batch["segments"], condition, target=targets)
            logits = model(batch["tokens"], **arguments).float().flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
        """,
    )
    for number in (1, 6):
        assert set(grade.grade(number, GRADED).values()) == {""}


# ---- The files of a handout ----


@pytest.fixture(scope="module")
def files():
    return handout.make_handout(TASKS)


def test_two_conversions_give_the_same_bytes(files, tmp_path):
    for dest in (tmp_path / "a", tmp_path / "b"):
        handout.write(handout.make_handout(TASKS), dest)
        written = {f.relative_to(dest).as_posix(): f for f in dest.rglob("*") if f.is_file()}
        assert {name: file.read_bytes() for name, file in written.items()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_signatures_and_docstrings_stay_and_nothing_else_changes(files, project):
    for task in TASKS.values():
        for name in task.functions:
            file, function = handout.file_of(name)
            before = handout.find_function(project[file].decode(), function)
            after = handout.find_function(files[file].decode(), function)
            assert ast.dump(before.args) == ast.dump(after.args)
            if name not in task.docstrings:
                assert ast.get_docstring(before) == ast.get_docstring(after)
            assert len(after.body) == 2 and isinstance(after.body[1], ast.Raise)
    holes = [name for task in TASKS.values() for name in task.functions]
    for file in project:
        if file.endswith(".py") and file in files:
            text = files[file].decode()
            assert text.count("raise NotImplementedError(") - project[file].decode().count(
                "raise NotImplementedError("
            ) == sum(handout.file_of(name)[0] == file for name in holes)


def test_no_answer_is_left_in_any_file(files, project):
    """No statement of a body that is gone, and none of the formulas, wherever they stood."""
    left = {}
    for file, content in files.items():
        if file.endswith(".py"):
            left[file] = handout.statements(ast.parse(content))
    for task in TASKS.values():
        for name in task.functions:
            file, function = handout.file_of(name)
            answer = handout.statements(handout.find_function(project[file].decode(), function))
            for other in left:
                is_read = task is TASKS[5] and other == "t5.py"  # T5's attention, not rotary
                assert is_read or not answer & left[other], (name, other)
    text = "\n".join(files[file].decode() for file in files if file.endswith((".py", ".md")))
    text = text.replace(files["tests/checks.py"].decode(), "")
    for formula in (
        "mask[q, k]",
        "table(condition)[",
        "L[i-1",
        "4d·h",
        "log(max_distance",
        "floor(",
    ):
        assert formula not in text, formula


def test_what_a_row_hides_is_there_to_hide(project):
    for task in TASKS.values():
        for file, part in task.hides:
            assert part in project[file].decode(), f"{file} has no {part!r}: mend TASKS"
        for file in task.leaves_out:
            assert file in project, f"{file} is not there: mend TASKS"


def test_exercises_with_an_answer_are_left_out_and_those_that_import_them(files):
    for name in ("count_flops", "attention", "what_else_to_keep"):
        assert f"tests/exercises/{name}.py" not in files
    only_flops = handout.make_handout({9: TASKS[9]})
    assert "tests/exercises/count_flops.py" not in only_flops
    assert "tests/exercises/attention.py" in only_flops


def test_no_exercise_shows_a_loss_or_how_to_compress(files):
    for name in files:
        if name.startswith("tests/exercises/") and name != "tests/exercises/micro.py":
            text = files[name].decode()
            assert "label_logits" not in text and "compress(tokens" not in text.lower(), name


def test_tasks_md_says_what_to_write_and_to_read(files, project):
    text = files["TASKS.md"].decode()
    headings = [
        line.lstrip("# ")
        for line in project["README.md"].decode().splitlines()
        if line.startswith("## ")
    ]
    for number, task in TASKS.items():
        assert f"## {number}. {task.title}" in text and f"`python -m tests.grade {number}`" in text
        assert f"{task.points} points, about {task.minutes} minutes" in text
        for what in task.read:
            if what.startswith("README"):
                assert what.split('"')[1] in headings, f"README has no section {what}"
        for name in task.functions:
            file, function = handout.file_of(name)
            assert f"`{function}` in {file}" in text
    assert sum(task.points for task in TASKS.values()) == 100
    assert max(map(len, text.splitlines())) <= 110


def test_every_check_belongs_to_one_task_and_every_oracle_to_a_function():
    from tests import checks

    used = Counter(name for task in TASKS.values() for name in task.checks)
    assert set(used.values()) == {1}
    assert set(used) == {name for name in dir(checks) if name.startswith("check_")}
    functions = [name for task in TASKS.values() for name in task.functions]
    assert set(checks.ORACLES) <= set(functions)


# ---- The commands ----


def test_a_condition_of_ones_own_is_trained_beside_gist(monkeypatch, tmp_path, capsys):
    small = data.builtin(200, 6)
    monkeypatch.setattr(data, "builtin", lambda seed: small | {"human": small["human"][:3]})
    monkeypatch.setitem(gist_mask.TABLE, "own", None)  # taken out again after the test
    monkeypatch.setattr(sys, "argv", ["", "--max_steps", "1", "--out", str(tmp_path)])
    own_condition.main()
    assert own_condition.own_prediction() in capsys.readouterr().out
    for condition in ("gist", "own"):
        metrics = json.loads((tmp_path / f"{condition}-1" / "metrics.json").read_text())
        assert metrics["condition"] == condition and metrics["unseen"]["n"] == 6


def run(*command, cwd=handout.ROOT):
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_handout_is_graded_where_it_lies(tmp_path):
    """Empty, then with one task done and one done wrong; the others hide nothing."""
    dest = tmp_path / "handout"
    done = run("tests.handout", str(dest), "--tasks", "8", "2")
    assert done.returncode == 0 and (dest / "TASKS.md").exists(), done.stderr
    rouge = (handout.ROOT / "eval.py").read_text()
    (dest / "eval.py").write_text(rouge)
    source = (dest / "gist_mask.py").read_text()
    hole = 'raise NotImplementedError("task 2: Positions, counted from the input; see TASKS.md")'
    (dest / "gist_mask.py").write_text(source.replace(hole, "return segments[0, 0].no_such_thing"))
    done = run("tests.grade", cwd=dest)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stderr
    assert lines[1][:1] == ["2"] and lines[1][-6:] == "0 of 3 0 of 5".split()
    assert lines[2][:1] == ["8"] and lines[2][-6:] == "4 of 4 10 of 10".split()
    assert "gist_mask.py, line" in done.stdout and "no_such_thing" in done.stdout
    done = run("tests.grade", "8", cwd=dest)
    assert done.returncode == 0 and "10 of 10" in done.stdout


@pytest.mark.parametrize(
    "answer",
    [
        "from tests.checks import slow_positions\n    return slow_positions(segments)",
        "from tests import checks\n    return checks.slow_positions(segments)",
        "import tests.checks as c\n    return c.slow_positions(segments)",
    ],
)
def test_an_oracle_is_no_answer(answer, monkeypatch, tmp_path):
    source = (handout.ROOT / "gist_mask.py").read_text()
    (tmp_path / "gist_mask.py").write_text(source.replace("return columns - n_before", answer))
    monkeypatch.setattr(grade, "ROOT", tmp_path)
    says = grade.grade(2, {2: GRADED[2]})
    assert set(says.values()) == {"gist_mask.py uses tests/checks.py: write an answer of your own"}


@pytest.mark.parametrize("program", ["grade", "handout"])
def test_started_as_a_script_it_says_how_to_start_it(program, tmp_path):
    command = [sys.executable, f"tests/{program}.py", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=handout.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"in the project's folder: python -m tests.{program}" in done.stderr


def test_a_file_that_python_cannot_read_is_named_in_one_line(tmp_path):
    handout.write(handout.make_handout({2: TASKS[2]}), tmp_path / "handout")
    with open(tmp_path / "handout" / "gist_mask.py", "a") as file:
        file.write("def (:\n")
    done = run("tests.grade", cwd=tmp_path / "handout")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gist_mask.py, line ")


@pytest.mark.parametrize(
    "command, says",
    [
        (["tests.handout", "{tmp}/new", "--tasks", "3", "12"], "--tasks 12: there is no such task"),
        (["tests.handout", "{tmp}"], "is there already"),
        (["tests.grade", "12"], "there is no task 12"),
    ],
)
def test_bad_flags_end_with_one_clear_line(command, says, tmp_path):
    done = run(*[part.format(tmp=tmp_path) for part in command])
    assert done.returncode == 2 and done.stdout == "" and not [*tmp_path.iterdir()]
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_the_grading_and_says_where_the_program_was(monkeypatch, capsys):
    put_in(monkeypatch, "eval.lcs_length", "def lcs_length(a, b):\n    raise KeyboardInterrupt")
    monkeypatch.setattr(sys, "argv", ["", "2", "8", "9"])
    with pytest.raises(SystemExit) as exit:
        grade.main()
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 1 and lines[1].endswith("3 of 3    5 of  5")
    assert "0 of 4    0 of 10  stopped in eval.py, line 2: KeyboardInterrupt" in lines[2]
    assert lines[3].split() == "in all 5 of 15".split()


def test_the_table_shows_what_is_missing(monkeypatch):
    outcomes = {1: {"check_a": "", "check_b": "a is to be b"}, 2: {"check_c": "needs task 1"}}
    text = io.StringIO()
    with redirect_stdout(text):
        grade.print_grades(outcomes, GRADED)
    lines = text.getvalue().splitlines()
    assert lines[1].endswith("1 of 2    5 of 11") and lines[2].endswith("0 of  5  needs task 1")
    assert lines[3].split() == "in all 5 of 16".split()
    assert "task 1, check b:\na is to be b" in text.getvalue()
