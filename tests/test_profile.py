"""profile.py: the paper's numbers, FLOPs beside PyTorch's counter, and the standard `profile`."""

import os
import profile
import random
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import gist_mask
from model import IGNORE_INDEX, Llama, LlamaConfig
from t5 import T5, T5Config
from train import batch_loss

from exercises import memory  # isort: skip

ROOT = Path(__file__).parent.parent


def python(*args, cwd=ROOT):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def counted(call) -> int:
    """The FLOPs that PyTorch counts in a call; its counter knows the plain attention kernel.

    In fp32, a single row goes through a matrix twice, so models are in fp64.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(1, n, dtype=torch.int64)


# ---- FLOPs ----


def random_model(kind: str, rng: random.Random):
    kv_heads = rng.choice((1, 2))
    shape = dict(
        vocab_size=rng.randint(9, 50),
        d_model=8 * rng.randint(1, 4),
        n_layers=rng.randint(1, 3),
        n_heads=kv_heads * rng.choice((1, 3)),
        head_dim=2 * rng.randint(1, 8),
        d_ff=rng.randint(5, 40),
    )
    if kind == "llama":
        return Llama(LlamaConfig(**shape, n_kv_heads=kv_heads)).double()
    gated = rng.random() < 0.5
    shape |= dict(n_decoder_layers=rng.randint(1, 3), gated=gated, tie_embeddings=not gated)
    return T5(T5Config(**shape)).double()


@pytest.mark.parametrize("seed", range(10))
def test_llama_flops_are_those_that_pytorch_counts(seed):
    rng = random.Random(seed)
    model = random_model("llama", rng)
    new, cached = rng.randint(1, 9), rng.choice((0, rng.randint(1, 9)))
    cache = model.compress(zeros(cached)) if cached else None
    expected = counted(lambda: model(zeros(new), cache=cache))
    assert profile.flops(model.config, new, cached + new, n_logits=new) == expected


@pytest.mark.parametrize("seed", range(10))
def test_t5_flops_are_those_that_pytorch_counts(seed):
    rng = random.Random(seed)
    model = random_model("t5", rng)
    new, cached, targets = rng.randint(1, 9), rng.choice((0, rng.randint(1, 9))), rng.randint(1, 4)
    cache = model.compress(zeros(cached)) if cached else None
    expected = counted(lambda: model(zeros(new), zeros(targets), cache=cache))
    assert profile.flops(model.config, new, cached + new, targets) == expected


def test_flops_of_the_real_llama_7b_and_flan_t5_xxl_modules():
    tokens, start = zeros(58).to("meta"), zeros(1).to("meta")
    llama, t5 = (profile.model_of_shape(name, "meta") for name in ("llama-7b", "flan-t5-xxl"))
    with torch.device("meta"):
        assert counted(lambda: llama(tokens)) == profile.flops(llama.config, 58, 58, n_logits=58)
        assert counted(lambda: t5(tokens, start)) == profile.flops(t5.config, 58, 58)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_first_token_costs_what_run_reports(kind):
    model = random_model(kind, random.Random(0))
    prompt, given = zeros(3 + 2), zeros(4)
    is_gist = torch.arange(5) >= 3
    for caching, row in profile.costs(model.config, 3, 2, 4, all_logits=False).items():
        tokens, cache = given, None
        if caching == "none":
            tokens = torch.cat([prompt, given], dim=1)
        else:
            cache = model.compress(prompt, keep=is_gist if caching == "gist" else None)
            assert cache.length == row["cached_tokens"]
        expected = counted(lambda: model.generate(tokens, cache=cache, max_new_tokens=1))  # noqa: B023
        assert row["gflops"] == expected / 1e9


# ---- The paper's numbers ----

# What the paper's profiler counted for LLaMA-7B: all tokens, those of the input, FLOPs
# without caching, FLOPs with gist caching.
COUNTED = [
    (58, 34, 768285567292, 449963612688),
    (30, 2, 396947951300, 26435078288),
    (67, 23, 887819016280, 304254331454),
    (50, 9, 662105055340, 118990015238),
    (17, 2, 224821193380, 26435078288),
    (27, 2, 357210632360, 26435078288),
    (40, 9, 529473971920, 118990015238),
    (51, 14, 675373942136, 185132203328),
    (88, 78, 1167061345072, 1034071997504),
    (460, 441, 6190438546360, 5930576587910),
]


@pytest.mark.parametrize("total, q, none, gist", COUNTED)
def test_flops_of_single_prompts_are_within_0_03_percent_of_the_papers(total, q, none, gist):
    rows = profile.costs(LlamaConfig.from_name("llama-7b"), total - 1 - q, 1, q, all_logits=True)
    assert rows["none"]["gflops"] == pytest.approx(none / 1e9, rel=3e-4)
    assert rows["gist"]["gflops"] == pytest.approx(gist / 1e9, rel=3e-4)


@pytest.mark.parametrize(
    "config, name, expected",
    [
        (LlamaConfig, "llama-7b", {"none": 915, "instruction": 553, "gist": 552}),
        (T5Config, "flan-t5-xxl", {"none": 716, "gist": 427}),
    ],
)
def test_mean_gflops_are_those_of_the_papers_table(config, name, expected):
    lengths = profile.human_lengths(name)
    all_logits = name == "llama-7b"
    prompts = [profile.costs(config.from_name(name), *row, all_logits) for row in lengths]
    assert len(prompts) == 252 and prompts[0].keys() == expected.keys()
    for caching, gflops in expected.items():
        assert round(statistics.mean(rows[caching]["gflops"] for rows in prompts)) == gflops


def test_paper_prints_the_table():
    done = python("profile.py", "paper")
    assert done.returncode == 0, done.stderr
    for number in ("914.6", "553.0", "552.4", "715.7", "426.7", "39.6%", "40.4%", "26.3"):
        assert number in done.stdout


# ---- Memory ----


@pytest.mark.parametrize(
    "model",
    [
        Llama(LlamaConfig(vocab_size=100, d_model=128, n_layers=4, n_kv_heads=4, d_ff=384)),
        T5(T5Config(vocab_size=100, d_model=128, n_layers=3, n_decoder_layers=3, d_ff=256)),
    ],
    ids=["llama", "t5"],
)
def test_memory_of_a_real_training_is_near_the_stated_formula(model):
    """States: exactly. Activations, without autocast's copies of weights: within a quarter."""
    B, T = 7, 90
    tokens = torch.randint(0, 90, (B, T))
    segments = torch.full((B, T), gist_mask.INPUT)
    segments[:, :20] = gist_mask.PROMPT
    segments[:, 20] = gist_mask.GIST
    targets = torch.where(torch.arange(T) < 60, IGNORE_INDEX, torch.randint(0, 90, (B, T)))
    if isinstance(model, T5):
        targets = torch.randint(0, 90, (B, T))
    batch = {"tokens": tokens, "segments": segments, "targets": targets}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes = {s for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.mT.shape)}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        is_copy = x.dtype == torch.bfloat16 and x.shape in shapes
        if storage._cdata not in weights and not is_copy:
            kept[storage._cdata] = storage
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        batch_loss(model, batch, "gist").backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = [m for state in optimizer.state.values() for m in state.values() if m.ndim]
    states += [x for p in model.parameters() for x in (p, p.grad)]

    assert sum(x.nbytes for x in states) == 16 * sum(p.numel() for p in model.parameters())
    _, activations, _ = memory.estimate(model.config, 0, 1, B * T)
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    assert kept_bytes == pytest.approx(activations, rel=0.25)


def test_memory_prints_what_llama_7b_takes_on_four_gpus():
    flags = ["--preset", "llama-7b", "--gpus", 4, "--micro_batch", 4]
    done = python("-m", "tests.exercises.memory", *flags)
    numbers = [float(line.split()[0]) for line in done.stdout.splitlines()]
    states, gradients, activations, checkpointed, hours = numbers
    layer = 4 * 512 * (36 * 4096 + 8 * 11008)
    assert states == pytest.approx(16 * 6_738_415_616 / 4 / 2**30, abs=0.05)
    assert gradients == pytest.approx(4 * 6_738_415_616 / 2**30, abs=0.05)
    assert activations == pytest.approx(32 * layer / 2**30, abs=0.05)
    assert checkpointed == pytest.approx((32 * 4 * 512 * 4 * 4096 + layer) / 2**30, abs=0.05)
    # 6 FLOPs for a parameter and a token, of 71 tokens; the output head's only for the 29 written.
    weights = 71 * (6_738_415_616 - 2 * 32000 * 4096) + 29 * 32000 * 4096
    assert hours == pytest.approx(6 * weights * 128 * 3000 / (4 * 0.4 * 312e12) / 3600, abs=0.05)


# ---- The other commands ----


@pytest.mark.parametrize("preset", ["llama-tiny", "t5-tiny"])
def test_run_measures_every_caching_and_draws(preset, tmp_path):
    flags = ["--input_tokens", 4, "--repeats", 1, "--max_new_tokens", 2]
    lengths = ["--prompt_tokens", 8, 16]
    where = ["--out", tmp_path / "profile.png", "--device", "cpu"]
    done = python("profile.py", "run", preset, *lengths, *flags, *where)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    cachings = {"none", "gist"} if preset == "t5-tiny" else {"none", "instruction", "gist"}
    measured = [(row[0], float(row[1])) for row in rows if row[0] in cachings]
    assert sorted(measured) == sorted((caching, p) for caching in cachings for p in (8, 16))
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("preset", ["llama-tiny", "t5-tiny"])
@pytest.mark.parametrize("flags", [("train", "--length", 12, "--batch_size", 2), ("generate",)])
def test_throughput_commands_run(preset, flags):
    flags = [flags[0], preset, *flags[1:], "--repeats", 1, "--device", "cpu"]
    done = python("-m", "tests.throughput", *flags)
    assert done.returncode == 0 and "tokens/s" in done.stdout, done.stderr


def test_a_round_of_timings_makes_every_call_and_the_first_round_does_not_count(monkeypatch):
    calls, seconds = [], iter([90.0, 90.0, 1.0, 10.0, 2.0, 30.0, 4.0, 20.0])

    def timeit(call, number):
        call()
        return next(seconds)

    monkeypatch.setattr(profile, "timeit", timeit)
    measured = profile.timings({name: partial(calls.append, name) for name in "ab"}, repeats=3)
    assert "".join(calls) == "abababab"
    assert measured == {"a": 2000.0, "b": 20_000.0}


@pytest.mark.parametrize(
    "flags, says",
    [
        (("run", "no_such_thing"), "neither a directory nor a preset"),
        (("run", "tests"), "tests"),
        (("run", "llama-tiny", "--prompt_tokens", 8, 0), "--prompt_tokens"),
        (("run", "llama-tiny", "--device", "abacus"), "--device abacus"),
        (("run", "llama-tiny", "--device", "cuda:9"), "--device cuda:9"),
    ],
)
def test_bad_input_ends_with_one_line(flags, says):
    done = python("profile.py", *flags)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and says in lines[-1], done.stderr
    assert len(lines) == 1 or lines[0].startswith("usage:")


@pytest.mark.parametrize("out", ["/nowhere/a.png", "picture", "a.zzz", "."])
def test_a_picture_that_cannot_be_written_is_found_before_anything_is_measured(
    out, monkeypatch, tmp_path
):
    def measure(*args):
        raise AssertionError("it measures")

    monkeypatch.setattr(profile, "measure", measure)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="give a file like"):
        profile.run_model("llama-tiny", out=out, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["llama-tiny", "t5-tiny"])
def test_the_shortest_lengths_are_measured(preset, tmp_path):
    lengths = {"prompt_tokens": [1], "input_tokens": 1, "max_new_tokens": 1, "repeats": 1}
    profile.run_model(preset, **lengths, device="cpu", out=str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()


def test_an_example_without_an_output_is_not_measured():
    done = python("-m", "tests.throughput", "train", "t5-tiny", "--length", 1)
    assert done.returncode == 2 and "1 is too small: at least 2" in done.stderr


def test_a_numbered_gpu_is_the_one_that_is_measured(monkeypatch):
    """The model is made on the device that is named. Its tokens follow it, whatever is current."""
    made_on = []

    def model_of_shape(preset, device):
        made_on.append(device)
        raise StopIteration

    monkeypatch.setattr(data, "find_device", lambda name: name)
    monkeypatch.setattr(profile, "model_of_shape", model_of_shape)
    with pytest.raises(StopIteration):
        profile.open_model("llama-tiny", device="cuda:1")
    assert made_on == ["cuda:1"]
    source = (ROOT / "profile.py").read_text()
    assert "torch.cuda" not in source  # nothing asks for the current device


def test_no_condition_is_named():
    source = (ROOT / "profile.py").read_text()
    assert not any(name in source for name in gist_mask.TABLE if name != "gist")


# ---- The standard library's name ----


@pytest.mark.parametrize(
    "code",
    [
        "import cProfile; cProfile.run('1')",
        "import profile; profile.run('1'); profile.Profile().runcall(len, [])",
        "import profile, sys; assert not {'torch', 'numpy', 'matplotlib', 'tqdm', 'data', 'model'}"
        " & set(sys.modules)",
        "import torch; f = torch.compile(lambda x: x + 1, backend='eager');"
        " assert f(torch.ones(1)) == 2",
    ],
)
def test_profile_is_the_standard_module_for_those_who_import_it(code):
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_cprofile_runs_a_script_from_the_projects_folder(tmp_path):
    (tmp_path / "script.py").write_text("print(sum(range(10)))")
    done = python("-m", "cProfile", tmp_path / "script.py")
    assert done.returncode == 0 and "45" in done.stdout, done.stderr
    assert "function calls" in done.stdout
