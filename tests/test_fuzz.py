"""Broken files are refused in one line: no traceback, no hang, no code that runs.

A fixed set of random mutations of every file that is read.
"""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import data

from exercises import gist_library  # isort: skip
from model import Llama, LlamaConfig

GOLDEN = Path(__file__).parent / "golden"
MUTATIONS = 60  # of every kind of directory
NUMBERS = (b"9", b"0", b"-1", b"99999999999", b"null", b'"x"', b"[]")
WORDS = (
    (b'"', b"'"),
    (b"{", b"["),
    (b"[", b"{"),
    (b":", b""),
    (b"0", b""),
    (b"llama", b"t5"),
    (b"true", b"3"),
)


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Some bytes changed, mostly near the beginning, where headers are; or worse."""
    match rng.choice(("flip", "flip", "cut", "swap", "number", "word")):
        case "cut":
            return content[: rng.randrange(len(content))]
        case "swap":
            return rng.choice(others)
        case "number":  # a digit of a size, an offset, a count
            digits = [i for i, c in enumerate(content[:5000]) if chr(c).isdigit()]
            at = rng.choice(digits or [0])
            return content[:at] + rng.choice(NUMBERS) + content[at + 1 :]
        case "word":
            return content.replace(*rng.choice(WORDS))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        at = min(int(rng.expovariate(1 / 300)), len(content) - 1)
        changed[at] = rng.randrange(256)
    return bytes(changed)


def too_slow(*_):
    raise AssertionError("a broken file was read for 60 seconds")


@pytest.fixture(autouse=True)
def alarm():
    """A handler, without which an alarm would end the whole test run without a word."""
    before = signal.signal(signal.SIGALRM, too_slow)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fuzz(folder: Path, target: Path, read, seed: int) -> int:
    """Call read(target) with one file of the folder mutated, again and again: how many refused?"""
    rng, refused = random.Random(seed), 0
    files = sorted(f for f in folder.iterdir() if f.suffix not in (".npz", ".csv", ".png"))
    contents = {f.name: f.read_bytes() for f in files}
    shutil.copytree(folder, target)
    for _ in range(MUTATIONS):
        name = rng.choice(sorted(contents))
        (target / name).write_bytes(mutate(contents[name], rng, list(contents.values())))
        signal.alarm(60)
        try:
            read(target)
        except data.DataError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, error
        signal.alarm(0)
        (target / name).write_bytes(contents[name])
    return refused


CHECKPOINTS = sorted(f.parent for f in GOLDEN.glob("*/config.json"))
TOKENIZERS = sorted((GOLDEN / "tokenizers").iterdir())


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda f: f.name)
def test_mutated_checkpoints(folder, tmp_path):
    """What is not refused is a model that works."""

    def read(target):
        model, _ = data.load_model(target)
        model.float().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)

    assert fuzz(folder, tmp_path / "mutated", read, seed=1) > MUTATIONS / 8


@pytest.mark.parametrize("folder", TOKENIZERS, ids=lambda f: f.name)
def test_mutated_tokenizers(folder, tmp_path):
    def read(target):
        tokenizer = data.load_tokenizer(target)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("Two words,  123 \N{GRINNING FACE}"))

    fuzz(folder, tmp_path / "mutated", read, seed=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ours, as train.py leaves it, with its data and its compressed prompt."""
    out = tmp_path_factory.mktemp("run")
    records = data.builtin(20, 2)["train"]
    tokenizer = data.train_tokenizer(records, 400)
    shape = dict(d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=16)
    model = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, **shape))
    model.init_weights()
    data.save_model(out, model, tokenizer, {"condition": "gist", "n_gist": 1, "arch": "llama"})
    gist = model.compress(torch.tensor([[5, 6, tokenizer.gist_id]]))
    gist_library.save_gist(out / "lamp.gist", gist, model, "lamp")
    (out / "a_train.json").write_text(json.dumps(records))
    (out / "b_train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return out


@pytest.mark.parametrize("read", [data.load_model, data.load_instructions])
def test_mutated_runs(read, run, tmp_path):
    assert fuzz(run, tmp_path / "mutated", read, seed=2) > 3


def test_mutated_gists(run, tmp_path):
    model, _ = data.load_model(run)
    read = lambda folder: gist_library.load_gist(folder / "lamp.gist", model)  # noqa: E731
    assert fuzz(run, tmp_path / "mutated", read, seed=3) > 3
