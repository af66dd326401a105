"""Everything that comes from disk, and back to it: instructions, tokenizers, weights.

Text becomes token ids here, with the gist tokens between prompt and input. The three parts are tokenized separately and
joined as ids, so that the prompt's tokens never depend on the input:

    LLaMA   <s> "Instruction: {instruction}" <G>...<G> "Input: {input}\\nOutput:" "{output}" </s>
    T5      source: "Instruction: {instruction}" <G>...<G> "Input: {input}" </s>      target: "{output}" </s>

An example without an input has just "Output:" (T5: nothing) after the gist. With LLaMA's tokenizer this gives the paper's own
token counts.
"""
import base64
import ctypes
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import random
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import sentencepiece
import tiktoken
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import IGNORE, Cache, Llama, LlamaConfig, rope_frequencies
from t5 import T5, T5Config

SPLITS = ("seen", "unseen", "human")       # the paper's three validation splits


class DataError(Exception):
    """Bad input from outside, told in one line: what is wrong, in which file, what to do."""


# ---- Instructions ----

def load_instructions(path: str, seed: int = 0, n_shots: int = 0, per_step: bool = False) -> dict[str, list[dict]]:
    """Read a data set: {"train": [...], "seen": [...], "unseen": [...], "human": [...]}.

    path: "builtin", or a directory in the Alpaca+ layout: `*train*.json` and any of `*validation_seen*.json`,
    `*validation_unseen*.json`, `*validation_human*.json` (or .jsonl), each a JSON array or JSON lines. A record is a dict with the strings
    `instruction`, `input` ("" if it needs none) and `output`. A split without a file is []. n_shots and per_step: see `builtin`,
    which alone has them. Raises DataError.
    """
    if path == "builtin":
        return builtin(seed=seed, n_shots=n_shots, per_step=per_step)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path}: no such data directory; give one in the Alpaca+ layout, or --data builtin")
    data: dict[str, list[dict]] = {split: [] for split in ("train", *SPLITS)}
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jsonl")):
        split = split_of(file.name)
        if split is not None:
            data[split] += read_records(file)
    if not data["train"]:
        raise DataError(f"{path}: no training examples; expected a file *train*.json or *train*.jsonl with at least one record")
    return data


def split_of(name: str) -> str | None:
    """The one split that a file belongs to; a validation file is never trained on, whatever else its name says."""
    for split in SPLITS:
        if f"validation_{split}" in name:
            return split
    return "train" if "train" in name and "validation" not in name else None


def read_records(file: Path) -> list[dict]:
    """The records of one JSON array or JSON lines file; JSON lines are read one by one, so a large file is never in memory as text.

    Bad records are left out and told on standard error. Raises DataError if they are more than 1 %, naming the first ones.
    """
    records, bad = [], []
    try:
        for place, record in parse_records(file):
            if problem := what_is_wrong(record):
                bad.append(f"{place}: {problem}")
            else:
                records.append({key: record.get(key, "") for key in ("instruction", "input", "output")})
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({one_line(error)})") from None
    if bad:
        told = f"{file}, {'; '.join(bad[:3])}{f'; and {len(bad) - 3} more' if len(bad) > 3 else ''}"
        if 100 * len(bad) > len(bad) + len(records):
            raise DataError(f"{told}: bad records: {len(bad)} of {len(bad) + len(records)}, and more than 1 % are refused; mend them")
        print(f"{told}: left out", file=sys.stderr)
    return records


def parse_records(file: Path) -> Iterable[tuple[str, object]]:
    """Every record and its place in the file; a ValueError stands for one that cannot be parsed."""
    with open(file, "rb") as f:
        start = f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        f.seek(0)
        if start != b"[":
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"line {number}", parse_json(line)
            return
        records = parse_json(f.read())
    if isinstance(records, json.JSONDecodeError):
        yield f"line {records.lineno}", records
    elif isinstance(records, ValueError):
        yield "record 1", records
    else:
        yield from ((f"record {i}", record) for i, record in enumerate(records, 1))


def parse_json(text: bytes) -> object:
    try:
        return json.loads(text.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return error if isinstance(error, ValueError) else ValueError("nested too deeply")


def what_is_wrong(record: object) -> str:
    """What keeps this from being a record; "" if nothing does."""
    if isinstance(record, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(record, ValueError):
        return f"broken JSON ({getattr(record, 'msg', record)})"
    if not isinstance(record, dict):
        return "not an object with instruction, input and output"
    wrong = [key for key in ("instruction", "input", "output") if not isinstance(record.get(key, "" if key == "input" else None), str)]
    return f"'{wrong[0]}' is missing or not a string" if wrong else ""


# ---- The built-in instructions ----
#
# A model trained from scratch cannot learn the world in minutes, so these ask for what it can learn and still needs the
# instruction for: what to do with a short list of everyday words. Slots of a template: {a} {b} {c} words, {n} two or three,
# {nth} first, second or third, {list} a name for the list. A function maps the list w and the slots' values to the answer's words.

WORDS = """
apple bag ball band basket bath beach bean bear bed bell belt bench bike bird boat bone book boot bottle bowl box branch
bread bridge brush bus butter button cake camel camp candle cap car card carpet cart castle cat chain cheese cherry
circle clock cloth cloud coat coin cow crow crown cup desk dog doll donkey door dress drum duck eagle farm field fire
fish flag flower flute fork fox frog fruit garden gate ghost glass goat gold goose hammer hat honey horn horse house
island jacket jar juice key king kite kitten knife lake lamp leaf lemon letter lion lock map mask milk mirror moon mouse
nail net paint paper pear pen pencil piano pig pipe plane pond queen rabbit rain ring river road robot rose salt sand
school sheep ship shirt shoe snake snow sock spoon star stone stool storm sugar sun table tent tiger tower train tree
truck watch water wheel window wolf
""".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()
ORDINALS = "first second third".split()
LISTS = ("the list", "this list", "the list of words", "the list below")
STEPS = ("reverse", "first to end", "drop first", "drop last", "prepend", "append")    # of a two-step instruction


@dataclass
class Family:
    """One kind of instruction: what it does to a list of words, and ways to ask for it."""
    apply: Callable                 # (w, a, b, c, n) -> list of words; n is the value of {n}, or the index of {nth}
    templates: tuple[str, ...]
    compares: bool = False          # does it look for an argument in the input?


def _family(apply, *templates, compares=False) -> Family:
    return Family(apply, templates, compares)


def _join(w: list[str], glue: str) -> list[str]:
    return [x for word in w for x in (word, glue)][:-1]


def _word_after(w: list[str], a: str) -> list[str]:
    after = w[w.index(a) + 1:] if a in w else []
    return after[:1] or ["nothing"]


@dataclass
class Task:
    """One instruction: its text, its family, what it does to a list of words, the word that it looks for, if any, how many it names,
    and the texts of its steps."""
    text: str
    family: str
    solve: Callable[[list[str]], list[str]]
    looks_for: str | None
    n_words: int
    steps: list[str]


FAMILIES = {
    # the order of the list
    "reverse": _family(lambda w, a, b, c, n: w[::-1], "Reverse {list}.", "Write {list} in reverse order.",
        "Turn the order of {list} around.", "Say {list} backwards."),
    "first to end": _family(lambda w, a, b, c, n: w[1:] + w[:1], "Move the first word of {list} to its end.", "Put the first word of {list} last.",
        "Take the first word of {list} and write it after all others.", "Say {list} with its first word at the end."),
    "swap ends": _family(lambda w, a, b, c, n: w[-1:] + w[1:-1] + w[:1], "Swap the first and the last word of {list}.", "Exchange the two ends of {list}.",
        "Let the first and the last word of {list} trade places.", "Write {list} with its first and last word exchanged."),
    # parts of it
    "keep first": _family(lambda w, a, b, c, n: w[:n], "Write only the first {n} words of {list}.", "Keep the first {n} words of {list}.",
        "Give just the first {n} words of {list}.", "Copy {list} but stop after {n} words."),
    "keep last": _family(lambda w, a, b, c, n: w[-n:], "Write only the last {n} words of {list}.", "Keep the last {n} words of {list}.",
        "Give just the last {n} words of {list}.", "Which {n} words are at the end of {list}?"),
    "drop first": _family(lambda w, a, b, c, n: w[1:], "Drop the first word of {list}.", "Leave out the first word of {list}.",
        "Write {list} without its first word.", "Skip the first word of {list} and write the others."),
    "drop last": _family(lambda w, a, b, c, n: w[:-1], "Drop the last word of {list}.", "Leave out the last word of {list}.",
        "Write {list} without its last word.", "Write {list} but stop before its last word."),
    "nth": _family(lambda w, a, b, c, n: [w[n]], "Write only the {nth} word of {list}.", "Say the {nth} word of {list}.",
        "What is the {nth} word of {list}?", "Pick the {nth} word of {list} and nothing else."),
    # repeating and counting
    "double": _family(lambda w, a, b, c, n: [x for word in w for x in (word, word)], "Write every word of {list} twice.", "Double each word of {list}.",
        "Say each word of {list} two times in a row.", "Repeat every word of {list} right after itself."),
    "repeat nth": _family(lambda w, a, b, c, n: w[:n + 1] + w[n:], "Write {list} with its {nth} word twice.", "Double only the {nth} word of {list}.",
        "Copy {list} but say its {nth} word two times.", "Repeat the {nth} word of {list} and keep the rest."),
    "count": _family(lambda w, a, b, c, n: [NUMBERS[len(w)]], "Count the words of {list}.", "How many words are there in {list}?",
        "Say how long {list} is.", "Give the number of words in {list}."),
    # a word to insert
    "prepend": _family(lambda w, a, b, c, n: [a] + w, "Put {a} at the front.", "Start the list with {a}.", "Add {a} before the first word.",
                       "Write {a}, then the list.", "Let {a} be the new first word."),
    "append": _family(lambda w, a, b, c, n: w + [a], "Put {a} at the end.", "End the list with {a}.", "Add {a} after the last word.",
                      "Write the list, then {a}.", "Let {a} be the new last word."),
    "surround": _family(lambda w, a, b, c, n: [a] + w + [b], "Put {a} at the front and {b} at the end.", "Start with {a} and end with {b}.",
                        "Write {a}, then the list, then {b}.", "Add {a} before the first word and {b} after the last."),
    "insert after nth": _family(lambda w, a, b, c, n: w[:n + 1] + [a] + w[n + 1:], "Insert {a} after the {nth} word.",
                                "Add {a} right behind the {nth} word.", "Write {a} once the {nth} word is written, then the rest.",
                                "Place {a} so that it follows the {nth} word."),
    "set nth": _family(lambda w, a, b, c, n: w[:n] + [a] + w[n + 1:], "Write {a} in place of the {nth} word.", "Change the {nth} word to {a}.",
                       "Let {a} take the place of the {nth} word.", "Make the {nth} word {a} and keep the rest."),
    "join": _family(lambda w, a, b, c, n: _join(w, a), "Write {a} between the words.", "Join the words with {a}.",
                    "Put {a} between each word and the next.", "Let a {a} stand between any two words."),
    "before each": _family(lambda w, a, b, c, n: [x for word in w for x in (a, word)], "Write {a} before every word.", "Put {a} in front of each word.",
                           "Let every word follow a {a}.", "Say {a} each time before you say a word."),
    "instead": _family(lambda w, a, b, c, n: [a, b], "Ignore the list and say {a} {b}.", "Do not read the list, just write {a} and {b}.",
                       "Forget the words and answer with {a} {b}.", "Say {a}, then {b}, and nothing of the list."),
    "say for each": _family(lambda w, a, b, c, n: [a] * len(w), "Write {a} once for every word.", "Say {a} in place of each word.",
                            "Turn every word into {a}.", "Replace all words with {a}."),
    # an argument to find in the list
    "replace": _family(lambda w, a, b, c, n: [b if x == a else x for x in w], "Replace every {a} with {b}.", "Write {b} instead of {a}.",
                       "Change {a} to {b}.", "Where it says {a}, write {b}.", "Copy the list but turn {a} into {b}.", compares=True),
    "remove": _family(lambda w, a, b, c, n: [x for x in w if x != a], "Remove every {a}.", "Leave out {a}.", "Take {a} out of the list.",
                      "Write all words except {a}.", "Copy the list without {a}.", compares=True),
    "is there": _family(lambda w, a, b, c, n: ["yes" if a in w else "no"], "Say yes if there is a {a}, otherwise say no.", "Is {a} in the list?",
                        "Does the list have a {a}? Say yes or no.", "Tell me if {a} is one of the words.", compares=True),
    "if there": _family(lambda w, a, b, c, n: [b if a in w else c], "Say {b} if there is a {a}, otherwise say {c}.", "If {a} is in the list, write {b}, else {c}.",
                        "Answer {b} when you see {a} and {c} when you do not.", "With {a} in the list say {b}, without it say {c}.", compares=True),
    "which": _family(lambda w, a, b, c, n: [a if a in w else b], "Which is in the list, {a} or {b}?", "Say which of {a} and {b} is there.",
                     "Is it {a} or {b} that the list has?", "Find {a} or {b} and write the one that you found.", compares=True),
    "next": _family(lambda w, a, b, c, n: _word_after(w, a), "Which word comes after {a}?", "Write the word behind {a}.",
                    "Find {a} and say the next word.", "What follows {a} in the list?", compares=True),
}


def _one_step(rng: random.Random, name: str) -> Task:
    """Fill one template of a family with words and numbers."""
    family, words = FAMILIES[name], rng.sample(WORDS, 3)
    template = rng.choice(family.templates)
    number, place = rng.choice((2, 3)), rng.randrange(len(ORDINALS))
    slots = dict(zip("abc", words), n=NUMBERS[number], nth=ORDINALS[place], list=rng.choice(LISTS))
    n = place if "{nth}" in family.templates[0] else number
    text = template.format(**slots)
    return Task(text, name, lambda w: family.apply(w, *words, n), words[0] if family.compares else None,
                sum(f"{{{slot}}}" in template for slot in "abc"), [text])


def make_task(rng: random.Random, compares: float = 0.18, two_steps: float = 0.08) -> Task:
    """Draw an instruction: the share `compares` looks for a word in the list, the share `two_steps` has two steps."""
    kind = rng.random()
    if kind >= two_steps:
        wanted = kind < two_steps + compares
        return _one_step(rng, rng.choice([name for name, family in FAMILIES.items() if family.compares == wanted]))
    first, second = (_one_step(rng, rng.choice(STEPS)) for _ in range(2))
    text = f"{first.text[:-1]}, then {second.text[0].lower()}{second.text[1:]}"
    return Task(text, "two steps", lambda w: second.solve(first.solve(w)), None, first.n_words + second.n_words, first.steps + second.steps)


def make_record(task: Task, rng: random.Random, n_shots: int = 0, per_step: bool = False) -> dict | None:
    """An example of an instruction: a random list of 3 to 5 words and the answer. None if it asks for words that are not there.

    With n_shots it has a list "shots" of (input, output) to show in the prompt; with per_step the texts of its "steps".
    """
    words = rng.sample(WORDS, rng.randint(3, 5))
    if task.looks_for and task.looks_for not in words and rng.random() < 0.75:
        words[rng.randrange(len(words))] = task.looks_for
    try:
        answer = task.solve(words)
    except IndexError:
        return None
    if not 0 < len(answer) <= 12:
        return None
    record = {"instruction": task.text, "input": " ".join(words), "output": " ".join(answer), "source": task.family, "n_words": task.n_words}
    if n_shots:
        shots = islice(filter(None, (make_record(task, rng) for _ in count())), n_shots)
        record["shots"] = [(shot["input"], shot["output"]) for shot in shots]
    return record | ({"steps": task.steps} if per_step else {})


def is_held_out(instruction: str) -> bool:
    """Is this instruction kept for the unseen split? One in ten is, by a hash that is the same everywhere and always."""
    return hashlib.sha256(instruction.encode()).digest()[0] % 10 == 0


def builtin(n_train: int = 100_000, n_valid: int = 500, seed: int = 0, n_shots: int = 0, per_step: bool = False) -> dict[str, list[dict]]:
    """The built-in data set, generated: unseen instructions never occur in training, seen ones do, with other inputs.

    Training asks for what is hard to learn, comparing and two steps, twice as often as the validation splits do. `human` is written
    by hand in free phrasing (assets/human.json): no template makes these instructions. n_shots, per_step: see `make_record`.
    """
    rng = random.Random(seed)
    data: dict[str, list[dict]] = {"train": [], "seen": [], "unseen": []}
    trained: dict[str, list[Task]] = {}                                   # family -> tasks of the training set
    while len(data["train"]) < n_train:
        task = make_task(rng, compares=0.36, two_steps=0.16)
        if not is_held_out(task.text) and (record := make_record(task, rng, n_shots, per_step)):
            data["train"].append(record)
            trained.setdefault(task.family, []).append(task)
    while len(data["unseen"]) < n_valid:
        task = make_task(rng)
        if is_held_out(task.text) and (record := make_record(task, rng, n_shots, per_step)):
            data["unseen"].append(record)
    while len(data["seen"]) < n_valid:
        if (tasks := trained.get(make_task(rng).family)) and (record := make_record(rng.choice(tasks), rng, n_shots, per_step)):
            data["seen"].append(record)
    data["human"] = read_records(Path(__file__).parent / "assets" / "human.json")
    return data


# ---- Text layout ----

@dataclass
class Example:
    """Token ids of one record: the prompt with its gist tokens, what follows them, and the answer."""
    prompt: list[int]
    input: list[int]
    output: list[int]
    record: dict

    def __len__(self) -> int:
        return len(self.prompt) + len(self.input) + len(self.output)


def layout(record: dict, tokenizer, n_gist: int, arch: str = "llama", idf: dict[str, float] | None = None) -> Example:
    """Tokenize the three parts of a record, each by itself, and put n_gist gist tokens at the end of the prompt.

    A record with "steps" has a prompt with gist tokens for each of them; one with "shots" shows these examples in its prompt.
    With `idf` (see `inverse_frequencies`) the instruction is replaced by its n_gist most informative words, and nothing is put
    behind it.
    """
    def ids(text: str) -> list[int]:
        return tokenizer.encode(tokenizer.prefix + text.strip()) if text.strip() else []

    shots = "".join(f"\nInput: {given}\nOutput: {answer}" for given, answer in record.get("shots", []))
    prompts = record.get("steps") or [record["instruction"].strip() + shots]
    if idf is not None:
        prompts, n_gist = [keywords(record["instruction"], idf, n_gist)], 0
    prompt = [i for text in prompts for i in ids("Instruction: " + text) + [tokenizer.gist_id] * n_gist]
    given = "Input: " + record["input"].strip() if record["input"].strip() else ""
    output = ids(record["output"]) + [tokenizer.eos_id]
    if arch == "t5":
        return Example(prompt, ids(given) + [tokenizer.eos_id], output, record)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Example(start + prompt, ids(given + "\nOutput:"), output, record)


def make_examples(records: list[dict], tokenizer, n_gist: int, arch: str = "llama", max_length: int = 512,
                  max_target: int = 256, idf: dict[str, float] | None = None) -> tuple[list[Example], int]:
    """Lay out all records, cut at the right as in the paper. Returns the examples and how many were skipped.

    LLaMA: prompt, input and output together have at most `max_length` tokens. T5: the source has at most `max_length`, the
    target `max_target`. An example that loses its whole output, or its gist, could not teach anything and is skipped.
    """
    examples = []
    for record in records:
        e = layout(record, tokenizer, n_gist, arch, idf)
        room = max(0, max_length - len(e.prompt))
        if arch == "t5" and len(e.input) > room:
            e.input = e.input[:max(0, room - 1)] + [tokenizer.eos_id]      # the source keeps its end
        e.input = e.input[:room]
        e.output = e.output[:max_target if arch == "t5" else room - len(e.input)]
        if e.input and e.output:
            examples.append(e)
    return examples, len(records) - len(examples)


def text_examples(path: str, tokenizer, n_gist: int, arch: str, n: int, seed: int = 0) -> list[Example]:
    """n examples of gist pretraining: running text, cut into a span, which the gist tokens have to hold, and the 32 tokens that follow it.

    path: a UTF-8 text file or a directory of *.txt files, read line by line, again and again until there are enough; or "builtin",
    for the built-in instructions with their inputs and outputs as running text. Spans have 4 to 64 tokens. Raises DataError.
    """
    rng, examples, text = random.Random(seed), [], []
    given = [tokenizer.eos_id] if arch == "t5" else tokenizer.encode(tokenizer.prefix + "\nOutput:")
    start = [] if arch == "t5" or tokenizer.bos_id is None else [tokenizer.bos_id]
    while len(examples) < n:
        before = len(examples)
        for line in text_lines(path, seed):
            text += tokenizer.encode(tokenizer.prefix + line.strip()) if line.strip() else []
            while len(text) >= 96 and len(examples) < n:
                span = rng.randint(4, 64)
                examples.append(Example(start + text[:span] + [tokenizer.gist_id] * n_gist, given, text[span:span + 32], {}))
                text = text[rng.randint(1, span + 32):]                   # the next cut is anywhere in it
            if len(examples) == n:
                return examples
        if len(examples) == before:
            raise DataError(f"{path}: less than 96 tokens of text, too little to learn from; give more or longer *.txt files")
    return examples


def text_lines(path: str, seed: int) -> Iterator[str]:
    if path == "builtin":
        yield from (f"{r['instruction']} {r['input']} {r['output']}" for r in builtin(seed=seed)["train"])
        return
    try:
        for file in sorted(Path(path).rglob("*.txt")) if Path(path).is_dir() else [path]:
            with open(file, encoding="utf-8", errors="replace") as f:
                yield from f
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from None


# The paper's discrete baseline: a prompt compressed into words instead of activations.

def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def inverse_frequencies(records: list[dict]) -> dict[str, float]:
    """idf(word) = log(N / number of instructions that have the word), over N different instructions."""
    instructions = {record["instruction"] for record in records}
    have = Counter(word for text in instructions for word in set(words_of(text)))
    return {word: math.log(len(instructions) / n) for word, n in have.items()}


def keywords(instruction: str, idf: dict[str, float], n: int) -> str:
    """The n words of the highest TF-IDF, count in the instruction times idf, as they stand in it. A word that `idf` lacks is the rarest."""
    words, rarest = words_of(instruction), max(idf.values(), default=0.0)
    best = sorted(dict.fromkeys(words), key=lambda w: -words.count(w) * idf.get(w, rarest))[:n]
    return " ".join(sorted(best, key=words.index))


# ---- Batches ----

def pad(rows: list[list[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one (B, T) int64 tensor, and which of it is not padding, (B, T) bool."""
    T = max(map(len, rows))
    out, valid = torch.full((len(rows), T), fill), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if left else slice(0, len(row))
        out[i, where], valid[i, where] = torch.tensor(row), True
    return out, valid


def collate(examples: list[Example], pad_id: int, arch: str = "llama") -> dict[str, Tensor]:
    """A batch to train on: tokens (B, T) int64, valid (B, T) bool, targets int64 with IGNORE where there is no label.

    LLaMA: targets (B, T) hold the output's tokens, each at the place before it. T5: tokens are the source, targets (B, T_out) the output.
    """
    if arch == "t5":
        tokens, valid = pad([e.prompt + e.input for e in examples], pad_id)
        return {"tokens": tokens, "valid": valid, "targets": pad([e.output for e in examples], IGNORE)[0]}
    tokens, valid = pad([e.prompt + e.input + e.output for e in examples], pad_id)
    before = [len(e.prompt) + len(e.input) - 1 for e in examples]
    targets, _ = pad([[IGNORE] * n + e.output + [IGNORE] for n, e in zip(before, examples)], IGNORE)
    return {"tokens": tokens, "valid": valid, "targets": targets}


def batch_order(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch as batches of indices: shuffled, but rows of a batch have similar lengths, so that little of it is padding.

    Shuffle all, sort by length within stretches of 50 batches, cut into batches, shuffle the batches.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    stretch = 50 * batch_size
    batches = []
    for start in range(0, len(order), stretch):
        rows = sorted(order[start:start + stretch], key=lambda i: lengths[i])
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """The fraction of all places that is padding."""
    places = sum(max(lengths[i] for i in rows) * len(rows) for rows in batches)
    return 1 - sum(lengths[i] for rows in batches for i in rows) / places


# ---- Tokenizers ----
#
# Text is only ever text: a "</s>" in it is four characters, not the end. The gist token is one id after the tokenizer's own.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class SentencePieceTokenizer:
    """A SentencePiece model: LLaMA's tokenizer.model, T5's spiece.model with its 100 extra ids, or one trained here."""
    prefix = ""                     # SentencePiece puts a space before the text itself

    def __init__(self, model: bytes, extra_ids: int = 0):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_id = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.eos_id, self.pad_id = self.sp.eos_id(), max(self.sp.pad_id(), 0)
        self.special = {self.sp.unk_id(), self.bos_id, self.eos_id, self.pad_id}
        self.gist_id = self.sp.vocab_size() + extra_ids
        self.vocab_size = self.gist_id + 1
        self.files = {"spiece.model" if extra_ids else "tokenizer.model": model}

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text.encode("utf-8", "replace"))            # JSON can hold half a character

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i < self.sp.vocab_size() and i not in self.special])

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            write_file(Path(folder) / name, content)


class BPETokenizer:
    """Byte-level byte-pair encoding (LLaMA 3, SmolLM2): numbers are cut out of the text if they have to, `pattern` cuts the rest, each piece is merged.

    ranks: a token's bytes -> its id, earlier merges first; special: the ids that no text gives; digits: "each", "runs" or None; files:
    what `save` writes.
    """
    prefix = " "                    # a word in the middle of a text begins with its space

    def __init__(self, ranks: dict[bytes, int], special: set[int], pattern: str, digits: str | None, bos_id: int | None, eos_id: int,
                 pad_id: int | None, files: dict[str, bytes]):
        self.gist_id = max([*ranks.values(), *special]) + 1
        self.vocab_size = self.gist_id + 1
        self.eos_id = eos_id
        self.bos_id = eos_id if bos_id is None else bos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.special, self.digits, self.files = special, digits, files
        # SmolLM2 has no tokens for 21 bytes that never came up, and the reference drops them; tiktoken needs an id for all 256.
        ranks = ranks | {bytes([b]): self.vocab_size + b for b in range(256) if bytes([b]) not in ranks}
        # What the pattern does not match is a piece, too; tiktoken alone would drop it.
        whole = rf"{pattern}|(?s:.+?)(?={pattern}|\z)" if pattern else r"(?s:.+)"
        self.bpe = tiktoken.Encoding("", pat_str=whole, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        pieces = cut_out_numbers(text, self.digits == "each") if self.digits else [text]
        return [i for piece in pieces for i in self.bpe.encode_ordinary(piece) if i < self.gist_id]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode([i for i in ids if i < self.gist_id and i not in self.special])

    save = SentencePieceTokenizer.save


def cut_out_numbers(text: str, each: bool) -> list[str]:
    """Cut a text before and after its runs of digits (Unicode's numbers), or around each digit."""
    pieces = []
    for is_number, run in groupby(text, lambda c: unicodedata.category(c)[0] == "N"):
        pieces += run if is_number and each else ["".join(run)]
    return pieces


def train_tokenizer(records: list[dict], vocab_size: int) -> SentencePieceTokenizer:
    """Train a SentencePiece model (byte-pair encoding, bytes for what it has not seen) on the training text."""
    texts = (f"Instruction: {r['instruction']}\nInput: {r['input']}\nOutput: {r['output']}" for r in records[:20_000])
    lines = (line[:4000] for text in texts for line in text.split("\n") if line.strip())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        character_coverage=0.9999, pad_id=3, user_defined_symbols=["\n"], normalization_rule_name="identity", remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2)
    return SentencePieceTokenizer(model.getvalue())


def load_tokenizer(folder: Path) -> SentencePieceTokenizer | BPETokenizer | None:
    """The tokenizer of a checkpoint, whichever kind it is; None if there is none. Raises DataError."""
    file = next((folder / name for name in ("tokenizer.model", "spiece.model", "tokenizer.json") if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        return read_tokenizer_json(file) if file.suffix == ".json" else read_tokenizer_model(file)
    except DataError:
        raise
    except Exception as error:       # a broken file can make the libraries raise anything
        raise DataError(f"{file}: not a tokenizer that can be honoured here ({one_line(error)}); put the model's tokenizer.model or "
                        "spiece.model there, or download the file again") from None


def read_tokenizer_model(file: Path) -> SentencePieceTokenizer | BPETokenizer:
    """SentencePiece (LLaMA 1, 2, T5), or lines of "base64 rank" (LLaMA 3, with 256 special ids behind them)."""
    content = file.read_bytes()
    if not re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        if not content:
            raise ValueError("empty file")
        return SentencePieceTokenizer(content, extra_ids=100 if file.name == "spiece.model" else 0)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)):
        raise ValueError("the ranks are not 0, 1, 2, ...")
    return BPETokenizer(ranks, set(range(n, n + 256)), LLAMA3_PATTERN, None, n, n + 1, None, {file.name: content})


def read_tokenizer_json(file: Path) -> BPETokenizer:
    """Byte-level BPE as the `tokenizers` library writes it. Raises ValueError for any other kind."""
    spec = read_json(file)
    model, vocab = spec["model"], spec["model"].get("vocab")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if model["type"] != "BPE" or odd or spec.get("normalizer"):
        raise ValueError(" ".join(["its kind is", model["type"], *odd, *["with a normalizer"] * bool(spec.get("normalizer"))]))
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]       # bytes that stand for themselves; the others are chr(256), ...
    alphabet = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*visible}))}
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if token not in added}
    order = [vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in model["merges"]]
    if order != sorted(order) or len(set(ranks.values())) < len(vocab.keys() - added.keys()):
        raise ValueError("its merges are not in the order of their ids")

    settings, config = file.with_name("tokenizer_config.json"), read_json(file.with_name("config.json"))
    names = read_json(settings) if settings.is_file() else {}
    special = {}
    for kind in ("bos", "eos", "pad"):
        token, number = names.get(f"{kind}_token"), config.get(f"{kind}_token_id")
        token = token["content"] if isinstance(token, dict) else token
        special[f"{kind}_id"] = added.get(token, number[0] if isinstance(number, list) else number)
    if special["eos_id"] is None:
        raise ValueError("no eos_token in tokenizer_config.json")
    files = {f.name: f.read_bytes() for f in (file, settings) if f.is_file()}
    return BPETokenizer(ranks, set(added.values()), *read_pre_tokenizer(spec["pre_tokenizer"]), **special, files=files)


def read_pre_tokenizer(spec: dict) -> tuple[str, str | None]:
    """How a text is cut into pieces: the regular expression, and what is done to numbers before. Raises ValueError for a kind that is not known."""
    pattern, digits, steps = "", None, spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False} if not pattern:
                pattern = GPT2_PATTERN
            case {"type": "Digits", "individual_digits": each} if not pattern:
                digits = "each" if each else "runs"
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} if not pattern:
                pattern = regex
            case _:
                raise ValueError(f"a step of its pre-tokenizer is {json.dumps(step)}")
    if steps[-1]["type"] != "ByteLevel":
        raise ValueError("its pre-tokenizer is not byte-level")
    return pattern, digits


# ---- Checkpoints ----
#
# A checkpoint is a directory. Read are Hugging Face's layout, with safetensors or PyTorch pickles, in one file or several; Meta's,
# where each file has a part of every tensor; and weights released as differences from others. Written is the first of them.
# Tensors are mapped from their files, not read into memory: nothing is there twice.

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Our names -> Hugging Face's: of a configuration's whole numbers ...
LLAMA_KEYS = dict(vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
                  n_kv_heads="num_key_value_heads", head_dim="head_dim", d_ff="intermediate_size")
T5_KEYS = dict(vocab_size="vocab_size", d_model="d_model", n_layers="num_layers", n_decoder_layers="num_decoder_layers",
               n_heads="num_heads", head_dim="d_kv", d_ff="d_ff", n_buckets="relative_attention_num_buckets",
               max_distance="relative_attention_max_distance")
# ... and of the tensors; N is the layer.
LLAMA_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "layers.N.attention_norm": "model.layers.N.input_layernorm", "layers.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    **{f"layers.N.attention.w{x}": f"model.layers.N.self_attn.{x}_proj" for x in "qkvo"},
    "layers.N.feed_forward.w1": "model.layers.N.mlp.gate_proj", "layers.N.feed_forward.w2": "model.layers.N.mlp.down_proj",
    "layers.N.feed_forward.w3": "model.layers.N.mlp.up_proj",
}
T5_NAMES = {"embedding": "shared", "output": "lm_head"}
for _stack, _ffn in (("encoder", 1), ("decoder", 2)):
    _ours, _theirs = f"{_stack}.layers.N", f"{_stack}.block.N.layer"
    T5_NAMES |= {
        f"{_stack}.relative_bias": f"{_stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{_stack}.norm": f"{_stack}.final_layer_norm", f"{_ours}.attention_norm": f"{_theirs}.0.layer_norm",
        f"{_ours}.cross_norm": f"{_theirs}.1.layer_norm", f"{_ours}.ffn_norm": f"{_theirs}.{_ffn}.layer_norm",
        **{f"{_ours}.attention.w{x}": f"{_theirs}.0.SelfAttention.{x}" for x in "qkvo"},
        **{f"{_ours}.cross_attention.w{x}": f"{_theirs}.1.EncDecAttention.{x}" for x in "qkvo"},
        **{f"{_ours}.feed_forward.{w}": f"{_theirs}.{_ffn}.DenseReluDense.{x}" for w, x in (("w1", "wi_0"), ("w2", "wo"), ("w3", "wi_1"))},
    }
# What some files carry and no model needs: rotary tables, copies of T5's embedding, a table that T5 never reads.
IGNORED = r".*rotary_emb\.inv_freq|rope\.freqs|(en|de)coder\.embed_tokens\.weight|.*EncDecAttention\.relative_attention_bias\.weight"
PUBLISHED_SUMS = {"llama-7b-gist": 50547.957, "llama-7b-pos_control": 50596.914, "llama-7b-neg_control": 50503.879}


def hf_name(name: str, config: LlamaConfig | T5Config) -> str:
    """Hugging Face's name of a parameter of ours."""
    layer = re.search(r"layers\.(\d+)\.", name)
    key = re.sub(r"layers\.\d+\.", "layers.N.", name.removesuffix(".weight"))
    other = (LLAMA_NAMES if isinstance(config, LlamaConfig) else T5_NAMES)[key] + ".weight"
    if not getattr(config, "gated", True):
        other = other.replace("wi_0", "wi")                               # T5 1.0
    return other.replace(".N.", f".{layer[1]}.") if layer else other


def embedding(model: Llama | T5) -> nn.Embedding:
    return model.tok_embeddings if isinstance(model, Llama) else model.embedding


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def read_json(file: Path) -> dict:
    """A JSON object. Raises DataError."""
    try:
        if file.stat().st_size > 100_000_000:
            raise ValueError("over 100 MB")
        if not isinstance(content := json.loads(file.read_bytes()), dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({one_line(error)}); download it again") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: 8 bytes with the length of a JSON header, the header, the tensors' bytes.

    The tensors have to cover the bytes exactly, without gap or overlap. Raises DataError.
    """
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise DataError(f"{file}: truncated, or not a safetensors file (a header of {length} bytes in {size}); download it again")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            entries = sorted((*entry["data_offsets"], name, entry["dtype"], entry["shape"]) for name, entry in header.items())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: broken header ({one_line(error)}); download it again") from None
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)          # private: what is changed in memory stays there
    tensors, end = {}, 0
    for start, stop, name, dtype, shape in entries:
        if dtype not in DTYPES:
            raise DataError(f"{file}: tensor {name} has the dtype {dtype}; only {', '.join(DTYPES)} are read")
        if not all(type(n) is int and n > 0 for n in shape) or start != end or stop - start != math.prod(shape) * DTYPES[dtype].itemsize \
                or 8 + length + stop > size:
            raise DataError(f"{file}: tensor {name} has the bytes {start} to {stop}, which its shape {shape}, its neighbours or the file's end "
                            "do not allow; download it again")
        tensors[name] = torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape), offset=8 + length + start).view(shape)
        end = stop
    if 8 + length + end != size:
        raise DataError(f"{file}: {size - 8 - length - end} bytes after the last tensor; download it again")
    return tensors


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped. Only tensors are unpickled, never code. Raises DataError."""
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file}: truncated, or not a PyTorch zip file (other pickles can run code); get the safetensors file instead")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(f"{file}: holds something else than tensors, which could run code: not opened; get the safetensors file instead") from None
    except Exception as error:       # a broken pickle can raise anything
        raise DataError(f"{file}: broken ({one_line(error)}); download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) and t.layout is torch.strided for t in tensors.values()):
        raise DataError(f"{file}: not a dictionary of tensors; give a checkpoint that holds nothing else")
    return {name: t.detach() for name, t in tensors.items()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory in Hugging Face's layout, by the names in the files. Raises DataError."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(f"{folder}: no weights; expected one of {', '.join(names)}")
    files = [found]
    if found.suffix == ".json":
        shards = read_json(found).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shards.values()):
            raise DataError(f"{found}: its weight_map does not name files of this directory; download it again")
        files = [folder / shard for shard in sorted(set(shards.values()))]
    weights = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing, though {found.name} names it; download it")
        tensors = read_safetensors(file) if ".safetensors" in found.name else read_pickle(file)
        if twice := weights.keys() & tensors.keys():
            raise DataError(f"{file}: tensor {min(twice)} is in another file, too; download the checkpoint again")
        weights |= tensors
    return weights


def read_parts(folder: Path) -> dict[str, list[Tensor]]:
    """All tensors of a directory in Meta's layout, each as the parts that the files have of it. Raises DataError."""
    shards = [read_pickle(file) for file in sorted(folder.glob("consolidated*.pth"))]
    names = {name for shard in shards for name in shard}
    if not shards:
        raise DataError(f"{folder}: no weights; expected consolidated.00.pth beside params.json")
    if lost := sorted(name for name in names for shard in shards if name not in shard):
        raise DataError(f"{folder}: tensor {lost[0]} is missing from one of the consolidated files; download them again")
    return {name: [shard[name] for shard in shards] for name in names}


# The shape of a model, as others write it down

def sizes(raw: dict, keys: dict[str, str], **default: int) -> dict[str, int]:
    """A configuration's whole numbers, by our names. Raises ValueError."""
    out = {}
    for ours, theirs in keys.items():
        out[ours] = default.get(ours) if raw.get(theirs) is None else raw[theirs]
        if type(out[ours]) is not int or out[ours] <= 0:
            raise ValueError(f"{theirs} is {out[ours]}, expected a positive whole number")
    return out


def llama_config(raw: dict) -> LlamaConfig:
    """From a config.json of any age: `rope_theta` and `rope_scaling`, or `rope_parameters`. Raises ValueError and the like."""
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0), **(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"rotary type {kind} and hidden_act {raw.get('hidden_act', 'silu')}; only default or llama3, and silu, are supported")
    scaling = {key: 1 * rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")} \
        if kind == "llama3" else None
    width, heads = sizes(raw, {"d_model": "hidden_size", "n_heads": "num_attention_heads"}).values()
    return LlamaConfig(**sizes(raw, LLAMA_KEYS, n_kv_heads=heads, head_dim=width // heads), rope_theta=float(rope["rope_theta"]),
                       rope_scaling=scaling, norm_eps=float(raw.get("rms_norm_eps", 1e-6)), tie_embeddings=raw.get("tie_word_embeddings") is True)


def t5_config(raw: dict) -> T5Config:
    """From a config.json of any age; newer ones say `scale_decoder_outputs` for what `tie_word_embeddings` meant. Raises ValueError."""
    kind = raw.get("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        raise ValueError(f"feed_forward_proj is {kind}; only relu and gated-gelu are supported")
    tied = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings")) is not False
    return T5Config(**sizes(raw, T5_KEYS, n_decoder_layers=raw.get("num_layers"), n_buckets=32, max_distance=128), gated=kind == "gated-gelu",
                    tie_embeddings=tied, norm_eps=float(raw.get("layer_norm_epsilon", 1e-6)), start_id=raw.get("decoder_start_token_id") or 0)


def meta_config(raw: dict, found: dict[str, list[Tensor]]) -> LlamaConfig:
    """From Meta's params.json, which leaves two widths to the tensors. Raises ValueError and the like."""
    wide = {"d_ff": "layers.0.feed_forward.w1.weight", "vocab_size": "output.weight"}
    raw = raw | {ours: sum(len(part) for part in found[name]) for ours, name in wide.items()}
    keys = {"d_model": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads", "head_dim": "head_dim", **{w: w for w in wide}}
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    width, heads = sizes(raw, {"d_model": "dim", "n_heads": "n_heads"}).values()
    return LlamaConfig(**sizes(raw, keys, n_kv_heads=heads, head_dim=width // heads), norm_eps=float(raw["norm_eps"]),
                       rope_theta=float(raw.get("rope_theta", 10_000.0)), rope_scaling=scaling if raw.get("use_scaled_rope") else None,
                       tie_embeddings=False)


def hf_config(c: LlamaConfig | T5Config, dtype: torch.dtype) -> dict:
    """The config.json of a model, which older and newer versions of `transformers` read."""
    raw = {theirs: getattr(c, ours) for ours, theirs in (LLAMA_KEYS if isinstance(c, LlamaConfig) else T5_KEYS).items()}
    raw |= {"tie_word_embeddings": c.tie_embeddings, "torch_dtype": str(dtype).removeprefix("torch.")}
    if isinstance(c, LlamaConfig):
        return raw | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": c.norm_eps,
                      "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}}
    return raw | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, "layer_norm_epsilon": c.norm_eps,
                  "feed_forward_proj": "gated-gelu" if c.gated else "relu", "decoder_start_token_id": c.start_id}


class EmptyModel(TorchFunctionMode):
    """Modules made under it have shapes but neither memory nor first random weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return function(*args, **kwargs)


@dataclass
class Checkpoint:
    """A directory's weights, found and checked, but not read yet.

    model: on the meta device; parts: for every parameter of the model, the tensors that make it up; ignored: names in the files.
    """
    model: Llama | T5
    parts: dict[str, list[Tensor]]
    ignored: list[str]
    interleaved: bool

    def tensor(self, name: str) -> Tensor:
        """A parameter's value. Parts are joined along the axis in which they are smaller; Meta's rotary pairs become halves."""
        parts, shape = self.parts[name], self.model.get_parameter(name).shape
        axis = next((i for i, n in enumerate(shape) if parts[0].shape[i] != n), None)
        weight = parts[0] if axis is None else torch.cat(parts, dim=axis)
        if self.interleaved and name.endswith(("wq.weight", "wk.weight")):
            weight = weight.view(-1, self.model.config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
        return weight

    def release(self, name: str) -> None:
        """Drop a parameter's file pages from memory, for it was copied; if they are needed again, they are read again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for part in filter(Tensor.is_contiguous, self.parts[name]):
            start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = part.data_ptr() + part.nbytes - start
            if length > 0:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length // mmap.PAGESIZE * mmap.PAGESIZE), mmap.MADV_DONTNEED)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find out what a directory holds, and check that every tensor of the model is there, in its shape, and no other. Raises DataError."""
    raw, meta = read_config(folder), not (folder / "config.json").is_file()
    file, kind = folder / ("params.json" if meta else "config.json"), "llama" if meta else raw.get("model_type")
    if kind not in ("llama", "t5"):
        raise DataError(f"{file}: the model_type {kind} is not supported; llama and t5 are")
    found = read_parts(folder) if meta else {name: [weight] for name, weight in read_weights(folder).items()}
    try:
        config = meta_config(raw, found) if meta else llama_config(raw) if kind == "llama" else t5_config(raw)
        if config.n_layers + getattr(config, "n_decoder_layers", 0) > len(found):
            raise ValueError(f"it asks for more layers than the {len(found)} tensors of the weights can make up")
        with torch.device("meta"), EmptyModel():
            model = Llama(config) if kind == "llama" else T5(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{file}: {'missing: ' * isinstance(error, KeyError)}{one_line(error)}; use the one that belongs to the weights") from None
    return Checkpoint(model, claim(found, model, folder, meta), sorted(found), meta)


def claim(found: dict[str, list[Tensor]], model: Llama | T5, folder: Path, meta: bool) -> dict[str, list[Tensor]]:
    """Take the tensors of the model's parameters out of `found`; what stays there may be ignored. Raises DataError."""
    parts, tied = {}, model.config.tie_embeddings
    if isinstance(model, T5) and not tied and "shared.weight" in found:   # no head of its own, yet no scaling either
        found.setdefault("lm_head.weight", [found["shared.weight"][0].clone()])
    for name, weight in model.named_parameters():
        theirs = name if meta else hf_name(name, model.config)
        if theirs not in found:
            raise DataError(f"{folder}: tensor {theirs} is missing from the weights; download them again")
        parts[name] = found.pop(theirs)
        if not fits([list(p.shape) for p in parts[name]], list(weight.shape)) or not all(p.dtype in DTYPES.values() for p in parts[name]):
            raise DataError(f"{folder}: tensor {theirs} is {' + '.join(f'{p.dtype} {list(p.shape)}' for p in parts[name])}, but the configuration "
                            f"asks for {list(weight.shape)}; use the config.json or params.json that belongs to the weights")
    head = found.pop("lm_head.weight", None) if tied else None
    if head is not None and not torch.equal(head[0], next(iter(parts.values()))[0]):
        raise DataError(f"{folder}: lm_head.weight is not the embedding, to which the configuration ties it; set tie_word_embeddings to false")
    if odd := [name for name in sorted(found) if not re.fullmatch(IGNORED, name)]:
        raise DataError(f"{folder}: tensor {odd[0]} has no place in the model ({len(odd)} such in all); only plain LLaMA and T5 are supported")
    return parts


def fits(parts: list[list[int]], shape: list[int]) -> bool:
    """Are these the shapes of copies of a tensor of this shape, or of its parts along one axis?"""
    if all(p == shape for p in parts):
        return True
    return any(all(len(p) == len(shape) and p[:i] + p[i + 1:] == shape[:i] + shape[i + 1:] for p in parts)
               and sum(p[i] for p in parts) == shape[i] for i in range(len(shape)))


def read_config(path: str | Path) -> dict:
    """The raw config.json (Meta: params.json) of a checkpoint. Runs of ours have the key "gisting". Raises DataError."""
    folder = Path(path)
    if not folder.is_dir() and "out" in folder.parts:
        raise DataError(f"{path}: no such run; make one with: python train.py --n_gist 1 --out_dir {path}")
    if not folder.is_dir():
        name = path if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else "HuggingFaceTB/SmolLM2-135M"
        raise DataError(f"{path}: no such directory; download a checkpoint with: hf download {name} --local-dir DIR")
    file = next((folder / name for name in ("config.json", "params.json") if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{path}: not a checkpoint, it has neither config.json nor params.json")
    return read_json(file)


@torch.no_grad()
def load_model(path: str | Path, base: str | Path | None = None, dtype: torch.dtype | None = None,
               device: str = "cpu") -> tuple[Llama | T5, SentencePieceTokenizer | BPETokenizer | None]:
    """Read a checkpoint of any layout. Returns the model and its tokenizer, None if the directory has none.

    path: a directory; base: that of the original model, if `path` holds differences from it; dtype: what the weights become, by
    default what the embedding is in the file. Weights that need no conversion stay mapped from the file. Raises DataError.
    """
    folder = Path(path)
    source = open_checkpoint(folder)
    origin = open_base(folder, source, base)
    model, dtype = source.model, dtype or next(iter(source.parts.values()))[0].dtype
    weights, total = {}, 0.0
    for name, _ in model.named_parameters():
        weight = source.tensor(name)
        if origin is not None:
            weight, original = weight.float(), origin.tensor(name).float()
            weight[:len(original)] += original                            # the base has no row for the gist token: as if it were zero
            total += weight.sum().item()
            origin.release(name)
        weights[name] = weight.to(device, dtype).contiguous()
        if weights[name].data_ptr() != source.parts[name][0].data_ptr():
            source.release(name)
    if origin is not None:           # the published sums count the rotary tables that the files carry
        total += sum(rope_frequencies(model.config).sum().item() for name in source.ignored if "inv_freq" in name)
        published = next((value for name, value in PUBLISHED_SUMS.items() if name in folder.resolve().name), total)
        if not abs(total - published) < 0.5:
            raise DataError(f"{path}: the recovered weights sum up to {total:.3f}, published is {published}; download differences and base again")
    model.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.output.weight = embedding(model).weight
    tokenizer = load_tokenizer(folder) or (load_tokenizer(Path(base)) if base else None)
    if tokenizer and tokenizer.gist_id > model.config.vocab_size:
        raise DataError(f"{path}: the tokenizer has {tokenizer.gist_id} tokens, but the model only {model.config.vocab_size}; "
                        "use the tokenizer that belongs to the model")
    return model, tokenizer


def open_base(folder: Path, source: Checkpoint, base: str | Path | None) -> Checkpoint | None:
    """The original of weights that are differences; None if they are none. Raises DataError if that is not what `base` says."""
    differs = isinstance(source.model, Llama) and source.tensor("norm.weight").float().abs().mean() < 0.05     # it is near 1 otherwise
    if differs != bool(base):
        raise DataError(f"{folder}: the weights are differences; name the original LLaMA-7B with --base DIR" if differs
                        else f"{folder}: the weights are no differences from others; leave --base out")
    if not base:
        return None
    origin = open_checkpoint(Path(base))
    for name, weight in source.model.named_parameters():
        other = dict(origin.model.named_parameters()).get(name)
        if other is None or other.shape[1:] != weight.shape[1:] or len(other) > len(weight):
            raise DataError(f"{base}: not the model that {folder} has the differences from; {name} has another shape")
    return origin


@torch.no_grad()
def add_gist_token(model: Llama | T5, tokenizer: SentencePieceTokenizer | BPETokenizer) -> None:
    """Give a stock model a row for the gist token, the mean of the tokenizer's other rows, in the embedding and the output head.

    A model with too few rows grows; one with spare rows (FLAN-T5 has 28) keeps its shape.
    """
    gist_id, tables = tokenizer.gist_id, [embedding(model)] + [model.output] * (not model.config.tie_embeddings)
    for table in tables:
        mean = table.weight[:gist_id].mean(dim=0, dtype=torch.float32).to(table.weight.dtype)
        if len(table.weight) <= gist_id:
            table.weight = nn.Parameter(torch.cat([table.weight, mean.expand(gist_id + 1 - len(table.weight), -1)]))
        table.weight[gist_id] = mean
    rows = embedding(model).num_embeddings = model.output.out_features = len(tables[0].weight)
    model.config = replace(model.config, vocab_size=rows)
    if model.config.tie_embeddings:
        model.output.weight = embedding(model).weight


def save_model(path: str | Path, model: Llama | T5, tokenizer: SentencePieceTokenizer | BPETokenizer | None = None,
               extra: dict | None = None, weights: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint in Hugging Face's layout; `extra` goes into config.json as "gisting". A file is replaced when it is whole.

    weights: the parameters by their names, for a model that itself holds parts of them only.
    """
    folder, weights = Path(path), weights or dict(model.named_parameters())
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(model.config, next(iter(weights.values())).dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
        config |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")}
    if extra is not None:
        config["gisting"] = extra
    header, end, names = {"__metadata__": {"format": "pt"}}, 0, {value: key for key, value in DTYPES.items()}
    for name, weight in weights.items():
        start, end = end, end + weight.nbytes
        header[hf_name(name, model.config)] = {"dtype": names[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)                                # the data begins at a multiple of 64 bytes
    data = (weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for weight in weights.values())
    write_file(folder / "model.safetensors", chain([len(head).to_bytes(8, "little"), head], data))
    write_file(folder / "config.json", json.dumps(config, indent=2).encode())


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name, flush it to the disk, and rename it: there is never half a file, and the old one stays until then."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(file: Path, content: bytes | Iterable[bytes]) -> None:
    """Replace a file by one with this content."""
    with replacing(file) as f:
        f.writelines([content] if isinstance(content, bytes) else content)


def save_state(file: Path, state: dict) -> None:
    """Write what `torch.load(file, weights_only=True)` reads again: tensors, numbers, strings, and dicts and lists of them."""
    with replacing(file) as f:                                            # torch.save writes piece by piece: nothing is in memory twice
        try:
            torch.save(state, f)
        except RuntimeError as error:                                     # what is left of an OSError that went through C++
            raise OSError(0, one_line(error), str(file)) from None


def model_id(model: Llama | T5) -> str:
    """A fingerprint of a model's weights, the same on every device and in every dtype: a hash over its shape and each 997th weight."""
    fingerprint = hashlib.sha256(repr(model.config).encode())
    for weight in model.parameters():
        fingerprint.update(weight.detach().flatten()[::997].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return fingerprint.hexdigest()


def save_cache(file: str | Path, cache: Cache, model: Llama | T5, n_gist: int, instruction: str) -> None:
    """Write a compressed prompt, and which model it belongs to."""
    tensors = {name: value for name, value in vars(cache).items() if value is not None}
    save_state(Path(file), {"cache": tensors, "model_id": model_id(model), "n_gist": n_gist, "instruction": instruction})


def load_cache(file: str | Path, model: Llama | T5, n_gist: int) -> tuple[Cache, str]:
    """Read a compressed prompt of this very model. Returns it, on the model's device, and the instruction. Raises DataError."""
    try:
        state = torch.load(file, weights_only=True, map_location=next(model.parameters()).device)
        cache, instruction = Cache(**state["cache"]), state["instruction"]
        mine = (state["model_id"], state["n_gist"])
    except Exception as error:       # a broken file can raise anything
        raise DataError(f"{file}: not a gist that can be read ({one_line(error)}); make it again with eval.py compress --save") from None
    if mine[0] != model_id(model):
        raise DataError(f"{file}: a gist of another model; its keys and values mean nothing to this one. Make it again with eval.py compress --save")
    if mine[1] != n_gist:
        raise DataError(f"{file}: has {mine[1]} gist tokens, but this model was trained with {n_gist}; make it again with eval.py compress --save")
    return cache, instruction


def run(main: Callable[[], None]) -> None:
    """Run a script's main function; bad input and files that cannot be read or written end it with one line and exit status 2, Ctrl-C with 130."""
    try:
        main()
        sys.stdout.flush()
    except DataError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:          # the reader of our output, `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:         # a full disk, a folder that may not be written
        print(f"{Path(sys.argv[0]).name}: {error.filename or 'a file'}: {error.strerror or error}; check its path, the permissions and the free space",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
