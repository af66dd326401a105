"""Everything that comes from disk, and back to it: instructions, tokenizers, weights.

Text becomes token ids here, with the gist tokens between prompt and input. The three parts are
tokenized separately and joined as ids, so that the prompt's tokens never depend on the input:

    LLaMA   <s> "Instruction: {instruction}" <G>...<G> "Input: {input}\\nOutput:" "{output}" </s>
    T5      source: "Instruction: {instruction}" <G>...<G> "Input: {input}" </s>
            target: "{output}" </s>

An example without an input has just "Output:" (T5: nothing) after the gist. With LLaMA's tokenizer
this gives the paper's own token counts.

The file reads in the order in which data flows: instructions, the text layout, batches, tokenizers,
checkpoints, and small things that every script needs. Run it to see one record on its way.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import torch
from torch import Tensor, nn

from model import IGNORE_INDEX, Llama, LlamaConfig, rope_frequencies
from t5 import T5, T5Config

Model = Llama | T5
AnyPath = str | Path
Tensors = dict[str, Tensor]  # by their names
SPLITS = ("seen", "unseen", "human")  # the paper's three validation splits
ASSETS = Path(__file__).parent / "assets"


# ---- Instructions ----


def load_instructions(path: str, seed: int = 0, tfidf: int | None = None) -> dict[str, list[dict]]:
    """Read a data set: {"train": [...], "seen": [...], "unseen": [...], "human": [...]}.

    path: "builtin", or a directory in the Alpaca+ layout: files whose names hold `train`,
    `validation_seen`, `validation_unseen` or `validation_human` and end in .json or .jsonl, each a
    JSON array or JSON lines. A record is a dict with the strings `instruction`, `input` ("" if it
    needs none) and `output`. A split without a file is []. Raises DataError.

    tfidf: shorten all instructions to so many keywords, see `with_keywords`.
    """
    splits = builtin(seed=seed) if path == "builtin" else read_splits(path)
    if tfidf:
        train = splits["train"]
        return {split: with_keywords(records, train, tfidf) for split, records in splits.items()}
    return splits


def read_splits(path):
    """The records of a directory, by split. Raises DataError."""
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such data directory; give one, or --data builtin")
    data = {split: [] for split in ("train", *SPLITS)}
    for file in sorted(Path(path).iterdir()):
        split = split_of(file.name)
        if split is not None:
            data[split] += read_records(file)
    if not data["train"]:
        raise DataError(f"{path}: no training examples; put some into a file like my_train.json")
    return data


def split_of(name):
    """The one split that a file belongs to. A validation file is never trained on."""
    if not name.endswith((".json", ".jsonl")):
        return None
    for split in SPLITS:
        if f"validation_{split}" in name:
            return split
    return "train" if "train" in name and "validation" not in name else None


def read_records(file):
    """The records of a JSON array or JSON lines file. Raises DataError, which names a bad one."""
    with reading(file, "correct it"):
        content = file.read_bytes()
        is_array = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        items = json.loads(content) if is_array else content.splitlines()
    records = []
    for number, item in enumerate(items, 1):
        with reading(f"{file}, {'record' if is_array else 'line'} {number}", "correct it"):
            if is_array or item.strip():
                records.append(to_record(item))
    return records


def to_record(item):
    """item: a line of JSON, or an object of an array. Raises ValueError if it is no record."""
    if isinstance(item, bytes):
        item = json.loads(item)
    if not isinstance(item, dict):
        raise ValueError("not an object with instruction, input and output")
    item.setdefault("input", "")
    record = {key: item.get(key) for key in ("instruction", "input", "output")}
    for key, text in record.items():
        if not isinstance(text, str):
            raise ValueError(f"'{key}' is missing or not a string")
        text.encode()  # raises for half a character: JSON's "\ud83d" alone is a lone surrogate
    return record


# The built-in instructions
#
# A model trained from scratch cannot learn the world in minutes, so these ask for what it can learn
# and still needs the instruction for: what to do with a short list of everyday words. The words and
# the phrasings are in assets/builtin.json. Slots of a phrasing: {a} {b} {c} words, {n} two or
# three, {nth} first, second or third, {list} a name for the list. As in a language, a few phrasings
# are common and many are rare: the one at rank r comes r ** -1.3 times as often as the first.

BUILTIN = json.loads((ASSETS / "builtin.json").read_text())
WORDS, NUMBERS, ORDINALS, LIST_NAMES, PHRASINGS = BUILTIN.values()  # PHRASINGS: by kind


def answers(w, a, b, c, n, nth):
    """By kind, what an instruction makes of the list of words w. Returns lists of words.

    a, b, c: its words; n: its number; nth: its place, from 0.
    """
    before, at, after = w[:nth], w[nth : nth + 1], w[nth + 1 :]
    return {
        # the order of the list
        "reverse": w[::-1],
        "first to end": w[1:] + w[:1],
        "swap ends": w[-1:] + w[1:-1] + w[:1],
        # parts of it
        "keep first": w[:n],
        "keep last": w[-n:],
        "drop first": w[1:],
        "drop last": w[:-1],
        "nth": at,
        # repeating and counting
        "double": [x for word in w for x in (word, word)],
        "repeat nth": before + at + at + after,
        "count": [NUMBERS[len(w)]],
        # a word to insert
        "prepend": [a] + w,
        "append": w + [a],
        "surround": [a] + w + [b],
        "insert after nth": before + at + [a] + after,
        "set nth": before + [a] + after,
        "join": [x for word in w for x in (word, a)][:-1],
        "before each": [x for word in w for x in (a, word)],
        "instead": [a, b],
        "say for each": [a] * len(w),
        # a word to find in the list
        "replace": [b if word == a else word for word in w],
        "remove": [word for word in w if word != a],
        "is there": ["yes" if a in w else "no"],
        "if there": [b if a in w else c],
        "which": [a if a in w else b],
        "next": [dict(zip(w, w[1:])).get(a, "nothing")],
        # the same, with an answer for every word
        "mark": ["yes" if word == a else "no" for word in w],
        "mark with": [b if word == a else c for word in w],
        "before a": [x for word in w for x in ([b, a] if word == a else [word])],
        "after a": [x for word in w for x in ([a, b] if word == a else [word])],
    }


KINDS = tuple(PHRASINGS)
COMPARES = KINDS[KINDS.index("replace") :]  # the last two groups: they have to find a
TWO_STEPS = "two steps"
STEPS = ("reverse", "first to end", "drop first", "drop last", "prepend", "append")


@dataclass
class Task:
    """One instruction: its text, its kind, and what it does to a list of words."""

    text: str
    kind: str
    solve: Callable  # list of words -> list of words
    words: tuple  # a, b and c


def make_task(rng, kind):
    """Fill one phrasing of a kind with words and numbers, or let one such step follow another."""
    if kind == TWO_STEPS:
        return in_turn(*[make_task(rng, rng.choice(STEPS)) for _ in range(2)])
    frequencies = [rank**-1.3 for rank in range(1, len(PHRASINGS[kind]) + 1)]
    phrasing = rng.choices(PHRASINGS[kind], frequencies)[0]
    a, b, c = rng.sample(WORDS, 3)
    n, nth, name = rng.choice((2, 3)), rng.randrange(len(ORDINALS)), rng.choice(LIST_NAMES)
    text = phrasing.format(a=a, b=b, c=c, n=NUMBERS[n], nth=ORDINALS[nth], list=name)
    text = text[0].upper() + text[1:]
    return Task(text, kind, lambda w: answers(w, a, b, c, n, nth)[kind], (a, b, c))


def in_turn(first, second):
    """Two steps: the second works on what the first makes of the list."""
    text = f"{first.text[:-1]}, then {second.text[0].lower()}{second.text[1:]}"
    return Task(text, TWO_STEPS, lambda w: second.solve(first.solve(w)), ())


def make_record(task, rng):
    """An example of an instruction: a random list of 3 to 5 words, and the answer."""
    kind = task.kind
    words = [word for word in rng.sample(WORDS, 8) if word not in task.words]
    words = words[: rng.randint(3, 5)]
    place = rng.randrange(len(words))
    if kind in ("which", "next"):
        words[place] = rng.choice(task.words[:2]) if kind == "which" else task.words[0]
    elif kind in COMPARES:
        # With 0.2, half of all lists have the word: yes is as frequent as no.
        often = 0.2 if kind in ("is there", "if there") else 0.5
        for i in range(len(words)):
            if i != place and rng.random() < often:
                words[i] = task.words[0]
    return {
        "instruction": task.text,
        "input": " ".join(words),
        "output": " ".join(task.solve(words)),
        "source": kind,
    }


def is_held_out(instruction):
    """Is it kept for the unseen split? One in ten is, by a hash that never changes."""
    return hashlib.sha256(instruction.encode()).digest()[0] % 10 == 0


def builtin(n_train: int = 100_000, n_valid: int = 620, seed: int = 0) -> dict[str, list[dict]]:
    """The built-in data set, generated.

    Unseen instructions never occur in training; seen ones do, with other inputs. Both have equally
    many of every kind. Training has four times as many of what is hard to learn. `human` is written
    by hand in free phrasing (assets/human.json); no phrasing of ours makes these.
    """
    rng = random.Random(seed)
    kinds = [*KINDS, TWO_STEPS]
    shares = [4 if kind in (*COMPARES, TWO_STEPS) else 1 for kind in kinds]
    train, unseen, seen = [], [], []
    trained = {}  # kind -> the training set's tasks
    while len(train) < n_train:
        task = make_task(rng, rng.choices(kinds, shares)[0])
        if not is_held_out(task.text):
            train.append(make_record(task, rng))
            trained.setdefault(task.kind, []).append(task)
    while len(unseen) < n_valid:
        task = make_task(rng, kinds[len(unseen) % len(kinds)])
        if is_held_out(task.text):
            unseen.append(make_record(task, rng))
    while len(seen) < n_valid:
        tasks = list(trained.values())[len(seen) % len(trained)]
        seen.append(make_record(rng.choice(tasks), rng))
    human = read_records(ASSETS / "human.json")
    return dict(train=train, seen=seen, unseen=unseen, human=human)


# The paper's discrete baseline: a prompt compressed into words instead of activations


def with_keywords(records: list[dict], train_records: list[dict], n: int) -> list[dict]:
    """The records with a key "keywords", which `layout` uses instead of the instruction.

    These are the instruction's n words of the highest TF-IDF, in their order: how often a word is
    in the instruction, times log(N / how many of the N training instructions have it). A word that
    no training instruction has counts as the rarest.
    """
    instructions = {record["instruction"] for record in train_records}
    have = Counter()
    for text in instructions:
        have.update(set(re.findall(r"\w+", text.lower())))
    idf = {word: math.log(len(instructions) / count) for word, count in have.items()}
    rarest = max(idf.values())
    changed = []
    for record in records:
        words = re.findall(r"\w+", record["instruction"].lower())
        tfidf = {word: words.count(word) * idf.get(word, rarest) for word in words}
        best = sorted(tfidf, key=tfidf.get, reverse=True)[:n]
        changed.append(record | {"keywords": " ".join(sorted(best, key=words.index))})
    return changed


# ---- Text layout ----


@dataclass
class Example:
    """Token ids of one record: the prompt with its gist tokens, what follows them, the answer."""

    prompt: list[int]
    input: list[int]
    output: list[int]
    record: dict

    def __len__(self) -> int:
        return len(self.prompt + self.input + self.output)


def layout(record: dict, tokenizer: Tokenizer, n_gist: int, arch: str = "llama") -> Example:
    """Tokenize the three parts of a record, each by itself, with n_gist gist tokens between.

    A record with "keywords" (see `with_keywords`) has them in the place of its instruction.
    """

    def encode(text):
        text = text.strip()
        return tokenizer.encode(tokenizer.prefix + text) if text else []

    instruction = record.get("keywords", record["instruction"])
    prompt = encode(f"Instruction: {instruction.strip()}") + [tokenizer.gist_id] * n_gist
    given = record["input"].strip()
    if given:
        given = f"Input: {given}"
    output = encode(record["output"]) + [tokenizer.eos_id]
    if arch == "t5":
        return Example(prompt, encode(given) + [tokenizer.eos_id], output, record)
    if tokenizer.bos_id is not None:
        prompt = [tokenizer.bos_id] + prompt
    return Example(prompt, encode(f"{given}\nOutput:"), output, record)


def make_examples(
    records: list[dict],
    tokenizer: Tokenizer,
    n_gist: int,
    arch: str = "llama",
    max_length: int = 512,
    max_target: int = 256,
) -> tuple[list[Example], int]:
    """Lay out all records, cut at the right as in the paper. Returns how many were skipped, too.

    LLaMA: prompt, input and output together have at most `max_length` tokens. T5: the source has at
    most `max_length`, the target `max_target`. An example that loses its whole output, or its gist,
    could not teach anything and is skipped.
    """
    examples = []
    for record in records:
        e = layout(record, tokenizer, n_gist, arch)
        room = max_length - len(e.prompt)
        if arch == "t5":
            if len(e.input) > room:
                e.input = e.input[: room - 1] + [tokenizer.eos_id]  # the source keeps its end
            e.output = e.output[:max_target]
        else:
            room -= len(e.input)
            e.output = e.output[:room]
        if e.output and room > 0:
            examples.append(e)
    return examples, len(records) - len(examples)


# ---- Batches ----


def pad(rows: list[list[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one (B, T) int64 tensor, and its attention mask, (B, T) bool."""
    T = max(map(len, rows), default=0)
    tokens = torch.full((len(rows), T), fill)
    attention_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(T - len(row), T) if left else slice(len(row))
        tokens[i, columns] = torch.tensor(row)
        attention_mask[i, columns] = True
    return tokens, attention_mask


def collate(examples: list[Example], pad_id: int, arch: str = "llama") -> Tensors:
    """A batch to train on: tokens and targets, int64, and attention_mask, bool.

    LLaMA: all are (B, T), and targets hold the output's tokens, each at the place before it. T5:
    tokens are the source, targets (B, T_out) the output. IGNORE_INDEX is where there is no label.
    """
    rows, labels = [], []
    for e in examples:
        source = e.prompt + e.input
        if arch == "t5":
            rows.append(source)
            labels.append(e.output)
        else:
            rows.append(source + e.output)
            labels.append([IGNORE_INDEX] * (len(source) - 1) + e.output + [IGNORE_INDEX])
    tokens, attention_mask = pad(rows, pad_id)
    targets, _ = pad(labels, IGNORE_INDEX)
    return {"tokens": tokens, "attention_mask": attention_mask, "targets": targets}


def batch_order(lengths, batch_size, seed):
    """One epoch as batches of indices, shuffled, with rows of similar lengths in each batch.

    Shuffle all, sort by length within stretches of 50 batches, cut into batches, shuffle these. So
    little of a batch is padding.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    stretch = 50 * batch_size
    batches = []
    for start in range(0, len(order), stretch):
        rows = sorted(order[start : start + stretch], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


# ---- Tokenizers ----
#
# Text is only ever text: a "</s>" in it is four characters, not the end. The gist token is one id
# after the tokenizer's own. `files` is what a checkpoint has of a tokenizer: name -> content.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same where numbers are cut out before: digit by digit, and no space goes with them.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class SentencePieceTokenizer:
    """A SentencePiece model: LLaMA's tokenizer.model, T5's spiece.model, or one trained here.

    extra_ids: ids behind the model's own, of which T5 has 100. Raises ValueError.
    """

    prefix = ""  # SentencePiece puts a space before the text itself

    def __init__(self, model, extra_ids=0):
        self.sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        if sp.eos_id() < 0:
            raise ValueError("it has no token for the end of a text")
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id, self.pad_id = sp.eos_id(), max(sp.pad_id(), 0)
        self.gist_id = sp.vocab_size() + extra_ids
        self.vocab_size = self.gist_id + 1
        self.files = {"spiece.model" if extra_ids else "tokenizer.model": model}

    def encode(self, text):
        return self.sp.encode(text.encode("utf-8", "replace"))

    def decode(self, ids):
        size, unknown = self.sp.vocab_size(), self.sp.unk_id()
        return self.sp.decode([i for i in ids if i < size and i != unknown])


@dataclass
class BPETokenizer:
    """Byte-level byte-pair encoding (LLaMA 3, SmolLM2): cut a text into pieces, merge each one."""

    tokens: dict[int, bytes]  # earlier merges have lower ids
    pattern: str  # the regular expression that cuts a text into pieces
    bos_id: int
    eos_id: int
    pad_id: int
    gist_id: int
    files: dict[str, bytes]
    prefix = " "  # a word in the middle of a text begins with its space

    def __post_init__(self):
        self.vocab_size = self.gist_id + 1
        ids = {token: i for i, token in self.tokens.items()}
        # SmolLM2 has no token for 21 bytes that never came up. tiktoken needs an id for each, and
        # `encode` drops them.
        for b in range(256):
            ids.setdefault(bytes([b]), self.vocab_size + b)
        # What the pattern does not match is a piece, too.
        pieces = rf"{self.pattern}|(?s:.+?)(?={self.pattern}|\z)" if self.pattern else "(?s:.+)"
        self.bpe = tiktoken.Encoding("", pat_str=pieces, mergeable_ranks=ids, special_tokens={})

    def encode(self, text):
        return [i for i in self.bpe.encode_ordinary(text) if i < self.vocab_size]

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i in self.tokens])


Tokenizer = SentencePieceTokenizer | BPETokenizer


# What every example has is one piece each, so sequences are a sixth shorter. \u2581 is a space.
LAYOUT_PIECES = ["\n", "\u2581Instruction:", "\u2581Input:", "\nOutput:", "\u2581Output:"]


def train_tokenizer(records, vocab_size):
    """Train a SentencePiece model: byte-pair encoding, with bytes for what it has not seen."""
    text = "".join(
        f"Instruction: {r['instruction']}\nInput: {r['input']}\nOutput: {r['output']}\n"
        for r in records[:20_000]
    )
    lines = [line[:4000] for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    with reading(f"--vocab_size {vocab_size}", "give one that fits the training text"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            pad_id=3,
            user_defined_symbols=LAYOUT_PIECES,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    return SentencePieceTokenizer(model.getvalue())


def load_tokenizer(folder):
    """The tokenizer of a checkpoint, of any kind; None if there is none. Raises DataError."""
    for name in ("tokenizer.model", "spiece.model", "tokenizer.json"):
        file = folder / name
        if file.is_file():
            with reading(file, "no tokenizer that can be used here; download it again"):
                return read_tokenizer(file)
    return None


def read_tokenizer(file):
    """SentencePiece (LLaMA 1, 2, T5), or lines of "base64 rank" (LLaMA 3, then 256 special ids)."""
    if file.suffix == ".json":
        return read_tokenizer_json(file)
    content = file.read_bytes()
    if not re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        return SentencePieceTokenizer(content, extra_ids=100 if file.name == "spiece.model" else 0)
    pairs = [line.split() for line in content.splitlines()]
    tokens = {int(rank): base64.b64decode(token) for token, rank in pairs}
    n, files = max(tokens) + 1, {file.name: content}
    return BPETokenizer(tokens, LLAMA3_PATTERN, n, n + 1, n + 1, n + 256, files)


def read_tokenizer_json(file):
    """Byte-level BPE as the `tokenizers` library writes it. Raises ValueError for other kinds."""
    spec, settings = read_json(file), file.with_name("tokenizer_config.json")
    if spec.get("normalizer"):
        raise ValueError("it has a normalizer")
    vocab = spec["model"]["vocab"]
    # "a b", or, in newer files, ["a", "b"]
    order = [vocab["".join(merge).replace(" ", "")] for merge in spec["model"]["merges"]]
    if order != sorted(order):
        raise ValueError("its merges are not in the order of their ids")
    # A letter stands for each byte: itself where it can be seen, chr(256), chr(257), ... elsewhere.
    unseen = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
    byte_of = {chr(b): b for b in range(256)} | {chr(256 + i): b for i, b in enumerate(unseen)}
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    plain = vocab.keys() - added.keys()
    tokens = {vocab[token]: bytes(map(byte_of.get, token)) for token in plain}

    special = {}
    for kind in ("eos", "bos", "pad"):  # the first stands for those that are not there
        token = read_json(settings).get(f"{kind}_token")
        if isinstance(token, dict):
            token = token["content"]
        special[f"{kind}_id"] = added.get(token, special.get("eos_id"))
    if special["eos_id"] is None:
        raise ValueError("no eos_token in tokenizer_config.json")
    gist_id = max(*vocab.values(), *added.values()) + 1
    files = {f.name: f.read_bytes() for f in (file, settings)}
    pattern = read_pre_tokenizer(spec["pre_tokenizer"])
    return BPETokenizer(tokens, pattern, **special, gist_id=gist_id, files=files)


def read_pre_tokenizer(spec):
    """The pattern that cuts a text into pieces. Raises ValueError."""
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    pattern, gpt2_pattern = "", GPT2_PATTERN
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False} if not pattern:
                pattern = gpt2_pattern
            case {"type": "Digits", "individual_digits": True} if not pattern:
                gpt2_pattern = DIGITS_PATTERN
            case {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated"}:
                if pattern or gpt2_pattern != GPT2_PATTERN:
                    raise ValueError("it cuts a text by two patterns")
                pattern = split
            case _:
                raise ValueError(f"a step of its pre-tokenizer is {json.dumps(step)}")
    if steps[-1]["type"] != "ByteLevel":
        raise ValueError("its pre-tokenizer is not byte-level")
    in_python = re.sub(r"\\p\{\w+\}", "a", pattern)
    if pattern and "" in [match[0] for match in re.finditer(in_python, "ab 1\n.")]:
        raise ValueError(f"the pattern {pattern} matches nothing, and would lose text")
    return pattern


# ---- Checkpoints ----
#
# A checkpoint is a directory. Read are Hugging Face's layout, with safetensors or PyTorch pickles,
# in one file or several; Meta's, where each file has a part of every tensor; and weights released
# as a delta from others. Written is the first of them. Tensors are mapped from their files, not
# read into memory, so that nothing is there twice. What is known about an architecture, its
# configuration's keys and its tensors' names in other layouts, stands beside its model.

ARCHITECTURES = {"llama": (LlamaConfig, Llama), "t5": (T5Config, T5)}  # model_type -> ours
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
HF_FILES = (  # the first of them that is there
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)
# What some files carry beside the weights: copies of the embedding, and what no model reads.
COPIES = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = r"rope\.freqs|.*(rotary_emb\.inv_freq|EncDecAttention\.relative_attention_bias\.weight)"
PUBLISHED_SUMS = {  # of all weights recovered from the paper's released deltas
    "llama-7b-gist": 50547.957,
    "llama-7b-pos_control": 50596.914,
    "llama-7b-neg_control": 50503.879,
}


@torch.no_grad()
def load_model(
    path: AnyPath,
    base: AnyPath | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Model, Tokenizer | None]:
    """Read a checkpoint of any layout: the model and its tokenizer, None if there is none.

    path: a directory; base: that of the original model, if `path` holds a weight delta; dtype: what
    the weights become, by default what the embedding is in the file. Weights that need no
    conversion stay mapped from the file. Raises DataError.
    """
    folder = Path(path)
    model = open_checkpoint(folder)
    dtype = dtype or model.embedding.weight.dtype
    # The final norm is near 1 in every LLaMA; where it is near 0, all weights are a delta.
    is_delta = isinstance(model, Llama) and model.norm.weight.float().abs().mean() < 0.05
    if is_delta and base is None:
        raise DataError(f"{path}: a weight delta; name the original LLaMA-7B with --base DIR")
    if base is not None:
        if not is_delta:
            raise DataError(f"{path}: whole weights, not a weight delta; leave --base out")
        add_base(model, Path(base), dtype, folder.resolve().name)
    model.to(device, dtype)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None and base is not None:
        tokenizer = load_tokenizer(Path(base))
    if tokenizer is not None and tokenizer.gist_id > model.config.vocab_size:
        raise DataError(f"{path}: more tokens than the model has embeddings; use its own tokenizer")
    return model, tokenizer


def read_config(path):
    """A checkpoint's config.json, or Meta's params.json. Runs of ours have the key "gisting".

    Raises DataError.
    """
    for name in ("config.json", "params.json"):
        if (Path(path) / name).is_file():
            return read_json(Path(path) / name)
    raise DataError(
        f"{path}: no checkpoint, it has neither config.json nor params.json; train a run with: "
        f"python train.py --out_dir {path}, or: hf download REPOSITORY --local-dir {path}"
    )


def open_checkpoint(folder):
    """A directory's model, its weights mapped. Raises DataError if they are not the model's."""
    raw = read_config(folder)
    is_meta = "dim" in raw
    tensors = read_meta(folder, raw) if is_meta else read_hf(folder)
    with reading(folder, "use weights, configuration and code that belong together"):
        make_config, make_model = ARCHITECTURES[raw.get("model_type", "llama")]
        if is_meta:
            vocab_size = len(tensors["output.weight"])
            d_ff = len(tensors["layers.0.feed_forward.w1.weight"])
            config = make_config.from_meta(raw, vocab_size, d_ff)
        else:
            config = make_config.from_hf(raw)
        n_layers = config.n_layers + getattr(config, "n_decoder_layers", 0)
        if n_layers > len(tensors):
            raise ValueError(f"{n_layers} layers are more than the weights' tensors")
        with torch.device("meta"):  # shapes without memory
            model = make_model(config)
        names = config.meta_names if is_meta else config.hf_names
        ours = {rename(name, names): name for name, _ in model.named_parameters()}
        embedding, head = tensors[rename("embedding.weight", names)], rename("output.weight", names)
        if head in ours and raw.get("tie_word_embeddings"):
            # Newer T5: the head is the embedding, but without the scaling of our tied head.
            tensors.setdefault(head, embedding.clone())
        for name in tensors.keys() - ours.keys():
            if name in COPIES and not torch.equal(tensors[name], embedding):
                raise ValueError(f"{name} is not the embedding, of which it should be a copy")
            if name in COPIES or re.fullmatch(UNUSED, name):
                del tensors[name]
        weights = {ours.get(name, name): tensor for name, tensor in tensors.items()}
        model.load_state_dict(weights, assign=True)  # raises if one is missing, or too many
    return model


def rename(name, names):
    """A parameter's name in another layout: that of the table `names`, or the same."""
    number = "".join(re.findall(r"layers\.(\d+)\.", name))
    key = name.replace(f"layers.{number}.", "layers.N.").removesuffix(".weight")
    if key not in names:
        return name
    return names[key].replace(".N.", f".{number}.") + ".weight"


def read_hf(folder):
    """All tensors of a directory in Hugging Face's layout. Raises DataError."""
    for pattern in HF_FILES:
        tensors = {}
        for file in folder.glob(pattern):
            with reading(file):
                tensors |= unpickle(file) if file.suffix == ".bin" else read_safetensors(file)
        if tensors:
            return tensors
    if any(folder.glob("checkpoint-*")):
        raise DataError(f"{folder}: not finished; train on with its command and --resume")
    raise DataError(f"{folder}: no weights; expected {' or '.join(HF_FILES)}")


def read_safetensors(file):
    """The tensors of a safetensors file, mapped. Raises what a broken file can.

    The file: 8 bytes with the length of a JSON header, the header, the tensors' bytes.
    """
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, (start, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        # Copy on write: what is changed in memory does not change the file.
        content = np.memmap(file, np.uint8, "c", offset=8 + length + start, shape=end - start)
        tensors[name] = torch.from_numpy(content).view(dtype).view(entry["shape"])
    return tensors


def unpickle(file):
    """What torch.save wrote, tensors mapped. Code is never run. Raises what a broken file can."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError("holds more than tensors, which could run code: not opened") from None


def read_meta(folder, raw):
    """All tensors of a directory in Meta's layout, whose files have a part of each.

    Meta rotates neighboring rows of queries and keys; here the two halves of a head are rotated, as
    in Hugging Face's layout, so the rows of these tensors change places. Raises DataError.
    """
    tensors = {}
    with reading(folder):
        shards = [unpickle(file) for file in sorted(folder.glob("consolidated*.pth"))]
        if not shards:
            raise ValueError("no weights, expected consolidated.00.pth beside params.json")
        pairs = (-1, raw["dim"] // raw["n_heads"] // 2, 2, raw["dim"])
        for name, tensor in shards[0].items():
            if len(shards) > 1 and tensor.ndim == 2:  # all have the norms, and a part of the others
                is_cut_in_rows = tensor.shape[1] == raw["dim"]
                parts = [shard[name] for shard in shards]
                tensor = torch.cat(parts, dim=0 if is_cut_in_rows else 1)
            if name.endswith(("wq.weight", "wk.weight")):
                tensor = tensor.view(pairs).transpose(1, 2).reshape(tensor.shape)
            tensors[name] = tensor
    return tensors


def add_base(model, base, dtype, name):
    """Make weights of a weight delta: add the original's, in fp32. Raises DataError.

    name: if the delta is one of those released, the sum of the weights has to be the published one,
    which counts the rotary tables, too.
    """
    originals = dict(open_checkpoint(base).named_parameters())
    total = model.config.n_layers * rope_frequencies(model.config).sum().item()
    with reading(base, "name the model that the delta was taken from"):
        for key, delta in model.named_parameters():
            weight, original = delta.float(), originals.pop(key)
            weight[: len(original)] += original  # no row for the gist token: as if it were zero
            total += weight.sum().item()
            delta.data = weight.to(dtype)
        for released, published in PUBLISHED_SUMS.items():
            if released in name and not abs(total - published) < 0.5:
                raise ValueError(f"the weights sum to {total:.3f}, published is {published}")


@torch.no_grad()
def add_gist_token(model: Model, tokenizer: Tokenizer) -> None:
    """Give a stock model a row for the gist token: the mean of the tokenizer's other rows.

    Embedding and output head grow if they have no row to spare; FLAN-T5 has 28.
    """
    n = tokenizer.gist_id
    for table in (model.embedding, model.output):
        if table is not None:
            weight = table.weight
            row = weight[:n].float().mean(dim=0, keepdim=True).to(weight)  # (1, D)
            table.weight = nn.Parameter(torch.cat([weight[:n], row, weight[n + 1 :]]))
    model.config = replace(model.config, vocab_size=len(model.embedding.weight))


def save_model(
    path: AnyPath,
    model: Model,
    tokenizer: Tokenizer | None = None,
    gisting: dict | None = None,
    weights: Iterable | None = None,
) -> None:
    """Write a checkpoint in Hugging Face's layout; `gisting` goes into config.json.

    weights: names and whole tensors, in the order of the parameters, for a model that itself holds
    only parts of them; they are written one by one.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, p in model.named_parameters():
        header[rename(name, model.config.hf_names)] = {
            "dtype": dtype_names[p.dtype],
            "shape": list(p.shape),
            "data_offsets": [end, end + p.nbytes],
        }
        end += p.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 64 + 56)  # the tensors begin at a multiple of 64 bytes
    save_config(path, model, tokenizer, gisting)
    with replacing(Path(path) / "model.safetensors") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _, tensor in weights or model.named_parameters():
            f.write(tensor.detach().cpu().flatten().view(torch.uint8).numpy())


def save_config(path, model, tokenizer, gisting):
    """Write a checkpoint without its weights: config.json and the tokenizer's files."""
    Path(path).mkdir(parents=True, exist_ok=True)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = model.config.to_hf() | {"torch_dtype": dtype}
    if gisting is not None:
        config["gisting"] = gisting
    if tokenizer is not None:
        for name, content in tokenizer.files.items():
            write_file(Path(path) / name, content)
        config["bos_token_id"] = tokenizer.bos_id
        config["eos_token_id"] = tokenizer.eos_id
        config["pad_token_id"] = tokenizer.pad_id
    write_file(Path(path) / "config.json", json.dumps(config, indent=2).encode())


# ---- Files ----


@contextmanager
def replacing(file):
    """Write a file under a temporary name, flush it to the disk, and rename it.

    There is never half a file, and the old one stays until the new one is whole.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(file, content):
    """Replace a file by one with this content."""
    with replacing(file) as f:
        f.write(content)


def read_json(file):
    """A JSON object. Raises DataError."""
    with reading(file):
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


# ---- Errors and flags ----


class DataError(Exception):
    """Bad input from outside, in one line: what is wrong, in which file, what to do."""


@contextmanager
def reading(file, remedy="download it again"):
    """Turn whatever a broken file can raise into one line: the file, what is wrong, the remedy."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: {one_line(error)}; {remedy}") from None


def one_line(error):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    return " ".join(str(error).split())[:250] or type(error).__name__


def run(main):
    """Run a script's main function.

    Bad input, and files that cannot be read or written, end it with one line and exit status 2.
    """
    status = 2
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output, like `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except DataError as error:
        message = error
    except OSError as error:  # a full disk, a folder that may not be written
        advice = "check its path, the permissions and the free space"
        message = f"{error.filename or 'a file'}: {one_line(error)}; {advice}"
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def at_least(low, kind=int, at_most=4_294_967_295):
    """A type for argparse: a number in a range; not-a-number and infinity are in none."""

    def parse(text):
        value = kind(text)
        if not low <= value <= at_most:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {at_most}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value: 'x'"
    return parse


# ---- Figures and devices ----


def new_figure(width, height, panels=1):
    """A matplotlib figure for a file, and its axes side by side. Sizes are in inches."""
    from matplotlib.figure import Figure  # without pyplot: no display, and nothing to close

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels)


def save_figure(figure, file):
    """Write a figure in the format that the file's ending names. Raises DataError."""
    with reading(file, "give a file like results.png"), replacing(Path(file)) as f:
        figure.savefig(f, dpi=120, format=Path(file).suffix[1:])


def find_device(name: str | None = None) -> str:
    """The device to use: `name`, or the first of cuda, mps and cpu. Raises DataError."""
    device = name or "cpu"
    if name is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    with reading(f"--device {device}", "give one that this machine has, like cpu"):
        torch.zeros(1, device=device).cpu()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # memory statistics and events are of the current device
    return device


# ---- One record on its way ----


def main():
    """Print the tokens of a record, and what the mask, the model and the loss get of them."""
    from gist_mask import positions, segments

    tokenizer = train_tokenizer(builtin(5000, 1)["train"], 1200)
    record = {
        "instruction": "Put lamp at the front.",
        "input": "fox cup sun",
        "output": "lamp fox cup sun",
    }
    example = layout(record, tokenizer, n_gist=1)
    tokens, _, targets = collate([example], tokenizer.pad_id).values()  # (1, T)
    place = (tokens, tokenizer.gist_id)
    columns = torch.cat([tokens, segments(*place), positions(*place), targets])  # (4, T)
    print(
        f"{json.dumps(record)}\n"
        "segment: 0 prompt, 1 gist, 2 input and output\n"
        "target: the next token if it is to be learned, or -100\n"
        "  id  segment  position  target  piece"
    )
    for row in columns.T.tolist():
        is_gist = row[0] == tokenizer.gist_id
        piece = "<G>" if is_gist else tokenizer.sp.id_to_piece(row[0])
        print("{:4} {:8} {:9} {:7} ".format(*row), repr(piece))


if __name__ == "__main__":
    run(main)
