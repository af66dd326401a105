"""Where one token fails: a prompt of k facts, asked for one of them.

    python -m tests.exercises.where_one_token_fails --out facts.png        # an hour on one core

An instruction can be said in other words; facts cannot. Here the prompt is k random pairs of words,
the input names a first word, and the output is the second:

    Instruction: fox lamp, cup sun, kite bread <G>   Input: cup   Output: sun

A pair of 157 words is 14.6 bits, and nothing in one pair helps to guess another. At which k do 1, 2
and 5 gist tokens fail, and which facts are lost: the first, those in the middle, the last? For each
number of gist tokens a model is trained on prompts of 1 to 8 facts, and one more under pos_control:
what the whole prompt in sight gets right is what the model can do, what is missing under it is the
gist's fault. All are tested with other prompts, 200 for each k.

With --n_gist 1 5 --max_facts 4 --max_steps 1500 (nine minutes on one core), exact match in percent
for prompts of 1, 2, 3 and 4 facts; one seed:

    gist, 1 token     100   52   38   25
    gist, 5 tokens    100   48   34   29
    pos_control       100   49   40   31

All are near 100 / k: after so few steps a model gives one of the values, but not yet the one that
was asked for, even with the whole prompt in sight. So look at pos_control first: where it fails,
nothing can be said of the gist. The default trains twice as long; it was not run fully.
"""

import argparse
import random
from statistics import mean

import data
import eval
import train


def make_record(n_facts: int, rng: random.Random) -> dict:
    """A prompt of n_facts pairs of words, and a question for one: for the pair number `place`."""
    names = rng.sample(data.WORDS, n_facts)  # so that a question has one answer
    values = rng.choices(data.WORDS, k=n_facts)
    place = rng.randrange(n_facts)
    return {
        "instruction": ", ".join(f"{name} {value}" for name, value in zip(names, values)),
        "input": names[place],
        "output": values[place],
        "n_facts": n_facts,
        "place": place,
    }


def run(config: train.Config, records: list[dict], tests: list[dict]) -> list[bool]:
    """Train a model on records. Returns for every test whether it is answered right."""
    config = train.fill_in(config)
    model, tokenizer = train.make_model(config, records)
    examples, _ = data.make_examples(records, tokenizer, config.n_gist, config.arch)
    train.fit(model, tokenizer, examples, config)
    model.eval()
    examples, _ = data.make_examples(tests, tokenizer, config.n_gist, config.arch)
    _, texts = eval.evaluate(model, tokenizer, examples, config.condition)
    return [text == test["output"] for text, test in zip(texts, tests)]


def by_number(right: list[bool], tests: list[dict]) -> dict[int, float]:
    """Percent right for every number of facts."""
    groups = {}
    for hit, test in zip(right, tests):
        groups.setdefault(test["n_facts"], []).append(hit)
    return {n: 100 * mean(groups[n]) for n in sorted(groups)}


def by_place(right: list[bool], tests: list[dict]) -> dict[str, float]:
    """Percent right for the first of three or more facts, for those in the middle, the last."""
    groups = {"first": [], "middle": [], "last": []}
    for hit, test in zip(right, tests):
        last = test["n_facts"] - 1
        name = {0: "first", last: "last"}.get(test["place"], "middle")
        if last >= 2:
            groups[name].append(hit)
    return {name: 100 * mean(hits) for name, hits in groups.items() if hits}


def draw(numbers: dict, places: dict, file: str) -> None:
    """A line for each model: against the number of facts, and against the place of the fact."""
    figure, axes = data.new_figure(9, 3.5, panels=2)
    panels = {"facts in the prompt": numbers, "which fact is asked for": places}
    for ax, (label, lines) in zip(axes, panels.items()):
        for name, percents in lines.items():
            ax.plot(list(percents), list(percents.values()), "o-", label=name)
        ax.set(xlabel=label, ylabel="right, %", ylim=(0, 102))
    axes[0].legend()
    data.save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask for one of many facts in a prompt.")
    parser.add_argument("--n_gist", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--max_facts", type=int, default=8)
    parser.add_argument("--max_steps", type=int, default=3000)
    parser.add_argument("--n_train", type=int, default=100_000)
    parser.add_argument("--n_test", type=int, default=200, help="for each number of facts")
    parser.add_argument("--out", default="facts.png")
    flags = parser.parse_args()
    rng = random.Random(0)
    numbers = range(1, flags.max_facts + 1)
    records = [make_record(rng.choice(numbers), rng) for _ in range(flags.n_train)]
    tests = [make_record(n, rng) for n in numbers for _ in range(flags.n_test)]

    models = {f"gist, {n} tokens": {"n_gist": n} for n in flags.n_gist}
    models["pos_control"] = {"n_gist": 1, "condition": "pos_control"}
    of_numbers, of_places = {}, {}
    for name, fields in models.items():
        right = run(train.Config(**fields, max_steps=flags.max_steps), records, tests)
        of_numbers[name], of_places[name] = by_number(right, tests), by_place(right, tests)
        percents = of_numbers[name] | of_places[name]
        print(name, "  ".join(f"{key}: {x:.1f}" for key, x in percents.items()), flush=True)
    draw(of_numbers, of_places, flags.out)


if __name__ == "__main__":
    data.run(main)
