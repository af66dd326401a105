"""Compressing a prompt for use: the command, its files, and gists that do not fit."""
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from model import Cache, Llama, LlamaConfig
from t5 import T5, T5Config

ROOT = Path(__file__).parent.parent


def make_run(folder, arch="llama", condition="gist", n_gist=2, seed=0):
    """A run with random weights, as train.py would have left it."""
    tokenizer = data.train_tokenizer(data.builtin(200, 2)["train"], 400)
    shape = dict(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=48)
    model = Llama(LlamaConfig(**shape, n_kv_heads=1)) if arch == "llama" else T5(T5Config(**shape, n_decoder_layers=2, start_id=tokenizer.pad_id))
    model.init_weights(torch.Generator().manual_seed(seed))
    data.save_model(folder, model, tokenizer, extra=dict(condition=condition, n_gist=n_gist, arch=arch, data="builtin", seed=0))
    return folder


def compress(*args, stdin=""):
    return subprocess.run([sys.executable, ROOT / "eval.py", "compress", *map(str, args), "--max_new_tokens", "5", "--device", "cpu"],
                          capture_output=True, text=True, input=stdin)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_saved_gist_answers_as_the_fresh_one(arch, tmp_path):
    run = make_run(tmp_path / "run", arch)
    fresh = compress(run, "--instruction", "Say the list backwards.", "--input", "fox cup sun", "", "-", "--save", tmp_path / "gist.pt", stdin="key\npen ring\n")
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.count("from the gist") == fresh.stdout.count("whole prompt") == 4 and "2 gist tokens" in fresh.stdout
    loaded = compress(run, "--load", tmp_path / "gist.pt", "--input", "fox cup sun", "", "key", "pen ring")
    assert loaded.returncode == 0 and loaded.stdout == fresh.stdout.split("\n", 1)[1]


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_cache_comes_back_from_its_file_as_it_was(arch, tmp_path):
    model, _ = data.load_model(make_run(tmp_path / "run", arch))
    gist_id = 9
    cache = model.compress(torch.tensor([[3, 4, 5, gist_id], [6, 7, 8, gist_id]]), gist_id)
    data.save_cache(tmp_path / "gist.pt", cache, model, 1, "Say é.")
    again, instruction = data.load_cache(tmp_path / "gist.pt", model, 1)
    assert instruction == "Say é." and isinstance(again, Cache)
    for name, value in vars(cache).items():
        assert value is None and vars(again)[name] is None or torch.equal(value, vars(again)[name])
    assert data.model_id(model.bfloat16()) == data.model_id(data.load_model(tmp_path / "run")[0])      # in any dtype


def test_gists_that_do_not_fit_and_models_that_cannot_compress_are_refused(tmp_path):
    run, other, more = (make_run(tmp_path / name, seed=seed, n_gist=n) for name, seed, n in (("run", 0, 2), ("other", 1, 2), ("more", 0, 5)))
    assert compress(run, "--instruction", "Say a.", "--save", tmp_path / "gist.pt").returncode == 0
    whole = (tmp_path / "gist.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for args, says in [
        ((other, "--load", tmp_path / "gist.pt"), "another model"),
        ((more, "--load", tmp_path / "gist.pt"), "2 gist tokens"),
        ((run, "--load", tmp_path / "cut.pt"), "cut.pt"),
        ((run, "--load", tmp_path / "nowhere.pt"), "nowhere.pt"),
        ((run, "--instruction", "  "), "empty"),
        ((tmp_path / "empty", "--instruction", "Say a."), "not a checkpoint"),
        ((make_run(tmp_path / "control", condition="pos_control"), "--instruction", "Say a."), "cannot compress"),
    ]:
        done = compress(*args)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_released_gist_model_answers_as_the_run_that_it_was(tmp_path):
    """Differences from a base whose matrices are all zero and whose norms are one: adding them is exact."""
    run = make_run(tmp_path / "run")
    model, tokenizer = data.load_model(run)
    base = Llama(dataclasses.replace(model.config, vocab_size=model.config.vocab_size - 1))
    with torch.no_grad():
        for weight in base.parameters():
            weight.fill_(float(weight.ndim == 1))
        for weight in model.parameters():
            weight.mul_(weight.ndim > 1)
    data.save_model(tmp_path / "base", base, tokenizer)
    data.save_model(tmp_path / "released", model)
    what = ["--instruction", "Put lamp at the front.", "--input", "fox cup", "sun"]
    expected, got = compress(run, *what), compress(tmp_path / "released", "--base", tmp_path / "base", "--n_gist", 2, *what)
    assert got.returncode == 0 and got.stdout == expected.stdout and "from the gist" in got.stdout, got.stderr
    for args, says in (([tmp_path / "released"], "give the --n_gist"), ([tmp_path / "released", "--n_gist", 2], "--base"),
                       ([tmp_path / "base", "--n_gist", 2], "no row for a gist token"), ([run, "--n_gist", 2], "leave --n_gist out")):
        done = compress(*args, *what)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
