"""Accumulating gists: a prompt in three parts, where each part's gist sees the gists before it.

    python -m tests.exercises.accumulating_gists                    # three trainings
    python -m tests.exercises.accumulating_gists --rules one        # one of them

As in a conversation of several turns, a prompt comes in parts, and each is compressed as it
arrives. Three rules, for a LLaMA and instructions of three steps:

    one           all of them after the prompt: step step step G G G
    apart         each step sees itself only:    step G step G step G      (several_gists.py)
    accumulate    ... and the gists before it:   step G step G step G      (AutoCompressors,
                                                                     arXiv 2305.14788)

All have three gist tokens, and the input sees all of them. Only the mask differs between `apart`
and `accumulate`. Results of the full run (10 minutes each on one core; exact match on 300 unseen
instructions, one seed): one 91.7, apart 100.0, accumulate 99.0. Steps that are compressed one by
one are easier than three at once, and as they hardly need one another, seeing the gists before adds
nothing here; think of prompts whose second part says "the same, but ...".
"""

import argparse
import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import train
from tests.exercises.several_gists import pair_mask, pairs, positions

STEPS = 3
RULES = ("one", "apart", "accumulate")


def rule_mask(tokens: Tensor, gist_id: int, attention_mask: Tensor, rule: str) -> Tensor:
    """A decoder's mask, (B, 1, T, T) bool. (One pair in the row is the plain gist mask.)"""
    mask = pair_mask(tokens, gist_id, attention_mask)
    if rule == "accumulate":
        pair = pairs(tokens, gist_id)  # (B, T)
        is_earlier = pair[:, None, :] < pair[:, :, None]  # (B, T, T)
        to_gist = (tokens == gist_id)[:, None, :]
        mask = mask | (is_earlier & to_gist)[:, None]
    return mask.tril()


def rule_loss(model, batch: dict[str, Tensor], gist_id: int, condition: str, rule: str) -> Tensor:
    tokens = batch["tokens"]
    mask = rule_mask(tokens, gist_id, batch["attention_mask"], rule)
    where = positions(tokens, gist_id)
    logits, labels = model.label_logits(tokens, batch["targets"], mask, where)
    return F.cross_entropy(logits, labels, reduction="sum")


def make_records(n: int, held_out: bool) -> list[dict]:
    """Instructions of three steps, with each step's text; held_out: those that are not trained."""
    rng = random.Random(int(held_out))
    records = []
    while len(records) < n:
        tasks = [data.make_task(rng, rng.choice(data.STEPS)) for _ in range(STEPS)]
        whole = data.in_turn(data.in_turn(tasks[0], tasks[1]), tasks[2])
        record = data.make_record(whole, rng)
        if record["output"] and data.is_held_out(whole.text) == held_out:
            records.append(record | {"steps": [task.text for task in tasks]})
    return records


def layout(record: dict, tokenizer, rule: str) -> data.Example:
    """Three gist tokens: behind the whole prompt, or one behind every step."""
    if rule == "one":
        return data.layout(record, tokenizer, STEPS)
    parts = [data.layout(record | {"instruction": s}, tokenizer, 1) for s in record["steps"]]
    prompt = [token for part in parts for token in part.prompt]
    return data.Example(prompt, parts[0].input, parts[0].output, record)


def answer(model, tokenizer, example: data.Example, rule: str) -> str:
    """Compress the prompt under the rule's mask, keep the gists, go on from them.

    No token of a part sees a later part, so compressing part after part gives the same gists.
    """
    device = model.embedding.weight.device
    row = torch.tensor([example.prompt], device=device)
    everything = torch.ones_like(row, dtype=torch.bool)
    where = positions(row, tokenizer.gist_id)
    cache = model.compress(
        row,
        mask=rule_mask(row, tokenizer.gist_id, everything, rule),
        positions=torch.cat([where, where[:, -1:] + 1], dim=1),
        keep=row[0] == tokenizer.gist_id,
    )
    given = torch.tensor([example.input], device=device)
    new = model.generate(given, cache=cache, max_new_tokens=32, eos_id=tokenizer.eos_id)
    return tokenizer.decode(new[0]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Three rules for a prompt in three parts.")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--n_train", type=int, default=100_000)
    parser.add_argument("--n_test", type=int, default=300)
    flags = parser.parse_args()
    config = train.fill_in(train.Config(n_gist=STEPS, max_steps=flags.max_steps))
    records = make_records(flags.n_train, held_out=False)
    tests = make_records(flags.n_test, held_out=True)
    for rule in flags.rules:
        model, tokenizer = train.make_model(config, records)
        examples = [layout(record, tokenizer, rule) for record in records]
        train.fit(model, tokenizer, examples, config, partial(rule_loss, rule=rule))
        model.eval()
        right = 0
        for record in tests:
            text = answer(model, tokenizer, layout(record, tokenizer, rule), rule)
            right += text == record["output"]
        print(f"{rule}: {100 * right / len(tests):.1f} % exact match", flush=True)


if __name__ == "__main__":
    data.run(main)
