"""Sixteen users, sixteen prompts, one batch: gists of different prompts, joined and answered.

    python -m tests.exercises.sixteen_users out/llama-gist-1        # seconds

Positions are counted from the gist, so gists of prompts of any lengths fit together (`Cache.cat`).
Every answer is the one that the user alone would get. What is gained is time: the weights are read
from memory once for all sixteen: 40 ms against 219 ms on one busy core, for the main job's model.
"""

import argparse
import profile
from functools import partial

import data
import eval
from model import Cache


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer sixteen prompts in one batch.")
    parser.add_argument("run", help="a gist run of train.py")
    flags = parser.parse_args()
    model, tokenizer, config = eval.open_run(flags.run)
    records = data.builtin(1000, 16)["unseen"]
    arch, n_gist = config["arch"], config["n_gist"]
    examples = [data.layout(record, tokenizer, n_gist, arch) for record in records]
    gists = []
    for example in examples:
        prompt = eval.pad_left([example.prompt], model, tokenizer)
        gists.append(eval.compress_prompts(model, *prompt, tokenizer.gist_id))
    answer = partial(model.generate, max_new_tokens=16, eos_id=tokenizer.eos_id)
    inputs = [e.input for e in examples]
    cache = Cache.cat(gists)

    def together() -> list[list[int]]:
        return answer(*eval.pad_left(inputs, model, tokenizer), cache=cache)

    def one_by_one() -> list[list[int]]:
        pairs = zip(inputs, gists, strict=True)
        return [
            answer(*eval.pad_left([given], model, tokenizer), cache=gist)[0]
            for given, gist in pairs
        ]

    for example, ids in zip(examples, together(), strict=True):
        record = example.record
        print(f"{record['instruction']}  {record['input']}  ->  {tokenizer.decode(ids).strip()}")
    same = sum(a == b for a, b in zip(together(), one_by_one(), strict=True))
    ms = profile.timings({"together": together, "one by one": one_by_one}, repeats=5)
    print(f"{same} of 16 answers are the same; {cache.nbytes / 2**10:.1f} KiB of cache")
    for name, value in ms.items():
        print(f"{name}: {value:.0f} ms")


if __name__ == "__main__":
    data.run(main)
