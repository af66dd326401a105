"""Answer, score and compare: what a gist model keeps of its prompts, beside its controls.

    python eval.py run out/llama-gist-1 out/llama-pos_control-1   # answer every split, one table
    python eval.py score out/llama-gist-1/outputs-*.csv           # ROUGE and exact match
    python eval.py compress out/llama-gist-1 --instruction "..."  # compress once, answer from it

There are two ways to answer, with the same result. Read the whole row as in training: prompt, gist,
input and answer under the condition's mask. Or compress the prompt first: read it once, and keep in
a cache the columns that the input may see (`gist`: the gist's; `pos_control`: all; `neg_control`:
none). Then only the inputs are left to read, however many there are.

The paper's section 4 scores with ROUGE-L and a judge. The built-in instructions have one right
answer, so there exact match says more.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import random
import re
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from http.client import IncompleteRead
from multiprocessing.pool import ThreadPool
from pathlib import Path

# As in train.py: threads that wait spin for a short time only.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import gist_mask
import train
from model import Cache

Model = data.Model

# ---- Answers ----


@torch.no_grad()
def answer(
    model: Model,
    tokenizer: data.Tokenizer,
    examples: list[data.Example],
    condition: str,
    max_new_tokens: int | list[int],
    cache: Cache | None = None,
) -> list[str]:
    """Answer a batch greedily, under the mask that was trained.

    max_new_tokens: the longest answer in tokens, the same for all examples or one for each. cache:
    the examples' prompts, or one prompt for all of them (`compress_prompts`): then only what
    follows is read. Raises ValueError where no cache can stand for a prompt (`check_cache`).
    """
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * len(examples)
    n_new = max(limits)
    # What is left to read: the whole row, or what follows the prompt in the cache.
    if cache is None:
        rows = [(e.prompt + e.input, e.segments) for e in examples]
    else:
        rows = [(e.input, e.segments[len(e.prompt) :]) for e in examples]
    # Padding stands on the left: an answer begins where its input ends.
    tokens, segments = left_padded(rows, tokenizer, model.embedding.weight.device)
    # The answer is part of the input: it sees what the input sees.
    masked = gist_mask.masking(model, segments, condition, cache, n_new=n_new)
    new = model.generate(
        tokens, **masked, cache=cache, max_new_tokens=n_new, eos_id=tokenizer.eos_id
    )
    return [tokenizer.decode(ids[:limit]).strip() for ids, limit in zip(new, limits)]


@torch.no_grad()
def compress_prompts(
    model: Model, tokens: Tensor, segments: Tensor, condition: str = "gist"
) -> Cache:
    """Read prompts under their mask, and keep the columns that the input may see.

    tokens, segments: (B, P) int64, prompts with their gist tokens, padded on the left. Raises
    ValueError where no cache can stand for a prompt (`check_cache`), or for padding on the right.
    """
    if (segments[:, -1:] == gist_mask.PADDING).any():
        raise ValueError("pad prompts on the left, as their input follows on the right")
    # An input will follow; `masking` looks again when it is there.
    gist_mask.check_cache(model, segments, torch.tensor([[gist_mask.INPUT]]), condition)
    # The prompt and its gist see what they saw in training.
    masked = gist_mask.masking(model, segments, condition)
    # Of all that the model has computed, keep what the input sees in any of the rows.
    keep = gist_mask.cross_mask(segments, condition)[:, 0, 0].any(dim=0)  # (P,)
    cache = model.compress(tokens, masked["mask"], masked["positions"], keep)
    # Their segments stay with them, so that the mask of what follows is that of the whole row.
    return replace(cache, segments=segments[:, keep])


def prompts_of(examples, tokenizer, device="cpu"):
    """The prompts of a batch, with their gist tokens: tokens and segments, (B, P) int64."""
    rows = [(e.prompt, e.segments[: len(e.prompt)]) for e in examples]
    return left_padded(rows, tokenizer, device)


def left_padded(rows, tokenizer, device):
    """Tokens and segments, (B, T) int64, of rows, each a pair of two lists; padding on the left."""
    tokens = data.pad([ids for ids, _ in rows], tokenizer.pad_id, side="left")
    segments = data.pad([segments for _, segments in rows], gist_mask.PADDING, side="left")
    return tokens.to(device), segments.to(device)


# ---- eval.py run: whole splits ----

MAX_TOKENS = 16_384  # at once, answers included: 8 GiB of cache for LLaMA-7B in bfloat16
MAX_ROWS = 32  # at once; more are no faster on a CPU


def evaluate_runs(runs: list[str], **options) -> None:
    """Answer every split of runs, and print one table of all.

    runs: folders of train.py, or released gist models
    options: see `evaluate_run`
    """
    rows = {}
    try:
        for path in runs:
            metrics = evaluate_run(path, **options)
            rows |= {f"{path} {split}": metrics[split] for split in data.SPLITS if split in metrics}
    finally:  # if a run cannot be evaluated, the table of those before it comes first
        if rows:
            print_table(rows)
            print("in percent; commonest: if every answer were the commonest; loss: nats per token")
    names = [name for name in ("n_gist", "condition", "base") if options.get(name)]
    given = "".join(f" --{name} {options[name]}" for name in names)  # for a released model
    print(f"next: python eval.py compress {path}{given} --instruction TEXT --input TEXT")


def evaluate_run(
    path: str,
    *,
    data_dir: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    **opening,
) -> dict:
    """Write outputs-<split>.csv and metrics.json of a run. Returns the metrics.

    data_dir: a directory in the Alpaca+ layout, or builtin (default: the training's)
    max_length: longest example in tokens (default: the training's)
    max_new_tokens: longest answer in tokens (default: the longest reference, or a preset's rule)
    opening: see `open_run`

    Raises data.DataError.
    """
    model, tokenizer, gisting = open_run(path, **opening)
    folder = data_dir or gisting["data"]
    records = data.load_instructions(folder, gisting["seed"])
    if max_length:
        gisting |= {"max_length": max_length, "max_length_human": max_length}
    scores = {}
    for split in data.SPLITS:
        options = train.layout_options(gisting, split)
        examples, skipped = data.make_examples(records[split], tokenizer, **options)
        if skipped:
            print(f"{path} {split}: {skipped} examples are beyond --max_length: skipped")
        if examples:
            end = gisting["generation_max_length"]
            loss, answers = evaluate(
                model, tokenizer, examples, gisting["condition"], max_new_tokens, end
            )
            write_outputs(
                Path(path) / f"outputs-{split}.csv", [e.record for e in examples], answers
            )
            pairs = [(text, e.record["output"]) for text, e in zip(answers, examples)]
            scores[split] = score(pairs) | {"loss": loss}
    if not scores:
        raise data.DataError(
            f"{folder}: nothing to evaluate; give a --data_dir with validation files, or a larger "
            "--max_length"
        )
    for split in set(data.SPLITS) - scores.keys():  # of an evaluation before this one
        (Path(path) / f"outputs-{split}.csv").unlink(missing_ok=True)
    metrics = gisting | {"data": folder} | scores
    data.write_file(Path(path) / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


@torch.no_grad()
def evaluate(
    model: Model,
    tokenizer: data.Tokenizer,
    examples: list[data.Example],
    condition: str,
    max_new_tokens: int | None = None,
    generation_max_length: int | None = None,
) -> tuple[float, list[str]]:
    """The mean loss per output token (nats), and an answer to every example.

    max_new_tokens: longest answer in tokens (default: that of the longest output, or up to
    generation_max_length, as in `answer_limits`)
    """
    device = model.embedding.weight.device
    lengths = [len(e) for e in examples]
    limits = answer_limits(examples, max_new_tokens, generation_max_length)
    batch_size = max(1, min(MAX_ROWS, MAX_TOKENS // (max(lengths) + max(limits))))
    loss, answers = 0.0, {}
    for indices in tqdm(data.batch_order(lengths, batch_size, seed=0), leave=False):
        chosen = [examples[i] for i in indices]
        batch = data.collate(chosen, tokenizer.pad_id)
        batch = {key: x.to(device) for key, x in batch.items()}
        loss += train.batch_loss(model, batch, condition).item()
        texts = answer(model, tokenizer, chosen, condition, [limits[i] for i in indices])
        answers.update(zip(indices, texts))
    n_labels = sum(len(e.output) for e in examples)
    return loss / n_labels, [answers[i] for i in range(len(examples))]


def answer_limits(examples, max_new_tokens, generation_max_length):
    """The longest answer to each example, in tokens.

    The paper's rule: a decoder's answer ends at generation_max_length tokens, prompt and input
    included, but has one at least; an encoder-decoder's ends after that many new tokens.
    """
    if generation_max_length is None or max_new_tokens is not None:
        longest = max_new_tokens or max(len(e.output) for e in examples)
        return [longest] * len(examples)
    read = [0 if e.arch == "t5" else len(e.prompt + e.input) for e in examples]
    return [max(1, generation_max_length - n) for n in read]


def open_run(
    path: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    n_gist: int | None = None,
    condition: str | None = None,
    base: str | None = None,
) -> tuple[Model, data.Tokenizer, dict]:
    """The model of a run of train.py, its tokenizer, and how it was trained (`train.describe`).

    device: cuda, mps or cpu (default: the first of these that is there)
    dtype: of the weights (default: on a GPU that of the training, elsewhere that of the file)
    n_gist: gist tokens of a released model, whose files do not say how it was trained
    condition: that of a released model (default: gist)
    base: folder of the original LLaMA, if a released model is a weight delta

    Raises data.DataError.
    """
    raw = data.read_config(path)
    trained = raw.get("gisting")
    if trained and (n_gist or condition or base):
        raise data.DataError(
            f"{path}: says itself how it was trained; leave out --n_gist, --condition and --base"
        )
    if not trained and n_gist is None:
        raise data.DataError(f"{path}: does not say how it was trained; give --n_gist")
    # A field that the file lacks, as a released model's or an older run's does, has its default.
    arch = "t5" if raw.get("model_type") == "t5" else "llama"
    defaults = asdict(train.fill_in(train.Config(arch=arch)))
    gisting = defaults | (trained or {"n_gist": n_gist, "condition": condition or "gist"})
    with data.one_line_errors(path, "train it with this version of the code"):
        gist_mask.table(gisting["condition"])  # only to see whether it is there
    device = data.find_device(device)
    if dtype is None and device.startswith("cuda"):
        dtype = gisting["dtype"]
    torch_dtype = getattr(torch, dtype) if dtype else None
    model, tokenizer = data.load_model(path, base, torch_dtype, device)
    if tokenizer is None or tokenizer.gist_id >= model.config.vocab_size:
        raise data.DataError(f"{path}: no tokenizer, or no row for a gist token; train it first")
    return model, tokenizer, gisting


def score(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Mean scores of (answer, reference) pairs, as fractions, and their number n.

    Another metric is another entry of a row. Exact match is up to white space at the ends; what
    always giving the commonest reference would reach is `commonest`.
    """
    rows = [{"exact_match": float(a.strip() == b.strip())} | rouge(a, b) for a, b in pairs]
    n = len(rows)
    means = {key: sum(row[key] for row in rows) / n for key in rows[0]}
    commonest = max(Counter(reference for _, reference in pairs).values())
    return {"n": n} | means | {"commonest": commonest / n}


NOT_PERCENT = ("n", "loss")  # the loss is in nats per token


def percent(metric):
    """What to multiply a metric by to show it."""
    return 1 if metric in NOT_PERCENT else 100


def print_table(rows):
    """A line for every row: shares in percent, whole numbers as they are."""
    columns = list(next(iter(rows.values())))
    margin = max(map(len, rows))
    print(" " * margin, *[f"{key:>11}" for key in columns])
    for name, row in rows.items():
        cells = [
            f"{x:,}" if isinstance(x, int) else f"{percent(key) * x:.5g}" for key, x in row.items()
        ]
        print(f"{name:{margin}}", *[f"{cell:>11}" for cell in cells])


# ---- Outputs files, and eval.py score ----

COLUMNS = ("x", "y_pred", "y_true")  # question, answer, reference


def write_outputs(file, records, answers):
    """Write a row for every record, with the family of a built-in instruction as a fourth cell."""
    rows = [(*COLUMNS, "family")]
    for record, prediction in zip(records, answers):
        question = f"Instruction: {record['instruction']}"
        if record["input"]:
            question += f"\nInput: {record['input']}"
        rows.append((question, prediction, record["output"], record.get("source", "")))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    data.write_file(file, text.getvalue().encode("utf-8", "replace"))  # JSON can hold half a letter


def read_outputs(file):
    """The rows of an outputs file, dicts with at least the keys COLUMNS. Raises data.DataError."""
    csv.field_size_limit(2**31 - 1)  # Python's own is 131,072 characters: an answer can be longer
    with data.one_line_errors(
        file, f"an outputs file has rows with the columns {', '.join(COLUMNS)}"
    ):
        with open(file, newline="", encoding="utf-8-sig") as f:
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


def score_files(files: list[str]) -> None:
    """Score outputs files: ROUGE and exact match of any csv with the columns x, y_pred, y_true.

    files: outputs files
    """
    rows = {}
    for file in files:
        rows[file] = score([(row["y_pred"], row["y_true"]) for row in read_outputs(file)])
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


def f_measure(overlap, total):
    """2PR / (P + R), from the overlap and |A| + |B|."""
    return 2 * overlap / total if overlap else 0.0


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


# ---- eval.py compress ----


def compress(
    run: str,
    *,
    instruction: str,
    input: list[str] | None = None,
    max_new_tokens: int = 128,
    **opening,
) -> None:
    """Compress an instruction once, and answer inputs from its cache.

    run: a folder of train.py, or a released gist model
    instruction: what to compress
    input: what to answer, one text or several (default: one answer without an input)
    max_new_tokens: longest answer in tokens
    opening: see `open_run`
    """
    model, tokenizer, gisting = open_run(run, **opening)
    inputs = input or [""]
    examples = [lay_out(instruction, text, tokenizer, gisting) for text in inputs]
    cache = compress_instruction(model, tokenizer, examples[0], gisting)
    tokens, segments = prompts_of(examples[:1], tokenizer, cache.keys.device)
    # The whole prompt is read once more, as if all of it were kept, only to see how large that is.
    print("whole prompt:", columns_and_size(segments, model.compress(tokens)))
    print("kept:        ", columns_and_size(cache.segments, cache))
    if gisting["data"] == "builtin":
        for word in data.unknown_words(" ".join([instruction, *inputs])):
            print(f"{word!r} was never seen in training: do not expect a sensible answer")
    with data.one_line_errors(*CANNOT_COMPRESS):
        answers = answer(model, tokenizer, examples, gisting["condition"], max_new_tokens, cache)
    for text, reply in zip(inputs, answers):
        print(f"\ninput   {text}\nanswer  {reply}")


CANNOT_COMPRESS = ("cannot compress", "give a run of another condition, with gist tokens")


def lay_out(instruction, input, tokenizer, gisting):
    """The data.Example of a question to a run. Raises data.DataError."""
    if not instruction.strip():
        raise data.DataError("--instruction is empty; give what to compress")
    if gisting["n_gist"] == 0:
        raise data.DataError("this run was trained without gist tokens; compress with another")
    record = {"instruction": instruction, "input": input, "output": ""}
    return data.layout(record, tokenizer, gisting["n_gist"], gisting["arch"], gisting["see_start"])


def compress_instruction(model, tokenizer, example, gisting):
    """The cache of an example's prompt, one row. Raises data.DataError."""
    prompt = prompts_of([example], tokenizer, model.embedding.weight.device)
    with data.one_line_errors(*CANNOT_COMPRESS):
        return compress_prompts(model, *prompt, gisting["condition"])


def columns_and_size(segments, cache):
    """What one row is and what it takes: "8 prompt + 1 gist: 36.00 KiB of cache"."""
    counts = Counter(gist_mask.NAMES[segment] for segment in segments[0].tolist())
    columns = " + ".join(f"{n} {name}" for name, n in counts.items())
    return f"{columns or 'nothing'}: {cache.nbytes / 1024:.2f} KiB of cache"


# ---- eval.py plot ----


def plot(
    runs: list[str], *, kind: str = "bars", metric: str = "rougeL", out: str = "results.png"
) -> None:
    """Draw the results of runs side by side.

    runs: evaluated runs; those that differ in their seed only share a bar, their mean and range
    kind: bars by split (the paper's figure), or the training's loss
    metric: one of those in metrics.json
    out: the picture
    """
    if kind == "loss":
        return train.draw_losses(runs, out)
    groups = {}  # recipe -> path -> a score for every split; no bar is drawn for NaN
    for path in runs:
        file = Path(path) / "metrics.json"
        with data.one_line_errors(file, f"first: python eval.py run {path}"):
            metrics = json.loads(file.read_bytes())
            scores = [metrics[x][metric] if x in metrics else math.nan for x in data.SPLITS]
        recipe = str({key: x for key, x in metrics.items() if key not in OF_ONE_RUN})
        groups.setdefault(recipe, {})[path] = scores
    figure, ax = data.new_figure(8, 5)
    places = np.arange(len(data.SPLITS))
    width = 0.8 / len(groups)
    for i, group in enumerate(groups.values()):
        label = os.path.commonprefix(list(group))
        if len(group) > 1:
            label += f"* ({len(group)})"
        scores = percent(metric) * np.array(list(group.values()))  # (runs, splits)
        mean = scores.mean(axis=0)
        spread = [mean - scores.min(axis=0), scores.max(axis=0) - mean]
        ax.bar(places + i * width, mean, width, align="edge", yerr=spread, label=f" {label}")
    ax.set_xticks(places + 0.4, data.SPLITS)
    if percent(metric) == 100:
        ax.set(ylabel=f"{metric}, %", ylim=(0, 100))
    else:
        ax.set(ylabel=metric)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    data.save_figure(figure, out)


# What runs of one recipe do not share.
OF_ONE_RUN = {*data.SPLITS, *train.MAY_CHANGE, "seed", "data_hash"} - {"steps"}


# ---- eval.py judge ----
#
# A language model at an OpenAI-compatible endpoint picks the better of two answers, which it sees
# in random order. Every judgment is a line of JSON, written when it comes.

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
    timeout: int = 60,
) -> None:
    """Let a language model pick the better of two answers, for every pair in two outputs files.

    a: one outputs file
    b: another, of the same split
    base_url: an OpenAI-compatible endpoint, as https://HOST/v1; its key is in OPENAI_API_KEY
    model: the judge's name there
    out: file of judgments; the pairs that it has are not asked for again
    workers: requests at once
    timeout: seconds without a word from the endpoint

    Raises data.DataError.
    """
    pairs = [
        {"row": row, "model": model, "x": one["x"], "a": one["y_pred"], "b": other["y_pred"]}
        for row, (one, other) in enumerate(read_pairs(a, b))
    ]
    judged = earlier_judgments(out, pairs)
    todo = [pair for pair in pairs if pair["row"] not in judged]
    url = base_url.rstrip("/") + "/chat/completions"
    remedy = "check --base_url, --model and OPENAI_API_KEY, then go on with the same command"
    refusals = []
    with open(out, "a") as file, ThreadPool(workers) as pool, data.one_line_errors(url, remedy):
        judgments = pool.imap_unordered(partial(judge_pair, url, timeout), todo)
        for r in tqdm(judgments, "judge", initial=len(judged), total=len(pairs)):
            print(json.dumps(r), file=file, flush=True)
            if r["choice"] == "refused":
                refusals.append(r["reason"])
            else:
                judged.add(r["row"])
            if not judged and len(refusals) == min(TRIES, len(todo)):
                raise OSError(refusals[-1])
    if refusals:
        print(f"refused {len(refusals)} times, the last time with {refusals[-1]}")
    winrate([out])


def earlier_judgments(file, pairs):
    """The rows of the pairs that a file has judged. What was refused is cut, to be asked again."""
    Path(file).touch()
    with data.one_line_errors(file, "give another --out"):
        judged = [r for r in read_lines(Path(file).read_bytes()) if r["choice"] != "refused"]
        for r in judged:
            if not pairs[r["row"]].items() <= r.items():
                raise ValueError("holds judgments of something else")
    data.write_file(Path(file), "".join(json.dumps(r) + "\n" for r in judged).encode())
    return {r["row"] for r in judged}


def judge_pair(url, timeout, pair):
    """The pair with a choice: a, b, tie, unparsed or refused. Raises what else goes wrong."""
    first, second = random.Random(f"{pair['row']} {pair['x']}").sample("ba", 2)
    shown = {"a": first, "b": second, "tie": "tie"}
    question = TASK.format(pair["x"], pair[first], pair[second])
    messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": question}]
    limit = {"max_tokens": 1000}
    settings = limit | {"temperature": 0}
    # Ask twice at most. After a reply that cannot be read, without temperature 0: it may differ.
    # After a refusal, without settings: some models take no temperature, or another limit's name.
    for _ in range(2):
        body = {"model": pair["model"], "messages": messages} | settings
        is_answered, reply = request(url, body, timeout)
        if is_answered:
            choice = shown.get(read_choice(reply), "unparsed")
            settings = limit
        else:
            choice = "refused"
            settings = {}
        if choice in shown:
            break
    return pair | {"swapped": first == "b", "choice": choice, "reason": reply}


TRIES = 8  # of a request; and as many refusals, before the first verdict, end the command
WAIT = 0.5  # seconds after the first failure; about twice as long after the next


def request(url, body, timeout):
    """Did the model answer, and what; or why not. A busy endpoint is asked again.

    Raises what went wrong at last. The key is never shown.
    """
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    question = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for failures in range(TRIES):
        time.sleep(WAIT * (2**failures - 1))
        try:
            with urllib.request.build_opener(AnyStatus).open(question, timeout=timeout) as response:
                status, content = response.status, response.read()
        except (OSError, IncompleteRead) as error:
            problem = getattr(error, "reason", error)  # what urllib has wrapped
            if not isinstance(problem, (TimeoutError, ConnectionResetError, IncompleteRead)):
                raise
            continue
        message = message_of(content)
        if status == 200 and message is not None:
            return True, message
        text = content.decode(errors="replace").replace(key or "KEY", "KEY")
        problem = data.one_line(f"HTTP status {status}: {text}")
        if status != 429 and status < 500:
            return False, problem
    raise OSError(problem)


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Every status is a reply. So no redirect is followed, which would take the key along."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def message_of(completion):
    """What a chat completion says; None if it is none."""
    try:
        content = json.loads(completion)["choices"][0]["message"].get("content")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        return content or ""
    except Exception:
        return None


# A verdict is the value of a key, in whatever notation, or a first short sentence, like "Answer A."
# It is not the A of "A" or "B".
VALUE = r"\W*[:=]\W*(?:answer |assistant )?(a|b|tie)\b(?!\W+(?:or|b|tie)\b|[ ,]+\w)"
BEFORE = "the|my|final|better|best|answer|assistant|choice|verdict|winner|it|s|is|a(?= tie)"
CHOICES = [
    "choice" + VALUE,
    "(?:verdict|winner|answer)" + VALUE,
    rf"\A\W*(?:(?:{BEFORE})\W+)*(a|b|tie)\b[^\w.\n]*(?:[.\n]|\Z)",
]


def read_choice(reply):
    """The verdict of a reply as it was shown: "a", "b" or "tie"; None if there is none."""
    text = reply.lower().rpartition("</think>")[2]
    if "<think>" in text:  # it has not come to an end
        return None
    for pattern in CHOICES:
        found = re.findall(pattern, text)
        if found:
            return found[0]
    return None


# ---- eval.py winrate ----


def read_lines(content):
    """The judgments of a file of ours; a line that a kill left unfinished is left out."""
    finished, _, unfinished = content.rpartition(b"\n")
    if not b'{"row": '.startswith(unfinished[:8]):
        raise ValueError("holds something else than judgments")
    return [json.loads(line) for line in finished.splitlines()]


def winrate_of(file):
    """Win rate of a against b, ties as half, with its 95% interval. Raises data.DataError.

    file: ours or, as the paper's, one JSON object. What has no verdict is not in the rate.
    """
    with data.one_line_errors(file, "make judgments with eval.py judge"):
        content = data.read_utf8(Path(file))
        is_ours = content.startswith(b'{"row": ')
        results = read_lines(content) if is_ours else json.loads(content)["results"]
        found = Counter(r["choice"].lower() for r in results)
        n = found["a"] + found["tie"] + found["b"]
        if n == 0:
            raise ValueError("no verdict in it")
    counts = {choice: found[choice] for choice in ("a", "tie", "b", "unparsed", "refused")}
    return {"n": n} | counts | wilson((found["a"] + found["tie"] / 2) / n, n)


def wilson(rate, n):
    """A share of n, with Wilson's 95% confidence interval."""
    z = 1.959964
    middle = rate + z**2 / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return {"rate": rate, "low": (middle - half) / scale, "high": (middle + half) / scale}


def winrate(files: list[str]) -> None:
    """Print win rates with their 95% intervals.

    files: judgments of eval.py judge, or of the paper
    """
    print_table({file: winrate_of(file) for file in files})


# ---- The command line ----


COMMANDS = {  # the first function is called; it hands flags on to the others
    "run": [evaluate_runs, evaluate_run, open_run],
    "score": [score_files],
    "compress": [compress, open_run],
    "plot": [plot],
    "judge": [judge],
    "winrate": [winrate],
}
OPTIONS = train.OPTIONS | {"kind": {"choices": ("bars", "loss")}}


def main():
    data.run_command("Answer, score and compare.", COMMANDS, OPTIONS)


# ---- ROUGE's stems ----


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
    word = cut_ed_and_ing(replace_ending(word, *STEP_1A))
    for step in LATER_STEPS:
        word = replace_ending(word, *step)
    return word


def letter_kinds(word):
    """A v (vowel) or c (consonant) for every letter; y is a vowel after a consonant: "sky" ccv."""
    kinds = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
        kinds += "v" if is_vowel else "c"
    return kinds


def replace_ending(word, stem_kinds, endings):
    """Apply the first rule whose ending fits, if the letter kinds of the stem are as asked."""
    for ending, replacement in endings.items():
        stem, found = re.subn(f"{ending}$", "", word)
        if found:
            return stem + replacement if re.search(stem_kinds, letter_kinds(stem)) else word
    return word


def cut_ed_and_ing(word):
    """Step 1b. What -ed or -ing leaves must hold a vowel, and is mended: hoping: hope."""
    if word.endswith("eed"):
        return replace_ending(word, "vc", {"eed": "ee"})
    stem = replace_ending(word, "v", {"ed": "", "ing": ""})  # but not of sing
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


def rules(text):
    """A table ending -> replacement from "sses>ss s>": -sses becomes -ss, and -s nothing."""
    return dict(rule.split(">") for rule in text.split())


# A step a line: a pattern that the letter kinds of the stem have to hold, then rules. Porter's
# measure m, near enough the number of syllables that end in a consonant, is the number of "vc". The
# first ending that fits decides, so the longer of two stands first. (?<=...) are letters before the
# ending that belong to the stem. -alli stands before the rest of step 2, which goes on with what it
# leaves. A last e goes, if m > 0 and the stem is not short: probate: probat, but rate. -ll becomes
# -l, if m > 1 with the l that stays: quadrille: quadril, but roll.
PORTER = """\
.        sses>ss (?<=^.)ies>ie (?<=^.)ied>ie ies>i ss>ss s>
.c$      y>i
vc       alli>al
vc       ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble entli>ent eli>e ousli>ous \
         ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al \
         iviti>ive biliti>ble fulli>ful (?<=l)ogi>og
vc       icate>ic ative> alize>al iciti>ic ical>ic ful> ness>
vc.*vc   al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> (?<=[st])ion> ou> ism> ate> \
         iti> ous> ive> ize>
vc.|.vc  (?<=[wxy])e>
vc.|vvc  e>
vc.*v    ll>l
"""
STEP_1A, *LATER_STEPS = [
    (kinds, rules(text)) for kinds, text in re.findall(r"^(\S+) +(.+)", PORTER, re.MULTILINE)
]
IRREGULAR = rules(
    "skies>sky sky>sky dying>die lying>lie tying>tie news>news inning>inning innings>inning "
    "outing>outing outings>outing canning>canning cannings>canning howe>howe proceed>proceed "
    "exceed>exceed succeed>succeed"
)


if __name__ == "__main__":
    data.run(main)
