"""What gisting saves, and how fast everything is: FLOPs, time, memory.

    python profile.py paper                        # the paper's efficiency table, from the models' shapes alone
    python profile.py run OUT_DIR                  # the same measured on a real model, with time and memory
    python profile.py shots OUT_DIR ...            # longer and longer prompts: what one gist still answers, what it saves
    python profile.py train|generate|load OUT_DIR  # throughput
    python profile.py memory --preset llama-7b --gpus 4    # will the training fit?

Before the first token of an answer, the model reads p prompt tokens, n gist tokens and q input tokens. What was cached when the
prompt was read before decides how many of them are new, and how many keys they attend to; the difference is in the cache:

    caching        new tokens    keys
    none           p + n + q     p + n + q
    instruction    q             p + n + q    (decoders only: an encoder's prompt depends on the input)
    gist           q             n + q

This file hides the standard library's `profile`, which cProfile imports, and torch.compile through it. So it hands on all names
of that module, and imports nothing heavy unless it is run. (`python -m profile` from here runs it; use `python -m cProfile`.)
"""
from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import io
import os
import tempfile
import time
from importlib.machinery import PathFinder
from pathlib import Path
from statistics import mean, median, stdev
from typing import Callable

_spec = PathFinder.find_spec("profile", [os.path.dirname(os.__file__)])
_standard = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_standard)
globals().update({name: value for name, value in vars(_standard).items() if not name.startswith("__")})

if __name__ == "__main__":
    import matplotlib
    matplotlib.use("Agg")
    import numpy as np
    import torch
    from matplotlib import pyplot
    from torch import Tensor
    from tqdm import tqdm

    import data
    import eval as evaluation
    import model as llama
    import t5
    import train

CACHINGS = ("none", "instruction", "gist")
LENGTHS = Path(__file__).parent / "assets" / "human_lengths.csv"


# ---- FLOPs: matrix multiplications only, 2 for a multiply-add ----

def llama_flops(c: llama.LlamaConfig, new: int, keys: int, n_logits: int = 1) -> int:
    """FLOPs of `new` tokens that attend to `keys` in all; n_logits of them reach the output head."""
    projections = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim         # the width of wq and wo, wk and wv
    layer = 2 * new * c.d_model * (projections + 3 * c.d_ff) + 4 * new * keys * c.n_heads * c.head_dim
    return c.n_layers * layer + 2 * n_logits * c.d_model * c.vocab_size


def t5_flops(c: t5.T5Config, new: int, keys: int, n_logits: int = 1) -> int:
    """FLOPs of encoding `new` tokens that attend to `keys` in all, then decoding n_logits tokens, which see all keys, too."""
    heads = c.n_heads * c.head_dim
    feed_forward = (3 if c.gated else 2) * c.d_model * c.d_ff
    encoder = 2 * new * (4 * c.d_model * heads + feed_forward) + 4 * new * keys * heads
    decoder = 2 * n_logits * (6 * c.d_model * heads + feed_forward) + 4 * n_logits * (n_logits + keys) * heads
    memory = 4 * keys * c.d_model * heads                                 # keys and values of the cross-attention
    return c.n_layers * encoder + c.n_decoder_layers * (decoder + memory) + 2 * n_logits * c.d_model * c.vocab_size


def flops(config, new: int, keys: int, n_logits: int = 1) -> int:
    return (t5_flops if is_t5(config) else llama_flops)(config, new, keys, n_logits)


def is_t5(config) -> bool:
    return hasattr(config, "n_decoder_layers")


def new_and_keys(caching: str, p: int, n: int, q: int) -> tuple[int, int]:
    """How many tokens are new, and how many keys they attend to: the table above."""
    return {"none": (p + n + q, p + n + q), "instruction": (q, p + n + q), "gist": (q, n + q)}[caching]


def cache_bytes(c, columns: int, itemsize: int = 2) -> int:
    """The size of so many cached tokens: keys and values of all layers; T5: and the encoder's output."""
    if is_t5(c):
        return columns * (2 * c.n_layers * c.n_heads * c.head_dim + c.d_model) * itemsize
    return columns * 2 * c.n_layers * c.n_kv_heads * c.head_dim * itemsize


# ---- profile.py paper ----

def paper_lengths(model: str) -> list[tuple[int, int, int]]:
    """(p, n, q) of the 252 human-split prompts that the paper measured."""
    with open(LENGTHS, newline="") as f:
        rows = csv.DictReader(line for line in f if not line.startswith("#"))
        return [(int(r["gist_index"]), 1, int(r["input_tokens"])) for r in rows if r["model"] == model]


def paper_flops(config, caching: str, p: int, n: int, q: int) -> int:
    """What the paper counted: a decoder's logits for all new tokens, an encoder-decoder's for its first."""
    new, keys = new_and_keys(caching, p, n, q)
    return flops(config, new, keys, n_logits=1 if is_t5(config) else new)


def paper(args) -> None:
    """Print the paper's efficiency table."""
    print("A forward pass over each of the paper's 252 human-split prompts; 1 gist token; caches in 16 bits\n")
    print("model         caching        GFLOPs      std           saved    cache per prompt")
    for name, config in (("llama-7b", llama.LlamaConfig.from_name("llama-7b")), ("flan-t5-xxl", t5.T5Config.from_name("flan-t5-xxl"))):
        lengths = paper_lengths(name)
        prompt = mean(p for p, _, _ in lengths)
        for caching in ("none", "gist") if is_t5(config) else CACHINGS:
            full, gflops = ([paper_flops(config, c, *row) / 1e9 for row in lengths] for c in ("none", caching))
            new, keys = new_and_keys(caching, prompt, 1, 0)
            print(f"{name:14}{caching:12}{mean(gflops):9.1f} ± {stdev(gflops):6.1f}{mean(full) - mean(gflops):8.1f} {1 - mean(gflops) / mean(full):6.1%}"
                  f"{cache_bytes(config, keys - new) / 2**20:16.2f} MiB")
        print(f"{'':14}compression: {prompt:.1f} prompt tokens on average, {max(p for p, _, _ in lengths)} at most, into 1 gist token\n")


# ---- Measuring ----

def timed(call: Callable, device: str) -> float:
    """Seconds that a call takes; on CUDA between two events on the device."""
    if not device.startswith("cuda"):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleave(calls: dict, repeats: int, device: str, name: str | None = None) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` times. A round makes each call once, so that a slow moment meets all; the first warms up."""
    rounds = [{key: timed(call, device) for key, call in calls.items()}
              for _ in tqdm(range(1 + repeats), desc=name, leave=False, disable=name is None)]
    return {key: [seconds[key] for seconds in rounds[1:]] for key in calls}


def peak_mib(call: Callable, device: str) -> float:
    """MiB that a call needs at most, over what is in use before; on a CPU the process's resident memory (Linux; elsewhere nan)."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)                                  # what earlier calls freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")                     # VmHWM, the peak of VmRSS, starts again from here
    except (OSError, AttributeError, TypeError):
        return float("nan")
    kib = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0])
    before = kib("VmRSS:")
    call()
    return (kib("VmHWM:") - before) / 1024


def interval(values: list[float]) -> str:
    """The median and its 95 % bootstrap confidence interval, as text."""
    picks = np.random.default_rng(0).choice(values, size=(2000, len(values)))
    return "{:.1f} % [{:.1f}, {:.1f}]".format(median(values), *np.percentile(np.median(picks, axis=1), [2.5, 97.5]))


# ---- Models and prompts ----

def config_of(preset: str) -> llama.LlamaConfig | t5.T5Config:
    """The shape of a preset. Raises data.DataError."""
    for config, presets in ((llama.LlamaConfig, llama.PRESETS), (t5.T5Config, t5.PRESETS)):
        if preset in presets:
            return config.from_name(preset)
    raise data.DataError(f"{preset}: neither a directory nor a preset; the presets are {', '.join([*llama.PRESETS, *t5.PRESETS])}")


def open_model(args) -> tuple[llama.Llama | t5.T5, object, int]:
    """A checkpoint, or a preset with random weights: the model, its tokenizer or None, the gist's id. Fills in args. Raises data.DataError."""
    args.device = train.find_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    tokenizer, gisting = None, {}
    if Path(args.model).is_dir():
        model, tokenizer = data.load_model(args.model, device=args.device)
        gisting = data.read_config(args.model).get("gisting") or {}
        if tokenizer is not None and not gisting:
            data.add_gist_token(model, tokenizer)
    else:
        config = config_of(args.model)
        with torch.device(args.device):
            model = (t5.T5 if is_t5(config) else llama.Llama)(config)
        model.init_weights()
    args.n_gist = args.n_gist or gisting.get("n_gist") or 1
    args.data = args.data or gisting.get("data") or "builtin"
    args.arch = "t5" if is_t5(model.config) else "llama"
    gist_id = tokenizer.gist_id if tokenizer is not None else model.config.vocab_size - 1
    return model.eval().to(args.device, getattr(torch, args.dtype)), tokenizer, gist_id


def random_prompts(batch: int, p: int, n: int, q: int, gist_id: int, device: str) -> tuple[Tensor, Tensor]:
    """Prompts (B, p + n), the gist tokens at their ends, and inputs (B, q) of random tokens."""
    tokens = torch.randint(gist_id, (batch, p + n + q), device=device)
    tokens[:, p:p + n] = gist_id
    return tokens[:, :p + n], tokens[:, p + n:]


def make_prompts(tokenizer, gist_id: int, args) -> list[tuple[Tensor, Tensor]]:
    """Prompts (1, p + n) and inputs (1, q): random ones of --prompt_tokens, or the human split's. Raises data.DataError."""
    if args.prompt_tokens:
        return [random_prompts(1, p, args.n_gist, args.input_tokens, gist_id, args.device) for p in args.prompt_tokens for _ in range(args.limit)]
    if tokenizer is None:
        raise data.DataError(f"{args.model}: no tokenizer to read real prompts with; give --prompt_tokens for random ones")
    records = data.load_instructions(args.data)["human"][:args.limit]
    if not records:
        raise data.DataError(f"{args.data}: has no human split; give --prompt_tokens for random prompts")
    examples = [data.layout(record, tokenizer, args.n_gist, args.arch) for record in records]
    return [(torch.tensor([e.prompt], device=args.device), torch.tensor([e.input], device=args.device)) for e in examples]


# ---- profile.py run ----

def measure(model, prompt: Tensor, given: Tensor, gist_id: int, args) -> list[dict]:
    """A row for every caching. prompt: (1, p + n), given: (1, q) int64."""
    caches, calls, rows = {"none": None}, {}, []
    if args.arch == "llama":
        caches["instruction"] = model.compress(prompt, gist_id, keep="all")
    caches["gist"] = model.compress(prompt, gist_id)
    for caching, cache in caches.items():
        tokens = torch.cat([prompt, given], dim=1) if cache is None else given
        for length in (1, args.max_new_tokens):
            calls[caching, length] = lambda t=tokens, c=cache, n=length: model.generate(t, cache=c, max_new_tokens=n)
    ms = {key: 1000 * median(seconds) for key, seconds in interleave(calls, args.repeats, args.device).items()}
    p, n, q = prompt.shape[1] - args.n_gist, args.n_gist, given.shape[1]
    for caching, cache in caches.items():
        rows.append({"caching": caching, "prompt_tokens": p, "n_gist": n, "input_tokens": q,
                     "gflops": flops(model.config, *new_and_keys(caching, p, n, q)) / 1e9,
                     "first_token_ms": ms[caching, 1], "answer_ms": ms[caching, args.max_new_tokens],
                     "peak_mib": peak_mib(calls[caching, args.max_new_tokens], args.device), "cache_mib": cache.nbytes / 2**20 if cache else 0.0})
    return rows


def print_run(rows: list[dict]) -> None:
    """Medians over the prompts; and, prompt by prompt, the part that a cache saves, with its 95 % confidence interval."""
    columns = ("gflops", "first_token_ms", "answer_ms", "peak_mib", "cache_mib")
    print(f"{'caching':20}" + "".join(f"{column:>24}" for column in columns))
    of = {caching: [r for r in rows if r["caching"] == caching] for caching in CACHINGS}
    for caching in filter(of.get, CACHINGS):
        print(f"{caching:20}" + "".join(f"{median(r[column] for r in of[caching]):24,.2f}" for column in columns))
    for caching in filter(of.get, CACHINGS[1:]):
        saved = ([100 - 100 * r[column] / full[column] for r, full in zip(of[caching], of["none"])] for column in columns[:3])
        print(f"{caching + ' saves':20}" + "".join(f"{interval(values):>24}" for values in saved))


def draw_run(rows: list[dict], title: str, file: Path) -> None:
    """Time and FLOPs up to the first token against the length of the prompt, a mark for every prompt."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for ax, column, unit in zip(axes, ("first_token_ms", "gflops"), ("milliseconds", "GFLOPs")):
        for caching, colour in zip(CACHINGS, ("tab:gray", "tab:blue", "tab:red")):
            x, y = ([r[key] for r in rows if r["caching"] == caching] for key in ("prompt_tokens", column))
            ax.plot(x, y, "o", markersize=4, alpha=0.5, color=colour, label=caching)
        ax.set(xlabel="prompt tokens", ylabel=f"{unit} to the first token", ylim=(0, None))
    axes[0].legend(frameon=False, title="caching")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(file, dpi=120)


def run_model(args) -> None:
    """Measure all prompts; print a table (for every length, if they are random), write profile.csv and profile.png."""
    model, tokenizer, gist_id = open_model(args)
    prompts = tqdm(make_prompts(tokenizer, gist_id, args), unit="prompt", leave=False)
    rows = [row for prompt, given in prompts for row in measure(model, prompt, given, gist_id, args)]
    title = f"{Path(args.model).name}, {args.dtype}, {args.device}: {len(prompts)} prompts, answers of {args.max_new_tokens} tokens"
    print(title)
    for p in args.prompt_tokens or ["human-split"]:
        print(f"\n{p} tokens of prompt" if args.prompt_tokens else "\nprompts of the human split")
        print_run([r for r in rows if not args.prompt_tokens or r["prompt_tokens"] == p])
    out_dir, text = Path(args.out_dir), io.StringIO()
    out_dir.mkdir(parents=True, exist_ok=True)
    csv.writer(text).writerows([rows[0], *(r.values() for r in rows)])
    data.write_file(out_dir / "profile.csv", text.getvalue().encode())
    draw_run(rows, title, out_dir / "profile.png")
    print(f"\nwrote {out_dir}/profile.csv and {out_dir}/profile.png")


# ---- profile.py shots ----

def measure_shots(path: str, args) -> dict:
    """A run of train.py: what it gets right, how long its prompts are, and the time to the first token of a batch of answers."""
    metrics = evaluation.read_metrics(path)
    model, tokenizer, run = evaluation.open_gist_run(path, args)
    if run["data"] != "builtin":
        raise data.DataError(f"{path}: was trained on {run['data']}; only the built-in data has worked examples")
    n_gist, device, n_shots = run["n_gist"], next(model.parameters()).device, run.get("n_shots", 0)
    records = data.builtin(1000, args.batch_size, n_shots=n_shots)["unseen"]
    examples, _ = data.make_examples(records, tokenizer, n_gist, run["arch"], run["max_length"])
    parts = zip(*((e.prompt, e.input, e.prompt + e.input) for e in examples))
    prompt, given, whole = ([x.to(device) for x in data.pad(rows, tokenizer.pad_id, left=True)] for rows in parts)
    cache = model.compress(prompt[0], tokenizer.gist_id, prompt[1])
    calls = {"none": lambda: model.generate(*whole, max_new_tokens=1), "gist": lambda: model.generate(*given, cache=cache, max_new_tokens=1)}
    ms = {key: 1000 * median(seconds) for key, seconds in interleave(calls, args.repeats, str(device), path).items()}
    return {"shots": n_shots, "prompt_tokens": mean(len(e.prompt) - n_gist for e in examples), "n_gist": n_gist,
            "exact_match": 100 * metrics["unseen"]["exact_match"], "none_ms": ms["none"], "gist_ms": ms["gist"]}


def shots(args) -> None:
    """Compare runs whose prompts show more and more worked examples: a table, and a picture over the compression factor."""
    rows = sorted((measure_shots(path, args) for path in args.runs), key=lambda r: r["shots"])
    factor, saved = [r["prompt_tokens"] / r["n_gist"] for r in rows], [100 - 100 * r["gist_ms"] / r["none_ms"] for r in rows]
    print("shots   prompt tokens   exact match   none, ms   gist, ms   time saved")
    for r, s in zip(rows, saved):
        print(f"{r['shots']:5}{r['prompt_tokens']:16.1f}{r['exact_match']:14.1f}{r['none_ms']:11.1f}{r['gist_ms']:11.1f}{s:11.1f} %")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for ax, values, label in zip(axes, ([r["exact_match"] for r in rows], saved), ("exact match, unseen instructions, %", "time to the first token saved, %")):
        ax.plot(factor, values, "o-", color="tab:red")
        for r, x, y in zip(rows, factor, values):
            ax.annotate(r["shots"], (x, y), (0, -14), textcoords="offset points", ha="center", fontsize="small")
        ax.set(xlabel="prompt tokens for every gist token", ylabel=label, xlim=(0, 1.08 * max(factor)), ylim=(0, 100))
    figure.suptitle("prompts with 0, 1, 2, ... worked examples", fontsize="medium")
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


# ---- profile.py train, generate, load ----

def train_speed(args) -> None:
    """Print tokens/s of training steps, and how near they come to the machine's own speed in a large matrix multiplication."""
    model, _, gist_id = open_model(args)
    B, T, n_out = args.batch_size, args.length, args.length // 3
    if T - n_out <= args.n_gist or n_out < 1:
        raise data.DataError(f"--length {T}: too short for {args.n_gist} gist tokens and an output; raise it")
    model.float().train()                                                 # the weights stay fp32, as in train.py
    prompt, output = random_prompts(B, T - n_out - args.n_gist, args.n_gist, n_out, gist_id, "cpu")
    batch = data.collate([data.Example(p, [], out, {}) for p, out in zip(prompt.tolist(), output.tolist())], 0, args.arch)
    batch, optimizer = {key: x.to(args.device) for key, x in batch.items()}, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    n = 8192 if args.device.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, device=args.device, dtype=getattr(torch, args.dtype))

    def step() -> None:
        with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = train.batch_loss(model, batch, gist_id, "gist")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_mib(step, args.device)
    seconds = interleave({"step": step, "matmul": lambda: a @ b}, args.repeats, args.device, "train")
    step_s, read = median(seconds["step"]), batch["tokens"].shape[1]      # read: T, or T - n_out in T5's encoder
    rate, fastest = 3 * B * flops(model.config, read, read, n_out) / step_s, 2 * n**3 / median(seconds["matmul"])     # backward is twice forward
    print(f"training {args.model}, {args.dtype}, {args.device}: {B} x {T} tokens, {n_out} of {T} with a label")
    print(f"{B * T / step_s:,.0f} tokens/s, {step_s:.3f} s a step, {peak:,.0f} MiB at most over the weights")
    print(f"{rate / 1e9:,.1f} GFLOP/s, {rate / fastest:.0%} of the {fastest / 1e9:,.1f} of a {n} x {n} matrix multiplication")


def generate_speed(args) -> None:
    """Print how fast answers come: one or sixteen at a time, reading prompts or starting from their gists."""
    model, _, gist_id = open_model(args)
    prompt, given = random_prompts(16, args.prompt_tokens, args.n_gist, args.input_tokens, gist_id, args.device)
    tokens, cache, calls = torch.cat([prompt, given], dim=1), model.compress(prompt, gist_id), {}
    for B in (1, 16):
        calls[B, "none"] = lambda B=B: model.generate(tokens[:B], max_new_tokens=args.max_new_tokens)
        calls[B, "gist"] = lambda B=B: model.generate(given[:B], cache=cache[:B], max_new_tokens=args.max_new_tokens)
    seconds = interleave(calls, args.repeats, args.device, "generate")
    print(f"generating with {args.model}, {args.dtype}, {args.device}: {args.prompt_tokens} prompt, {args.n_gist} gist, {args.input_tokens} input, "
          f"{args.max_new_tokens} new tokens\n\nbatch   caching   tokens/s   answers/s")
    for (B, caching), s in seconds.items():
        rate = B / median(s)
        print(f"{B:5}   {caching:7}{rate * args.max_new_tokens:11,.1f}{rate:12,.2f}")


def load_speed(args) -> None:
    """Print time and memory of loading a checkpoint as it is. Weights stay mapped from the file until they are used: in the first token."""
    with tempfile.TemporaryDirectory() as folder:
        if not Path(args.model).is_dir():
            data.save_model(folder, open_model(args)[0])
        folder, device = args.model if Path(args.model).is_dir() else folder, train.find_device(args.device)
        load, token = lambda: data.load_model(folder, device=device)[0], torch.tensor([[0]], device=device)
        calls = {"load": load, "load and first token": lambda: load().generate(token, max_new_tokens=1)}
        peaks = {name: peak_mib(call, device) for name, call in calls.items()}
        seconds = interleave(calls, args.repeats, device, "load")
    for name in calls:
        print(f"{args.model}, {device}, {name:20} {median(seconds[name]):8.3f} s{peaks[name]:8,.0f} MiB at most")


# ---- profile.py memory ----

def n_parameters(c) -> tuple[int, int]:
    """The numbers of parameters outside and inside the layers."""
    with torch.device("meta"):
        model = (t5.T5 if is_t5(c) else llama.Llama)(c)
    inner = sum(p.numel() for layer in train.layers_of(model) for p in layer.parameters())
    return sum(p.numel() for p in model.parameters()) - inner, inner


def layer_activations(c, B: int, T: int, itemsize: int, S: int = 0) -> int:
    """Bytes that a layer keeps for its backward pass. T: its tokens; S: those of the source, in a T5 decoder.

    itemsize: of matrix products. A norm keeps its fp32 input and its fp32 output; matrices their input, which autocast copies for each
    of them; attention q, k, v, the mask, and what goes into wo (T5, whose bias is learned: and fp32 probabilities); feed-forward all
    that is as wide as d_ff.
    """
    autocast, wide, heads = itemsize == 2, 4 if not is_t5(c) or c.gated else 2, c.n_heads * c.head_dim
    norms = 8 * (3 if S else 2) * c.d_model
    inputs = itemsize * c.d_model * (bool(S) + (3 + wide // 2 if autocast else 2))
    if is_t5(c):
        attention = heads * (3 * 4 + itemsize) + 4 * c.n_heads * T
    else:
        attention = itemsize * (3 * heads + 2 * c.n_kv_heads * c.head_dim + T)
    cross = itemsize * (3 * heads * T + 2 * (heads + c.d_model * autocast) * S) if S else 0
    return B * (T * (norms + inputs + attention + wide * c.d_ff * itemsize) + cross)


def training_memory(c, outer: int, inner: int, gpus: int, batch: int, length: int, target: int, itemsize: int, parallel: str,
                    recompute: bool) -> dict[str, float]:
    """Bytes on every GPU of a training with AdamW, by what they are for.

    outer, inner: parameters outside and inside the layers; batch: examples at once on a GPU; length: their tokens, T5: of the
    source, and `target` of the output; itemsize: of matrix products.
    """
    n_layers = c.n_layers + (c.n_decoder_layers if is_t5(c) else 0)
    parts = gpus if parallel == "fsdp" else 1
    weights = 4 * (outer + inner) / parts
    layers = [layer_activations(c, batch, length, itemsize)] * c.n_layers
    if is_t5(c):
        layers += [layer_activations(c, batch, target, itemsize, length)] * c.n_decoder_layers
    inputs = 4 * batch * c.d_model * (c.n_layers * length + (c.n_decoder_layers * target if is_t5(c) else 0))
    labels = target if is_t5(c) else length // 3
    if parts > 1:                                      # two layers whole, and the embeddings, with their gradients
        copies = 2 * itemsize * 2 * inner / n_layers + 8 * outer
    else:                                              # autocast's
        copies = itemsize * (inner + outer) if itemsize == 2 else 0
    return {"weights": weights, "gradients": weights, "moments": 2 * weights, "copies": copies,
            "activations": inputs + max(layers) if recompute else sum(layers), "logits": 8 * batch * labels * c.vocab_size}


def memory(args) -> None:
    """Print how much memory a training takes on every GPU."""
    preset, config = train.PRESETS.get(args.preset, {}), config_of(args.preset)
    together = args.batch_size or preset.get("batch_size", 8)
    batch = min(args.micro_batch or together, -(-together // args.gpus))
    length, itemsize = args.length or preset.get("max_length", 128 if is_t5(config) else 512), 2 if args.dtype == "bfloat16" else 4
    parts = training_memory(config, *n_parameters(config), args.gpus, batch, length, args.target, itemsize, args.parallel, args.checkpoint_activations)
    print(f"training {args.preset} with AdamW on {args.gpus} GPUs ({args.parallel}, {args.dtype}): {batch} examples of {length} tokens at once on each")
    for name, size in [*parts.items(), ("together", sum(parts.values()))]:
        print(f"{name:16}{size / 2**30:9.1f} GiB")


# ---- The command ----

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What gisting saves, and how fast everything is: FLOPs, time, memory.")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("paper", help="the paper's efficiency table, from the models' shapes alone").set_defaults(call=paper)
    by_name = {}
    for name, call, text in (("run", run_model, "no caching, instruction caching and gist caching on a real model: FLOPs, time and memory"),
                             ("train", train_speed, "throughput of training"), ("generate", generate_speed, "throughput of generation"),
                             ("load", load_speed, "time and memory of loading")):
        by_name[name] = p = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(call=call, data=None, n_gist=None)
        p.add_argument("model", metavar="OUT_DIR", help="a checkpoint, or the name of a preset (smollm2-135m), which gets random weights")
        p.add_argument("--device", help="cuda, mps or cpu; default: the first of these that is there")
        p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, else float32")
    text = "runs of train.py --n_shots K, evaluated: what one gist answers and saves when the prompts get longer"
    p = commands.add_parser("shots", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(call=shots, device=None, n_gist=None, base=None)
    p.add_argument("runs", nargs="+", metavar="OUT_DIR", help="their directories")
    p.add_argument("--batch_size", type=int, default=50, help="prompts answered at once")
    p.add_argument("--repeats", type=int, default=9, help="how often everything is measured; the median counts")
    p.add_argument("--out", metavar="FILE.png", default="shots.png", help="where to draw it")
    text = "will a training fit? memory for every GPU, from the shapes alone"
    p = commands.add_parser("memory", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(call=memory)
    p.add_argument("--preset", default="llama-7b", metavar="NAME", help="the model, and its batches if train.py has such a preset")
    p.add_argument("--gpus", type=int, default=1, help="processes of torchrun")
    for flag, text in (("--batch_size", "examples a step, on all GPUs; default: the preset's, or 8"),
                       ("--micro_batch", "examples at once on a GPU; default: all of its share"),
                       ("--length", "tokens of an example, T5: of its source; default: the longest")):
        p.add_argument(flag, type=int, help=text)
    p.add_argument("--target", type=int, default=256, help="T5: tokens of an output")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of matrix products; weights and moments are fp32")
    p.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp", help="as in train.py")
    p.add_argument("--checkpoint_activations", action="store_true", help="as in train.py")
    by_name["run"].add_argument("--data", help="take the human split of this data: 'builtin' or a directory; default: the checkpoint's")
    by_name["run"].add_argument("--out_dir", default="out/profile", help="where profile.csv and profile.png go")
    by_name["run"].add_argument("--prompt_tokens", type=int, nargs="+", help="take random prompts of these lengths")
    for names, flag, default, text in (
            ("run train generate load", "--repeats", 5, "how often everything is measured; the median counts"),
            ("run train generate", "--n_gist", None, "number of gist tokens; default: the checkpoint's, or 1"),
            ("generate", "--prompt_tokens", 256, "length of the prompts"), ("run generate", "--input_tokens", 32, "length of random inputs"),
            ("run generate", "--max_new_tokens", 32, "length of an answer"),
            ("run", "--limit", 10, "how many prompts; of every length, if they are random"),
            ("train", "--batch_size", 8, "examples a step"), ("train", "--length", 128, "tokens of an example, a third of them output")):
        for name in names.split():
            by_name[name].add_argument(flag, type=int, default=default, help=text)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for name, value in vars(args).items():
        if any(type(n) is int and n < 1 for n in (value if isinstance(value, list) else [value])):
            parser.error(f"--{name} must be 1 or more")
    args.call(args)


if __name__ == "__main__":
    data.run(main)
