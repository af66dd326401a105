"""Learn to compare: what a tiny model has to see before it finds a word in a list.

    python -m tests.exercises.learn_to_compare --phrasings

DOCSTRING
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from statistics import mean

import data
import eval
import train

# Kinds that compare every word of the list with a, so each word of the answer is a lesson: say yes
# for a and no for others; say b for a and c for others; write b before each a; and after each a.
DENSE = {
    "mark": lambda w, a: ["yes" if word == a else "no" for word in w],
    "mark say": lambda w, a, b, c: [b if word == a else c for word in w],
    "before a": lambda w, a, b: [x for word in w for x in ([b, a] if word == a else [word])],
    "after a": lambda w, a, b: [x for word in w for x in ([a, b] if word == a else [word])],
}
KINDS = data.KINDS | DENSE
GROUPS = {
    "other kinds": [kind for kind in data.KINDS if kind not in data.COMPARES],
    "two steps": ["two steps"],
    "comparing": [kind for kind in data.KINDS if kind in data.COMPARES],
    "dense": list(DENSE),
}


def read_templates(many: bool) -> dict[str, list[str]]:
    """The phrasings of every kind: the core's four or five, or `many`, twenty more of each."""
    more = json.loads(Path(__file__).with_name("phrasings.json").read_text())
    if not many:
        more = {kind: more[kind] for kind in DENSE}
    return {kind: data.TEMPLATES.get(kind, []) + more.get(kind, []) for kind in KINDS}


def make_list(rng: random.Random, kind: str, slots: dict, training: bool) -> list[str]:
    """A list of words for an instruction with these slots. Yes is as likely as no, a as b.

    In training, the word to replace or remove is often at many places.
    """
    n_words = rng.randint(3, 6 if kind in DENSE else 5)
    words = rng.sample([word for word in data.WORDS if word not in slots.values()], n_words)
    place, draw = rng.randrange(n_words), rng.random()
    if kind in DENSE or (training and kind in ("replace", "remove") and rng.random() < 0.4):
        return [slots["a"] if rng.random() < 0.4 else word for word in words]
    if kind == "which":
        words[place] = slots["a"] if draw < 0.5 else slots["b"]
    elif kind in data.COMPARES and draw < (0.5 if kind in ("is there", "if there") else 0.9):
        words[place] = slots["a"]
    return words


def make_record(rng: random.Random, kind: str, templates: dict, training: bool = False) -> dict:
    """An example of a kind. The record keeps the values of the slots of its phrasing."""
    if kind == "two steps":
        steps = [data.one_step(rng, rng.choice(data.STEPS)) for _ in range(2)]
        return data.make_record(data.in_turn(*steps), rng) | {"slots": {}}
    template = rng.choice(templates[kind])
    a, b, c = rng.sample(data.WORDS, 3)
    n, nth = rng.choice((2, 3)), rng.randrange(len(data.ORDINALS))
    values = dict(a=a, b=b, c=c, n=n, nth=nth)
    slots = {slot: value for slot, value in values.items() if f"{{{slot}}}" in template}
    values |= dict(n=data.NUMBERS[n], nth=data.ORDINALS[nth], list=rng.choice(data.LIST_NAMES))
    text = template.format(**values)
    words = make_list(rng, kind, slots, training)
    answer = " ".join(KINDS[kind](words, **slots))
    record = {"instruction": text[0].upper() + text[1:], "input": " ".join(words)}
    return record | {"output": answer, "source": kind, "slots": slots}


def make_records(n: int, rng: random.Random, templates: dict, dense=0, kind=None) -> list[dict]:
    """n examples of a kind, on instructions that training never meets; None: of the training mix.

    dense: percent of the training mix; together with the other comparing kinds they are 60.
    """
    training, records = kind is None, []
    while len(records) < n:
        group = rng.choices(list(GROUPS.values()), (32, 8, 60 - dense, dense))[0]
        record = make_record(rng, kind or rng.choice(group), templates, training)
        if record["output"] and data.is_held_out(record["instruction"]) != training:
            records.append(record)
    return records


def always_the_commonest(records: list[dict]) -> float:
    """The share of the commonest answer, in percent. "b" is one answer, whatever word b is."""
    answers = Counter()
    for record in records:
        slot_of = {value: slot for slot, value in record.get("slots", {}).items()}
        answers[" ".join(slot_of.get(word, word) for word in record["output"].split())] += 1
    return 100 * max(answers.values()) / len(records)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the kinds that look for a word.")
    parser.add_argument("--phrasings", action="store_true", help="25 phrasings a kind, not 4")
    parser.add_argument("--dense", type=int, default=15, help="percent that compare every word")
    parser.add_argument("--muon_lr", type=float, default=0.01)
    parser.add_argument("--max_steps", type=int, default=2800)
    parser.add_argument("--n_valid", type=int, default=40, help="unseen instructions of each kind")
    flags = parser.parse_args()
    templates = read_templates(flags.phrasings)
    config = train.Config(max_steps=flags.max_steps, muon_lr=flags.muon_lr, decay=0.8)
    config = train.fill_in(config)
    n_train = config.max_steps * config.batch_size  # every step has new ones
    records = make_records(n_train, random.Random(0), templates, flags.dense)
    model, tokenizer = train.make_model(config, records)
    examples, _ = data.make_examples(records, tokenizer, config.n_gist)
    train.fit(model, tokenizer, examples, config)

    model.eval()
    rng = random.Random(1)  # the same tests, whatever the model was trained on
    kinds = sum(GROUPS.values(), [])
    tests = {kind: make_records(flags.n_valid, rng, templates, kind=kind) for kind in kinds}
    tests["human"] = data.read_records(data.ASSETS / "human.json")
    exact = {}
    print("exact match, %     commonest  model")
    for kind, records in tests.items():
        examples, _ = data.make_examples(records, tokenizer, config.n_gist)
        texts = eval.answer(model, tokenizer, examples, config.condition, max_new_tokens=32)
        exact[kind] = 100 * mean(text == r["output"] for text, r in zip(texts, records))
        print(f"{kind:18} {always_the_commonest(records):9.1f} {exact[kind]:6.1f}")
    for name, kinds in GROUPS.items():
        print(f"{f'mean, {name}':28} {mean(exact[kind] for kind in kinds):6.1f}")


if __name__ == "__main__":
    main()
