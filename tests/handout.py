"""Make a course assignment of this project: holes to fill, and checks that grade them.

    python -m tests.handout DEST                    # all tasks
    python -m tests.handout DEST --tasks 1 2 5      # some

DEST is a copy of the project in which the tasks' functions have no body. Signatures and docstrings
stay; formulas that are an answer go, and so do exercises that hold the same code, and the tests,
which compare with such code. DEST/TASKS.md tells students what to write; `python -m tests.grade`
grades it there.

For other tasks, add a row to TASKS and its checks to tests/checks.py. Where a check of another task
calls the functions of yours, it needs an oracle there, too.
"""

import argparse
import ast
import json
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # as a script, Python does not find the project's files
    print("start it in the project's folder: python -m tests.handout DEST", file=sys.stderr)
    sys.exit(2)

import data
from tests.grade import ROOT, file_of


@dataclass
class Task:
    """What to write, and how it is graded."""

    title: str
    functions: list[str]  # module.function or module.Class.function: these lose their bodies
    checks: list[str]  # functions of tests/checks.py, which share the points
    minutes: int
    points: int
    read: list[str]  # before writing
    write: str  # what the docstrings do not say
    needs: list[int] = field(default_factory=list)  # tasks whose functions its checks call
    # What would show the answer: docstrings, and what stands there instead; paragraphs with a text,
    # as (file, text); files.
    docstrings: dict[str, str] = field(default_factory=dict)
    hides: list[tuple[str, str]] = field(default_factory=list)
    leaves_out: list[str] = field(default_factory=list)


OWN = "tests.exercises.own_condition"
TASKS = {
    1: Task(
        "The segments of a row, and the masks",
        functions=["gist_mask.segments", "gist_mask.encoder_mask", "gist_mask.decoder_mask"],
        checks=[
            "check_segments",
            "check_segments_of_a_batch",
            "check_encoder_mask",
            "check_encoder_mask_of_padded_rows",
            "check_decoder_mask",
            "check_decoder_mask_of_padded_rows",
            "check_decoder_mask_of_a_new_condition",
        ],
        minutes=30,
        points=11,
        read=[
            "the paper's section 3 and Figure 2",
            'README, "How the mask works"',
            "the docstring of gist_mask.py, and `TABLE` and `table` in it",
        ],
        write="""
        `segments` finds the three parts of a row by its gist tokens. With `gist_id` 9, the tokens
        3, 4, 9, 9, 5, 6 are prompt, prompt, gist, gist, input, input. Mind rows without a gist
        token, and that the input begins after the *last* one.

        `encoder_mask` says for every pair of a query and a key whether the query may look at the
        key. Look the pair's segments up in `table(condition)`, which has a row and a column for
        each of the five labels; all pairs at once, by indexing with two tensors that broadcast to
        (B, T, T). Then add a dimension for the heads: (B, 1, T, T). Every token sees itself,
        padding too: a row of nothing but False would make the softmax divide zero by zero. T5's
        encoder reads the prompt, the gist and the input at once, so all nine entries of a table
        count.

        `decoder_mask` is the same, but no token sees a later one.
        """,
        hides=[("gist_mask.py", "mask[q, k] = "), ("README.md", "table(condition)[")],
    ),
    2: Task(
        "Positions, counted from the input",
        functions=["gist_mask.positions"],
        checks=[
            "check_positions",
            "check_positions_of_a_prompt_to_cache",
            "check_positions_of_padded_rows",
        ],
        minutes=10,
        points=5,
        read=["the docstring of `positions`"],
        write="""
        The first input token of a row stands at position 0, what is before it at -1, -2, ..., what
        follows at 1, 2, ... Count all columns that stand before the first input token, padding as
        well. A row without an input is a prompt that is going to be cached: its last column is -1.
        There may be gist or prompt tokens after the input, too.
        """,
    ),
    3: Task(
        "The mask of the cross-attention",
        functions=["gist_mask.cross_mask"],
        checks=["check_cross_mask", "check_cross_mask_of_padded_rows"],
        minutes=10,
        points=4,
        read=['README, "How the mask works"', "`table` in gist_mask.py"],
        write="""
        T5's decoder looks at the encoder's output through cross-attention, and may see of it what
        an input token may see. The same mask says which columns a cache keeps of a prompt. Padding
        is never seen, START always (`table` knows both).
        """,
    ),
    4: Task(
        "The targets of a batch",
        functions=["data.collate"],
        checks=[
            "check_collate_for_a_decoder",
            "check_collate_for_an_encoder_decoder",
            "check_collate_keeps_labels",
        ],
        minutes=25,
        points=10,
        read=["the docstring of data.py", "`Example`, `layout` and `pad` in data.py"],
        write="""
        Make three tensors of a list of examples. A decoder reads prompt, input and output as one
        row and predicts the next token, but only the output is to be learned: where a token is read
        after which an output token comes, `targets` has that output token; everywhere else,
        IGNORE_INDEX. So the first label stands at the last token of the input. `tokens` holds the
        whole row; its last token has no label, so all three tensors have one length (micro.py cuts
        the last column instead). The output's tokens belong to the segment INPUT. Rows are filled
        up on the right: tokens with `pad_id`, segments with PADDING, targets with IGNORE_INDEX. For
        T5 (`example.arch`), the output is not in the row, and its own tokens are the targets; the
        model shifts them itself.
        """,
    ),
    5: Task(
        "Attention, with rotary positions and shared heads",
        functions=[
            "model.rotate",
            "model.Attention.queries_keys_values",
            "model.Attention.forward",
        ],
        checks=[
            "check_rotate",
            "check_queries_keys_values",
            "check_attention",
            "check_attention_of_a_mask_for_all_rows",
            "check_attention_after_a_cache",
        ],
        minutes=45,
        points=15,
        read=[
            "the docstring of model.py, `Llama.hidden` and `append` in it",
            "`t5.Attention`, which has neither rotary positions nor shared heads",
            "Su et al. 2021 (arXiv 2104.09864), section 3.2: rotary positions",
            "Ainslie et al. 2023 (arXiv 2305.13245), section 2: grouped queries",
        ],
        write="""
        `rotate`: a head of width K holds K/2 pairs, and pair i is (x[i], x[i + K/2]), not its
        neighbor. Turn each pair by its angle, as a point in the plane, counterclockwise. Compute in
        fp32, and give back x's own dtype.

        `queries_keys_values`: project, cut into heads of width `self.head_dim`, and rotate the
        queries and the keys.

        `forward`: with a cache, `append(past, k, v, end)` writes the new keys and values in front
        of column `end`, which is the number of keys that the mask has, and gives all of them back.
        There may be fewer heads of keys and values than of queries: with 4 and 2, the first two
        query heads use the first. Scores are divided by the square root of K. You may use
        F.scaled_dot_product_attention (its heads come before its tokens).
        """,
        leaves_out=["tests/exercises/attention.py"],
    ),
    6: Task(
        "The loss of a batch",
        functions=["train.batch_loss", "train.label_logits"],
        checks=[
            "check_logits_of_the_labels",
            "check_loss_of_a_batch",
            "check_loss_is_in_fp32",
            "check_loss_can_be_learned_from",
        ],
        minutes=20,
        points=10,
        read=[
            "the paper's section 3",
            "the docstring of train.py",
            "`masking` in gist_mask.py, and `Llama.forward` in model.py",
        ],
        write="""
        `batch_loss` has the model's arguments made by `gist_mask.masking`: the mask of a condition,
        and the positions. It needs the targets, too, which T5 reads. `label_logits` runs the model
        with these arguments; only the places that have a label count, and `where` of the model's
        `forward` keeps it from computing logits that nobody needs. The loss is the cross-entropy of
        the labels in nats, from fp32 logits, and a *sum*: what it is to be divided by is known only
        when all parts of a batch have been counted.
        """,
        # Their losses differ from `batch_loss` by another mask, a cache or another model.
        leaves_out=[
            "tests/exercises/accumulating_gists.py",
            "tests/exercises/cartridge.py",
            "tests/exercises/distillation.py",
            "tests/exercises/several_gists.py",
        ],
    ),
    7: Task(
        "Keep the gist, and answer from it",
        functions=["eval.compress_prompts", "eval.answer", "eval.left_padded"],
        checks=[
            "check_cache_keeps_the_gist",
            "check_cache_keeps_what_the_input_sees",
            "check_cache_is_refused_where_it_would_be_wrong",
            "check_answers_of_whole_rows",
            "check_answers_end",
            "check_answers_from_the_cache",
            "check_three_answers_from_one_gist",
        ],
        minutes=45,
        points=15,
        read=[
            "the paper's section 3 and its section 5",
            "the docstring of eval.py",
            "`masking`, `check_cache` and `cross_mask` in gist_mask.py",
            "`Llama.compress`, `Llama.generate` and `Cache` in model.py; `pad` in data.py",
        ],
        write="""
        `compress_prompts` reads prompts, with their gist tokens, under their mask, and keeps the
        columns of the key-value cache that the input may see: under `gist` the gist's, under
        `pos_control` all, under `neg_control` none. A column stays if the input sees it in any of
        the rows. `model.compress` does the reading: give it the mask and the positions that
        `gist_mask.masking` makes (T5's `cross_mask` is not for the prompt) and, as `keep`, one bool
        for each column. The cache's field `segments` gets the labels of the kept columns, (B, C),
        from which the mask of what follows is made. First refuse what could not be right:
        `gist_mask.check_cache(model, before, after, condition)`, where what follows is INPUT, and
        padding on the right.

        `left_padded` makes tensors of rows and of their labels with `data.pad`, padded on the left
        (labels with PADDING), on the device that it is given: the model's. `answer` gives
        `model.generate` such rows, and the arguments that `gist_mask.masking` makes; its `n_new`
        are the tokens to be written. Without a cache, a row is prompt and input; with one, the
        input alone. An answer ends at `tokenizer.eos_id`. Decode each one and strip it of white
        space. Both ways have to give the same tokens: that is the whole point.
        """,
        leaves_out=["tests/exercises/live_table.py", "tests/exercises/several_gists.py"],
    ),
    8: Task(
        "The longest common subsequence, and ROUGE-L",
        functions=["eval.lcs_length", "eval.rouge"],
        checks=[
            "check_lcs_length",
            "check_lcs_length_of_random_lists",
            "check_rouge",
            "check_rouge_is_symmetric",
        ],
        minutes=30,
        points=10,
        read=[
            "the paper's section 4",
            "the comment under ROUGE in eval.py, `f_measure` and `stems`",
        ],
        write="""
        `lcs_length`: a subsequence of a list is what is left after some items are taken out; the
        items that stay keep their order and need not be neighbors. Of `a x b c` and `a b y c`, the
        longest that both have is `a b c`: 3. Use dynamic programming, in time proportional to
        len(a) * len(b).

        `rouge`: cut both texts into stems; ROUGE-1 and ROUGE-2 count the words and the pairs of
        neighboring words that they share (a word counts as often as both have it), ROUGE-L takes
        their longest common subsequence. All three are the F-measure, under the keys rouge1,
        rouge2, rougeL. A text of n words has n - 1 pairs.
        """,
        docstrings={
            "eval.lcs_length": "The length of the longest common subsequence of two lists of words."
        },
    ),
    9: Task(
        "What a cached gist saves, in FLOPs",
        functions=["profile.flops"],
        checks=[
            "check_flops_of_a_decoder",
            "check_flops_of_one_logit",
            "check_flops_of_an_encoder_decoder",
            "check_flops_are_the_papers",
        ],
        minutes=35,
        points=10,
        read=[
            "the paper's section 5",
            'README, "What it saves"',
            "the docstring of profile.py",
            "what matrices a layer has: `Attention` and `FeedForward` in model.py and t5.py",
        ],
        write="""
        Count the multiply-adds of all matrix products, and take each for 2 FLOPs. A token that
        passes a matrix of m rows and n columns costs m * n of them; a query that attends to a key
        costs 2 K in every head, K for the score and K for the average of the values. Norms, biases,
        softmax and the embedding's lookup count nothing; masked pairs count like all others.

        `new` tokens pass through the layers, and each of them attends to `keys`, those of a cache
        included. So a prompt of p tokens with one gist token and q input tokens costs flops(config,
        p + 1 + q, p + 1 + q), and from the cached gist flops(config, q, 1 + q). The output head is
        for `n_logits` places only. Keys and values may have fewer heads than queries.

        T5: the encoder's layers are like these (its feed-forward has two matrices, or three if it
        is gated). Then the decoder writes n_logits tokens, all at once: they attend to n_logits
        keys of their own and to all `keys` of the source, and have two attentions' wq and wo and
        one attention's wk and wv. The cross-attention's wk and wv are for each of the source's
        keys, cached or not.
        """,
        hides=[("profile.py", "a layer of LLaMA or")],
        leaves_out=["tests/exercises/count_flops.py"],
    ),
    10: Task(
        "T5's buckets of distances",
        functions=["t5.relative_buckets"],
        checks=[
            "check_buckets_of_keys_before_the_query",
            "check_buckets_of_keys_after_the_query",
            "check_buckets_of_any_shape",
        ],
        minutes=25,
        points=5,
        read=["Raffel et al. 2020 (arXiv 1910.10683), section 2.1", "`Stack.bias` in t5.py"],
        write="""
        T5 learns a bias for every bucket of distances between a query and a key. A direction has N
        buckets. The first half are for the distances 0, 1, ..., N/2 - 1, one each. The others are
        wider and wider: each begins at the same multiple of where the one before it begins, so that
        N/2 steps of this size lead from N/2 to `max_distance`; the last one has everything farther.
        With N = 16 and 128 they begin at 8, 12, 16, 23, 32, 46, 64 and 91 (rounded up).

        A decoder has N = n_buckets; keys after the query count as distance 0. An encoder
        (bidirectional) has N = n_buckets / 2 for keys before or at the query, and the next N for
        keys after it.
        """,
        docstrings={
            "t5.relative_buckets": textwrap.dedent("""\
                The bucket of every distance: fine for near keys, coarse for far ones (Raffel, 2.1).

                relative_position: int64 of any shape, the key's position minus the query's. In a
                decoder, later keys count as 0. An encoder (bidirectional) has half of the buckets
                for keys before or at the query, and half for keys after it. Returns int64 in
                [0, n_buckets).""")
        },
    ),
    11: Task(
        "A condition of your own (open-ended)",
        functions=[f"{OWN}.own_table", f"{OWN}.own_prediction"],
        checks=["check_own_table", "check_own_prediction", "check_own_condition_trains"],
        minutes=40,
        points=5,
        read=["`TABLE` in gist_mask.py", "tests/exercises/own_condition.py"],
        write="""
        Who else could see whom? `own_table` is a condition that the paper does not have, three rows
        of three entries; in a decoder it has to differ from all others. `own_prediction` says in
        one sentence what it will score on unseen instructions, in percent or compared with another
        condition, and why. Write it before you train. Then

            python -m tests.exercises.own_condition --max_steps 300

        trains `gist` and yours on the same batches, and prints the scores of both. After so few
        steps even `gist` gets only about one unseen instruction in ten right: compare the losses,
        too. Were you right? If not, what does that say about the model? Hand in one paragraph; only
        the table and the sentence are graded here.
        """,
        needs=[1, 2, 4, 5, 6],
        hides=[("tests/exercises/own_condition.py", "Here, a prompt token sees nothing")],
    ),
}

# What a handout has of the project. It has no tests: many compare with the answers, written down a
# second time, and others would fail until all tasks are done.
COPIED = [
    "*.py",
    "README.md",
    "LICENSE",
    "requirements.txt",
    ".gitignore",
    "assets/*",
    "tests/checks.py",
    "tests/grade.py",
    "tests/exercises/*.py",
]


# ---- Holes ----


def find_function(source: str, name: str) -> ast.FunctionDef:
    """name: a function, or Class.function."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def body_lines(source: str, name: str) -> tuple[int, int]:
    """Where a function's body begins, after its docstring, and ends; lines counted from 0."""
    node = find_function(source, name)
    first = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    return first, node.end_lineno


def code_lines(source: str, name: str) -> int:
    """The lines of a body that are neither empty nor a comment."""
    first, end = body_lines(source, name)
    lines = [line.strip() for line in source.splitlines()[first:end]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def with_hole(source: str, name: str, message: str) -> str:
    """The source with a NotImplementedError instead of a function's body."""
    first, end = body_lines(source, name)
    lines = source.splitlines(keepends=True)
    indent = " " * find_function(source, name).body[0].col_offset
    hole = f"{indent}raise NotImplementedError({json.dumps(message)})\n"
    return "".join([*lines[:first], hole, *lines[end:]])


def with_docstring(source: str, name: str, text: str) -> str:
    """The source with another docstring of a function that has one."""
    old = find_function(source, name).body[0]
    lines = source.splitlines(keepends=True)
    quoted = f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'
    new = textwrap.indent(quoted, " " * old.col_offset) + "\n"
    return "".join([*lines[: old.lineno - 1], new, *lines[old.end_lineno :]])


def without_paragraph(text: str, part: str, note: str) -> str:
    """The text with a note instead of every paragraph that has the part."""
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if part in paragraph:
            indent = paragraph[: len(paragraph) - len(paragraph.lstrip())]
            paragraphs[i] = indent + note
    return "\n\n".join(paragraphs)


def statements(tree: ast.AST) -> set[str]:
    """The longer simple statements of a tree, all written alike."""
    simple = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)
    found = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, simple)]
    return {text for text in found if len(text) >= 50 and not text.startswith(("'", '"'))}


# ---- The handout ----


NOTE = """\
*This is an assignment: begin with TASKS.md. The tests, what makes the results, and exercises that \
would show an answer are not in this copy.*

"""


def as_json(task: Task) -> dict:
    """What tests/grade.py needs to know of a task."""
    known = ("title", "functions", "needs", "checks", "points")
    return {name: getattr(task, name) for name in known}


def make_handout(chosen: dict[int, Task]) -> dict[str, bytes]:
    """The files of a handout: their paths and contents."""
    files = {}
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                files[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    answers = set()
    for number, task in chosen.items():
        for name in task.functions:
            file, function = file_of(name)
            source = files[file].decode()
            answers |= statements(find_function(source, function))
            if name in task.docstrings:
                source = with_docstring(source, function, task.docstrings[name])
            message = f"task {number}: {task.title}; see TASKS.md"
            files[file] = with_hole(source, function, message).encode()
        for file, part in task.hides:
            note = f"(task {number} leaves this out)"
            files[file] = without_paragraph(files[file].decode(), part, note).encode()
    for file in given_away(files, answers, chosen):
        del files[file]
    table = {number: as_json(task) for number, task in chosen.items()}
    files["tests/tasks.json"] = json.dumps(table, indent=1).encode()
    files["TASKS.md"] = tasks_md(chosen).encode()
    files["README.md"] = NOTE.encode() + files["README.md"]
    return dict(sorted(files.items()))


def given_away(files, answers, chosen):
    """The exercises that give an answer away, and those that import one of these."""
    trees = {f: ast.parse(files[f]) for f in files if f.startswith("tests/exercises/")}
    left_out = {file for task in chosen.values() for file in task.leaves_out if file in trees}
    left_out |= {file for file, tree in trees.items() if statements(tree) & answers}
    while more := {f for f, tree in trees.items() if imported(tree) & left_out} - left_out:
        left_out |= more
    return sorted(left_out)


def imported(tree):
    """The exercises that one imports: from tests.exercises import a; from tests.exercises.a ..."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "tests.exercises":
            found |= {f"tests/exercises/{alias.name}.py" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{(node.module or '').replace('.', '/')}.py")
    return found


# ---- TASKS.md ----

INTRODUCTION = """
# The tasks

Gisting teaches a language model to squeeze a prompt into the activations of a few *gist tokens*.
The prompt is read once; the gist's keys and values are kept in a cache, and any number of inputs
are answered from them. All that changes in training is the attention mask: what comes after the
gist cannot see the prompt, so what it needs from the prompt has to go through the gist. The paper
is Mu, Li & Goodman, "Learning to Compress Prompts with Gist Tokens" (NeurIPS 2023), arXiv
2304.08467.

This is a whole project that trains, answers and measures such models, but some functions have
lost their bodies. Where one is missing you find `raise NotImplementedError("task 3: ...")`. Write
what its docstring asks for; everything around it is there. Read the first half of README.md
before you begin.

    pip install -r requirements.txt
    python -m tests.grade              # all tasks: which checks pass, and the points
    python -m tests.grade 3            # task 3 alone, and what is wrong with it

- Signatures stay. Beyond them you are free: helpers, other functions of the project, all of
  PyTorch.
- Letters of the shapes: B batch, T tokens of a row, S keys, H heads, D model width, K head width,
  V vocabulary. Labels of tokens: PADDING 0, PROMPT 1, GIST 2, INPUT 3, START 4.
- Do them in any order. While a task is graded, the functions of the others are replaced by slow
  ones that are right (at the end of tests/checks.py: compare with them, but write your own, without
  a loop over tokens or rows of a tensor; a file that imports them is not graded). Only where a task
  *builds on* another does it use what you wrote.
- A check tells what it expected and what it got. The points of a task are shared by its checks.
- No function may change its arguments. If one never ends, Ctrl-C stops the grading and tells where
  the program was.
- The README's commands work when the functions they need are there: training needs the masks, the
  targets, attention and the loss. The project's own tests are not in this copy.
"""


def tasks_md(chosen: dict[int, Task]) -> str:
    """What the students are given to read."""
    lines = [INTRODUCTION.lstrip(), "| | task | builds on | minutes | lines | points |"]
    lines.append("|---|---|---|---|---|---|")
    for number, task in chosen.items():
        on = builds_on(task, chosen) or "-"
        n = sum(n for _, _, n in to_write(task))
        lines.append(f"| {number} | {task.title} | {on} | {task.minutes} | {n} | {task.points} |")
    minutes = sum(task.minutes for task in chosen.values())
    points = sum(task.points for task in chosen.values())
    lines.append(f"| | together | | {minutes} | | {points} |")
    for number, task in chosen.items():
        lines += ["", *section(number, task, chosen)]
    return "\n".join(lines) + "\n"


def section(number, task, chosen):
    """What TASKS.md says of one task, in lines."""
    on = builds_on(task, chosen)
    effort = f"{task.points} points, about {task.minutes} minutes"
    effort += f", builds on {on}" if on else ""
    lines = [f"## {number}. {task.title}", ""]
    lines += [f"{effort}. Check it with `python -m tests.grade {number}`.", ""]
    for file, function, n in to_write(task):
        lines.append(f"- Write `{function}` in {file} (about {n} {'line' if n == 1 else 'lines'}).")
    lines += [f"- Read {what}." for what in task.read]
    return [*lines, "", textwrap.dedent(task.write).strip()]


def to_write(task):
    """File, name and number of lines of every function that is to be written."""
    places = [file_of(name) for name in task.functions]
    return [(file, name, code_lines((ROOT / file).read_text(), name)) for file, name in places]


def builds_on(task, chosen):
    return ", ".join(str(number) for number in task.needs if number in chosen)


# ---- The command line ----


def choose(numbers: list[int] | None) -> dict[int, Task]:
    """The tasks of these numbers, in their order; None: all. Raises data.DataError."""
    for number in numbers or []:
        if number not in TASKS:
            known = ", ".join(map(str, TASKS))
            raise data.DataError(f"--tasks {number}: there is no such task; choose from {known}")
    return {number: TASKS[number] for number in TASKS if numbers is None or number in numbers}


def write(files: dict[str, bytes], dest: Path) -> None:
    """Write them into a new folder, or nothing. Raises data.DataError if it exists."""
    if dest.exists():
        raise data.DataError(f"{dest}: is there already; name a new folder")
    unfinished = dest.with_name(dest.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for name, content in files.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        unfinished.rename(dest)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="Make a course assignment of this project.")
    parser.add_argument("dest", help="a new folder for it")
    parser.add_argument("--tasks", nargs="+", type=int, metavar="N", help="default: all")
    flags = parser.parse_args()
    chosen = choose(flags.tasks)
    write(make_handout(chosen), Path(flags.dest))
    print(
        f"{flags.dest}: {len(chosen)} tasks, in TASKS.md; grade them there: python -m tests.grade"
    )


if __name__ == "__main__":
    data.run(main)
