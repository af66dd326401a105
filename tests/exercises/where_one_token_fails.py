"""Where one token fails: a prompt of k facts, asked for one of them.

    python train.py --n_gist 1 --condition pos_control
    python -m tests.exercises.where_one_token_fails out/llama-pos_control-1 --out facts.png

An instruction can be said in other words; facts cannot. Here the prompt is k random pairs of words,
the input names a first word, and the output is its pair:

    Instruction: fox lamp, cup sun, kite bread <G>   Input: cup   Output: cup sun

A pair of 157 words is 14.6 bits, and nothing in one pair helps to guess another. At which k do 1, 2
and 5 gist tokens fail, and which facts are lost: the first, those in the middle, the last? For each
number of gist tokens a model is trained on prompts of 1 to 8 facts, and one more under pos_control:
what the whole prompt in sight gets right is what the model can do, what is missing under it is the
gist's fault. All are tested with other prompts, 200 for each k.

Looking a fact up takes two steps, find the name and read what follows, and is learned late. Three
things make it early: a start from a model that follows instructions, several questions in a row
while it trains, and an answer that repeats the name.

Results of the full run (40 minutes of one core, one seed): right in percent, for 1 to 8 facts:

    gist, 1 token     100   51   33   31   25   18   16   16
    gist, 2 tokens    100   46   33   25   19   15   14   16
    gist, 5 tokens    100   45   39   21   24   17   14   19
    pos_control       100  100  100  100  100  100  100  100

With the prompt in sight, all facts are looked up, after 500 steps already. From a gist, the model
gives one of the k values, whichever place its fact has: 100 / k percent. Five tokens are no better
than one, so it is not room that is missing. What each value belongs to is not written down, and
2,000 steps do not teach it; whether more would was not measured.
"""

import argparse
import random
from statistics import mean

import data
import eval
import train


def make_record(n_facts: int, n_asked: int, rng: random.Random) -> dict:
    """A prompt of n_facts pairs of words, and a question for n_asked of them, in any order.

    place: that of the pair that is asked for first.
    """
    names = rng.sample(data.WORDS, n_facts)  # so that a question has one answer
    values = rng.choices(data.WORDS, k=n_facts)
    pairs = [f"{name} {value}" for name, value in zip(names, values)]
    places = rng.sample(range(n_facts), n_asked)
    return {
        "instruction": ", ".join(pairs),
        "input": " ".join(names[place] for place in places),
        "output": " ".join(pairs[place] for place in places),
        "n_facts": n_facts,
        "place": places[0],
    }


def answer(config: train.Config, records: list[dict], tests: list[dict]) -> list[bool]:
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
    parser.add_argument("run", help="of pos_control: what all start from")
    parser.add_argument("--n_gist", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--max_facts", type=int, default=8)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--n_train", type=int, default=100_000)
    parser.add_argument("--n_test", type=int, default=200, help="for each number of facts")
    parser.add_argument("--out", default="facts.png")
    flags = parser.parse_args()
    rng = random.Random(0)
    numbers = range(1, flags.max_facts + 1)
    records = []
    for _ in range(flags.n_train):
        n_facts = rng.choice(numbers)
        records.append(make_record(n_facts, rng.randint(1, n_facts), rng))
    tests = [make_record(n, 1, rng) for n in numbers for _ in range(flags.n_test)]

    start = dict(init_from=flags.run, optimizer="muon", lr=3e-3, max_steps=flags.max_steps)
    models = {f"gist, {n} tokens": {"n_gist": n} for n in flags.n_gist}
    models["pos_control"] = {"n_gist": 1, "condition": "pos_control"}
    of_numbers, of_places = {}, {}
    for name, fields in models.items():
        right = answer(train.Config(**fields, **start), records, tests)
        of_numbers[name], of_places[name] = by_number(right, tests), by_place(right, tests)
        percents = of_numbers[name] | of_places[name]
        print(name, "  ".join(f"{key}: {x:.1f}" for key, x in percents.items()), flush=True)
    draw(of_numbers, of_places, flags.out)


if __name__ == "__main__":
    data.run(main)
