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
import math
import os
import random
import re
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException, responses
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # footgun: on a busy machine, threads that spin while they wait train ten times slower
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import data
import gist_mask
from model import IGNORE, Cache
from t5 import T5
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
    if condition in ("pos_control", "tfidf") or n_gist == 0:
        rows = [e.prompt + e.input for e in examples]
    elif condition == "gist" and any("steps" in e.record for e in examples):
        cache = Cache.cat([compress_apart(model, e.prompt, tokenizer.gist_id, n_gist) for e in examples])
    elif condition == "gist":
        tokens, valid = tensors([e.prompt for e in examples])
        cache = model.compress(tokens, tokenizer.gist_id, valid)
    tokens, valid = tensors(rows)
    new = model.generate(tokens, valid, cache=cache, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id)
    return [tokenizer.decode(ids).strip() for ids in new]


def compress_apart(model, prompt: list[int], gist_id: int, n_gist: int) -> Cache:
    """Compress the prompts of a row with several, each without the others, and join their gists."""
    ends = [i + 1 for i in range(len(prompt)) if prompt[i] == gist_id][n_gist - 1::n_gist]
    rows = [torch.tensor([prompt[start:end]], device=next(model.parameters()).device) for start, end in zip([0, *ends], ends)]
    return Cache.join([model.compress(row, gist_id, first=i * n_gist) for i, row in enumerate(rows)])


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


def open_run(path: str, args) -> tuple:
    """The model of a run of train.py, ready to answer; its tokenizer; and the flags that it was trained with. Raises data.DataError.

    For released gist models, which do not say how they were trained, args.n_gist, .condition and .base do.
    """
    config = data.read_config(path).get("gisting")
    if config is None and args.n_gist is None:
        raise data.DataError(f"{path}/config.json: has no 'gisting' entry, so this is no run of train.py; train one first, or give the "
                             "--n_gist of a released gist model")
    if config and args.n_gist:
        raise data.DataError(f"{path}: a run of train.py, which knows its gist tokens; leave --n_gist out")
    model, tokenizer = data.load_model(path, base=args.base, device=find_device(args.device))
    if tokenizer is None or tokenizer.gist_id >= model.config.vocab_size:
        raise data.DataError(f"{path}: has no tokenizer, or the model no row for a gist token; train it first with train.py --init_from")
    arch, length = ("t5", 128) if isinstance(model, T5) else ("llama", 512)
    return model.eval(), tokenizer, config or dict(condition=args.condition, n_gist=args.n_gist, arch=arch, data="builtin", seed=0,
                                                   max_length=length, max_target=256, steps=0, seconds=0.0)


def open_gist_run(path: str, args) -> tuple:
    """`open_run` for a model that was trained to compress. Raises data.DataError for any other."""
    model, tokenizer, config = open_run(path, args)
    if config["condition"] != "gist" or config["n_gist"] == 0:
        raise data.DataError(f"{path}: was trained with condition {config['condition']} and {config['n_gist']} gist tokens, so it cannot compress; "
                             "train one with train.py --n_gist 1")
    return model, tokenizer, config


# ---- eval.py run ----

def run_one(path: str, args) -> dict:
    """Evaluate one run on every split that its data has: write outputs-<split>.csv and metrics.json, return the metrics."""
    model, tokenizer, config = open_run(path, args)
    splits = data.load_instructions(args.data or config["data"], config["seed"], config.get("n_shots", 0), config.get("per_step", False))
    idf = data.inverse_frequencies(splits["train"]) if config["condition"] == "tfidf" else None
    metrics = {key: config[key] for key in ("condition", "n_gist", "arch", "steps", "seconds")}
    for split in data.SPLITS:
        examples, skipped = data.make_examples(splits[split][:args.limit], tokenizer, config["n_gist"], config["arch"],
                                               args.max_length or config["max_length"], config["max_target"], idf)
        if skipped:
            print(f"{path} {split}: {skipped} examples skipped, their output was cut off; raise --max_length", file=sys.stderr)
        if not examples:
            continue
        loss, answers = evaluate(model, tokenizer, examples, config, args.batch_size, args.max_new_tokens, f"{path} {split}")
        rows = [(as_text(e.record), text, e.record["output"]) for e, text in zip(examples, answers)]
        write_outputs(Path(path) / f"outputs-{split}.csv", rows)
        metrics[split] = score([(text, truth) for _, text, truth in rows]) | {"loss": loss}
        if (args.data or config["data"]) == "builtin" and split != "human":
            metrics[split]["families"] = by_group(examples, answers, "source")
            metrics[split]["n_words"] = by_group(examples, answers, "n_words")
    data.write_file(Path(path) / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def by_group(examples: list[data.Example], answers: list[str], key: str) -> dict[str, float]:
    """Exact match for every value of a key of the built-in records: `source`, their family, or `n_words`, the words that they name."""
    right: dict[str, list[bool]] = {}
    for e, text in zip(examples, answers):
        right.setdefault(str(e.record[key]), []).append(text == e.record["output"])
    return {group: sum(r) / len(r) for group, r in sorted(right.items())}


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
    for path, m in results:
        for control, c in results:
            if c["condition"] == "pos_control" != m["condition"] and c["arch"] == m["arch"]:
                for split in (s for s in data.SPLITS if s in m and s in c):
                    print_agreement(f"{path}/outputs-{split}.csv", f"{control}/outputs-{split}.csv")
    groups = [m["unseen"] for _, m in results if "families" in m.get("unseen", {})]
    for key, title in (("families", "family (* looks for a word in the list)"), ("n_words", "the number of words that they name")):
        for i, name in enumerate(groups[0][key] if groups else []):
            star = "*" if name in data.FAMILIES and data.FAMILIES[name].compares else " "
            print(f"\nexact match on unseen instructions by {title}:\n" * (i == 0)
                  + f"  {name:18}{star}" + "".join(f"{100 * g[key].get(name, math.nan):8.1f}" for g in groups))


# ---- eval.py score ----

def read_outputs(file: str) -> list[dict]:
    """The rows of an outputs file, dicts with at least x, y_pred and y_true. Raises data.DataError."""
    csv.field_size_limit(2**31 - 1)      # an answer of a long-winded model is longer than Python's limit
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


def read_pairs(file_a: str, file_b: str) -> list[tuple[dict, dict]]:
    """The rows of two outputs files, side by side. Raises data.DataError if they do not answer the same questions."""
    a, b = read_outputs(file_a), read_outputs(file_b)
    for i, (row_a, row_b) in enumerate(zip(a, b), 1):
        if (row_a["x"], row_a["y_true"]) != (row_b["x"], row_b["y_true"]):
            raise data.DataError(f"{file_b}: row {i} is another example than in {file_a}; give two outputs files of the same split")
    if len(a) != len(b):
        raise data.DataError(f"{file_b}: {len(b)} rows, but {file_a} has {len(a)}; give two outputs files of the same split")
    return list(zip(a, b))


def print_agreement(file_a: str, file_b: str) -> None:
    """How often two files give the same answer, and ROUGE-L between their answers."""
    s = score([(a["y_pred"], b["y_pred"]) for a, b in read_pairs(file_a, file_b)])
    print(f"{file_a}: {100 * s['exact_match']:.1f} % of {s['n']:,} answers are those of {file_b}; ROUGE-L between the two {100 * s['rougeL']:.3f}")


def score_files(args) -> None:
    print_table([(file, "", score([(row["y_pred"], row["y_true"]) for row in read_outputs(file)])) for file in args.files])
    for file in args.files if args.against else []:
        print_agreement(file, args.against)


# ---- eval.py judge ----
#
# A language model behind an OpenAI-compatible endpoint picks the better of two answers. The order in which it sees them is random.

JUDGE = """Two assistants, A and B, were given the same task. Decide whose answer does it better: correct first, then complete, then to the point. \
Which of them stands first, and which is longer, must not matter. If neither is better, call it a tie.
Reply with a JSON object and nothing else: {"reason": "one short sentence", "choice": "A" or "B" or "tie"}"""
RETRY = (408, 409, 425, 429)        # and 5xx: HTTP errors that may pass


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None                 # it would take the key along to another host


@dataclass
class Endpoint:
    """A chat-completions endpoint, and how many more failed requests are borne with."""
    url: str
    model: str
    key: str
    timeout: float
    failures_left: int
    wait: float
    stop: threading.Event

    def ask(self, question: str) -> str:
        """The model's reply, asked for again after waiting when the server is busy, broken or silent. Raises data.DataError."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "system", "content": JUDGE}, {"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        wait = self.wait
        while True:
            after = 0.0
            try:
                with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout) as response:
                    reply = json.loads(response.read())["choices"][0]["message"]["content"]
                    return reply if isinstance(reply, str) else ""
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in RETRY:
                    raise data.DataError(f"{self.url}: answers HTTP {error.code} ({responses.get(error.code, '?')}); check --base_url, --model and "
                                         "OPENAI_API_KEY") from None
                problem, after = f"HTTP {error.code}", error.headers.get("Retry-After", "")
                after = float(after) if re.fullmatch(r"\d{1,3}", after) else 0.0
            except urllib.error.URLError as error:
                if not isinstance(error.reason, (TimeoutError, ConnectionResetError)):
                    raise data.DataError(f"{self.url}: cannot be reached ({data.one_line(error.reason)}); check --base_url") from None
                problem = data.one_line(error.reason)
            except (OSError, HTTPException) as error:       # too slow, or dropped
                problem = type(error).__name__
            except (ValueError, LookupError, TypeError):
                problem = "a reply that is no chat completion"
            self.failures_left -= 1
            if self.failures_left < 0:
                raise data.DataError(f"{self.url}: too many failures, the last one: {problem}; go on later with the same command, or raise --max_failures")
            if self.stop.wait(max(after, wait * random.uniform(0.5, 1))):
                raise data.DataError("stopped")
            wait = min(2 * wait, 60 * self.wait)


def parse_verdict(reply: str) -> tuple[str, str] | None:
    """("a", "b" or "tie", the reason) from the first JSON object with a choice, wherever in the text it stands; None without one."""
    for start in (i for i, c in enumerate(reply) if c == "{"):
        try:
            verdict, _ = json.JSONDecoder().raw_decode(reply, start)
        except (ValueError, RecursionError):
            continue
        choice = str(verdict.get("choice")).strip().lower()
        if choice in ("a", "b", "tie"):
            return choice, str(verdict.get("reason", ""))
    return None


def judge_pair(endpoint: Endpoint, row: int, pair: tuple[dict, dict], names: list[str], seed: int) -> dict:
    """One verdict in the layout of the paper's files: `choice` is about names, a or b; `swapped`: the judge saw b's answer as A's."""
    answers = [r["y_pred"] for r in pair]
    swapped = random.Random(f"{seed} {row}").random() < 0.5
    first, second = answers[::-1] if swapped else answers
    reply = endpoint.ask(f"# Task\n{pair[0]['x']}\n\n# Answer of A\n{first}\n\n# Answer of B\n{second}")
    choice, reason = parse_verdict(reply) or ("unparsed", reply)
    if swapped:
        choice = {"a": "b", "b": "a"}.get(choice, choice)
    verdict = {"row": row, "reason": reason, "choice": choice, "swapped": swapped, "x": pair[0]["x"]}
    return dict(zip(names, answers)) | verdict


def judged_before(file: Path, head: dict, pairs: list, names: list[str]) -> list[dict]:
    """The verdicts that `file` already has. Raises data.DataError if they are about other answers, or by another judge."""
    if not file.exists():
        return []
    old = data.read_json(file)
    results = old.get("results")
    try:
        same = all(old[key] == value for key, value in head.items())
        same = same and all([r[n] for n in names] == [p["y_pred"] for p in pairs[r["row"]]] and r["x"] == pairs[r["row"]][0]["x"] for r in results)
    except (LookupError, TypeError):
        same = False
    if not same:
        raise data.DataError(f"{file}: holds judgments of other answers, or with another model or seed; give another --out")
    return results


def judge(args) -> None:
    """Ask for a verdict on every pair that has none yet, several at once; the file is whole after every verdict."""
    if not re.match("https?://", args.base_url):
        raise data.DataError(f"--base_url {args.base_url}: give one that begins with http:// or https://, like https://HOST/v1")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise data.DataError("OPENAI_API_KEY: has characters that no key has; set it again")
    names = [os.path.splitext(file)[0] for file in (args.a, args.b)]
    if names[0] == names[1]:
        raise data.DataError(f"{args.b}: the same file twice; give the outputs of two models")
    if taken := {*names} & {"row", "reason", "choice", "swapped", "x"}:
        raise data.DataError(f"{min(taken)}.csv: its name is a key of the judgments file; give it with its folder, as ./{min(taken)}.csv")
    pairs, out = read_pairs(args.a, args.b), Path(args.out)
    head = {"names": dict(zip("ab", names)), "model": args.model, "seed": args.seed}
    results = judged_before(out, head, pairs, names)
    endpoint = Endpoint(args.base_url.rstrip("/") + "/chat/completions", args.model, key, args.timeout, args.max_failures, args.wait, threading.Event())

    def save() -> None:
        counts = count_verdicts(results)
        points = {name: wins + counts[1] / 2 for name, wins in zip(names, (counts[0], counts[2]))}
        data.write_file(out, json.dumps({**head, "scores": points, "results": sorted(results, key=lambda r: r["row"])}, indent=1).encode())

    def one(row: int) -> None:
        verdict = judge_pair(endpoint, row, pairs[row], names, args.seed)
        with lock:
            results.append(verdict)
            save()

    todo, lock = sorted({*range(len(pairs))} - {r["row"] for r in results}), threading.Lock()
    pool, bar = ThreadPoolExecutor(args.workers), tqdm(total=len(pairs), initial=len(results), desc="judge", unit="pair")
    try:
        save()
        for done in as_completed([pool.submit(one, row) for row in todo]):
            done.result()
            bar.set_postfix(dict(zip(("wins", "ties", "losses"), count_verdicts(results))), refresh=False)
            bar.update()
    except OSError as error:
        raise data.DataError(f"--out {out}: cannot be written ({data.one_line(error)})") from None
    finally:                        # what was asked for already is waited for, and kept
        endpoint.stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
    unparsed = sum(r["choice"] == "unparsed" for r in results)
    print(f"{unparsed} of {len(results)} replies had no verdict and count as ties" if unparsed else f"all {len(results)} replies had a verdict")
    print_winrates([winrate_of(args.out)])


# ---- eval.py winrate ----

def count_verdicts(results: list[dict]) -> tuple[int, int, int]:
    """Wins of a, ties, losses. What is neither a nor b is a tie."""
    choices = [str(r["choice"]).lower() for r in results]
    return choices.count("a"), len(choices) - choices.count("a") - choices.count("b"), choices.count("b")


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval for a share of n."""
    z = 1.959964
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def sign_test(wins: int, losses: int) -> float:
    """The two-sided probability of a split at least as uneven, if both were equally likely; ties are left out."""
    n, few = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def winrate_of(file: str) -> dict:
    """Win rate of a against b, ties as half, in a judgments file of ours or the paper's. Raises data.DataError."""
    judgments = data.read_json(Path(file))
    try:
        names, results = judgments["names"], judgments["results"]
        wins, ties, losses = count_verdicts(results)
        out = {"file": file, "a": str(names["a"]), "b": str(names["b"]), "n": len(results), "wins": wins, "ties": ties, "losses": losses}
    except (LookupError, TypeError):
        raise data.DataError(f"{file}: not a judgments file; it has names, and results with a choice each") from None
    if not results:
        raise data.DataError(f"{file}: has no results yet; make them with eval.py judge")
    n, out["rate"] = len(results), (wins + ties / 2) / len(results)
    out["low"], out["high"] = wilson(out["rate"], n)
    draws = np.random.default_rng(0).multinomial(n, [wins / n, ties / n, losses / n], size=10_000) @ [1, 0.5, 0] / n
    out["boot_low"], out["boot_high"] = np.percentile(draws, [2.5, 97.5]).tolist()
    out["p"] = sign_test(wins, losses)
    points = (judgments.get("scores") or {}).get(names["a"])
    out["own_rate"] = points / n if isinstance(points, (int, float)) else out["rate"]
    return out


def print_winrates(rows: list[dict]) -> None:
    print("wins  ties  losses     n   win rate   95 % (Wilson)   (bootstrap)         p   a : b")
    for r in rows:
        print(f"{r['wins']:4}  {r['ties']:4}  {r['losses']:6}  {r['n']:4}  {100 * r['rate']:7.2f} %   {100 * r['low']:5.1f} to {100 * r['high']:4.1f}"
              f"   {100 * r['boot_low']:5.1f} to {100 * r['boot_high']:4.1f}  {r['p']:8.4f}   {r['a']} : {r['b']}")
        if abs(r["own_rate"] - r["rate"]) > 1e-9:
            low, high = wilson(r["own_rate"], r["n"])
            print(f"{'by the scores in the file':25}  {100 * r['own_rate']:7.2f} %   {100 * low:5.1f} to {100 * high:4.1f}"
                  f"{'':28}   its choices do not add up to them: {r['file']}")


def winrate(args) -> None:
    rows = [winrate_of(file) for file in args.files]
    print_winrates(rows)
    if args.csv:
        text = io.StringIO()
        csv.writer(text).writerows([rows[0], *(r.values() for r in rows)])
        data.write_file(Path(args.csv), text.getvalue().encode())


# ---- eval.py compress ----

def compress(args) -> None:
    """Compress one instruction, answer every input from its gist, and show the answers from the whole prompt beside them."""
    model, tokenizer, config = open_gist_run(args.run, args)
    device, n_gist, arch = next(model.parameters()).device, config["n_gist"], config["arch"]
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


# ---- eval.py attention ----

class RecordAttention(TorchFunctionMode):
    """Under it, every attention that is computed leaves its weights, (B, H, T, S), in the list `weights`."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k = args[0], args[1].repeat_interleave(args[0].shape[1] // args[1].shape[1], dim=1)     # (B, H, T, K), (B, H, S, K)
            scores = q @ k.mT * kwargs.get("scale", q.shape[-1] ** -0.5)
            mask = kwargs["attn_mask"]
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
            self.weights.append((scores + bias).softmax(dim=-1))
        return function(*args, **kwargs)


def attention(args) -> None:
    """Draw what the gist tokens look at in the prompt, layer by layer, and print the words nearest to what they end up as."""
    model, tokenizer, config = open_gist_run(args.run, args)
    prompt = data.layout({"instruction": args.instruction, "input": "", "output": ""}, tokenizer, config["n_gist"], config["arch"]).prompt
    if not args.instruction.strip():
        raise data.DataError("--instruction is empty: there is nothing to compress")
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)     # (1, T)
    n_gist, table = config["n_gist"], data.embedding(model).weight              # (V, D)
    with torch.no_grad(), RecordAttention() as record:
        if config["arch"] == "llama":
            mask = gist_mask.decoder_mask(tokens, tokenizer.gist_id)
            hidden, table = model.hidden(tokens, mask, gist_mask.positions(tokens, tokenizer.gist_id)), model.output.weight
        else:
            hidden = model.compress(tokens, tokenizer.gist_id).hidden     # (1, n_gist, D)
    rows = torch.cat([w[0, :, -n_gist:].mean(dim=0) for w in record.weights]).cpu()     # (L * n_gist, T), mean over the heads
    words = [plain(tokenizer.decode([i]).strip()) or "·" for i in prompt[:-n_gist]] + ["<G>"] * n_gist
    labels = [f"layer {i + 1}" + f", gist {g + 1}" * (n_gist > 1) for i in range(len(record.weights)) for g in range(n_gist)]
    draw_attention(rows, words, labels, plain(args.instruction), args.out)
    print(f"wrote {args.out}\nnearest words to the last hidden state of the gist, by cosine:")
    for g, state in enumerate(hidden[0, -n_gist:]):
        near = F.cosine_similarity(state, table, dim=-1).topk(min(args.words, len(table)))
        print(f"  gist {g + 1}  " + "   ".join(f"{tokenizer.decode([i]).strip() or '·'} {c:.2f}" for c, i in zip(near.values.tolist(), near.indices.tolist())))


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: a pair of $ would make mathematics of it."""
    return text.replace("$", r"\$")


def draw_attention(rows: Tensor, words: list[str], labels: list[str], title: str, file: str) -> None:
    """A heat map: a row for every gist token in every layer, a column for every token that it sees."""
    figure, ax = new_figure(1 + 0.35 * len(words), 1.6 + 0.3 * len(labels))
    image = ax.imshow(rows.numpy(), cmap="Reds", vmin=0, aspect="auto")
    ax.set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(title, fontsize="medium")
    figure.colorbar(image, label="attention, mean over heads")
    save_figure(figure, file)


# ---- eval.py plot ----

COLOURS = {"gist": "tab:red", "pos_control": "tab:blue", "neg_control": "tab:gray", "tfidf": "tab:olive"}
Runs = list[dict]        # contents of metrics.json files


def read_metrics(path: str) -> dict:
    """What `eval.py run` found for a run. Raises data.DataError."""
    file = Path(path) / "metrics.json"
    if not file.is_file():
        raise data.DataError(f"{file}: no such file; make it with: python eval.py run {path}")
    metrics = data.read_json(file)
    if not {"condition", "n_gist", "arch"} <= metrics.keys() or not metrics.keys() & {*data.SPLITS}:
        raise data.DataError(f"{file}: has no results; make it again with: python eval.py run {path}")
    return metrics


def run_name(m: dict) -> str:
    return m["condition"] + (f" {m['n_gist']}" if m["condition"] in ("gist", "tfidf") else "")


def draw_bars(ax, runs: Runs, metric: str) -> None:
    """A group of bars for every split, in it a bar for every run: the paper's results figure."""
    splits = [split for split in data.SPLITS if any(split in m for m in runs)]
    for i, m in enumerate(runs):
        values = [100 * m[split][metric] if split in m else math.nan for split in splits]
        same = [other["n_gist"] for other in runs if other["condition"] == m["condition"]]
        bars = ax.bar([x + (i + 0.5) * 0.8 / len(runs) - 0.4 for x in range(len(splits))], values, width=0.76 / len(runs),
                      label=run_name(m), color=COLOURS[m["condition"]], alpha=1 - 0.6 * sorted(same).index(m["n_gist"]) / len(same))
        ax.bar_label(bars, fmt="%.1f", fontsize="x-small")
    ax.set_xticks(range(len(splits)), splits)


def draw_n_gist(ax, runs: Runs, metric: str) -> None:
    """A line for every split over the number of gist tokens; the controls are level lines."""
    gist = sorted((m for m in runs if m["condition"] == "gist"), key=lambda m: m["n_gist"])
    for split, colour in zip(data.SPLITS, ("tab:green", "tab:red", "tab:purple")):
        at = [(str(m["n_gist"]), 100 * m[split][metric]) for m in gist if split in m]
        if at:
            ax.plot(*zip(*at), "o-", color=colour, label=f"gist, {split}")
        for m in runs:
            if split in m and m["condition"] in ("pos_control", "neg_control"):
                ax.axhline(100 * m[split][metric], color=colour, linestyle={"p": "--", "n": ":"}[m["condition"][0]], linewidth=1,
                           label=f"{m['condition']}, {split}")
    ax.set_xlabel("n_gist")


def draw_families(ax, runs: Runs, metric: str) -> None:
    """What every kind of built-in instruction is answered with by every run: rows of one heat map, unseen instructions."""
    runs = [m for m in runs if "families" in m.get("unseen", {})]
    if not runs:
        raise data.DataError("none of the runs was evaluated on the built-in data, which alone has families of instructions")
    names = sorted(runs[0]["unseen"]["families"], key=lambda name: [m["unseen"]["families"].get(name, 0) for m in runs])
    ax.imshow([[m["unseen"]["families"].get(name, math.nan) for m in runs] for name in names], cmap="RdYlGn", alpha=0.6,
              vmin=0, vmax=1, aspect="auto")
    for y, name in enumerate(names):
        for x, m in enumerate(runs):
            ax.text(x, y, f"{100 * m['unseen']['families'].get(name, math.nan):.0f}", ha="center", va="center", fontsize="small")
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(runs)), [run_name(m) for m in runs])
    ax.set_xlabel("exact match, unseen instructions, %")


def draw_winrates(ax, rows: list[dict]) -> None:
    """A point with its 95 % Wilson interval for every judgments file."""
    for y, r in enumerate(rows[::-1]):
        ax.errorbar(100 * r["rate"], y, xerr=[[100 * (r["rate"] - r["low"])], [100 * (r["high"] - r["rate"])]], fmt="o", color="tab:red", capsize=4)
        ax.annotate(f"{100 * r['rate']:.1f} %", (100 * r["rate"], y), (0, 7), textcoords="offset points", ha="center", fontsize="small")
    ax.axvline(50, color="tab:gray", linestyle=":")
    ax.set_yticks(range(len(rows)), [f"{r['a']}\nagainst {r['b']}\n{Path(r['file']).name}" for r in rows[::-1]], fontsize="small")
    ax.set(xlim=(0, 100), ylim=(-0.5, len(rows) - 0.5), xlabel="win rate, % (ties count half)")


def plot(args) -> None:
    """Draw results into one picture: runs, with a panel for every architecture, or judgments files."""
    if args.kind == "winrates":
        figure, ax = new_figure(7, 1 + 0.7 * len(args.results))
        draw_winrates(ax, [winrate_of(file) for file in args.results])
    else:
        runs = [read_metrics(path) for path in args.results]
        archs = sorted({m["arch"] for m in runs})
        draw, height = {"bars": (draw_bars, 4), "n_gist": (draw_n_gist, 4), "families": (draw_families, 8)}[args.kind]
        figure, axes = new_figure(6 * len(archs), height, len(archs))
        for arch, ax in zip(archs, axes if len(archs) > 1 else [axes]):
            draw(ax, [m for m in runs if m["arch"] == arch], args.metric)
            ax.set_title(arch)
            if args.kind != "families":
                ax.set(ylabel=f"{args.metric}, %", ylim=(0, None))
                ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, args.out)
    print(f"wrote {args.out}")


def new_figure(width: float, height: float, panels: int = 1):
    """A matplotlib figure with its panels side by side, for a file: no display is needed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, panels, figsize=(width, height), constrained_layout=True)


def save_figure(figure, file: str) -> None:
    """Write a picture under a temporary name, and rename it. Raises data.DataError."""
    temporary = Path(file).with_name("tmp-" + Path(file).name)
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, file)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise data.DataError(f"--out {file}: cannot write the picture ({data.one_line(error)}); give a file like results.png") from None


# ---- The command ----

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Answer, score and compare.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, call, text: str):
        p = commands.add_parser(name, help=text)
        p.set_defaults(call=call)
        return p.add_argument

    a = command("run", run, "answer every split of a run's data greedily, score the answers, print a table over the runs")
    a("runs", nargs="+", metavar="OUT_DIR", help="directories that train.py wrote")
    a("--data", help="'builtin' or a directory in the Alpaca+ layout; default: what the run was trained on")
    a("--limit", type=int, help="only the first examples of every split")
    a("--batch_size", type=int, default=50, help="examples answered at once (%(default)s)")
    a("--max_length", type=int, help="longest example in tokens; default: that of the training (the paper: 512, human split 768)")
    a("--max_new_tokens", type=int, help="longest answer in tokens; default: the longest reference of the split")
    a("--condition", choices=gist_mask.CONDITIONS, default="gist", help="of a released model (%(default)s)")
    a = command("score", score_files, "ROUGE-1/2/L and exact match of outputs files (csv with the columns x, y_pred, y_true)")
    a("files", nargs="+", metavar="FILE.csv")
    a("--against", metavar="FILE.csv", help="also compare the answers with those of this file")
    a = command("judge", judge, "let a language model pick the better of two answers, pair by pair; the same command again goes on")
    a("a", metavar="A.csv", help="outputs of one model")
    a("b", metavar="B.csv", help="outputs of another, to the same examples")
    a("--base_url", required=True, metavar="URL", help="an OpenAI-compatible endpoint, as https://HOST/v1; its key: OPENAI_API_KEY")
    a("--model", required=True, metavar="NAME", help="the judge")
    a("--out", required=True, metavar="FILE.json", help="where the judgments go")
    a("--workers", type=int, default=8, help="requests at once (%(default)s)")
    a("--timeout", type=float, default=60, help="seconds to wait for a reply (%(default)s)")
    a("--wait", type=float, default=0.5, help="seconds before a failed request is made again; each time twice as long (%(default)s)")
    a("--max_failures", type=int, default=100, help="stop after so many failed requests in all (%(default)s)")
    a("--seed", type=int, default=0, help="of the order in which the answers are shown (%(default)s)")
    a = command("winrate", winrate, "win rates of judgments files, with 95 %% confidence intervals")
    a("files", nargs="+", metavar="FILE.json", help="what eval.py judge wrote, or the paper's released judgments")
    a("--csv", metavar="FILE.csv", help="also write the table, with all digits, into this file")
    a = command("compress", compress, "compress an instruction once, and answer inputs from its gist")
    a("run", metavar="OUT_DIR", help="a directory that train.py --condition gist wrote")
    what = commands.choices["compress"].add_mutually_exclusive_group(required=True).add_argument
    what("--instruction", help="what to compress")
    what("--load", metavar="FILE", help="a gist that --save wrote")
    a("--input", nargs="+", metavar="TEXT", help="answer these; - reads inputs from standard input, one a line; default: no input")
    a("--save", metavar="FILE", help="keep the gist in this file")
    a("--max_new_tokens", type=int, default=128, help="longest answer in tokens (%(default)s)")
    a = command("attention", attention, "draw what the gist tokens attend to in an instruction, layer by layer")
    a("run", metavar="OUT_DIR", help="a directory that train.py --condition gist wrote")
    a("--instruction", required=True, help="what to compress")
    a("--out", metavar="FILE.png", default="attention.png", help="where to draw it (%(default)s)")
    a("--words", type=int, default=8, help="how many of the nearest words to print (%(default)s)")
    a = command("plot", plot, "draw results into one picture")
    a("results", nargs="+", metavar="OUT_DIR", help="runs that eval.py run has evaluated; for winrates: judgments files")
    a("--kind", choices=("bars", "n_gist", "families", "winrates"), default="bars",
      help="bars by split and condition, lines over n_gist, a table of the built-in families, or win rates (%(default)s)")
    a("--metric", choices=("exact_match", "rouge1", "rouge2", "rougeL"), default="rougeL", help="(%(default)s)")
    a("--out", metavar="FILE.png", default="results.png", help="where to draw it (%(default)s)")
    for name in ("run", "compress", "attention"):
        commands.choices[name].set_defaults(condition="gist")
        a = commands.choices[name].add_argument
        a("--device", help="cuda, mps or cpu; default: the first of these that is there")
        a("--n_gist", type=int, metavar="N", help="of a released gist model, which is no run of train.py")
        a("--base", metavar="DIR", help="the original LLaMA, if the model's weights are released as differences from it")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name != "seed" and isinstance(value, (int, float)) and not value > 0:
            parser.error(f"--{name} must be more than 0")
    args.call(args)


if __name__ == "__main__":
    data.run(main)
