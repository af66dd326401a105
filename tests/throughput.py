"""How many tokens a second: training steps and answers, of a checkpoint or of random weights.

python -m tests.throughput train llama-tiny
python -m tests.throughput generate llama-tiny
"""

from __future__ import annotations

import profile
from functools import partial
from types import SimpleNamespace

import data
from gist_mask import GIST, PROMPT
from train import Config, fill_in, fit


def generate(model: str, *, repeats: int = 5, **opening) -> None:
    """Measure answers of 32 tokens to prompts of 256 and inputs of 32, in batches of 1 and 16.

    model: a checkpoint, or a preset with random weights
    repeats: measurements, of which the median counts
    """
    model = profile.open_model(model, **opening)
    for B in (1, 16):
        for caching, row in profile.measure(model, B, 256, 1, 32, 32, repeats).items():
            print(f"batch {B:2}   {caching:12}{1000 * 32 * B / row['ms']:12,.1f} tokens/s")


def train(
    model: str, *, batch_size: int = 8, length: int = 128, repeats: int = 5, **opening
) -> None:
    """Measure ten training steps with AdamW.

    model: a checkpoint, or a preset with random weights
    batch_size: examples a step
    length: of an example in tokens, half of them its output
    repeats: measurements, of which the median counts
    """
    model = profile.open_model(model, **opening)
    arch = "t5" if profile.is_t5(model.config) else "llama"
    half = [1] * (length // 2)
    segments = [PROMPT] * len(half) + [GIST]
    example = data.Example([*half, 0], [], half, segments, {}, arch)
    examples = [example] * batch_size
    tokenizer = SimpleNamespace(pad_id=0)
    config = Config(
        arch=arch,
        batch_size=batch_size,
        max_steps=10,
        device=str(model.embedding.weight.device),
        optimizer="adamw",
    )
    model.float()  # as in a training, where only matrix products are in bf16
    steps = partial(fit, model, tokenizer, examples, fill_in(config))
    ms = profile.timings({"steps": steps}, repeats)["steps"]
    print(f"{10_000 * batch_size * length / ms:,.0f} tokens/s, {ms / 10:.1f} ms a step")


COMMANDS = {"train": [train, profile.open_model], "generate": [generate, profile.open_model]}
OPTIONS = {"length": {"type": data.at_least(2)}}


def main():
    data.run_command("How many tokens a second.", COMMANDS, OPTIONS)


if __name__ == "__main__":
    data.run(main)
