"""Answer, score and compare: what a gist model keeps of its prompts, beside its controls.

    python eval.py run out/llama-gist-1 out/llama-pos_control-1   # answer every split, one table
    python eval.py score out/llama-gist-1/outputs-*.csv           # ROUGE and exact match
    python eval.py compress out/llama-gist-1 --instruction "..."  # compress once, answer from it

One rule answers for every condition, and it is the one that was trained. A prompt is read once,
under its mask. The cache keeps the columns that the input may see: under `gist` the gist's, under
`pos_control` all, under `neg_control` none. Input and answer follow, under what is left of the
whole row's mask. No condition is named in the code: `gist_mask.TABLE` is asked.

The paper's section 4 scores with ROUGE-L and a judge. The built-in instructions have one right
answer, so there exact match says more.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import io
import json
import math
import os
import random
import re
import time
import urllib.request
from collections import Counter
from dataclasses import asdict
from http.client import InvalidURL
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import HTTPError, URLError

# As in train.py: threads that wait spin for a short time only.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import gist_mask
from model import Cache
from t5 import T5
from train import Config, batch_loss, draw_losses, fill_in

Model = data.Model

# ---- Answers ----


@torch.no_grad()
def answer(
    model: Model,
    tokenizer: data.Tokenizer,
    examples: list[data.Example],
    condition: str,
    max_new_tokens: int,
    cache: Cache | None = None,
) -> list[str]:
    """Answer a batch greedily, every input from what it may see of its prompt.

    cache: the prompts', if they were compressed before (`compress_prompts`).
    """
    is_t5 = isinstance(model, T5)
    gist_id = tokenizer.gist_id
    before = [e.prompt for e in examples]
    after = [e.input for e in examples]
    is_masked = gist_id in before[0]  # a row without gist tokens is not
    if is_t5 and (gist_mask.prompt_sees_input(condition) or not is_masked):
        # In an encoder such a prompt cannot be read before its input: read them together.
        after = [e.prompt + e.input for e in examples]
        before = [[] for _ in examples]
    prompts = pad_left(before, model, tokenizer)  # tokens and attention mask, two of (B, P)
    inputs = pad_left(after, model, tokenizer)  # two of (B, T)
    P = prompts[0].shape[1]
    if cache is None and P > 0:
        cache = compress_prompts(model, *prompts, gist_id, condition)

    # The mask of the whole row. A decoder's answer is part of it, whatever its tokens will be.
    room = (0, 0 if is_t5 else max_new_tokens)
    tokens = F.pad(torch.cat([prompts[0], inputs[0]], dim=1), room)
    attention_mask = F.pad(torch.cat([prompts[1], inputs[1]], dim=1), room, value=True)
    row = (tokens, gist_id, condition, attention_mask)
    cross_mask = gist_mask.cross_mask(*row)  # (B, 1, 1, P + ...)

    # What is still to come of it: the queries behind the prompt, and the keys that are left.
    columns = cross_mask[:, 0, 0].any(dim=0)  # of the prompt, those that the cache has kept
    columns[P:] = True
    masks = {"mask": mask_of(model)(*row)[:, :, P:, columns]}
    if is_t5:
        masks["cross_mask"] = cross_mask[..., columns]
    if P == 0:  # no cache says where the input stands: the gist is in these rows
        masks["positions"] = gist_mask.positions(tokens, gist_id)
    new = model.generate(
        *inputs, **masks, cache=cache, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id
    )
    return [tokenizer.decode(ids).strip() for ids in new]


@torch.no_grad()
def compress_prompts(
    model: Model,
    tokens: Tensor,
    attention_mask: Tensor | None,
    gist_id: int,
    condition: str = "gist",
) -> Cache:
    """Read prompts under their mask, and keep the columns that the input may see.

    tokens: (B, P) int64, prompts with their gist tokens. attention_mask: (B, P) bool, False on
    padding, which stands on the left; None is no padding.
    """
    row = (tokens, gist_id, condition, attention_mask)
    if attention_mask is not None:
        assert attention_mask[:, -1:].all(), "prompts have to be padded on the left"
    return model.compress(
        tokens,
        attention_mask,
        mask=mask_of(model)(*row),
        positions=gist_mask.positions(F.pad(tokens, (0, 1)), gist_id),  # and of what comes next
        keep=gist_mask.cross_mask(*row)[:, 0, 0].any(dim=0),  # (P,)
    )


def mask_of(model):
    return gist_mask.encoder_mask if isinstance(model, T5) else gist_mask.decoder_mask


def pad_left(rows, model, tokenizer):
    """Tokens (B, T) int64 and their attention mask (B, T) bool, on the model's device."""
    padded = data.pad(rows, tokenizer.pad_id, left=True)
    return [x.to(model.embedding.weight.device) for x in padded]


# ---- eval.py run: whole splits ----

MAX_TOKENS = 16_384  # of a batch: their cache is 8 GiB for LLaMA-7B in bfloat16


def run(runs: list[str], **options) -> None:
    """Evaluate runs, and print one table of all. options: see `evaluate_run`."""
    rows = {}
    for path in runs:
        metrics = evaluate_run(path, **options)
        rows |= {f"{path} {split}": metrics[split] for split in data.SPLITS if split in metrics}
    if rows:
        print_table(rows)
    else:
        print("nothing to evaluate: no validation files, or no output within --max_length")


def evaluate_run(
    path: str,
    *,
    data_dir: str | None = None,
    batch_size: int = 50,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    **opening,
) -> dict:
    """Write outputs-<split>.csv and metrics.json of a run, print families. Returns the metrics.

    data_dir: "builtin" or a directory; default: what the run was trained on. batch_size: examples
    at once, at most. max_length: of an example in tokens; default: the training's. max_new_tokens:
    of an answer; default: that of the split's longest reference. opening: see `open_run`.
    """
    model, tokenizer, config = open_run(path, **opening)
    splits = data.load_instructions(data_dir or config["data"], config["seed"], config["tfidf"])
    condition = config["condition"]
    described = ("condition", "n_gist", "tfidf", "arch", "steps", "seconds")
    metrics = {key: config.get(key) for key in described}
    for split in data.SPLITS:
        examples, skipped = data.make_examples(
            splits[split],
            tokenizer,
            config["n_gist"],
            config["arch"],
            max_length or config["max_length"],
            config["max_target"],
        )
        if skipped:
            print(f"{path} {split}: {skipped} outputs are beyond --max_length: skipped")
        if not examples:
            continue
        loss, answers = evaluate(model, tokenizer, examples, condition, batch_size, max_new_tokens)
        records = [e.record for e in examples]
        write_outputs(Path(path) / f"outputs-{split}.csv", records, answers)
        pairs = [(text, record["output"]) for text, record in zip(answers, records)]
        metrics[split] = score(pairs) | {"loss": loss}
        if "source" in records[0]:  # a built-in instruction's family
            sources = [record["source"] for record in records]
            families = {}
            for name in sorted(set(sources)):
                families[name] = score([p for p, source in zip(pairs, sources) if source == name])
            metrics[split]["families"] = families
            print(f"{path}, {split} instructions by family:")
            print_table(families)
            print()
    data.write_file(Path(path) / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


@torch.no_grad()
def evaluate(
    model: Model,
    tokenizer: data.Tokenizer,
    examples: list[data.Example],
    condition: str,
    batch_size: int = 50,
    max_new_tokens: int | None = None,
) -> tuple[float, list[str]]:
    """The mean loss per output token (nats), and an answer to every example.

    A batch has at most MAX_TOKENS tokens, answers included.
    """
    device = model.embedding.weight.device
    arch = "t5" if isinstance(model, T5) else "llama"
    max_new_tokens = max_new_tokens or max(len(e.output) for e in examples)
    longest = max(len(e) for e in examples) + max_new_tokens
    batch_size = max(1, min(batch_size, MAX_TOKENS // longest))
    batches = data.batch_order([len(e) for e in examples], batch_size, seed=0)  # little padding
    answers = {}
    loss = 0.0
    for rows in tqdm(batches, leave=False):
        some = [examples[i] for i in rows]
        batch = data.collate(some, tokenizer.pad_id, arch)
        batch = {key: x.to(device) for key, x in batch.items()}
        loss += batch_loss(model, batch, tokenizer.gist_id, condition).item()
        answers |= zip(rows, answer(model, tokenizer, some, condition, max_new_tokens))
    mean = loss / sum(len(e.output) for e in examples)
    return mean, [answers[i] for i in range(len(examples))]


def open_run(
    path: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    n_gist: int | None = None,
    condition: str | None = None,
    base: str | None = None,
) -> tuple[Model, data.Tokenizer, dict]:
    """The model of a run of train.py, its tokenizer, and the Config that it was trained with.

    device: cuda, mps or cpu; default: the first that is there. dtype: of the weights, float32 or
    bfloat16; default: that of the training on a GPU, that of the file elsewhere. n_gist, condition
    ("gist") and base (the original LLaMA): of a released gist model, which does not say how it was
    trained. Raises data.DataError.
    """
    raw = data.read_config(path)
    trained = raw.get("gisting")
    is_released = trained is None
    if is_released != (n_gist is not None) or (trained and (condition or base)):
        raise data.DataError(
            f"{path}: a released gist model needs --n_gist; for a run of train.py, which knows how "
            "it was trained, leave --n_gist, --condition and --base out"
        )
    with data.reading(path, "train it with this version of the code"):
        arch = "t5" if raw.get("model_type") == "t5" else "llama"
        released = {"n_gist": n_gist, "condition": condition or "gist"}
        config = asdict(fill_in(Config(arch=arch))) | (released if is_released else trained)
        gist_mask.table(config["condition"])
    device = data.find_device(device)
    if dtype is None and device.startswith("cuda"):
        dtype = config["dtype"]
    weights = getattr(torch, dtype) if dtype else None
    model, tokenizer = data.load_model(path, base, weights, device)
    if tokenizer is None or tokenizer.gist_id >= model.config.vocab_size:
        raise data.DataError(f"{path}: no tokenizer, or no row for a gist token; train it first")
    return model.eval(), tokenizer, config


def score(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Mean scores of (answer, reference) pairs, as fractions, and their number n.

    Another metric is another entry of a row. Exact match is up to white space at the ends; what
    always giving the commonest reference would reach is `commonest`.
    """
    rows = [{"exact_match": float(a.strip() == b.strip())} | rouge(a, b) for a, b in pairs]
    n = len(rows)
    scores = {key: sum(row[key] for row in rows) / n for key in rows[0]}
    commonest = max(Counter(reference for _, reference in pairs).values())
    return {"n": n} | scores | {"commonest": commonest / n}


def print_table(rows):
    """A line for every row: percent, except for whole numbers and the loss (nats per token)."""
    first = next(iter(rows.values()))
    columns = [key for key in first if key != "families"]
    margin = max(map(len, rows))
    print(" " * margin, *[f"{key:>11}" for key in columns])
    for name, row in rows.items():
        cells = []
        for key in columns:
            is_share = isinstance(row[key], float) and key != "loss"
            cells.append(f"{row[key] * (100 if is_share else 1):11,.5g}")
        print(f"{name:{margin}}", *cells)


# ---- Outputs files, and eval.py score ----

COLUMNS = ("x", "y_pred", "y_true")  # question, answer, reference


def write_outputs(file, records, answers):
    rows = [COLUMNS]
    for record, prediction in zip(records, answers):
        question = f"Instruction: {record['instruction']}"
        if record["input"]:
            question += f"\nInput: {record['input']}"
        rows.append((question, prediction, record["output"]))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    data.write_file(file, text.getvalue().encode("utf-8", "replace"))  # JSON can hold half a letter


def read_outputs(file):
    """The rows of an outputs file, dicts with at least the keys COLUMNS. Raises data.DataError."""
    csv.field_size_limit(2**31 - 1)  # Python's own is 131,072 characters: an answer can be longer
    with data.reading(file, f"an outputs file has rows with the columns {', '.join(COLUMNS)}"):
        with open(file, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        for row in rows:
            if None in [row[column] for column in COLUMNS]:
                raise ValueError("a row has too few columns")
        if not rows:
            raise ValueError("it has no rows")
    return rows


def read_pairs(file_a, file_b):
    """The rows of two outputs files, side by side. Raises data.DataError."""
    a = read_outputs(file_a)
    b = read_outputs(file_b)
    if [(r["x"], r["y_true"]) for r in a] != [(r["x"], r["y_true"]) for r in b]:
        raise data.DataError(f"{file_b}: answers other examples than {file_a}; give one split's")
    return list(zip(a, b))


def score_files(files: list[str], *, against: str | None = None) -> None:
    """Score outputs files (csv with the columns x, y_pred, y_true).

    against: take this file's answers for the references.
    """
    reference = "y_pred" if against else "y_true"
    rows = {}
    for file in files:
        pairs = read_pairs(file, against or file)
        rows[file] = score([(a["y_pred"], b[reference]) for a, b in pairs])
    print_table(rows)


# ---- ROUGE ----
#
# How much of the reference the prediction says in the same words, up to their endings. Both texts
# become lists of word stems. With A and B the bags of n-grams of the two (n = 1, 2), the overlap is
# the size of their intersection. For ROUGE-L, A and B are the lists themselves, and the overlap is
# the length of their longest common subsequence (LCS).
#
#     precision P = overlap / |A|      recall R = overlap / |B|
#     F = 2PR / (P + R) = 2 overlap / (|A| + |B|)


def rouge(prediction, reference):
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures, as fractions; 0 for a text without words.

    Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), with the tokens and stems
    of the rouge-score package (use_stemmer=True), so that figures compare with published ones.
    """
    a = stems(prediction)
    b = stems(reference)
    both = len(a) + len(b)
    ones = Counter(a) & Counter(b)
    twos = Counter(zip(a, a[1:])) & Counter(zip(b, b[1:]))
    return {
        "rouge1": f_measure(ones.total(), both),
        "rouge2": f_measure(twos.total(), both - 2),
        "rougeL": f_measure(lcs_length(a, b), both),
    }


def f_measure(overlap, both):
    return 2 * overlap / both if overlap else 0.0


def lcs_length(a, b):
    """L[i, j] = L[i-1, j-1] + 1 if a[i] == b[j] else max(L[i-1, j], L[i, j-1]), row by row."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def stems(text):
    """The stems of the runs of a-z and 0-9; rouge-score leaves those of up to three letters."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [porter_stem(word) if len(word) > 3 else word for word in words]


def rules(text):
    """A table ending -> replacement from "sses>ss s>": -sses becomes -ss, and -s nothing."""
    return dict(rule.split(">") for rule in text.split())


@functools.cache
def porter_stem(word):
    """Cut the English endings off a lower-case word: "relational" and "relate" become "relat".

    Porter's "An algorithm for suffix stripping" (1980), with the departures of NLTK's default: the
    table IRREGULAR; dies and died: die; in step 1c, y: i after a consonant only; -alli before the
    rest of step 2, and in it -bli, -fulli and -logi; words of one or two letters stay; a short
    stem may have two letters.
    """
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = cut_ed_and_ing(replace_ending(word, STEP_1A))
    for endings, stem_kinds in STEPS:
        word = replace_ending(word, endings, stem_kinds)
    return word


def letter_kinds(word):
    """A v (vowel) or c (consonant) for every letter; y is a vowel after a consonant: "toy" cvc."""
    kinds = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
        kinds += "v" if is_vowel else "c"
    return kinds


def replace_ending(word, endings, stem_kinds="."):
    """Apply the first rule whose ending fits, if the letter kinds of the stem are as asked."""
    for ending, replacement in endings.items():
        stem, found = re.subn(f"{ending}$", "", word)
        if found:
            return stem + replacement if re.search(stem_kinds, letter_kinds(stem)) else word
    return word


def cut_ed_and_ing(word):
    """Step 1b. What -ed or -ing leaves must hold a vowel, and is mended: hoping: hope."""
    if word.endswith("eed"):
        return replace_ending(word, {"eed": "ee"}, "vc")
    stem = replace_ending(word, {"ed": "", "ing": ""}, "v")  # but not of sing
    if stem == word:
        return word
    kinds = letter_kinds(stem)
    # Porter's *o, a syllable that a silent e makes a word: "hop", hope, not "snow", "box", "toy".
    is_short = kinds == "vc" or (re.fullmatch("c+vc", kinds) and stem[-1] not in "wxy")
    if stem.endswith(("at", "bl", "iz")) or is_short:
        return stem + "e"
    if stem[-2:-1] == stem[-1] and kinds.endswith("c") and stem[-1] not in "lsz":
        return stem[:-1]  # hopping: hop, but falling: fall
    return stem


# Porter's rules, and from step 1c on a pattern that the letter kinds of the stem have to hold: his
# measure m, near enough the number of syllables that end in a consonant, is the number of "vc". The
# first ending that fits decides, so the longer of two stands first. (?<=...) are letters before the
# ending that belong to the stem.
STEP_1A = rules("sses>ss (?<=^.)ies>ie (?<=^.)ied>ie ies>i ss>ss s>")
STEPS = [
    (rules("y>i"), ".c$"),
    (rules("alli>al"), "vc"),  # before the rest of step 2, which goes on with what it leaves
    (
        rules(
            "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble entli>ent eli>e "
            "ousli>ous ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous "
            "aliti>al iviti>ive biliti>ble fulli>ful (?<=l)ogi>og"
        ),
        "vc",
    ),
    (rules("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>"), "vc"),
    (
        rules(
            "al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> (?<=[st])ion> ou> ism> "
            "ate> iti> ous> ive> ize>"
        ),
        "vc.*vc",
    ),
    # A last e goes, if m > 0 and the stem is not short: probate: probat, but rate.
    (rules("(?<=[wxy])e>"), "vc.|.vc"),
    (rules("e>"), "vc.|vvc"),
    (rules("ll>l"), "vc.*v"),  # m > 1 with the l that stays; quadrille: quadril, but roll
]
IRREGULAR = rules(
    "skies>sky sky>sky dying>die lying>lie tying>tie news>news inning>inning innings>inning "
    "outing>outing outings>outing canning>canning cannings>canning howe>howe proceed>proceed "
    "exceed>exceed succeed>succeed"
)


# ---- eval.py compress ----


def compress(
    run: str,
    *,
    instruction: str,
    input: list[str] | None = None,
    max_new_tokens: int = 128,
    **opening,
) -> None:
    """Compress an instruction once, and answer inputs from its gist.

    instruction: what to compress. input: what to answer; default: one answer without an input.
    max_new_tokens: of an answer. opening: see `open_run`.
    """
    model, tokenizer, config = open_run(run, **opening)
    prompt, gist = compress_instruction(instruction, model, tokenizer, config)
    n = prompt.shape[1] - gist.length
    column = gist.nbytes / gist.length / 1024  # KiB
    print(
        f"{n} prompt tokens, gist tokens: {gist.length}, {n / gist.length:.1f} times smaller; "
        f"cache {n * column:.2f} KiB before, {gist.nbytes / 1024:.2f} KiB after"
    )
    for text in input or [""]:
        record = {"instruction": instruction, "input": text, "output": ""}
        example = data.layout(record, tokenizer, config["n_gist"], config["arch"])
        answers = answer(model, tokenizer, [example], config["condition"], max_new_tokens, gist)
        print(f"\ninput   {text}\nanswer  {answers[0]}")


def compress_instruction(instruction, model, tokenizer, config):
    """Its tokens with the gist tokens, (1, P) int64, and its gist. Raises data.DataError."""
    if not instruction.strip():
        raise data.DataError("--instruction is empty; give what to compress")
    record = {"instruction": instruction, "input": "", "output": ""}
    prompt = data.layout(record, tokenizer, config["n_gist"], config["arch"]).prompt
    tokens = torch.tensor([prompt], device=model.embedding.weight.device)
    cache = compress_prompts(model, tokens, None, tokenizer.gist_id, config["condition"])
    if cache.length != config["n_gist"]:
        raise data.DataError(
            f"cannot compress: with condition {config['condition']} the input does not see just "
            "the gist tokens; give another run"
        )
    return tokens, cache


# ---- eval.py plot ----


def plot(
    runs: list[str], *, kind: str = "bars", metric: str = "rougeL", out: str = "results.png"
) -> None:
    """Draw the results of runs side by side.

    kind: bars by split (the paper's figure) or by families of instructions, with a line for what
    the commonest answer would score; or the training loss. metric: one of metrics.json. out: the
    picture.
    """
    if kind == "loss":
        draw_losses(runs, out)
        return
    figure, ax = data.new_figure(14 if kind == "families" else 8, 5)
    width = 0.8 / len(runs)
    for i, path in enumerate(runs):
        groups = read_groups(path, kind == "families")
        places = [place + i * width for place in range(len(groups))]
        with data.reading(f"--metric {metric}", "choose one of metrics.json"):
            heights = [100 * group[metric] for group in groups.values()]
        ax.bar(places, heights, width, align="edge", label=path)
        if kind == "families":
            guesses = [100 * group["commonest"] for group in groups.values()]
            ax.hlines(guesses, places, [place + width for place in places], "black", "dotted")
    names = [f"{name} ({group['n']})" for name, group in groups.items()]
    ax.set_xticks([x + 0.4 for x in range(len(names))], names, rotation=30, ha="right")
    ax.set(ylabel=f"{metric}, %", ylim=(0, 100), xlim=(-0.2, len(names)))
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    data.save_figure(figure, out)


def read_groups(path, by_family):
    """The scores of a run's splits, or of its families of unseen instructions."""
    file = Path(path) / "metrics.json"
    with data.reading(file, f"draw something else, or first: python eval.py run {path}"):
        metrics = json.loads(file.read_bytes())
        if by_family:
            return metrics["unseen"]["families"]
        return {split: metrics[split] for split in data.SPLITS if split in metrics}


# ---- eval.py judge ----
#
# A language model behind an OpenAI-compatible endpoint picks the better of two answers, which it
# sees in random order.

JUDGE = """Two assistants, A and B, were given the same task. Decide whose answer does it better: \
correct first, then complete, then to the point. Which of them stands first, and which is longer, \
must not matter. If neither is better, call it a tie.
Reply with a JSON object and nothing else: \
{"reason": "one short sentence", "choice": "A" or "B" or "tie"}"""
TASK = "# Task\n{}\n\n# Answer of A\n{}\n\n# Answer of B\n{}"


def judge(
    a: str,
    b: str,
    *,
    base_url: str,
    model: str,
    out: str,
    workers: int = 8,
    timeout: float = 60.0,
    wait: float = 0.5,
    tries: int = 8,
) -> None:
    """Let a language model pick the better of two answers, for every pair in two outputs files.

    base_url: an OpenAI-compatible endpoint, as https://HOST/v1; its key is in OPENAI_API_KEY. out:
    the judgments; the pairs that it has are not asked for again. workers: requests at once.
    timeout: seconds for all of these. wait: seconds after a failure, twice as long after the next.
    tries: stop after so many failures in a row. Raises data.DataError.
    """
    pairs = []
    for row, (first, second) in enumerate(read_pairs(a, b)):
        pairs.append({"row": row, "x": first["x"], "a": first["y_pred"], "b": second["y_pred"]})
    judgments = {"names": {"a": a, "b": b}, "model": model, "results": []}
    if Path(out).exists():
        judgments = earlier_judgments(out, judgments, pairs)
    url = base_url.rstrip("/") + "/chat/completions"
    results = judgments["results"]
    failures = 0
    with tqdm(total=len(pairs), initial=len(results), desc="judge") as bar:
        while len(results) < len(pairs):
            judged = {r["row"] for r in results}
            todo = [pair for pair in pairs if pair["row"] not in judged]
            verdicts, error = ask_together(url, model, timeout, todo[:workers])
            results += verdicts
            bar.update(len(verdicts))
            data.write_file(Path(out), json.dumps(judgments, indent=1).encode())
            failures = 0 if verdicts else failures + 1
            if error and (is_final(error) or failures == tries):
                raise data.DataError(
                    f"{url}: {data.one_line(error)}; check --base_url, --model and OPENAI_API_KEY, "
                    "and go on with the same command"
                )
            if error:
                time.sleep(min(60, wait * 2**failures))
    winrate([out])


def earlier_judgments(file, new, pairs):
    """Judgments to go on with: of the same names and model as the new ones, and of these pairs."""
    with data.reading(file, "give another --out"):
        old = read_judgments(file)
        known = [{key: r[key] for key in pairs[0]} in pairs for r in old["results"]]
        if not all(known) or old | {"results": []} != new:
            raise ValueError("holds judgments of something else")
    return old


def ask_together(url, model, timeout, pairs):
    """The verdicts that come in time, and what went wrong with the last of the others."""
    pool = ThreadPool(len(pairs))  # a new one: a request that is late keeps its thread
    replies = [pool.apply_async(ask_for_verdict, (url, model, timeout, pair)) for pair in pairs]
    pool.close()
    end = time.monotonic() + timeout
    verdicts, error = [], None
    for reply in replies:
        try:
            verdicts.append(reply.get(max(0, end - time.monotonic())))
        except Exception as problem:
            error = problem
    return verdicts, error


def ask_for_verdict(url, model, timeout, pair):
    """The pair with a verdict. The answers are shown in random order. Raises what went wrong."""
    first, second = random.Random(f"{pair['row']} {pair['x']}").sample("ba", 2)
    question = TASK.format(pair["x"], pair[first], pair[second])
    messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": question}]
    body = {"model": model, "temperature": 0, "messages": messages}
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as response:
        content = response.read(1_000_000)  # a verdict is shorter
    try:
        reply = str(json.loads(content)["choices"][0]["message"]["content"])
    except Exception:
        raise OSError("the reply is no chat completion") from None
    found = re.findall(r'"choice"\s*:\s*"(a|b|tie)"\s*[,}]', reply.lower())
    shown = {"a": first, "b": second, "tie": "tie"}
    choice = shown[found[-1]] if found else "unparsed"  # counts as a tie
    return pair | {"swapped": first == "b", "choice": choice, "reason": reply}


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # it would take the key along to another host


def is_final(error):
    """Would the same request fail again? So do refusals, and a base_url that leads nowhere."""
    if isinstance(error, HTTPError):
        return error.code < 500 and error.code not in (408, 409, 425, 429)
    if isinstance(error, URLError):
        return not isinstance(error.reason, (TimeoutError, ConnectionResetError))
    return isinstance(error, (InvalidURL, ValueError, ArithmeticError))


# ---- eval.py winrate ----


def read_judgments(file):
    """Judgments of ours, or of the paper, whose results have no row. Raises what is wrong."""
    judgments = json.loads(Path(file).read_bytes())
    rows = [r["row"] for r in judgments["results"] if "row" in r]
    if len(set(rows)) < len(rows) or min(rows, default=0) < 0:
        raise ValueError("a row is there twice, or negative")
    return judgments


def winrates_of(file):
    """Win rate of a against b, ties as half, with its 95% interval. Raises data.DataError.

    A second row follows for scores in the file, as its choices may not add up to them.
    """
    with data.reading(file, "make judgments with eval.py judge"):
        judgments = read_judgments(file)
        choices = Counter(str(r["choice"]).lower() for r in judgments["results"])
        n = choices.total()
        wins, losses = choices["a"], choices["b"]
        counts = {"n": n, "wins": wins, "ties": n - wins - losses, "losses": losses}
        points = {file: (n + wins - losses) / 2}
        if "scores" in judgments:
            points[f"{file}, by its scores"] = judgments["scores"][judgments["names"]["a"]]
        return {name: counts | wilson(x / n, n) for name, x in points.items()}


def wilson(rate, n):
    """A share of n, with Wilson's 95% confidence interval."""
    z = 1.959964
    middle = rate + z**2 / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    whole = 1 + z**2 / n
    return {"rate": rate, "low": (middle - half) / whole, "high": (middle + half) / whole}


def winrate(files: list[str]) -> None:
    """Print the win rates of judgments files."""
    rows = {}
    for file in files:
        rows |= winrates_of(file)
    print_table(rows)


# ---- The command line ----


COMMANDS = {  # the first function is called; it hands flags on to the others
    "run": [run, evaluate_run, open_run],
    "score": [score_files],
    "compress": [compress, open_run],
    "plot": [plot],
    "judge": [judge],
    "winrate": [winrate],
}
KINDS = {  # what argparse is to do for a parameter's type, and for some parameters
    "str": {},
    "list[str]": {"nargs": "+"},
    "list[int]": {"nargs": "+", "type": data.at_least(1)},
    "int": {"type": data.at_least(1)},
    "float": {"type": data.at_least(0.001, float, 86_400)},
    "condition": {"choices": gist_mask.TABLE},
    "dtype": {"choices": ("float32", "bfloat16")},
    "kind": {"choices": ("bars", "families", "loss")},
}


def make_parser(description, commands):
    """A function's keyword-only parameters are flags, the others arguments; docstrings are help."""
    parser = argparse.ArgumentParser(description=description)
    subparsers = parser.add_subparsers(required=True)
    for command, functions in commands.items():
        docs = "\n\n".join(map(inspect.getdoc, functions))
        p = subparsers.add_parser(
            command,
            help=docs.split("\n")[0],
            description=docs,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,  # what is not given keeps the function's default
        )
        p.set_defaults(function=functions[0])
        for name in inspect.getfullargspec(functions[0]).args:
            p.add_argument(name, **KINDS[functions[0].__annotations__[name]])
        for function in functions:
            spec = inspect.getfullargspec(function)
            for name in spec.kwonlyargs:
                hint = spec.annotations[name].removesuffix(" | None")
                required = name not in (spec.kwonlydefaults or {})
                p.add_argument(f"--{name}", required=required, **KINDS.get(name, KINDS[hint]))
    return parser


def run_command(description, commands):
    """Call the function that the command line names, with its flags."""
    options = vars(make_parser(description, commands).parse_args())
    options.pop("function")(**options)


def main():
    run_command("Answer, score and compare.", COMMANDS)


if __name__ == "__main__":
    data.run(main)
