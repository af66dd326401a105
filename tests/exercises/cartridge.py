"""A cartridge: gradient descent on one prompt's gist itself, with the model frozen.

    python -m tests.exercises.cartridge out/llama-gist-1        # two minutes

A gist model writes a prompt into the keys and values of one token in a single forward pass. What
could that token hold at best? Take one instruction and examples of it, start from the gist that the
model writes, and train these keys and values alone to answer the examples (Eyuboglu et al. 2025,
"Cartridges", arXiv 2506.06266). Both are then tested on other inputs: if the trained one is right
where the written one is not, then the token has room, and it is the writing that fails.

With the model of the main job, 300 steps on 64 examples of one instruction, 100 others to test,
exact match in percent, three instructions each:

    --kind       written        trained
    if there     99, 89, 77     100, 99, 100
    mark with    85, 84, 73     100, 99, 99
    before a     36, 15, 26     66, 71, 57

So one token has room for more than the model writes into it: for `if there`, a gist that is nearly
always right exists, and the frozen model can read it. For `before a`, no gist helps enough: there
the model has not learned what to do with it.

Needs a LLaMA run. The model copies a cache before it goes on from it, so gradients flow back into
the cache's keys and values like into any other input.
"""

import argparse
import random
from dataclasses import replace
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval
import gist_mask
import train
from model import Cache, Llama


def cached_loss(model: Llama, cache: Cache, examples: list[data.Example]) -> Tensor:
    """Cross-entropy per label of examples that go on from a cache of one row."""
    # A batch as in training, but for the prompt, which is in the cache.
    given = [replace(e, prompt=[], segments=e.segments[len(e.prompt) :]) for e in examples]
    batch = data.collate(given, pad_id=0)
    batch = {name: x.to(cache.keys.device) for name, x in batch.items()}
    masked = gist_mask.masking(model, batch["segments"], cache=cache)
    return F.cross_entropy(*train.label_logits(model, batch, masked | {"cache": cache}))


def train_cartridge(
    model: Llama, gist: Cache, examples: list[data.Example], steps: int, lr: float
) -> Cache:
    """Move a gist's keys and values to where the examples are answered best."""
    model.requires_grad_(False)
    keys, values = gist.keys.clone().requires_grad_(), gist.values.clone().requires_grad_()
    optimizer = torch.optim.Adam([keys, values], lr=lr)
    for step in range(steps):
        loss = cached_loss(model, replace(gist, keys=keys, values=values), examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return replace(gist, keys=keys.detach(), values=values.detach())


def exact_match(model: Llama, tokenizer, cache: Cache, examples: list[data.Example]) -> float:
    """The share of examples that are answered right from a cache of one row."""
    texts = eval.answer(model, tokenizer, examples, "gist", max_new_tokens=32, cache=cache)
    return mean(text == e.record["output"] for text, e in zip(texts, examples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one prompt's gist, the model frozen.")
    parser.add_argument("run", help="a LLaMA gist run of train.py")
    parser.add_argument("--kind", default="if there", choices=data.TASK_KINDS)
    parser.add_argument("--instructions", type=int, default=3)
    parser.add_argument("--n_train", type=int, default=64)
    parser.add_argument("--n_test", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.02)
    flags = parser.parse_args()
    model, tokenizer, config = eval.open_run(flags.run)
    rng = random.Random(0)
    for _ in range(flags.instructions):
        task = data.make_task(rng, flags.kind)
        n = flags.n_train + flags.n_test
        records = [data.make_record(task, rng) for _ in range(n)]
        sizes = {name: config[name] for name in ("n_gist", "see_start")}
        examples = [data.layout(record, tokenizer, **sizes) for record in records]
        to_train, to_test = examples[: flags.n_train], examples[flags.n_train :]
        gist = eval.compress_instruction(model, tokenizer, examples[0], config)
        cartridge = train_cartridge(model, gist, to_train, flags.steps, flags.lr)
        print(task.text)
        for name, cache in (("written", gist), ("trained", cartridge)):
            print(f"  {name}: {100 * exact_match(model, tokenizer, cache, to_test):.1f} % right")


if __name__ == "__main__":
    data.run(main)
