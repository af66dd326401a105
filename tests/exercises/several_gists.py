"""Several gists in one context: compress every prompt separately, and put the caches side by side.

    python -m tests.exercises.several_gists               # 10 minutes on one core

A row holds several pairs of a prompt and its gist tokens, then one input. A prompt and its gist see
their own pair only, the input sees every gist. So each prompt can be compressed alone, and a row's
cache is its prompts' caches, side by side: gists become a library of parts. Here an instruction of
two steps is two prompts. Mask, positions, layout and loss change; loop and models do not.

    Reverse the list. <G> Put lamp at the end. <G> Input: fox cup sun  Output: sun cup fox lamp

Exact match in percent, one seed: with a gist token for each step, a LLaMA gets 99.6 of 242 unseen
instructions of two steps right, and 84.1 of 258 of one. On two steps, with an earlier version and
other data: one gist token for both got 72.5 right, one for each 85.0; with a T5, 92.5 and 95.0.
"""

import argparse
import random

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval
import train
from gist_mask import INPUT, PROMPT, segments
from model import Cache
from t5 import T5


def pairs(tokens: Tensor, gist_id: int) -> Tensor:
    """How many pairs of prompt and gist ended before each token. tokens: (B, T). Returns (B, T)."""
    is_gist = (tokens == gist_id).int()
    ends = (is_gist[:, :-1] - is_gist[:, 1:]).clamp(min=0)  # 1 where the next token is no gist
    return F.pad(ends.cumsum(dim=1), (1, 0))


def pair_mask(tokens: Tensor, gist_id: int, attention_mask: Tensor) -> Tensor:
    """An encoder's mask, (B, 1, T, T) bool: the input sees no prompt, the others their pair."""
    segment, pair = segments(tokens, gist_id), pairs(tokens, gist_id)  # (B, T)
    from_input = (segment == INPUT)[:, :, None]
    to_prompt = (segment == PROMPT)[:, None, :]
    same_pair = pair[:, :, None] == pair[:, None, :]
    mask = torch.where(from_input, ~to_prompt, same_pair) & attention_mask[:, None, :]
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return (mask | itself)[:, None]


def positions(tokens: Tensor, gist_id: int) -> Tensor:
    """The gists follow one another from 0 on; every prompt ends right before its own gist."""
    is_prompt, pair = segments(tokens, gist_id) == PROMPT, pairs(tokens, gist_id)  # (B, T)
    skipped = is_prompt[:, None, :] & (pair[:, None, :] <= pair[:, :, None])  # (B, T, T)
    return torch.arange(tokens.shape[1], device=tokens.device) - skipped.sum(dim=2)


def pair_loss(model, batch: dict[str, Tensor], gist_id: int, condition: str) -> Tensor:
    """`train.batch_loss` under the mask of pairs."""
    tokens, targets = batch["tokens"], batch["targets"]
    mask = pair_mask(tokens, gist_id, batch["attention_mask"])
    masks = [mask.tril()]
    if isinstance(model, T5):
        cross_mask = (segments(tokens, gist_id) != PROMPT) & batch["attention_mask"]
        masks = [mask, cross_mask[:, None, None]]
    logits, labels = model.label_logits(tokens, targets, *masks, positions(tokens, gist_id))
    return F.cross_entropy(logits, labels, reduction="sum")


def make_records(n: int, held_out: bool) -> list[dict]:
    """Instructions of one or two steps, with their texts; held_out: those that are not trained."""
    rng = random.Random(int(held_out))
    records = []
    while len(records) < n:
        one = data.make_task(rng, rng.choice(data.KINDS))
        two = [data.make_task(rng, rng.choice(data.STEPS)) for _ in range(2)]
        for task, steps in ((one, [one]), (data.in_turn(*two), two)):
            if data.is_held_out(task.text) == held_out:
                texts = [step.text for step in steps]
                records.append(data.make_record(task, rng) | {"steps": texts})
    return records


def layout(record: dict, tokenizer, n_gist: int, arch: str) -> data.Example:
    """A prompt with its gist tokens for every step, then what `data.layout` makes of the rest."""
    steps = [record | {"instruction": step} for step in record["steps"]]
    parts = [data.layout(step, tokenizer, n_gist, arch) for step in steps]
    prompt = [token for part in parts for token in part.prompt]
    return data.Example(prompt, parts[0].input, parts[0].output, record)


def compress_apart(model, prompt: list[int], gist_id: int) -> Cache:
    """Compress each prompt of a row without the others, and put the caches side by side."""
    row = torch.tensor([prompt], device=model.embedding.weight.device)
    pair, where = pairs(row, gist_id)[0], positions(row, gist_id)
    caches = []
    for i in pair.unique().tolist():
        part, at = row[:, pair == i], where[:, pair == i]
        and_next = torch.cat([at, at[:, -1:] + 1], dim=1)
        caches.append(model.compress(part, positions=and_next, keep=part[0] == gist_id))
    return join(caches)


def join(caches: list[Cache]) -> Cache:
    """The columns of several caches of the same rows; what follows comes after the last."""
    *columns, next_positions = zip(*[vars(cache).values() for cache in caches])
    return Cache(*[torch.cat(parts, dim=1) for parts in columns], next_positions[-1])


def answer(model, tokenizer, examples: list[data.Example], max_new_tokens: int) -> list[str]:
    """Answer a batch, each input from its prompts' gists."""
    gists = [compress_apart(model, example.prompt, tokenizer.gist_id) for example in examples]
    cache = Cache.cat(gists)
    inputs = eval.pad_left([example.input for example in examples], model, tokenizer)
    limits = {"max_new_tokens": max_new_tokens, "eos_id": tokenizer.eos_id}
    new = model.generate(*inputs, cache=cache, **limits)
    return [tokenizer.decode(ids).strip() for ids in new]


def main() -> None:
    parser = argparse.ArgumentParser(description="A gist for every step of an instruction.")
    parser.add_argument("--arch", default="llama", choices=("llama", "t5"))
    parser.add_argument("--n_gist", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=3000)
    parser.add_argument("--n_train", type=int, default=100_000)
    flags = parser.parse_args()

    records = make_records(flags.n_train, held_out=False)
    tests = make_records(500, held_out=True)
    shape = {"arch": flags.arch, "n_gist": flags.n_gist, "max_steps": flags.max_steps}
    config = train.fill_in(train.Config(**shape))
    model, tokenizer = train.make_model(config, records)
    examples = [layout(r, tokenizer, flags.n_gist, flags.arch) for r in records]
    train.fit(model, tokenizer, examples, config, pair_loss)

    model.eval()
    unseen = [layout(r, tokenizer, flags.n_gist, flags.arch) for r in tests]
    texts = []
    for start in range(0, len(unseen), 50):
        texts += answer(model, tokenizer, unseen[start : start + 50], 32)
    right = [text == e.record["output"] for text, e in zip(texts, unseen)]
    for n_steps in (1, 2):
        hits = [hit for hit, e in zip(right, unseen) if len(e.record["steps"]) == n_steps]
        print(f"{n_steps} steps: {100 * sum(hits) / len(hits):.1f} % right of {len(hits)} unseen")


if __name__ == "__main__":
    data.run(main)
