"""Gist pretraining: learn to compress running text first, instructions afterwards.

    python -m tests.exercises.gist_pretraining --max_steps 1000 --out_dir out/pretrained
    python train.py --n_gist 1 --init_from out/pretrained --optimizer muon --lr 3e-3 --max_steps 500

Text is cut anywhere into a span and the 32 tokens that follow it. Gist tokens stand between, and
the model learns the continuation under the gist mask: what it needs of the span has to go through.
The text is that of the built-in instructions, or --text, a file or a directory of *.txt files. With
--init_from, a pretrained model goes on from its own weights.

    Reverse the list. fox cup sun ... <G> Output: sun cup fox Put lamp at the end. ...

Results of the full runs: exact match on unseen instructions in percent, after so many steps of gist
training (500 and 1,000: one seed; 3,000: mean and range of three, all from the same pretrained
weights, which took 7 minutes of one core):

                                               500   1,000   3,000
    from random weights                       21.9    60.5    89.7 (85.8 to 92.9)
    from 1,000 steps of gist pretraining      50.3    83.2    96.8 (96.5 to 97.1)

So one gist token can be as good as the whole prompt (pos_control: 96.5) after 3,000 steps. But it
is these weights that are good: from others, pretrained with another seed, 3,000 steps get 84.7 and
82.1 where they got 96.9 and 96.5 (90.3 and 85.8 from random weights); after 400 steps of
pretraining, 84.7 and 80.8 (seeds 2 and 1); after 1,000 under the mask of pos_control, 90.6 (seed
2). What makes the difference was not found. A T5 gains nothing (85.2, 86.9 from random weights).
Nor did SmolLM2-135M, with 100 steps of 8 on the texts of 1,700 Alpaca+ training examples before 213
steps of gist training, whose learning rate stayed at its peak for the first half: loss 1.918 on
unseen and 2.842 on human instructions, against 1.908 and 2.805 without.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import data
import gist_mask
import train
from gist_mask import GIST, INPUT, PROMPT, START

SPAN = range(4, 65)  # tokens to compress
CONTINUATION = 32  # tokens to predict


def lines_of(path: str | None, seed: int) -> Iterator[str]:
    """The lines of a text file, or of all *.txt files in a directory; None: the built-in text."""
    if path is None:
        for record in data.builtin(seed=seed)["train"]:
            yield f"{record['instruction']} {record['input']} {record['output']}"
        return
    files = sorted(Path(path).rglob("*.txt")) if Path(path).is_dir() else [Path(path)]
    for file in files:
        with open(file, encoding="utf-8-sig", errors="replace") as lines:
            yield from lines


def cut(path: str | None, tokenizer, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of a span and its continuation, as many as wanted: the text begins again at its end.

    Raises data.DataError if the text is too short to cut.
    """
    rng = random.Random(seed)
    while True:
        tokens, n_pairs = [], 0
        for line in lines_of(path, seed):
            if line.strip():
                tokens += tokenizer.encode(tokenizer.prefix + line.strip())
            while len(tokens) >= SPAN[-1] + CONTINUATION:
                end = rng.choice(SPAN)
                yield tokens[:end], tokens[end : end + CONTINUATION]
                n_pairs += 1
                tokens = tokens[rng.randint(1, end + CONTINUATION) :]  # cut anywhere next
        if n_pairs == 0:
            raise data.DataError(f"{path}: too little text to learn from; give more")


def text_examples(
    path: str | None, tokenizer, n: int, n_gist: int, arch: str, see_start: bool, seed: int = 0
) -> list[data.Example]:
    """n examples, whose prompt is a span and whose output is its continuation. Raises as `cut`."""
    empty = {"instruction": "", "input": "", "output": ""}
    given = data.layout(empty, tokenizer, n_gist, arch).input
    start = [] if arch == "t5" or tokenizer.bos_id is None else [tokenizer.bos_id]
    examples = []
    for span, continuation in islice(cut(path, tokenizer, seed), n):
        prompt = start + span + [tokenizer.gist_id] * n_gist
        segments = [PROMPT] * len(start + span) + [GIST] * n_gist + [INPUT] * len(given)
        if see_start and start:
            segments[0] = START
        examples.append(data.Example(prompt, given, continuation, segments, empty, arch))
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn to compress running text.")
    parser.add_argument("--text", help="a file or a directory of *.txt (the built-in text)")
    parser.add_argument("--init_from", help="start from this checkpoint (random weights)")
    parser.add_argument("--arch", default="llama", choices=("llama", "t5"))
    parser.add_argument("--see_start", action="store_true", help="as in train.py")
    parser.add_argument("--n_gist", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--condition", default="gist", choices=gist_mask.TABLE)
    parser.add_argument("--out_dir", default="out/pretrained")
    config = vars(parser.parse_args())
    text = config.pop("text")
    config = train.fill_in(train.Config(**config, no_eval=True))
    records = data.load_instructions("builtin")["train"]
    model, tokenizer = train.make_model(config, records)
    n = config.max_steps * config.batch_size
    layout = (config.n_gist, config.arch, config.see_start, config.seed)
    examples = text_examples(text, tokenizer, n, *layout)
    train.fit(model, tokenizer, examples, config, out_dir=Path(config.out_dir))


if __name__ == "__main__":
    data.run(main)
