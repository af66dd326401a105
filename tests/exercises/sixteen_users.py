"""Sixteen users, sixteen prompts, one batch: gists of different prompts, joined and answered.

    python -m tests.exercises.sixteen_users out/llama-gist-1        # seconds

Positions are counted from the input, so gists of prompts of any lengths fit together (`Cache.cat`).
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
    examples = [eval.lay_out(r["instruction"], r["input"], tokenizer, config) for r in records]
    gists = [eval.compress_instruction(model, tokenizer, e, config) for e in examples]
    cache = Cache.cat(gists)
    answer = partial(
        eval.answer, model, tokenizer, condition=config["condition"], max_new_tokens=16
    )

    def together() -> list[str]:
        return answer(examples, cache=cache)

    def one_by_one() -> list[str]:
        return [answer([e], cache=gist)[0] for e, gist in zip(examples, gists)]

    for record, text in zip(records, together()):
        print(f"{record['instruction']}  {record['input']}  ->  {text}")
    same = sum(a == b for a, b in zip(together(), one_by_one()))
    ms = profile.timings({"together": together, "one by one": one_by_one}, repeats=5)
    print(f"{same} of 16 answers are the same; {cache.nbytes / 2**10:.1f} KiB of cache")
    for name, value in ms.items():
        print(f"{name}: {value:.0f} ms")


if __name__ == "__main__":
    data.run(main)
