"""A gist is not text: walk from the gist of one prompt to the gist of another.

    python -m tests.exercises.mean_of_two_gists out/llama-gist-1        # seconds

A gist's keys and values are numbers, so two gists have a mean. The program answers from
(1 - t) a + t b for t from 0 to 1. At the ends stand the answers of both prompts. What stands in the
middle: one of the two, a blend, or nonsense? Where does it change?

For "Add lamp before the first word." and "... after the last word.", the main job's model answered
"lamp fox cup sun" up to t = 0.5, "fox cup sun" at 0.6 and 0.7, and "fox cup sun lamp" from 0.8 on:
one of the two almost everywhere, and something else in a narrow zone between.
"""

import argparse
from dataclasses import replace

import torch

import data
import eval
from model import Cache


def blend(a: Cache, b: Cache, t: float) -> Cache:
    """(1 - t) a + t b, of keys, values, and T5's hidden states."""
    mixed = {}
    for name in ("keys", "values", "hidden"):
        if getattr(a, name) is not None:
            mixed[name] = torch.lerp(getattr(a, name), getattr(b, name), t)
    return replace(a, **mixed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer from between two gists.")
    parser.add_argument("run", help="a gist run of train.py")
    parser.add_argument("--a", default="Add lamp before the first word.")
    parser.add_argument("--b", default="Add lamp after the last word.")
    parser.add_argument("--input", default="fox cup sun")
    parser.add_argument("--points", type=int, default=11)
    flags = parser.parse_args()
    model, tokenizer, config = eval.open_run(flags.run)
    texts = (flags.a, flags.b)
    examples = [eval.lay_out(text, flags.input, tokenizer, config) for text in texts]
    gists = [eval.compress_instruction(model, tokenizer, e, config) for e in examples]
    for i in range(flags.points):
        t = i / (flags.points - 1)
        cache = blend(*gists, t)
        answers = eval.answer(model, tokenizer, examples[:1], config["condition"], 16, cache)
        print(f"{t:.2f}   {' '.join(answers[0].split())}")


if __name__ == "__main__":
    data.run(main)
