"""profile.py: the paper's numbers, FLOPs beside PyTorch's own counter, every command, and the standard library's name."""
import csv
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import profile
import train
from model import IGNORE, Llama, LlamaConfig
from t5 import T5, T5Config

ROOT = Path(__file__).parent.parent


def python(*args, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})


def counted(call) -> int:
    """The FLOPs that PyTorch counts in a call; its counter knows the plain attention kernel. (In fp32, a single row goes through a matrix twice.)"""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


# ---- FLOPs ----

def random_shape(seed: int):
    rng = random.Random(seed)
    kv, new, cached = rng.choice((1, 2)), rng.randint(1, 9), rng.choice((0, rng.randint(1, 9)))
    shape = dict(vocab_size=rng.randint(9, 50), d_model=8 * rng.randint(1, 4), n_layers=rng.randint(1, 3), n_heads=kv * rng.choice((1, 3)),
                 head_dim=2 * rng.randint(1, 8), d_ff=rng.randint(5, 40))
    return rng, kv, new, cached, shape


@pytest.mark.parametrize("seed", range(10))
def test_llama_flops_are_those_that_pytorch_counts(seed):
    rng, kv, new, cached, shape = random_shape(seed)
    with torch.device("meta"):
        model = Llama(LlamaConfig(**shape, n_kv_heads=kv))
        cache = model.empty_cache(1, cached + new)
        cache.valid, cache.positions = torch.ones(1, cached, dtype=torch.bool), torch.zeros(1, cached, dtype=torch.int64)
        tokens = torch.zeros(1, new, dtype=torch.int64)
        assert counted(lambda: model(tokens, cache=cache)) == profile.llama_flops(model.config, new, cached + new, n_logits=new)


@pytest.mark.parametrize("seed", range(10))
def test_t5_flops_are_those_that_pytorch_counts(seed):
    rng, _, new, cached, shape = random_shape(seed)
    gated, targets = rng.random() < 0.5, rng.randint(1, 4)
    model = T5(T5Config(**shape, n_decoder_layers=rng.randint(1, 3), gated=gated, tie_embeddings=not gated)).double()
    gist_id = shape["vocab_size"] - 1
    cache = model.compress(torch.full((1, cached), gist_id), gist_id) if cached else None
    source, target = torch.zeros(1, new, dtype=torch.int64), torch.zeros(1, targets, dtype=torch.int64)
    assert counted(lambda: model(source, target, cache=cache)) == profile.t5_flops(model.config, new, cached + new, targets)


def test_flops_of_the_real_llama_7b_and_flan_t5_xxl_modules():
    tokens, start = torch.zeros(1, 58, dtype=torch.int64, device="meta"), torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with torch.device("meta"), data.EmptyModel():
        llama, t5 = Llama(LlamaConfig.from_name("llama-7b")), T5(T5Config.from_name("flan-t5-xxl"))
        assert counted(lambda: llama(tokens)) == profile.llama_flops(llama.config, 58, 58, n_logits=58)
        assert counted(lambda: t5(tokens, start)) == profile.t5_flops(t5.config, 58, 58)


@pytest.mark.parametrize("make", [lambda: Llama(LlamaConfig(n_kv_heads=2)), lambda: T5(T5Config())])
@pytest.mark.parametrize("caching, keep", [("none", None), ("instruction", "all"), ("gist", "gist")])
def test_the_first_token_costs_what_run_reports(make, caching, keep):
    model, prompt, given = make().double(), torch.tensor([[3, 4, 5, 99, 99]]), torch.tensor([[6, 7, 8, 9]])
    cache = model.compress(prompt, 99, keep=keep) if keep else None
    tokens = given if keep else torch.cat([prompt, given], dim=1)
    new, keys = profile.new_and_keys(caching, 3, 2, 4)
    assert counted(lambda: model.generate(tokens, cache=cache, max_new_tokens=1)) == profile.flops(model.config, new, keys)
    assert (cache.nbytes if cache else 0) == profile.cache_bytes(model.config, keys - new, itemsize=8)


# ---- The paper's numbers ----

# What the paper's profiler counted for LLaMA-7B: prompt tokens in all, input tokens, FLOPs without caching, with gist caching.
COUNTED = [(58, 34, 768285567292, 449963612688), (30, 2, 396947951300, 26435078288), (67, 23, 887819016280, 304254331454),
           (50, 9, 662105055340, 118990015238), (17, 2, 224821193380, 26435078288), (27, 2, 357210632360, 26435078288),
           (40, 9, 529473971920, 118990015238), (51, 14, 675373942136, 185132203328), (88, 78, 1167061345072, 1034071997504),
           (460, 441, 6190438546360, 5930576587910)]


@pytest.mark.parametrize("total, q, none, gist", COUNTED)
def test_flops_of_single_prompts_are_within_0_03_percent_of_the_papers(total, q, none, gist):
    config = LlamaConfig.from_name("llama-7b")
    assert profile.paper_flops(config, "none", total - 1 - q, 1, q) == pytest.approx(none, rel=3e-4)
    assert profile.paper_flops(config, "gist", total - 1 - q, 1, q) == pytest.approx(gist, rel=3e-4)


@pytest.mark.parametrize("config, name, caching, expected", [
    (LlamaConfig, "llama-7b", "none", 915), (LlamaConfig, "llama-7b", "instruction", 553), (LlamaConfig, "llama-7b", "gist", 552),
    (T5Config, "flan-t5-xxl", "none", 716), (T5Config, "flan-t5-xxl", "gist", 427)])
def test_mean_gflops_are_those_of_the_papers_table(config, name, caching, expected):
    lengths = profile.paper_lengths(name)
    mean = statistics.mean(profile.paper_flops(config.from_name(name), caching, *row) for row in lengths)
    assert len(lengths) == 252 and round(mean / 1e9) == expected


def test_paper_prints_the_table():
    done = python("profile.py", "paper")
    assert done.returncode == 0, done.stderr
    for number in ("914.6", "553.0", "552.4", "715.7", "426.7", "39.6%", "40.4%", "26.3 prompt tokens"):
        assert number in done.stdout


# ---- Memory ----

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [
    lambda: Llama(LlamaConfig(vocab_size=100, d_model=128, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=16, d_ff=384)),
    lambda: T5(T5Config(vocab_size=100, d_model=96, n_layers=3, n_decoder_layers=3, n_heads=6, head_dim=16, d_ff=256)),
    lambda: T5(T5Config(vocab_size=100, d_model=96, n_layers=2, n_decoder_layers=4, n_heads=4, head_dim=24, d_ff=320, gated=False)),
], ids=["llama", "t5", "t5 1.0"])
def test_memory_of_a_real_training_is_within_10_percent_of_the_estimate(make, dtype):
    """Counted: weights, gradients, moments, and every tensor that autograd keeps; but not autocast's copies of weights."""
    model, B, T = make(), 7, 90
    if isinstance(model, Llama) and torch.__version__ < "2.9":
        pytest.skip("before torch 2.9, a CPU's attention with grouped heads keeps the probabilities")
    target = 30
    tokens = torch.randint(0, 90, (B, T))
    tokens[:, 20] = 99
    targets = torch.randint(0, 90, (B, target))
    if isinstance(model, Llama):
        targets = torch.cat([torch.full((B, T - target), IGNORE), targets], dim=1)
    batch = {"tokens": tokens, "valid": torch.ones_like(tokens, dtype=torch.bool), "targets": targets}
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}
    shapes = {shape for p in model.parameters() if p.ndim == 2 for shape in (p.shape, p.mT.shape)}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights and not (x.dtype == torch.bfloat16 and x.shape in shapes):
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        train.batch_loss(model, batch, 99, "gist").backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    n = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for layer in train.layers_of(model) for p in layer.parameters())
    parts = profile.training_memory(model.config, n - inner, inner, 1, B, T, target, 2 if dtype == "bfloat16" else 4, "fsdp", False)
    moments = sum(m.nbytes for state in optimizer.state.values() for m in state.values() if m.ndim)
    assert [sum(p.nbytes for p in model.parameters()), sum(p.grad.nbytes for p in model.parameters()), moments] == \
        [parts[name] for name in ("weights", "gradients", "moments")]
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(parts["activations"] + parts["logits"], rel=0.1)


def test_memory_prints_what_llama_7b_takes_on_four_gpus():
    done = python("profile.py", "memory", "--preset", "llama-7b", "--gpus", "4", "--micro_batch", "4")
    sizes = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()[1:]}
    assert sizes["weights"] == pytest.approx(6_738_415_616 * 4 / 4 / 2**30, abs=0.1)
    assert sizes["together"] == pytest.approx(sum(sizes.values()) / 2, abs=0.5)


# ---- The other commands ----

@pytest.mark.parametrize("preset", ["llama-tiny", "t5-tiny"])
def test_run_measures_every_caching_and_writes_csv_and_picture(preset, tmp_path):
    done = python("profile.py", "run", preset, "--prompt_tokens", 8, 16, "--input_tokens", 4, "--limit", 2, "--repeats", 1, "--max_new_tokens", 2,
                  "--n_gist", 2, "--out_dir", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "profile.csv")))
    cachings = {"none", "gist"} if preset == "t5-tiny" else set(profile.CACHINGS)
    assert {r["caching"] for r in rows} == cachings and len(rows) == 2 * 2 * len(cachings)
    assert {(r["prompt_tokens"], r["n_gist"], r["input_tokens"]) for r in rows} == {("8", "2", "4"), ("16", "2", "4")}
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG") and "gist saves" in done.stdout


@pytest.mark.parametrize("preset", ["llama-tiny", "t5-tiny"])
@pytest.mark.parametrize("flags, says", [(("train", "--length", 12, "--batch_size", 2), "tokens/s"), (("load",), "first token"),
                                         (("generate", "--prompt_tokens", 5, "--max_new_tokens", 2), "answers/s")])
def test_throughput_commands_run(preset, flags, says):
    done = python("profile.py", flags[0], preset, *flags[1:], "--repeats", 1, "--device", "cpu")
    assert done.returncode == 0 and says in done.stdout, done.stderr


@pytest.mark.parametrize("flags, says", [
    (("run", "no_such_thing"), "neither a directory nor a preset"), (("load", "no_such_thing"), "neither a directory nor a preset"),
    (("run", "llama-tiny"), "--prompt_tokens"), (("run", "tests"), "not a checkpoint"),
    (("train", "llama-tiny", "--length", 3, "--n_gist", 2), "--length"), (("run", "llama-tiny", "--prompt_tokens", 8, 0), "--prompt_tokens must"), (("generate", "llama-tiny", "--device", "abacus"), "--device abacus")])
def test_bad_input_ends_with_one_line(flags, says):
    done = python("profile.py", *flags)
    assert done.returncode == 2 and says in (lines := done.stderr.splitlines())[-1], done.stderr
    assert len(lines) == 1 or lines[0].startswith("usage:")


# ---- The standard library's name ----

@pytest.mark.parametrize("code", [
    "import cProfile; cProfile.run('1')",
    "import profile; profile.run('1'); profile.Profile().runcall(len, [])",
    "import profile, sys; assert not {'torch', 'numpy', 'matplotlib', 'tqdm', 'data', 'model'} & set(sys.modules)",
    "import torch; assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2"])
def test_profile_is_the_standard_module_for_those_who_import_it(code):
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_cprofile_runs_a_script_from_the_projects_folder(tmp_path):
    (tmp_path / "script.py").write_text("print(sum(range(10)))")
    done = python("-m", "cProfile", tmp_path / "script.py")
    assert done.returncode == 0 and "45" in done.stdout and "function calls" in done.stdout, done.stderr
