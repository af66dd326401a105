"""The paper's discrete baseline: a prompt compressed into words instead of activations.

    python -m tests.exercises.keywords --n 1 --out out/keywords-1       # seconds
    python train.py --condition pos_control --n_gist 0 --data out/keywords-1 --out_dir out/tfidf-1
    python eval.py run out/tfidf-1

A gist token is a compressed prompt that the model has learned to write and to read. Without any
learning, a prompt can be shortened to its most telling words: those of the highest TF-IDF, that is,
often in this instruction and rare in others,

    tfidf(word) = (how often the instruction has it) * log(N / how many of N instructions have it)

counted in the training split's different instructions. A word that none of these has counts as the
rarest. This program writes a data set whose instructions are their n best words, in their order;
a plain model is trained on it and evaluated like any other.
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import data


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def inverse_frequencies(instructions: set[str]) -> dict[str, float]:
    """By word: log(N / how many of the N instructions have it)."""
    have = Counter()
    for text in instructions:
        have.update(set(words_of(text)))
    return {word: math.log(len(instructions) / count) for word, count in have.items()}


def keywords(text: str, idf: dict[str, float], n: int) -> str:
    """The n words of a text that have the highest TF-IDF, in their order."""
    words = words_of(text)
    rarest = max(idf.values(), default=0.0)
    tfidf = {word: words.count(word) * idf.get(word, rarest) for word in words}
    best = sorted(tfidf, key=tfidf.get, reverse=True)[:n]
    return " ".join(sorted(best, key=words.index))


def shorten(splits: dict[str, list[dict]], n: int) -> dict[str, list[dict]]:
    """The same records, each instruction replaced by its n keywords."""
    idf = inverse_frequencies({record["instruction"] for record in splits["train"]})
    return {
        split: [r | {"instruction": keywords(r["instruction"], idf, n)} for r in records]
        for split, records in splits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a data set with keywords as instructions.")
    parser.add_argument("--data", default="builtin", help="builtin, or a directory")
    parser.add_argument("--seed", type=int, default=0, help="of the built-in data")
    parser.add_argument("--n", type=data.at_least(1), default=1, help="words of an instruction")
    parser.add_argument("--out", required=True, help="the directory to make")
    flags = parser.parse_args()
    splits = shorten(data.load_instructions(flags.data, flags.seed), flags.n)
    Path(flags.out).mkdir(parents=True)
    for split, records in splits.items():
        name = "train" if split == "train" else f"validation_{split}"
        content = "\n".join(map(json.dumps, records))
        data.write_file(Path(flags.out) / f"keywords_{name}.jsonl", content.encode())
    print(f"{flags.out}: {len(splits['train'])} training examples, such as: ", end="")
    print(json.dumps(splits["train"][0]))


if __name__ == "__main__":
    data.run(main)
