"""Several gists in one context: compress every prompt separately, and put the caches side by side.

    python -m tests.exercises.several_gists               # 10 minutes on one core

A row holds several pairs of a prompt and its gist tokens, then one input. A prompt and its gist see
their own pair only, the input sees every gist. So each prompt can be compressed alone, and a row's
cache is its prompts' caches, side by side: gists become a library of parts. Here an instruction of
two steps is two prompts. Mask, positions, layout and loss change; loop and models do not.

    Reverse the list. <G> Put lamp at the end. <G> Input: fox cup sun  Output: sun cup fox lamp

Exact match in percent, one seed: with a gist token for each step, a LLaMA gets 99.6 of 242 unseen
instructions of two steps right, and 82.2 of 258 of one. On two steps, with an earlier version and
other data: one gist token for both got 72.5 right, one for each 85.0; with a T5, 92.5 and 95.0.
"""

import argparse
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval
import gist_mask
import train
from gist_mask import GIST, INPUT, PROMPT
from model import Cache


def pairs(segments: Tensor) -> Tensor:
    """How many pairs of prompt and gist ended before each token. segments and result: (B, T)."""
    is_gist = segments == GIST
    is_end = is_gist[:, :-1] & ~is_gist[:, 1:]  # the next token is no gist token any more
    return F.pad(is_end.cumsum(dim=1), (1, 0))


def positions(segments: Tensor) -> Tensor:
    """The core's, but a later prompt takes no place: gists follow one another, whatever its length.

    segments and result: (B, T) int64.
    """
    pair = pairs(segments)
    is_later = pair[:, None, :] > pair[:, :, None]  # (B, T, T)
    later_prompt = is_later & (segments == PROMPT)[:, None, :]
    return gist_mask.positions(segments) + later_prompt.sum(dim=2)


def pair_masking(model, segments: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
    """`gist_mask.masking`, but a prompt and its gist see nothing before them."""
    pair = pairs(segments)
    same_pair = pair[:, :, None] == pair[:, None, :]  # (B, T, T)
    from_input = (segments == INPUT)[:, :, None]  # (B, T, 1)
    masked = gist_mask.masking(model, segments, target=target)
    masked["mask"] = masked["mask"] & (same_pair | from_input)[:, None]
    masked["positions"] = positions(segments)
    return masked


def pair_loss(model, batch: data.Tensors, condition: str) -> Tensor:
    masked = pair_masking(model, batch["segments"], batch["targets"])
    return F.cross_entropy(*train.label_logits(model, batch, masked), reduction="sum")


def make_records(n: int, held_out: bool) -> list[dict]:
    """Instructions of one or two steps, with their texts; held_out: those that are not trained."""
    rng = random.Random(int(held_out))
    records = []
    while len(records) < n:
        one = data.make_task(rng, rng.choice(data.TASK_KINDS))
        two = [data.make_task(rng, rng.choice(data.STEP_KINDS)) for _ in range(2)]
        for task, steps in ((one, [one]), (data.in_turn(*two), two)):
            if data.is_held_out(task.text) == held_out:
                texts = [step.text for step in steps]
                records.append(data.make_record(task, rng) | {"steps": texts})
    return records


def layout(record: dict, tokenizer, n_gist: int, arch: str = "llama") -> data.Example:
    """A prompt with its gist tokens for every step, then what `data.layout` makes of the rest."""
    steps = [record | {"instruction": step} for step in record["steps"]]
    parts = [data.layout(step, tokenizer, n_gist, arch) for step in steps]
    prompt = [token for part in parts for token in part.prompt]
    segments = [label for part in parts[:-1] for label in part.segments[: len(part.prompt)]]
    last = parts[-1]
    return replace(last, prompt=prompt, segments=segments + last.segments, record=record)


def compress_apart(model, tokenizer, example: data.Example) -> Cache:
    """Compress each prompt of a row without the others, and put the caches side by side."""
    tokens, segments = eval.prompts_of([example], tokenizer, model.embedding.weight.device)
    pair, where = pairs(segments)[0], positions(segments)  # (P,) and (1, P)
    caches = []
    for i in pair.unique():
        own = pair == i  # (P,) this prompt and its gist
        labels = segments[:, own]
        is_gist = labels[0] == GIST
        mask = gist_mask.masking(model, labels)["mask"]
        cache = model.compress(tokens[:, own], mask, where[:, own], keep=is_gist)
        caches.append(replace(cache, segments=labels[:, is_gist]))
    return side_by_side(caches)


def side_by_side(caches: list[Cache]) -> Cache:
    """The columns of several caches of the same rows, one after the other."""
    fields = zip(*[vars(cache).values() for cache in caches])
    return Cache(*[None if parts[0] is None else torch.cat(parts, dim=1) for parts in fields])


def answer(model, tokenizer, examples: list[data.Example], max_new_tokens: int) -> list[str]:
    """Answer a batch, each input from its prompts' gists."""
    gists = [compress_apart(model, tokenizer, example) for example in examples]
    return eval.answer(model, tokenizer, examples, "gist", max_new_tokens, Cache.cat(gists))


def main() -> None:
    parser = argparse.ArgumentParser(description="A gist for every step of an instruction.")
    parser.add_argument("--arch", default="llama", choices=("llama", "t5"))
    parser.add_argument("--n_gist", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=3000)
    parser.add_argument("--n_train", type=int, default=100_000)
    flags = parser.parse_args()

    records = make_records(flags.n_train, held_out=False)
    config = train.Config(arch=flags.arch, n_gist=flags.n_gist, max_steps=flags.max_steps)
    config = train.fill_in(config)
    model, tokenizer = train.make_model(config, records)
    examples = [layout(record, tokenizer, flags.n_gist, flags.arch) for record in records]
    train.fit(model, tokenizer, examples, config, pair_loss)

    model.eval()
    unseen = make_records(500, held_out=True)
    for n_steps in (1, 2):
        tests = [record for record in unseen if len(record["steps"]) == n_steps]
        examples = [layout(record, tokenizer, flags.n_gist, flags.arch) for record in tests]
        texts = answer(model, tokenizer, examples, max_new_tokens=32)
        right = sum(text == record["output"] for text, record in zip(texts, tests))
        print(f"{n_steps} steps: {100 * right / len(tests):.1f} % right of {len(tests)} unseen")


if __name__ == "__main__":
    data.run(main)
