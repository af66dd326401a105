"""Instructions, the text layout and batches."""
import json
import random
import re
from collections import Counter

import pytest

import data
from model import IGNORE


class Letters:
    """A tokenizer of one token a character: what it does is easy to see."""
    prefix, bos_id, eos_id, pad_id, gist_id, vocab_size = "_", 1, 2, 0, 999, 1000

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) if i != self.gist_id else "G" for i in ids if i not in (0, 1, 2))


def record(instruction="Say a.", given="b c", output="a"):
    return {"instruction": instruction, "input": given, "output": output}


# ---- The built-in instructions ----

@pytest.fixture(scope="module")
def builtin():
    return data.builtin()


def test_unseen_instructions_are_not_in_training_and_seen_ones_are_with_other_inputs(builtin):
    train = {r["instruction"] for r in builtin["train"]}
    pairs = {(r["instruction"], r["input"]) for r in builtin["train"]}
    assert len(builtin["seen"]) == len(builtin["unseen"]) == 500 and len(builtin["human"]) >= 100
    assert not train & {r["instruction"] for r in builtin["unseen"]}
    assert not train & {r["instruction"] for r in builtin["human"]}
    assert all(r["instruction"] in train and (r["instruction"], r["input"]) not in pairs for r in builtin["seen"])


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    one, same, other = (data.builtin(300, 50, seed) for seed in (1, 1, 2))
    assert one == same and one["train"] != other["train"] and one["unseen"] != other["unseen"]


def test_there_are_many_families_words_ways_to_ask_and_instructions():
    assert len(data.FAMILIES) >= 20 and len(set(data.WORDS)) == len(data.WORDS) >= 150
    assert all(len(set(f.templates)) >= 4 for f in data.FAMILIES.values())
    n = len(data.WORDS)
    slots = {"{a}": n, "{b}": n - 1, "{c}": n - 2, "{n}": 2, "{nth}": 3, "{list}": len(data.LISTS)}
    count = 0
    for family in data.FAMILIES.values():
        for template in family.templates:
            ways = 1
            for slot, values in slots.items():
                ways *= values if slot in template else 1
            count += ways
    assert count >= 1_000_000                                # one-step instructions alone


def test_every_split_asks_of_the_instruction_what_it_should(builtin):
    compares = [name for name, f in data.FAMILIES.items() if f.compares]
    for split in ("train", "seen", "unseen"):
        records = builtin[split]
        assert sum(r["source"] in compares for r in records) >= 0.15 * len(records)
        assert sum(len(r["instruction"].split()) for r in records) >= 7 * len(records)
    assert sum(len(re.findall(r"\w+|[^\w\s]", r["instruction"])) for r in builtin["train"]) >= 8 * len(builtin["train"])


def test_guessing_without_the_instruction_fails(builtin):
    """The best rule that knows only the list: the answer that is most frequent, written with places of the list for its words."""
    def by_place(r):
        words = r["input"].split()
        return len(words), tuple(words.index(w) if w in words else w for w in r["output"].split())

    answers = [by_place(r) for r in builtin["train"]]
    for length in (3, 4, 5):
        mine = [a for a in answers if a[0] == length]
        assert Counter(mine).most_common(1)[0][1] < 0.15 * len(mine)


def test_human_instructions_use_words_that_training_holds(builtin):
    words = lambda r: set(re.findall(r"[a-z]+", f"{r['instruction']} {r['input']} {r['output']}".lower()))
    known = set().union(*map(words, builtin["train"]))
    for r in builtin["human"]:
        assert not words(r) - known, r


EXAMPLES = {      # solved by hand: template, (a, b, c), number or place, list, answer
    "reverse": ("fox cup sun", "sun cup fox"), "first to end": ("fox cup sun", "cup sun fox"), "swap ends": ("fox cup sun map", "map cup sun fox"),
    "keep first": ("fox cup sun map", "fox cup"), "keep last": ("fox cup sun map", "sun map"), "drop first": ("fox cup sun", "cup sun"),
    "drop last": ("fox cup sun", "fox cup"), "nth": ("fox cup sun", "sun"), "double": ("fox cup sun", "fox fox cup cup sun sun"),
    "repeat nth": ("fox cup sun map", "fox cup sun sun map"), "count": ("fox cup sun map", "four"), "prepend": ("fox cup", "A fox cup"),
    "append": ("fox cup", "fox cup A"), "surround": ("fox cup", "A fox cup B"), "insert after nth": ("fox cup sun map", "fox cup sun A map"),
    "set nth": ("fox cup sun map", "fox cup A map"), "join": ("fox cup sun", "fox A cup A sun"), "before each": ("fox cup", "A fox A cup"),
    "instead": ("fox cup", "A B"), "say for each": ("fox cup", "A A"), "replace": ("fox A sun", "fox B sun"), "remove": ("fox A sun", "fox sun"),
    "is there": ("fox A sun", "yes"), "if there": ("fox cup", "C"), "which": ("fox A sun", "A"),
    "next": ("fox A sun", "sun"),
}


@pytest.mark.parametrize("name", data.FAMILIES)
def test_families_do_what_they_say(name):
    given, expected = EXAMPLES[name]
    assert data.FAMILIES[name].apply(given.split(), "A", "B", "C", 2) == expected.split()


def test_two_steps_are_done_one_after_the_other():
    rng = random.Random(0)
    tasks = [t for t in (data.make_task(rng) for _ in range(20_000)) if t.family == "two steps"]
    assert 0.06 < len(tasks) / 20_000 < 0.10
    steps = {"Reverse": lambda w: w[::-1], "Drop the first": lambda w: w[1:], "Drop the last": lambda w: w[:-1],
             "reverse": lambda w: w[::-1], "drop the first": lambda w: w[1:], "drop the last": lambda w: w[:-1]}
    known = 0
    for task in tasks:
        if task.text.count(", then ") > 1:                   # "Write fox, then the list, then ..."
            continue
        first, second = ([f for start, f in steps.items() if step.startswith(start)] for step in task.text.split(", then "))
        if first and second:
            known += 1
            assert task.solve(["fox", "cup", "sun", "map"]) == second[0](first[0](["fox", "cup", "sun", "map"]))
    assert known > 10


# ---- Files ----

def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")


def test_arrays_and_lines_are_read_alike_and_missing_splits_are_empty(tmp_path):
    records = [record(), {"instruction": "Say d.", "output": "é"}]
    write(tmp_path, "my_train_set.json", json.dumps(records))
    write(tmp_path, "my_validation_human.json", "\n\n".join(json.dumps(r) for r in records) + "\n")
    loaded = data.load_instructions(str(tmp_path))
    assert loaded["train"] == loaded["human"] == [record(), record("Say d.", "", "é")]
    assert loaded["seen"] == loaded["unseen"] == []


@pytest.mark.parametrize("content, says", [
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "outp', "x_train.json, line 2: broken JSON"),
    ('[{"instruction": "a", "output": "b"},\n{"instruction" "a"}]', "x_train.json, line 2: broken JSON"),
    ('{"instruction": "a", "output": "b"}\n\n{"input": "a", "output": "b"}', "x_train.json, line 3: 'instruction' is missing"),
    ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}]', "x_train.json, record 2: 'output' is missing or not a string"),
    ('[1]', "x_train.json, record 1: not an object"),
    ("", "no training examples"), ("[]", "no training examples"), (b"\xff\xfe{", "line 1: not UTF-8"),
    ("[" * 100_000, "nested too deeply"),
])
def test_a_broken_file_is_named_with_its_line(tmp_path, content, says):
    (tmp_path / "x_train.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.DataError) as error:
        data.load_instructions(str(tmp_path))
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_up_to_one_percent_of_bad_records_are_left_out_and_told(tmp_path, capsys):
    good = [json.dumps(record(f"Say {i}.")) for i in range(297)]
    lines = good[:100] + ["{"] + good[100:200] + [json.dumps({"instruction": None, "output": "x"})] + good[200:] + ['{"output": "x"}']
    (tmp_path / "x_train.json").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert data.load_instructions(str(tmp_path))["train"] == [json.loads(line) for line in good]
    told = capsys.readouterr().err
    assert all(place in told for place in ("line 101: broken JSON", "line 202: 'instruction'", "line 300: 'instruction'")) and told.count("\n") == 1
    (tmp_path / "x_train.json").write_text("\n".join(lines + ["[]"]))
    with pytest.raises(data.DataError, match="line 300: .*; and 1 more: bad records: 4 of 301"):
        data.load_instructions(str(tmp_path))


# ---- Layout and batches ----

def test_layout_is_the_papers():
    e = data.layout(record(" Say a. ", " b c\n", " a "), Letters(), n_gist=2)
    assert (e.prompt[0], e.output[-1]) == (1, 2)
    assert [Letters().decode(ids) for ids in (e.prompt, e.input, e.output)] == ["_Instruction: Say a.GG", "_Input: b c\nOutput:", "_a"]
    e = data.layout(record(given=" \n"), Letters(), n_gist=0)
    assert [Letters().decode(ids) for ids in (e.prompt, e.input, e.output)] == ["_Instruction: Say a.", "_Output:", "_a"]


def test_long_examples_are_cut_at_the_right_and_those_without_output_skipped():
    whole, _ = data.make_examples([record(output="abcdef")], Letters(), 1)
    for max_length in range(1, len(whole[0]) + 3):
        examples, skipped = data.make_examples([record(output="abcdef")], Letters(), 1, max_length=max_length)
        expected = (whole[0].prompt + whole[0].input + whole[0].output)[:max_length]
        if max_length <= len(whole[0].prompt) + len(whole[0].input):
            assert (examples, skipped) == ([], 1)
        else:
            assert skipped == 0 and examples[0].prompt + examples[0].input + examples[0].output == expected


def test_targets_are_the_output_one_place_early():
    examples, _ = data.make_examples([record(output="xyz"), record("Say.", "", "x")], Letters(), 1)
    batch = data.collate(examples, pad_id=0)
    for row, e in enumerate(examples):
        tokens, targets, valid = (batch[k][row] for k in ("tokens", "targets", "valid"))
        assert valid.sum() == len(e) and tokens[valid].tolist() == e.prompt + e.input + e.output
        labelled = (targets != IGNORE).nonzero()[:, 0]
        assert targets[labelled].tolist() == e.output == tokens[labelled + 1].tolist()


def test_an_epoch_has_every_example_once_and_little_padding():
    rng = random.Random(0)
    for n, batch_size in ((1, 4), (7, 8), (1000, 16), (3001, 10)):
        lengths = [rng.randint(5, 300) for _ in range(n)]
        batches = data.batch_order(lengths, batch_size, seed=3)
        assert sorted(i for rows in batches for i in rows) == list(range(n))
        assert max(map(len, batches)) <= batch_size and len(batches) == -(-n // batch_size)
        assert batches == data.batch_order(lengths, batch_size, seed=3)
        assert n < 100 or (batches != data.batch_order(lengths, batch_size, seed=4) and data.padding_share(lengths, batches) < 0.12)
    assert data.padding_share([2, 4], [[0, 1]]) == 0.25


def test_rows_are_padded_on_the_side_that_is_asked_for():
    assert [x.tolist() for x in data.pad([[5, 6], [7]], 0)] == [[[5, 6], [7, 0]], [[True, True], [True, False]]]
    assert [x.tolist() for x in data.pad([[5, 6], [7]], 0, left=True)] == [[[5, 6], [0, 7]], [[True, True], [False, True]]]


def test_a_tokenizer_trained_on_the_builtin_text_has_a_token_for_every_word(builtin):
    tokenizer = data.train_tokenizer(builtin["train"], 2048)
    assert all(len(tokenizer.encode(word)) == 1 for word in data.WORDS)
    assert len({tokenizer.gist_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 4
    assert tokenizer.gist_id == tokenizer.vocab_size - 1
    for text in ("fox bread", "naïve café 日本 🦊", "two\nlines", "x" * 50):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("fox") + [tokenizer.gist_id] + tokenizer.encode("cup")) == "fox cup"


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    data.write_file(tmp_path / "a", b"first")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        data.write_file(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
