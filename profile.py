"""What gisting saves, and how fast everything is: FLOPs, time, the cache's memory.

    python profile.py paper                        # the paper's efficiency table, from shapes alone
    python profile.py run OUT_DIR                  # the same of a real model, with times

Before the first token of an answer, a model reads p prompt tokens, n gist tokens and q input
tokens. What a cache has kept of the prompt decides how many of them are new, and how many keys
they attend to (the paper's section 5):

    caching        the cache keeps    new tokens     keys
    none           nothing            p + n + q      p + n + q
    instruction    everything         q              p + n + q     (no encoder can do that:
    gist           the gist           q              n + q          its prompt sees the input)

FLOPs are those of matrix multiplications, 2 for a multiply-add. With d the width of the model, h
that of all heads together, T new tokens and S keys:

    a layer of LLaMA or of T5's encoder    2T(4d·h + 3d·d_ff) + 4T·S·h
    a layer of T5's decoder                2T(6d·h + 3d·d_ff) + 4T(T + S)h + 4S·d·h
    the output                             2T·d·V

What the tokens are changes neither FLOPs nor time, so everything is measured on arbitrary ones.

This file hides the standard library's `profile`, which cProfile and torch.compile need. So it
hands on that module's names (last lines), and imports torch only where it is used.
"""

from __future__ import annotations

import os
import runpy
from functools import partial
from pathlib import Path
from statistics import fmean, median
from timeit import timeit

LENGTHS = Path(__file__).parent / "assets" / "human_lengths.csv"


# ---- From shapes alone ----


def flops(config, new: int, keys: int, n_logits: int = 1) -> int:
    """FLOPs of reading `new` tokens that attend to `keys` in all, and of n_logits logits.

    config: a LlamaConfig; or a T5Config, then of encoding `new` tokens and decoding n_logits.
    """
    d, h = config.d_model, config.n_heads * config.head_dim
    total = 2 * n_logits * d * config.vocab_size
    if is_t5(config):
        feed_forward = (3 if config.gated else 2) * d * config.d_ff
        weights = 4 * d * h + feed_forward
        decoder = 2 * n_logits * (6 * d * h + feed_forward)
        decoder += 4 * n_logits * (n_logits + keys) * h  # attention, to itself and to the source
        decoder += 4 * keys * d * h  # the source's keys and values
        total += config.n_decoder_layers * decoder
    else:
        kv = config.n_kv_heads * config.head_dim  # the width of wk and wv; wq and wo have h
        weights = 2 * d * (h + kv) + 3 * d * config.d_ff
    return total + config.n_layers * (2 * new * weights + 4 * new * keys * h)


def is_t5(config):
    return hasattr(config, "n_decoder_layers")


def costs(config, p, n, q, all_logits):
    """A row for every caching, by the table above. all_logits: of every new token, not of one."""
    kept = {"none": 0, "instruction": p + n, "gist": n}
    if is_t5(config):
        del kept["instruction"]
    rows = {}
    for caching, columns in kept.items():
        new = q if columns else p + n + q
        count = flops(config, new, columns + new, new if all_logits else 1)
        rows[caching] = {"prompt_tokens": p, "cached_tokens": columns, "gflops": count / 1e9}
    return rows


def human_lengths(model):
    """(p, n, q) of the 252 human-split prompts that the paper measured, for one of its models."""
    rows = [line.split(",") for line in LENGTHS.read_text().splitlines()]
    return [(int(row[3]), 1, int(row[2])) for row in rows if row[0] == model]


def print_savings(prompts):
    """For every caching the means over prompts, and what part it saves."""
    names = prompts[0]["none"]
    print("caching     " + "".join(f"{name:>14}         " for name in names))
    for caching in prompts[0]:
        line = f"{caching:12}"
        for name in names:
            value = fmean(rows[caching][name] for rows in prompts)
            without = fmean(rows["none"][name] for rows in prompts)
            is_saving = 0 < value < without  # not so of the prompt's length, nor of what is cached
            saved = f"-{1 - value / without:.1%}" if is_saving else ""
            line += f"{value:14,.1f} {saved:8}"
        print(line)


def paper() -> None:
    """Print the paper's efficiency table, from the shapes of its models alone.

    The means over the 252 prompts of the human split. As in the paper, LLaMA makes logits for all
    new tokens, T5 for the first token of its answer.
    """
    for name in ("llama-7b", "flan-t5-xxl"):
        config = model_of_shape(name, "meta").config
        print(f"\n{name}")
        prompts = [costs(config, *row, not is_t5(config)) for row in human_lengths(name)]
        print_savings(prompts)


# ---- A real model ----


def model_of_shape(preset, device):
    """A Llama or T5 in the shape of a preset. Raises data.DataError."""
    import torch

    import data
    import model
    import t5

    with torch.device(device):
        if preset in model.PRESETS:
            return model.Llama(model.LlamaConfig.from_name(preset))
        if preset in t5.PRESETS:
            return t5.T5(t5.T5Config.from_name(preset))
    raise data.DataError(
        f"{preset}: neither a directory nor a preset, of {', '.join([*model.PRESETS, *t5.PRESETS])}"
    )


def open_model(name: str, *, device: str | None = None):
    """The model of a checkpoint, or a preset with random weights; on a GPU in bf16.

    device: cuda, mps or cpu (default: the first of these that is there)

    Raises data.DataError.
    """
    import data

    device = data.find_device(device)
    if Path(name).is_dir():
        model, _ = data.load_model(name, device=device)
    else:
        model = model_of_shape(name, device)
        model.init_weights()
    return model.bfloat16() if device.startswith("cuda") else model.float()


def timings(calls, repeats):
    """The median milliseconds of every call, which has to wait until its device is done.

    A round makes each call once, so that a slow moment of the machine meets them all. One more
    round at the start warms up.
    """
    rounds = []
    for _ in range(1 + repeats):
        rounds.append({name: timeit(call, number=1) for name, call in calls.items()})
    return {name: 1000 * median(times[name] for times in rounds[1:]) for name in calls}


def measure(model, B, p, n, q, max_new_tokens, repeats):
    """The rows of `costs`, with the time of B answers. Without caching, an empty cache is kept."""
    import torch

    tokens = torch.zeros(B, p + n + q, dtype=torch.int64, device=model.embedding.weight.device)
    rows = costs(model.config, p, n, q, all_logits=False)
    calls = {}
    for caching, row in rows.items():
        kept = row["cached_tokens"]
        keep = torch.arange(p + n) >= p + n - kept  # the last ones
        cache = model.compress(tokens[:, : p + n], keep=keep)
        row["cache_kib"] = cache.nbytes / B / 1024
        rest = tokens[:, p + n :] if kept else tokens
        calls[caching] = partial(model.generate, rest, cache=cache, max_new_tokens=max_new_tokens)
    for caching, ms in timings(calls, repeats).items():
        rows[caching]["ms"] = ms
    return rows


def run_model(
    model: str,
    *,
    prompt_tokens: list[int] = (32, 64, 128, 256),
    input_tokens: int = 32,
    max_new_tokens: int = 1,
    repeats: int = 5,
    out: str = "profile.png",
    **opening,
) -> None:
    """Measure a model without caching, with instruction caching and with gist caching.

    model: a checkpoint, or a preset with random weights, like llama-tiny
    prompt_tokens: lengths of prompts to measure
    input_tokens: length of the input after them
    max_new_tokens: length of the answer whose time is measured
    repeats: measurements, of which the median counts
    out: the picture of prompt tokens and milliseconds
    """
    import data

    data.check_picture(out)
    model = open_model(model, **opening)
    prompts = []
    for p in prompt_tokens:
        prompts.append(measure(model, 1, p, 1, input_tokens, max_new_tokens, repeats))
        print_savings(prompts[-1:])
    figure, ax = data.new_figure(6, 3.5)
    for caching in prompts[0]:
        x = [prompt[caching]["prompt_tokens"] for prompt in prompts]
        y = [prompt[caching]["ms"] for prompt in prompts]
        ax.plot(x, y, "o", label=caching)
    ax.set(xlabel="prompt tokens", ylabel="milliseconds")
    ax.legend(title="caching")
    data.save_figure(figure, out)


# ---- The command line ----

# (`run` itself is the standard library's, once this file is imported.)
COMMANDS = {
    "paper": [paper],
    "run": [run_model, open_model],
}


def main():
    import data

    data.run_command("What gisting saves, and how fast everything is.", COMMANDS, {})


if __name__ == "__main__":
    import data

    data.run(main)
else:
    file = Path(os.__file__).with_name("profile.py")
    standard = runpy.run_path(str(file), run_name="profile")
    globals().update({k: v for k, v in standard.items() if not k.startswith("__")})
