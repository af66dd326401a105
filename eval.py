"""Answer, score and compare: what a gist model keeps of its prompts, beside its controls.

    python eval.py run out/llama-gist-1 out/llama-pos_control-1   # greedy answers on every split, metrics.json, one table
    python eval.py score out/llama-gist-1/outputs-*.csv           # ROUGE and exact match of any outputs file
    python eval.py compress out/llama-gist-1 --instruction "..."  # compress a prompt once, and answer from its gist

How a model answers shows what each condition sees. `gist`: the prompt is compressed into the cache of its gist tokens, and the
answer comes from this cache and the input alone. `pos_control`: prompt and input are read together. `neg_control`: only the input.
The paper's section 4 scores with ROUGE-L (and a judge); the built-in instructions have one right answer, so exact match says more.
"""
import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # footgun: on a busy machine, threads that spin while they wait train ten times slower
import torch
from tqdm import tqdm

import data
from model import IGNORE
from train import batch_loss, find_device


# ---- ROUGE ----
#
# How much of the reference the prediction says in the same words, up to their endings. Both texts become lists
# of word stems. With A and B the bags of n-grams of the two (n = 1, 2), the overlap is the size of their intersection;
# for ROUGE-L, A and B are the lists themselves and the overlap is their longest common subsequence (LCS):
#
#     precision P = overlap / |A|      recall R = overlap / |B|      F = 2PR / (P + R) = 2 overlap / (|A| + |B|)

# Porter's rules, one table a step: ending -> what replaces it. The first ending that fits decides, so the longer of two
# stands first. A lookbehind (?<=...) asks for letters before the ending that stay and count as part of the stem.
STEP_1A = {"sses": "ss", "(?<=^.)ies": "ie", "ies": "i", "ss": "ss", "s": ""}
STEP_2A = {"alli": "al"}                                        # first, as step 2 goes on with what it leaves
STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "entli": "ent",
    "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive",
    "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
    "(?<=l)ogi": "og",
}
STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP_4 = dict.fromkeys([
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "(?<=[st])ion", "ou", "ism", "ate",
    "iti", "ous", "ive", "ize",
], "")
IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "inning": "inning",
    "innings": "inning", "outing": "outing", "outings": "outing", "canning": "canning", "cannings": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}


def _shape(word: str) -> str:
    """The word as v (vowel) and c (consonant) letters; y is a vowel after a consonant: "toy" cvc, "syzygy" cvcvcv."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape.endswith("c")) else "c"
    return shape


def _measure(stem: str) -> int:
    """Porter's m, near enough the number of syllables that end in a consonant: [c..](v..c..)^m[v..]."""
    return _shape(stem).count("vc")


def _is_short(stem: str) -> bool:
    """Porter's *o, a stem that a silent e makes a word: "hop", hope, not "snow", "box", "toy"; NLTK adds "us", use."""
    shape = _shape(stem)
    return shape == "vc" or (shape.endswith("cvc") and stem[-1] not in "wxy")


def _replace_ending(word: str, rules: dict[str, str], min_measure: int = 0) -> str:
    """Apply the one rule whose ending fits, if Porter's m of the stem before it is large enough."""
    for ending, replacement in rules.items():
        if found := re.search(f"{ending}$", word):
            stem = word[:found.start()]
            return stem + replacement if _measure(stem) >= min_measure else word
    return word


def _cut_ed_and_ing(word: str) -> str:
    """Step 1b: what -ed or -ing leaves must hold a vowel, unlike "sing", and is mended: hoping: hope, hopping: hop."""
    if re.search("^.ied$", word):
        return word[:-1]                                        # died: die, but cried: cri as in cries
    if word.endswith("eed"):
        return _replace_ending(word, {"eed": "ee"}, min_measure=1)
    stem = re.sub("(ed|ing)$", "", word)
    shape = _shape(stem)
    if stem == word or "v" not in shape:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-2:-1] == stem[-1] and shape.endswith("c"):
        return stem if stem[-1] in "lsz" else stem[:-1]         # fall, but hop
    return stem + "e" if _measure(stem) == 1 and _is_short(stem) else stem


@lru_cache(maxsize=None)
def porter_stem(word: str) -> str:
    """Cut the English endings off a lower-case word: "relational" and "relate" both become "relat".

    Porter's "An algorithm for suffix stripping" (1980), with the departures of NLTK's PorterStemmer in its default mode:
    the table IRREGULAR; dies and died: die; in step 1c, y: i after a consonant only; -alli before the rest of step 2,
    and in it -bli, -fulli and -logi; words of one or two letters stay; a short stem may have two letters.
    """
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = _replace_ending(word, STEP_1A)
    word = _cut_ed_and_ing(word)
    if re.search("..y$", word) and _shape(word)[-2] == "c":     # step 1c: happy: happi as in happiness, but enjoy
        word = word[:-1] + "i"
    for rules in (STEP_2A, STEP_2, STEP_3):
        word = _replace_ending(word, rules, min_measure=1)
    word = _replace_ending(word, STEP_4, min_measure=2)
    m = _measure(word[:-1])
    if word.endswith("e") and (m > 1 or (m == 1 and not _is_short(word[:-1]))):
        word = word[:-1]                                        # step 5a: probate: probat, but rate
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]                                        # step 5b: quadrille: quadril, but roll
    return word


def _stems(text: str) -> list[str]:
    """Stem the runs of a-z and 0-9 in the lower-cased text; rouge-score leaves those of up to three letters whole."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [porter_stem(word) if len(word) > 3 else word for word in words]


def _lcs_length(a: list[str], b: list[str]) -> int:
    """L[i, j] = L[i-1, j-1] + 1 if a[i] == b[j] else max(L[i-1, j], L[i, j-1]), one row at a time."""
    row = [0] * (len(b) + 1)                                    # L[i-1, :], overwritten by L[i, :] from the left
    for x in a:
        diagonal = left = 0
        for j, y in enumerate(b, start=1):
            above = row[j]
            if x == y:
                left = diagonal + 1
            elif above > left:
                left = above
            row[j] = left
            diagonal = above
    return row[-1]


def _f_measure(overlap: int, n_prediction: int, n_reference: int) -> float:
    return 2 * overlap / max(n_prediction + n_reference, 1)     # two empty texts: 0


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures of two texts, as fractions in 0..1; 0 when one has no words.

    The measures are those of Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), with the tokens and
    stems of the rouge-score package (use_stemmer=True), so that the figures compare with published ones.
    """
    a, b = _stems(prediction), _stems(reference)
    scores = {}
    for name, n in (("rouge1", 1), ("rouge2", 2)):
        a_grams = Counter(zip(*(a[i:] for i in range(n))))      # n-gram -> how often
        b_grams = Counter(zip(*(b[i:] for i in range(n))))
        scores[name] = _f_measure((a_grams & b_grams).total(), a_grams.total(), b_grams.total())
    scores["rougeL"] = _f_measure(_lcs_length(a, b), len(a), len(b))
    return scores


# ---- Answers ----

def answer(model, tokenizer, examples: list[data.Example], condition: str, n_gist: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of examples, each condition reading what it may see."""
    device = next(model.parameters()).device

    def tensors(rows):
        return [x.to(device) for x in data.pad(rows, tokenizer.pad_id, left=True)]

    cache = None
    rows = [e.input for e in examples]
    if condition == "pos_control" or n_gist == 0:
        rows = [e.prompt + e.input for e in examples]
    elif condition == "gist":
        tokens, valid = tensors([e.prompt for e in examples])
        cache = model.compress(tokens, tokenizer.gist_id, valid)
    tokens, valid = tensors(rows)
    new = model.generate(tokens, valid, cache=cache, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id)
    return [tokenizer.decode(ids).strip() for ids in new]


@torch.no_grad()
def evaluate(model, tokenizer, examples: list[data.Example], run: dict, batch_size: int, max_new_tokens: int | None,
             name: str) -> tuple[float, list[str]]:
    """The mean loss per output token of a split (nats), and an answer to every example. run: the flags that it was trained with."""
    lengths = [len(e) for e in examples]
    max_new_tokens = max_new_tokens or max(len(e.output) for e in examples)
    answers, loss, labels = [""] * len(examples), 0.0, 0
    bar = tqdm(total=len(examples), desc=name, unit="example", leave=False)
    order = sorted(range(len(examples)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        batch = data.collate([examples[i] for i in rows], tokenizer.pad_id, run["arch"])
        batch = {k: v.to(next(model.parameters()).device) for k, v in batch.items()}
        loss += batch_loss(model, batch, tokenizer.gist_id, run["condition"]).item()
        labels += int((batch["targets"] != IGNORE).sum())
        new = answer(model, tokenizer, [examples[i] for i in rows], run["condition"], run["n_gist"], max_new_tokens)
        for i, text in zip(rows, new):
            answers[i] = text
        bar.update(len(rows))
    bar.close()
    return loss / labels, answers


def score(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Mean ROUGE-1/2/L and exact match (up to white space at the ends) over (prediction, reference) pairs, as fractions."""
    rows = [{"exact_match": float(p.strip() == r.strip()), **rouge(p, r)} for p, r in pairs]
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"n": len(rows)}


def as_text(record: dict) -> str:
    """The question as it stands in the x column of an outputs file."""
    return f"Instruction: {record['instruction']}" + (f"\nInput: {record['input']}" if record["input"] else "")


def open_run(path: str, device: str | None) -> tuple:
    """The model of a run of train.py, ready to answer; its tokenizer; and the flags that it was trained with. Raises data.DataError."""
    config = data.read_config(path).get("gisting")
    if config is None:
        raise data.DataError(f"{path}/config.json: has no 'gisting' entry, so this is no run of train.py; train one first")
    model, tokenizer = data.load_model(path, device=find_device(device))
    return model.eval(), tokenizer, config


# ---- eval.py run ----

def run_one(path: str, args) -> dict:
    """Evaluate one run on every split that its data has: write outputs-<split>.csv and metrics.json, return the metrics."""
    model, tokenizer, config = open_run(path, args.device)
    splits = data.load_instructions(args.data or config["data"], config["seed"])
    metrics = {key: config[key] for key in ("condition", "n_gist", "arch", "steps", "seconds")}
    for split in data.SPLITS:
        examples, skipped = data.make_examples(splits[split][:args.limit], tokenizer, config["n_gist"], config["arch"],
                                               args.max_length or config["max_length"], config["max_target"])
        if skipped:
            print(f"{path} {split}: {skipped} examples skipped, their output was cut off; raise --max_length", file=sys.stderr)
        if not examples:
            continue
        loss, answers = evaluate(model, tokenizer, examples, config, args.batch_size, args.max_new_tokens, f"{path} {split}")
        rows = [(as_text(e.record), text, e.record["output"]) for e, text in zip(examples, answers)]
        write_outputs(Path(path) / f"outputs-{split}.csv", rows)
        metrics[split] = score([(text, truth) for _, text, truth in rows]) | {"loss": loss}
        if (args.data or config["data"]) == "builtin" and split != "human":
            metrics[split]["families"] = by_family(examples, answers)
    data.write_file(Path(path) / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def by_family(examples: list[data.Example], answers: list[str]) -> dict[str, float]:
    """Exact match of every family of the built-in instructions."""
    right: dict[str, list[bool]] = {}
    for e, text in zip(examples, answers):
        right.setdefault(e.record["source"], []).append(text == e.record["output"])
    return {family: sum(r) / len(r) for family, r in sorted(right.items())}


def write_outputs(file: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write a csv file with the columns x, y_pred, y_true: the question, the answer, the reference."""
    text = io.StringIO()
    csv.writer(text).writerows([("x", "y_pred", "y_true"), *rows])
    data.write_file(file, text.getvalue().encode())


def print_table(rows: list[tuple[str, str, dict]]) -> None:
    """One line for every (run, split, metrics); percent, but for the loss (nats a token)."""
    width = max(len(name) for name, _, _ in rows)
    print(f"{'':{width}}  split        n   exact match   ROUGE-1   ROUGE-2   ROUGE-L      loss")
    for name, split, m in rows:
        loss = f"{m['loss']:10.3f}" if "loss" in m else ""
        print(f"{name:{width}}  {split:7} {m['n']:6,}   {100 * m['exact_match']:11.1f}   {100 * m['rouge1']:7.3f}   {100 * m['rouge2']:7.3f}"
              f"   {100 * m['rougeL']:7.3f}{loss}")


def run(args) -> None:
    results = [(path, run_one(path, args)) for path in args.runs]
    rows = [(path, split, m[split]) for path, m in results for split in data.SPLITS if split in m]
    if not rows:
        print("nothing to evaluate: the data has no validation file, or --max_length cuts all outputs off", file=sys.stderr)
        return
    print_table(rows)
    families = [(path, m["unseen"]["families"]) for path, m in results if "families" in m.get("unseen", {})]
    if families:
        print("\nexact match on unseen instructions by family (* looks for a word in the list):")
        for name in families[0][1]:
            star = "*" if name in data.FAMILIES and data.FAMILIES[name].compares else " "
            print(f"  {name:18}{star}" + "".join(f"{100 * f[name]:8.1f}" for _, f in families))


# ---- eval.py score ----

def read_outputs(file: str) -> list[dict]:
    """The rows of an outputs file, dicts with at least x, y_pred and y_true. Raises data.DataError."""
    try:
        with open(file, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise data.DataError(f"{file}: cannot be read as a csv file: {error}") from None
    missing = [c for c in ("x", "y_pred", "y_true") if c not in columns]
    if missing:
        raise data.DataError(f"{file}: no column {', '.join(missing)}; an outputs file has the columns x, y_pred, y_true")
    if not rows:
        raise data.DataError(f"{file}: has no rows to score")
    if any(row["y_true"] is None for row in rows):
        raise data.DataError(f"{file}: a row has too few columns; an outputs file has the columns x, y_pred, y_true")
    return rows


def score_files(args) -> None:
    print_table([(file, "", score([(row["y_pred"], row["y_true"]) for row in read_outputs(file)])) for file in args.files])


# ---- eval.py compress ----

def compress(args) -> None:
    """Compress one instruction, answer every input from its gist, and show the answers from the whole prompt beside them."""
    model, tokenizer, config = open_run(args.run, args.device)
    device, n_gist, arch = next(model.parameters()).device, config["n_gist"], config["arch"]
    if config["condition"] != "gist" or n_gist == 0:
        raise data.DataError(f"{args.run}: was trained with condition {config['condition']} and {n_gist} gist tokens, so it cannot compress; "
                             "train one with train.py --n_gist 1")
    cache, instruction = data.load_cache(args.load, model, n_gist) if args.load else (None, args.instruction.strip())
    if not instruction:
        raise data.DataError("--instruction is empty: there is nothing to compress")
    inputs = [line for given in args.input or [""] for line in (sys.stdin.read().splitlines() if given == "-" else [given])]
    examples = [data.layout({"instruction": instruction, "input": given, "output": ""}, tokenizer, n_gist, arch) for given in inputs or [""]]
    prompt = torch.tensor([examples[0].prompt], device=device)            # (1, T)
    whole = model.compress(prompt, tokenizer.gist_id, keep="all")
    cache = model.compress(prompt, tokenizer.gist_id) if cache is None else cache
    if args.save:
        data.save_cache(args.save, cache, model, n_gist, instruction)
        print(f"wrote {args.save}")
    n = prompt.shape[1] - n_gist
    print(f"{n} prompt tokens in {n_gist} gist token{'s' * (n_gist > 1)}: {n / n_gist:.1f} times smaller; "
          f"cache {size(whole.nbytes)} before, {size(cache.nbytes)} after")

    def generate(rows: list[list[int]], cache=None) -> list[str]:
        tokens, valid = (x.to(device) for x in data.pad(rows, tokenizer.pad_id, left=True))
        new = model.generate(tokens, valid, cache=cache, max_new_tokens=args.max_new_tokens, eos_id=tokenizer.eos_id)
        return [tokenizer.decode(ids).strip() for ids in new]

    from_gist = generate([e.input for e in examples], cache[[0] * len(examples)])
    from_prompt = generate([e.prompt + e.input for e in examples])
    for given, gist, prompt in zip(inputs or [""], from_gist, from_prompt):
        print(f"\ninput         {given}\nfrom the gist {gist}\nwhole prompt  {prompt}")


def size(n: int) -> str:
    """Bytes, for people."""
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 else f"{n / 2**10:.2f} KiB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer, score and compare.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="answer every split of a run's data greedily, score the answers, print a table over the runs")
    p.add_argument("runs", nargs="+", metavar="OUT_DIR", help="directories that train.py wrote")
    p.add_argument("--data", help="'builtin' or a directory in the Alpaca+ layout; default: what the run was trained on")
    p.add_argument("--limit", type=int, help="only the first examples of every split")
    p.add_argument("--batch_size", type=int, default=50, help="examples answered at once (%(default)s)")
    p.add_argument("--max_length", type=int, help="longest example in tokens; default: that of the training (the paper: 512, human split 768)")
    p.add_argument("--max_new_tokens", type=int, help="longest answer in tokens; default: the longest reference of the split")
    p.add_argument("--device", help="cuda, mps or cpu; default: the first of these that is there")
    p.set_defaults(call=run)
    p = commands.add_parser("score", help="ROUGE-1/2/L and exact match of outputs files (csv with the columns x, y_pred, y_true)")
    p.add_argument("files", nargs="+", metavar="FILE.csv")
    p.set_defaults(call=score_files)
    p = commands.add_parser("compress", help="compress an instruction once, and answer inputs from its gist")
    p.add_argument("run", metavar="OUT_DIR", help="a directory that train.py --condition gist wrote")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--instruction", help="what to compress")
    what.add_argument("--load", metavar="FILE", help="a gist that --save wrote")
    p.add_argument("--input", nargs="+", metavar="TEXT", help="answer these; - reads inputs from standard input, one a line; default: no input")
    p.add_argument("--save", metavar="FILE", help="keep the gist in this file")
    p.add_argument("--max_new_tokens", type=int, default=128, help="longest answer in tokens (%(default)s)")
    p.add_argument("--device", help="cuda, mps or cpu; default: the first of these that is there")
    p.set_defaults(call=compress)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    data.run(main)
