"""Broken files are refused in one line, never with a traceback, a hang, or code that runs: a fixed set of random mutations."""
import json
import random
import shutil
import signal
from pathlib import Path

import pytest

import data
import eval
import train

GOLDEN = Path(__file__).parent / "golden"
MUTATIONS = 60          # of every kind of directory


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Some bytes changed, mostly near the beginning, where headers are; or the end cut off; or text that means something else; or another file."""
    kind = rng.choice(("flip", "flip", "cut", "swap", "number", "word"))
    if kind == "cut":
        return content[:rng.randrange(len(content))]
    if kind == "swap":
        return rng.choice(others)
    if kind == "number":                               # a digit of a size, an offset, a count
        digits = [i for i, c in enumerate(content[:5000]) if chr(c).isdigit()]
        at = rng.choice(digits or [0])
        return content[:at] + rng.choice((b"9", b"0", b"-1", b"99999999999", b"null", b'"x"', b"[]")) + content[at + 1:]
    if kind == "word":
        return content.replace(*rng.choice(((b'"', b"'"), (b"{", b"["), (b":", b""), (b"0", b""), (b"llama", b"t5"), (b"true", b"3"), (b"[", b"{"))))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        changed[min(int(rng.expovariate(1 / 300)), len(content) - 1)] = rng.randrange(256)
    return bytes(changed)


def too_slow(*args):
    raise TimeoutError("a broken file was read for 60 seconds")


def fuzz(folder: Path, target: Path, read, seed: int) -> int:
    """Call read(target) with one file of the folder mutated, again and again. Returns how many were refused."""
    rng, refused = random.Random(seed), 0
    files = sorted(f for f in folder.iterdir() if f.suffix not in (".npz", ".csv", ".png"))
    contents = {f.name: f.read_bytes() for f in files}
    target.mkdir()
    signal.signal(signal.SIGALRM, too_slow)            # without a handler, an alarm ends the whole test run without a word
    for f in files:
        (target / f.name).write_bytes(contents[f.name])
    for _ in range(MUTATIONS):
        name = rng.choice(sorted(contents))
        (target / name).write_bytes(mutate(contents[name], rng, list(contents.values())))
        signal.alarm(60)                               # a hang fails the test
        try:
            read(target)
        except data.DataError as error:
            refused += 1
            assert "\n" not in str(error), error
        finally:
            signal.alarm(0)
        (target / name).write_bytes(contents[name])
    shutil.rmtree(target)
    return refused


@pytest.mark.parametrize("folder", sorted(f for f in GOLDEN.iterdir() if (f / "config.json").exists()), ids=lambda f: f.name)
def test_mutated_checkpoints(folder, tmp_path):
    """What is not refused is a model that works."""
    def read(target):
        model, _ = data.load_model(target)
        model.float().generate(data.torch.tensor([[1, 2, 3]]), max_new_tokens=2)

    assert fuzz(folder, tmp_path / "mutated", read, seed=1) > MUTATIONS / 8


@pytest.mark.parametrize("folder", sorted((GOLDEN / "tokenizers").iterdir()), ids=lambda f: f.name)
def test_mutated_tokenizers(folder, tmp_path):
    def read(target):
        if tokenizer := data.load_tokenizer(target):
            tokenizer.decode(tokenizer.encode("Two words,  123 \N{GRINNING FACE}"))

    fuzz(folder, tmp_path / "mutated", read, seed=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ours, as train.py leaves it, with its data and its compressed prompt."""
    out = tmp_path_factory.mktemp("run")
    records = data.builtin(20, 2)
    tokenizer = data.train_tokenizer(records["train"], 400)
    model = train.Llama(train.LlamaConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=16))
    model.init_weights()
    data.save_model(out, model, tokenizer, {"condition": "gist", "n_gist": 1, "arch": "llama"})
    tokens = data.torch.tensor([[5, 6, tokenizer.gist_id]])
    data.save_cache(out / "lamp.gist", model.compress(tokens, tokenizer.gist_id), model, 1, "lamp")
    data.save_state(out / "train_state.pt", {"step": 1, "seconds": 1.0, "model": dict(model.named_parameters()), "optimizers": [], "args": {}, "examples": 20})
    (out / "a_train.json").write_text(json.dumps(records["train"]))
    (out / "b_train.json").write_text("\n".join(map(json.dumps, records["train"])))
    (out / "judged.json").write_text(json.dumps({"names": ["a", "b"], "results": [{"choice": "a"}, {"choice": "b"}]}))
    return out


READERS = {
    "model": data.load_model, "data": data.load_instructions, "state": lambda run: train.read_state(run / "train_state.pt"),
    "judgments": lambda run: eval.winrate_of(str(run / "judged.json")),
}


@pytest.mark.parametrize("kind", READERS)
def test_mutated_runs(kind, run, tmp_path):
    fuzz(run, tmp_path / "mutated", READERS[kind], seed=2)


def test_mutated_gists(run, tmp_path):
    model, _ = data.load_model(run)
    fuzz(run, tmp_path / "mutated", lambda folder: data.load_cache(folder / "lamp.gist", model, 1), seed=3)
