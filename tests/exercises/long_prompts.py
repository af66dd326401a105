"""Long prompts: worked examples in the prompt, and still one gist token.

    python -m tests.exercises.long_prompts --n_shots 0 1 2 4 8 --out long_prompts.png

Every prompt shows n worked examples of its instruction, all of them in the same gist token:

    Instruction: Put lamp at the end.
    Input: sun cup
    Output: sun cup lamp <G> Input: fox cup sun  Output: fox cup sun lamp

Nothing of the core changes, only the text does. For each n, a model is trained for 1,000 steps and
answers 500 unseen instructions; then the time to the first token of 50 answers is measured, from
the whole prompts and from their gists.

Results of the full runs, one seed, half an hour of one core together. A prompt ten times as long
fits into the same token, at a price of six points. The examples are no help here, as the
instruction already says everything; they are more to read past. Whether the gap closes with more
training was not measured.

    examples   prompt tokens   exact match   whole prompts   from gists   time saved
           0            11.5          71.6           36 ms        12 ms          68%
           1            24.9          72.4           70 ms        12 ms          82%
           2            38.9          70.0           89 ms        12 ms          86%
           4            66.0          68.6          142 ms        13 ms          91%
           8           120.3          65.6          261 ms        14 ms          95%
"""

import argparse
import profile
import random
from functools import partial
from statistics import mean

import data
import eval
import train


def make_records(n: int, n_shots: int, held_out: bool, seed: int) -> list[dict]:
    """n of the built-in instructions, each followed by n_shots worked examples of itself.

    held_out: those that are kept for the unseen split, or those of the training set.
    """
    rng = random.Random(seed)
    kinds = [*data.TASK_KINDS, data.TWO_STEPS]
    records = []
    while len(records) < n:
        task = data.make_task(rng, rng.choice(kinds))
        if data.is_held_out(task.text) == held_out:
            shots = [data.make_record(task, rng) for _ in range(n_shots)]
            texts = [f"Input: {shot['input']}\nOutput: {shot['output']}" for shot in shots]
            record = data.make_record(task, rng)
            records.append(record | {"instruction": "\n".join([task.text, *texts])})
    return records


def milliseconds(model, tokenizer, examples: list[data.Example], repeats: int) -> list[float]:
    """The time to the first token of a batch of answers: from whole prompts, and from gists."""
    prompts = eval.prompts_of(examples, tokenizer, model.embedding.weight.device)
    gists = eval.compress_prompts(model, *prompts)
    answer = partial(eval.answer, model, tokenizer, examples, "gist", max_new_tokens=1)
    calls = {"whole": answer, "gists": partial(answer, cache=gists)}
    return list(profile.timings(calls, repeats).values())


def run(n_shots: int, arch: str, max_steps: int, n_train: int, n_valid: int) -> dict:
    """Train and measure one model; a row of the table."""
    config = train.fill_in(train.Config(arch=arch, max_steps=max_steps, max_length=512))
    records = make_records(n_train, n_shots, held_out=False, seed=0)
    model, tokenizer = train.make_model(config, records)
    examples, _ = data.make_examples(records, tokenizer, 1, arch)
    train.fit(model, tokenizer, examples, config)

    model.eval()
    unseen = make_records(n_valid, n_shots, held_out=True, seed=1)
    examples, _ = data.make_examples(unseen, tokenizer, 1, arch)
    right = []
    for start in range(0, len(examples), 50):
        batch = examples[start : start + 50]
        texts = eval.answer(model, tokenizer, batch, config.condition, max_new_tokens=32)
        right += [text == e.record["output"] for text, e in zip(texts, batch, strict=True)]
    whole, gists = milliseconds(model, tokenizer, examples[:50], repeats=9)
    return {
        "n_shots": n_shots,
        "prompt_tokens": mean(len(e.prompt) - 1 for e in examples),
        "exact_match": 100 * mean(right),
        "whole_ms": whole,
        "gists_ms": gists,
        "saved": 100 - 100 * gists / whole,
    }


def draw(rows: list[dict], file: str) -> None:
    """Exact match and the time saved against the prompt tokens in one gist token."""
    figure, axes = data.new_figure(9, 3.5, panels=2)
    labels = {"exact_match": "exact match, unseen instructions, %", "saved": "time saved, %"}
    x = [row["prompt_tokens"] for row in rows]
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        ax.plot(x, [row[name] for row in rows], "o-")
        ax.set(xlabel="prompt tokens in one gist token", ylabel=label, ylim=(0, 100))
    data.save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description="One gist token for longer and longer prompts.")
    parser.add_argument("--n_shots", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--arch", default="llama", choices=("llama", "t5"))
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--n_train", type=int, default=100_000)
    parser.add_argument("--n_valid", type=int, default=500)
    parser.add_argument("--out", default="long_prompts.png")
    flags = parser.parse_args()
    rows = []
    for n_shots in flags.n_shots:
        row = run(n_shots, flags.arch, flags.max_steps, flags.n_train, flags.n_valid)
        print("   ".join(f"{name} {value:.1f}" for name, value in row.items()), flush=True)
        rows.append(row)
    draw(rows, flags.out)


if __name__ == "__main__":
    data.run(main)
