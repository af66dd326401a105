"""Instructions, the text layout, batches, and the small things that every script needs."""

import argparse
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
import gist_mask
from model import IGNORE_INDEX

ROOT = Path(__file__).parent.parent


class Letters:
    """A tokenizer of one token a character: what it does is easy to see."""

    prefix, bos_id, eos_id, pad_id, gist_id = "_", 1, 2, 0, 999

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join("G" if i == self.gist_id else chr(i) for i in ids if i > 2)


def record(instruction="Say a.", given="b c", output="a"):
    return {"instruction": instruction, "input": given, "output": output}


# ---- The built-in instructions ----


@pytest.fixture(scope="module")
def builtin():
    return data.builtin()


def test_unseen_instructions_are_not_in_training_and_seen_ones_are_with_other_inputs(builtin):
    train = {r["instruction"] for r in builtin["train"]}
    pairs = {(r["instruction"], r["input"]) for r in builtin["train"]}
    assert len(builtin["seen"]) == len(builtin["unseen"]) == 620
    assert len(builtin["human"]) >= 100
    assert not train & {r["instruction"] for r in builtin["unseen"]}
    assert not train & {r["instruction"] for r in builtin["human"]}
    assert all(r["instruction"] in train for r in builtin["seen"])
    assert not pairs & {(r["instruction"], r["input"]) for r in builtin["seen"]}


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    one, same, other = (data.builtin(300, 50, seed) for seed in (1, 1, 2))
    assert one == same
    assert one["train"] != other["train"] and one["unseen"] != other["unseen"]


def test_the_records_of_a_seed_stay_the_same():
    """So that a run can be repeated: hashes of the records of the published results."""
    for seed, published in enumerate(["addcddb8", "c1e4a97e"]):
        content = json.dumps(data.builtin(5000, 62, seed)).encode()
        assert hashlib.sha256(content).hexdigest()[:8] == published


def test_there_are_many_kinds_words_phrasings_and_instructions():
    assert len(data.TASK_KINDS) == 30 and set(data.TASK_KINDS) == set(data.PHRASINGS)
    assert len(set(data.WORDS)) == len(data.WORDS) >= 150
    assert all(len(set(phrasings)) >= 15 for phrasings in data.PHRASINGS.values())
    n = len(data.WORDS)
    values = {"a": n, "b": n - 1, "c": n - 2, "n": 2, "nth": 3, "list": len(data.LIST_NAMES)}
    count = 0
    for phrasings in data.PHRASINGS.values():
        for phrasing in phrasings:
            count += math.prod(values[slot] for slot in re.findall(r"{(\w+)}", phrasing))
    assert count >= 1_000_000  # one-step instructions alone


def test_every_split_asks_of_the_instruction_what_it_should(builtin):
    for split in ("train", "seen", "unseen"):
        records = builtin[split]
        assert sum(r["source"] in data.SEARCHING for r in records) >= 0.15 * len(records)
        assert sum(len(r["instruction"].split()) for r in records) >= 7 * len(records)


def test_guessing_without_the_instruction_fails(builtin):
    """The best rule that knows only the list: the most frequent answer, words named by place."""

    def by_place(r):
        words = r["input"].split()
        return len(words), tuple(words.index(w) if w in words else w for w in r["output"].split())

    answers = [by_place(r) for r in builtin["train"]]
    for length in (3, 4, 5):
        mine = [a for a in answers if a[0] == length]
        assert Counter(mine).most_common(1)[0][1] < 0.15 * len(mine)


def test_human_instructions_use_words_that_training_holds(builtin):
    def words(r):
        return set(re.findall("[a-z]+", f"{r['instruction']} {r['input']} {r['output']}".lower()))

    known = set().union(*map(words, builtin["train"]))
    for r in builtin["human"]:
        assert not words(r) - known, r


EXAMPLES = {  # solved by hand, with the words A, B, C, the number 2 and the third place
    "reverse": ("fox cup sun", "sun cup fox"),
    "first to end": ("fox cup sun", "cup sun fox"),
    "swap ends": ("fox cup sun map", "map cup sun fox"),
    "keep first": ("fox cup sun map", "fox cup"),
    "keep last": ("fox cup sun map", "sun map"),
    "drop first": ("fox cup sun", "cup sun"),
    "drop last": ("fox cup sun", "fox cup"),
    "nth": ("fox cup sun", "sun"),
    "double": ("fox cup sun", "fox fox cup cup sun sun"),
    "repeat nth": ("fox cup sun map", "fox cup sun sun map"),
    "count": ("fox cup sun map", "four"),
    "prepend": ("fox cup", "A fox cup"),
    "append": ("fox cup", "fox cup A"),
    "surround": ("fox cup", "A fox cup B"),
    "insert after nth": ("fox cup sun map", "fox cup sun A map"),
    "set nth": ("fox cup sun map", "fox cup A map"),
    "join": ("fox cup sun", "fox A cup A sun"),
    "before each": ("fox cup", "A fox A cup"),
    "instead": ("fox cup", "A B"),
    "say for each": ("fox cup", "A A"),
    "replace": ("fox A sun", "fox B sun"),
    "remove": ("fox A sun", "fox sun"),
    "is there": ("fox A sun", "yes"),
    "if there": ("fox cup", "C"),
    "which": ("fox A sun", "A"),
    "next": ("fox A sun", "sun"),
    "mark": ("fox A sun", "no yes no"),
    "mark with": ("fox A sun", "C B C"),
    "before a": ("fox A sun", "fox B A sun"),
    "after a": ("fox A sun", "fox A B sun"),
}


@pytest.mark.parametrize("kind", data.TASK_KINDS)
def test_kinds_do_what_they_say(kind):
    given, expected = EXAMPLES[kind]
    task = data.Task("", kind, ("A", "B", "C", 2, 2))
    assert task.solve(given.split()) == expected.split()


def blanked(text):
    """The words of an instruction or a phrasing, with * for all that stands in a slot."""
    text = re.sub(r"{\w+}", "*", text.lower())
    for name in sorted(data.LIST_NAMES, key=len, reverse=True):
        text = text.replace(name, "*")
    arguments = {*data.WORDS, *data.NUMBERS, *data.ORDINALS}
    return tuple("*" if word in arguments else word for word in re.findall(r"\w+|\*", text))


@pytest.mark.parametrize("kind", data.TASK_KINDS)
def test_phrasings_have_all_slots_of_their_kind_and_are_not_the_human_ones(kind):
    """Each has a slot at least: else all its texts are held out, or none."""
    human = data.read_records(data.ASSETS / "human.json")
    by_hand = {blanked(record["instruction"]) for record in human}
    phrasings = data.PHRASINGS[kind]
    slots = [set(re.findall(r"{(\w+)}", phrasing)) for phrasing in phrasings]
    assert all(slots) and len({frozenset(some - {"list"}) for some in slots}) == 1
    texts = {blanked(phrasing) for phrasing in phrasings}
    assert len(texts) == len(phrasings) and not texts & by_hand


def test_two_steps_are_done_one_after_the_other():
    first = data.Task("Drop the first word.", "drop first", ("", "", "", 2, 0))
    second = data.Task("Put fox at the end.", "append", ("fox", "", "", 2, 0))
    task = data.in_turn(first, second)
    assert task.text == "Drop the first word, then put fox at the end."
    assert task.solve(["cup", "sun"]) == ["sun", "fox"]


def test_common_phrasings_are_common_and_rare_ones_come(builtin):
    """The phrasing at rank r comes r ** -1.3 times as often as the first."""
    rng = random.Random(0)
    n = len(data.PHRASINGS["reverse"])
    texts = Counter(blanked(data.make_task(rng, "reverse").text) for _ in range(20_000))
    counts = [texts[blanked(phrasing)] for phrasing in data.PHRASINGS["reverse"]]
    whole = sum(rank**-1.3 for rank in range(1, n + 1))
    for rank, count in enumerate(counts, 1):
        assert abs(count / 20_000 - rank**-1.3 / whole) < 0.02 and count > 0


def test_every_kind_is_asked_for_as_often_as_it_should(builtin):
    kinds = [*data.TASK_KINDS, "two steps"]
    for split in ("seen", "unseen"):
        counts = Counter(r["source"] for r in builtin[split])
        assert max(counts.values()) - min(counts[kind] for kind in kinds) <= 1
    counts = Counter(r["source"] for r in builtin["train"])
    whole = sum(counts.values())
    for kind in kinds:
        share = (4 if kind in (*data.SEARCHING, "two steps") else 1) / 64
        assert abs(counts[kind] / whole - share) < 0.01


def test_where_a_word_is_to_be_found_guessing_does_not_help():
    """The commonest answer to a kind that compares is right for at most a bit over half."""
    rng = random.Random(0)
    for kind in data.SEARCHING:
        tasks = [data.make_task(rng, kind) for _ in range(1000)]
        records = [data.make_record(task, rng) for task in tasks]
        answers = Counter(r["output"] for r in records)
        assert answers.most_common(1)[0][1] < 560
        assert all(r["output"] for r in records)  # what is removed is never the whole list
        there = sum(task.slots[0] in r["input"].split() for task, r in zip(tasks, records))
        assert 440 < there <= 1000


# ---- Files ----


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_arrays_and_lines_are_read_alike_and_missing_splits_are_empty(tmp_path):
    records = [record(), {"instruction": "Say d.", "output": "é", "id": 7}]
    lines = "\r\n\r\n".join(json.dumps(r) for r in records)
    write(tmp_path, "my_train_set.json", json.dumps(records))
    write(tmp_path, "my_validation_human.json", b"\xef\xbb\xbf" + lines.encode())
    loaded = data.load_instructions(str(tmp_path))
    assert loaded["train"] == loaded["human"] == [record(), record("Say d.", "", "é")]
    assert loaded["seen"] == loaded["unseen"] == []


def test_a_data_file_belongs_to_one_split_and_may_be_json_lines(tmp_path):
    write(tmp_path, "a_train.jsonl", json.dumps(record()))
    write(tmp_path, "constrained_validation_unseen.json", json.dumps([record()] * 2))
    write(tmp_path, "constrained_validation_other.json", json.dumps([record()] * 3))
    write(tmp_path, "train.txt", "no data")
    loaded = data.load_instructions(str(tmp_path))
    assert [len(loaded[split]) for split in ("train", *data.SPLITS)] == [1, 0, 2, 0]


def test_files_of_a_run_are_not_taken_for_data(tmp_path):
    """A run whose --out_dir is the data directory: its log is no training set."""
    write(tmp_path, "a_train.jsonl", json.dumps(record()))
    names = ("train_log.jsonl", "config.json", "metrics.json", "outputs-seen.csv", "tokenizer.json")
    for name in names:
        write(tmp_path, name, "[3]")
    assert data.load_instructions(str(tmp_path))["train"] == [record()]


@pytest.mark.parametrize("before, between", [("", "\n"), ("[", ",")])
def test_a_byte_order_mark_is_no_part_of_the_data(before, between, tmp_path):
    content = before + between.join([json.dumps(record())] * 2) + "]" * len(before)
    write(tmp_path, "a_train.json", content.encode("utf-8-sig"))
    write(tmp_path, "a_validation_seen.json", b"\xef\xbb\xbf\n")
    assert data.load_instructions(str(tmp_path))["train"] == [record()] * 2


GOOD = '{"instruction": "a", "output": "b"}'
BAD_DATA = {
    "a line cut off": (GOOD + '\n{"instruction": "a", "outp', "x_train.json, line 2: "),
    "broken array": (f'[{GOOD},\n{{"instruction" "a"}}]', "x_train.json: .* line 2"),
    "no instruction": (GOOD + '\n\n{"input": "a", "output": "b"}', "line 3: 'instruction' is miss"),
    "output a number": (f'[{GOOD}, {{"instruction": "a", "output": 3}}]', "record 2: 'output' is"),
    "no input": ('[{"instruction": "a", "output": "b", "input": null}]', "record 1: 'input' is"),
    "a number": ("[1]", "record 1: not an object"),
    "empty": ("", "no training examples"),
    "empty array": ("[]", "no training examples"),
    "not UTF-8": (GOOD.encode() + b'\n{"instruction": "\xff"}', "line 2: .*decode"),
    "nested deeply": (GOOD + "\n" + '{"a":' * 100_000, "line 2: .*recursion"),
    "half a character": (GOOD[:-2] + '\\ud83d"}', "line 1: .*surrogates not allowed"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_a_broken_file_is_named_with_its_line(tmp_path, what):
    content, says = BAD_DATA[what]
    write(tmp_path, "x_train.json", content)
    with pytest.raises(data.DataError, match=says) as error:
        data.load_instructions(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_half_a_character_in_a_validation_file_is_found_before_the_training(tmp_path):
    write(tmp_path, "a_train.jsonl", json.dumps(record()))
    write(tmp_path, "a_validation_seen.jsonl", json.dumps(record(output="\ud83d")))
    with pytest.raises(data.DataError, match="validation_seen.jsonl, line 1"):
        data.load_instructions(str(tmp_path))


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError("disk full")

    data.write_file(tmp_path / "a", b"first")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        data.write_file(tmp_path / "a", b"second")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


# ---- Layout and batches ----


def texts(example):
    return [Letters().decode(ids) for ids in (example.prompt, example.input, example.output)]


def test_layout_is_the_papers():
    e = data.layout(record(" Say a. ", " b c\n", " a "), Letters(), n_gist=2)
    assert (e.prompt[0], e.output[-1]) == (1, 2)
    assert texts(e) == ["_Instruction: Say a.GG", "_Input: b c\nOutput:", "_a"]
    e = data.layout(record(given=" \n"), Letters(), n_gist=0)
    assert texts(e) == ["_Instruction: Say a.", "_Output:", "_a"]
    e = data.layout(record(), Letters(), n_gist=1, arch="t5")
    assert texts(e) == ["_Instruction: Say a.G", "_Input: b c", "_a"]
    assert (e.prompt[0], e.input[-1], e.output[-1]) == (ord("_"), 2, 2)
    e = data.layout(record(given=""), Letters(), n_gist=1, arch="t5")
    assert e.input == [2]


@pytest.mark.parametrize("n_gist", [0, 1, 3])
@pytest.mark.parametrize("see_start", [False, True])
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_every_token_has_its_segment(arch, see_start, n_gist):
    """The first token of a decoder's row is START if it is to be seen; without gists, all is input."""
    e = data.layout(record(), Letters(), n_gist, arch, see_start)
    named = "".join("_pgis"[label] for label in e.segments)
    prompt = "p" * len("_Instruction: Say a.") if n_gist else "i" * len("_Instruction: Say a.")
    start = {"t5": "", "llama": "s" if see_start else prompt[0]}[arch]
    assert named == start + prompt + "g" * n_gist + "i" * len(e.input)
    assert "g" * n_gist == "".join("g" for token in e.prompt if token == Letters.gist_id)


def test_a_tokenizer_without_a_first_token_has_none_in_its_rows():
    tokenizer = Letters()
    tokenizer.bos_id = None
    e = data.layout(record(), tokenizer, 1, see_start=True)
    assert e.prompt[0] == ord("_") and gist_mask.START not in e.segments


@pytest.mark.parametrize("see_start", [False, True])
def test_long_examples_are_cut_at_the_right_and_those_without_output_skipped(see_start):
    records = [record(output="abcdef")]
    e = data.layout(records[0], Letters(), 1, "llama", see_start)
    whole, n_source = e.prompt + e.input + e.output, len(e.prompt + e.input)
    for n in range(1, len(whole) + 3):
        some, skipped = data.make_examples(records, Letters(), 1, "llama", see_start, n)
        assert skipped == 1 - len(some) == (n <= n_source)
        for cut in some:
            assert cut.prompt + cut.input + cut.output == whole[:n]
            assert cut.segments == e.segments
            n_letters = min(6, n - n_source - 1)  # after the prefix
            assert cut.record["output"].removeprefix("_") == "abcdef"[:n_letters]
    assert records[0]["output"] == "abcdef"


def test_a_long_source_of_t5_keeps_its_end_and_loses_no_gist():
    records = [record(given="b" * 20)]
    e = data.layout(records[0], Letters(), 1, "t5")
    source = e.prompt + e.input
    for n in range(1, len(source) + 2):
        some, skipped = data.make_examples(records, Letters(), 1, "t5", False, n, 2)
        assert skipped == 1 - len(some) == (n <= len(e.prompt))
        for cut in some:
            kept = source if n >= len(source) else source[: n - 1] + [2]
            assert cut.prompt + cut.input == kept and cut.output == e.output[:2]
            assert cut.segments == e.segments[:n]


def test_an_example_that_loses_a_gist_token_after_its_input_is_skipped(monkeypatch):
    """By an edit of the layout alone: a gist token after the input, too."""
    layout = data.layout

    def gist_after(*args):
        e = layout(*args)
        e.input, e.segments = e.input + [Letters.gist_id], e.segments + [gist_mask.GIST]
        return e

    monkeypatch.setattr(data, "layout", gist_after)
    n_source = len(gist_after(record(), Letters(), 1, "t5", False).segments)
    for n in range(1, n_source + 2):
        some, skipped = data.make_examples([record()], Letters(), 1, "t5", False, n)
        assert skipped == 1 - len(some) == (n < n_source)


@pytest.mark.parametrize("see_start", [False, True])
def test_targets_are_the_output_one_place_early(see_start):
    records = [record(output="xyz"), record("Say.", "", "x")]
    examples, _ = data.make_examples(records, Letters(), 1, see_start=see_start)
    batch = data.collate(examples, pad_id=7)
    for row, e in enumerate(examples):
        tokens, segments, targets = (batch[k][row] for k in ("tokens", "segments", "targets"))
        n = len(e)
        assert tokens[:n].tolist() == e.prompt + e.input + e.output
        assert segments[:n].tolist() == e.segments + [gist_mask.INPUT] * len(e.output)
        assert all(tokens[n:] == 7) and all(segments[n:] == gist_mask.PADDING)
        labels = (targets != IGNORE_INDEX).nonzero()[:, 0]
        assert targets[labels].tolist() == e.output == tokens[labels + 1].tolist()


def test_t5_has_its_source_and_its_output_apart():
    records = [record(output="xyz"), record("Say.", "", "x")]
    examples, _ = data.make_examples(records, Letters(), 1, "t5")
    batch = data.collate(examples, pad_id=7)
    for row, e in enumerate(examples):
        tokens, segments, targets = (batch[k][row] for k in ("tokens", "segments", "targets"))
        n = len(e.segments)
        assert tokens[:n].tolist() == e.prompt + e.input and segments[:n].tolist() == e.segments
        assert all(tokens[n:] == 7) and all(segments[n:] == gist_mask.PADDING)
        assert (
            targets[targets != IGNORE_INDEX].tolist()
            == e.output
            == targets[: len(e.output)].tolist()
        )


def test_rows_are_padded_on_the_side_that_is_asked_for():
    assert data.pad([[5, 6], [7]]).tolist() == [[5, 6], [7, 0]]
    assert data.pad([[5, 6], [7], []], 9, side="left").tolist() == [[5, 6], [9, 7], [9, 9]]


def test_batches_of_no_rows_and_of_empty_rows_are_batches():
    assert data.pad([[], []]).shape == (2, 0) and data.pad([]).shape == (0, 0)
    for x in (*data.collate([], 0).values(), data.pad([[]])):
        assert len(x) <= 1 and x.dtype == torch.int64


@pytest.mark.parametrize("n, batch_size", [(1, 4), (7, 8), (1000, 16), (3001, 10)])
def test_an_epoch_has_every_example_once_and_little_padding(n, batch_size):
    rng = random.Random(0)
    lengths = [rng.randint(5, 300) for _ in range(n)]
    batches = data.batch_order(lengths, batch_size, seed=3)
    assert sorted(i for rows in batches for i in rows) == list(range(n))
    assert max(map(len, batches)) <= batch_size and len(batches) == -(-n // batch_size)
    assert batches == data.batch_order(lengths, batch_size, seed=3)
    if n >= 1000:
        places = sum(max(lengths[i] for i in rows) * len(rows) for rows in batches)
        assert batches != data.batch_order(lengths, batch_size, seed=4)
        assert 1 - sum(lengths) / places < 0.12


# ---- The tokenizer that is trained here ----


def test_a_tokenizer_trained_on_the_builtin_text_has_a_token_for_every_word(builtin):
    tokenizer = data.train_tokenizer(builtin["train"], 2048)
    assert all(len(tokenizer.encode(word)) == 1 for word in data.WORDS)
    ids = {tokenizer.gist_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(ids) == 4 and tokenizer.gist_id == tokenizer.vocab_size - 1
    for text in ("fox bread", "naïve café 日本 🦊", "two\nlines", "x" * 50):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with_gist = tokenizer.encode("fox") + [tokenizer.gist_id] + tokenizer.encode("cup")
    assert tokenizer.decode(with_gist) == "fox cup"


@pytest.mark.parametrize("letters", ["一丁七万丈三上下不", "абвгдежзи"])
def test_long_lines_of_any_script_are_learned(letters):
    """SentencePiece skips lines of more than 4,192 bytes, which is 1,397 Chinese letters."""
    rng = random.Random(0)
    records = [record("".join(rng.choices(letters, k=2500))) for _ in range(10)]
    tokenizer = data.train_tokenizer(records, 400)
    assert len(tokenizer.encode("".join(rng.choices(letters, k=100)))) <= 102


def test_more_characters_than_vocab_size_are_answered_with_its_name():
    records = [record("".join(map(chr, range(i, i + 60)))) for i in range(0x4E00, 0x6500, 60)]
    with pytest.raises(data.DataError, match="--vocab_size 500: .*500 vs") as error:
        data.train_tokenizer(records, 500)
    assert "\n" not in str(error.value)


# ---- Small things ----


@pytest.mark.parametrize("name", ["cuda:99", "cpu:banana", "gpu", "meta", "mps:7", ":"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name):
    with pytest.raises(data.DataError, match=f"--device {name}: .*cpu"):
        data.find_device(name)


def test_the_device_is_the_one_asked_for_or_the_best():
    assert data.find_device("cpu") == "cpu"
    best = "cuda" if torch.cuda.is_available() else None
    assert data.find_device() == (best or data.find_device())
    torch.zeros(1, device=data.find_device())


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "1e400", "11", "x", "", "0x1"])
def test_a_flag_refuses_numbers_out_of_its_range(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=data.at_least(0, float, 10))
    parser.add_argument("--steps", type=data.at_least(0, at_most=10))
    for flag in ("--rate", "--steps"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"{flag}={text}"])
        assert flag in capsys.readouterr().err.splitlines()[-1]
    args = parser.parse_args(["--rate", "0.5", "--steps", "10"])
    assert (args.rate, args.steps) == (0.5, 10)


@pytest.mark.parametrize("name", [".", "no_ending", "a.banana", "no/such/folder.png", "a."])
def test_a_picture_that_cannot_be_written_leaves_nothing_behind(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="give a file like results.png"):
        data.save_figure(data.new_figure(1, 1)[0], name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_pictures_are_written_and_no_figure_stays_open(ending, tmp_path):
    from matplotlib import pyplot

    for _ in range(3):
        figure, axes = data.new_figure(3, 2, panels=2)
        axes[1].plot([1, 2])
        data.save_figure(figure, tmp_path / f"a.{ending}")
    assert [f.name for f in tmp_path.iterdir()] == [f"a.{ending}"]
    assert (tmp_path / f"a.{ending}").stat().st_size > 500 and not pyplot.get_fignums()


def script(body, *args, **how):
    code = f"import data\ndef main():\n    {body}\ndata.run(main)"
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True, **how
    )


@pytest.mark.parametrize(
    "body, status, says",
    [
        ("raise data.DataError('bad')", 2, "-c: bad"),
        ("open('/no/such/file', 'wb')", 2, "-c: /no/such/file: No such file"),
        ("raise KeyboardInterrupt", 130, "-c: interrupted"),
    ],
)
def test_what_a_user_can_cause_ends_in_one_line(body, status, says):
    process = script(body)
    _, stderr = process.communicate()
    assert process.returncode == status and stderr.startswith(says) and stderr.count("\n") == 1


@pytest.mark.parametrize("body", ["print('x' * 100_000)", "print('x'); raise SystemExit(0)"])
def test_a_closed_pipe_ends_quietly(body):
    read, write = os.pipe()
    os.close(read)
    process = script(body, stdout=write)
    os.close(write)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")


@pytest.mark.parametrize("command", ["data.py", "profile.py paper"])
def test_what_prints_may_be_cut_short(command):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_file_shows_one_record_on_its_way():
    done = subprocess.run([sys.executable, "data.py"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 40
    shown = json.loads(lines[0])
    _, segments, positions, targets = zip(*[line.split()[:4] for line in lines[3:]])
    n_prompt, n_input = segments.count("prompt"), segments.count("input")
    assert list(segments) == ["prompt"] * n_prompt + ["gist"] + ["input"] * n_input
    assert [int(position) for position in positions] == list(range(-n_prompt - 1, n_input))
    labels = [target for target in targets if int(target) != IGNORE_INDEX]
    assert len(labels) > len(shown["output"].split())
