"""Everything that comes from disk, and back to it: instructions, tokenizers, weights.

Text becomes token ids here, with the gist tokens between prompt and input. The three parts are
tokenized separately and joined as ids, so that the prompt's tokens never depend on the input:

    LLaMA   <s> "Instruction: {instruction}" <G>...<G> "Input: {input}\\nOutput:" "{output}" </s>
    T5      source: "Instruction: {instruction}" <G>...<G> "Input: {input}" </s>
            target: "{output}" </s>

An example without an input has just "Output:" (T5: </s>) after the gist. With LLaMA's tokenizer,
this gives the paper's own token counts.

The file reads in the order in which data flows: instructions, the text layout, batches, tokenizers,
checkpoints; then the built-in instructions, and small things that every script needs. Run it to see
one record on its way.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import gc
import hashlib
import inspect
import io
import json
import os
import pickle
import random
import re
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import gist_mask
from gist_mask import GIST, INPUT, PROMPT, START
from model import IGNORE_INDEX, Llama, LlamaConfig, Unsupported, rope_frequencies
from t5 import T5, T5Config

Model = Llama | T5
AnyPath = str | Path
Tensors = dict[str, Tensor]  # by their names
SPLITS = ("seen", "unseen", "human")  # the paper's three validation splits
ASSETS = Path(__file__).parent / "assets"


# ---- Instructions ----


def load_instructions(path: str, seed: int = 0) -> dict[str, list[dict]]:
    """Read a data set: {"train": [...], "seen": [...], "unseen": [...], "human": [...]}.

    path: "builtin", or a directory in the Alpaca+ layout: files whose names hold `train`,
    `validation_seen`, `validation_unseen` or `validation_human` and end in .json or .jsonl, each a
    JSON array or JSON lines. A record is a dict with the strings `instruction`, `input` ("" if it
    needs none) and `output`. A split without a file is []. Raises DataError.
    """
    splits = {split: [] for split in ("train", *SPLITS)}
    if path == "builtin":
        return splits | builtin(seed=seed)
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such data directory; give one, or --data builtin")
    for file in sorted(Path(path).iterdir()):
        split = split_of(file.name)
        if split is not None:
            splits[split] += read_records(file)
    if not splits["train"]:
        raise DataError(f"{path}: no training examples; put some into a file like my_train.json")
    return splits


def split_of(name):
    """The one split that a file belongs to. A validation file is never trained on."""
    if not name.endswith((".json", ".jsonl")) or name == "train_log.jsonl":  # that is a run's own
        return None
    for split in SPLITS:
        if re.search(f"validation_{split}(?![a-z])", name):
            return split
    return "train" if "train" in name and "validation" not in name else None


def read_records(file):
    """The records of a JSON array or JSON lines file. Raises DataError, which names a bad one."""
    with one_line_errors(file, "correct it"):
        content = read_utf8(file)
        if content.lstrip().startswith(b"["):
            unit, items = "record", json.loads(content)
        else:
            unit, items = "line", content.splitlines()
    records = []
    for number, item in enumerate(items, 1):
        with one_line_errors(f"{file}, {unit} {number}", "correct it"):
            if unit == "record":
                records.append(to_record(item))
            elif item.strip():
                records.append(to_record(json.loads(item)))
    return records


def to_record(item):
    """Raises ValueError if a JSON value is no record."""
    if not isinstance(item, dict):
        raise ValueError("not an object with instruction, input and output")
    item = {"input": ""} | item
    record = {key: item.get(key) for key in ("instruction", "input", "output")}
    for key, text in record.items():
        if not isinstance(text, str):
            raise ValueError(f"'{key}' is missing or not a string")
        text.encode()  # raises for half a character: JSON's "\ud83d" alone is a lone surrogate
    return record


# ---- Text layout ----


@dataclass
class Example:
    """Token ids of one record.

    prompt: all that a cache can stand for: <s>, instruction, gist. input: what follows. output: the
    answer. segments: that of each token of prompt and input. arch: of the model that it is for.
    """

    prompt: list[int]
    input: list[int]
    output: list[int]
    segments: list[int]
    record: dict
    arch: str = "llama"

    def __len__(self) -> int:
        return len(self.prompt + self.input + self.output)


def layout(
    record: dict, tokenizer: Tokenizer, n_gist: int, arch: str = "llama", see_start: bool = False
) -> Example:
    """Tokenize the parts of a record, each by itself, and say which segment each token is.

    n_gist gist tokens follow the prompt. see_start: the row's first token is START, which everybody
    sees, and not part of the prompt. Without gist tokens, the prompt is part of the input.
    """

    def encode(text):
        text = text.strip()
        return tokenizer.encode(tokenizer.prefix + text) if text else []

    # What has to be compressed, and the gist tokens that it is compressed into.
    instruction = encode(f"Instruction: {record['instruction'].strip()}")
    gist = [tokenizer.gist_id] * n_gist
    # What comes with every use of it. A decoder's row has a first token and goes on with the
    # output; an encoder's row has neither, and ends with </s>.
    given = record["input"].strip()
    text = f"Input: {given}" if given else ""
    start = []
    if arch == "t5":
        input = encode(text) + [tokenizer.eos_id]
    else:
        input = encode(f"{text}\nOutput:")
        if tokenizer.bos_id is not None:
            start = [tokenizer.bos_id]
    output = encode(record["output"]) + [tokenizer.eos_id]

    # This is where a token's segment is decided; everything else follows from it. (A second gist
    # after the input is not GIST: by the table it would see the prompt, and hand it to the output.)
    before = PROMPT if n_gist else INPUT
    segments = [START if see_start else before] * len(start)
    segments += [before] * len(instruction) + [GIST] * n_gist + [INPUT] * len(input)
    return Example(start + instruction + gist, input, output, segments, record, arch)


def make_examples(
    records: list[dict],
    tokenizer: Tokenizer,
    n_gist: int,
    arch: str = "llama",
    see_start: bool = False,
    max_length: int = 512,
    max_target: int = 256,
) -> tuple[list[Example], int]:
    """Lay out all records, cut at the right as in the paper. Returns how many were skipped, too.

    LLaMA: prompt, input and output together have at most `max_length` tokens. T5: the source has at
    most `max_length`, the target `max_target`. The record's output is cut with its tokens. An
    example that loses all of it, or a gist token, could not teach anything and is skipped.
    """
    examples = []
    for record in records:
        e = layout(record, tokenizer, n_gist, arch, see_start)
        gists, n_output = e.segments.count(GIST), len(e.output)
        room = max_length - len(e.prompt)  # for what follows the prompt
        if arch == "t5":
            e.output = e.output[:max_target]
            if len(e.input) > room:  # the source keeps its end
                e.input = e.input[: room - 1] + [tokenizer.eos_id]
                e.segments = e.segments[: max_length - 1] + [INPUT]
        else:
            e.output = e.output[: max(0, room - len(e.input))]
        if len(e.output) < n_output:  # an answer is compared with what could be learned
            e.record = record | {"output": tokenizer.decode(e.output).strip()}
        if e.output and room > 0 and e.segments.count(GIST) == gists:
            examples.append(e)
    return examples, len(records) - len(examples)


# ---- Batches ----


def pad(rows: list[list[int]], fill: int = 0, side: str = "right") -> Tensor:
    """Rows of different lengths as one (B, T) int64 tensor; side: where the filling stands."""
    if not rows:  # pad_sequence wants one at least
        return torch.zeros(0, 0, dtype=torch.int64)
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def collate(examples: list[Example], pad_id: int) -> Tensors:
    """A batch to train on: tokens, their segments, and targets, all int64.

    LLaMA: all are (B, T), and targets hold the output's tokens, each at the place before it. T5:
    tokens and segments are the source's, (B, T), targets (B, T_out) the output. Targets are
    IGNORE_INDEX where there is no label.
    """
    rows, segments, targets = [], [], []
    for e in examples:
        source = e.prompt + e.input
        if e.arch == "t5":
            rows.append(source)
            segments.append(e.segments)
            targets.append(e.output)
        else:
            # The output goes on in the input's segment. Each token predicts the next one.
            rows.append(source + e.output)
            segments.append(e.segments + [INPUT] * len(e.output))
            targets.append([IGNORE_INDEX] * (len(source) - 1) + e.output + [IGNORE_INDEX])
    return {
        "tokens": pad(rows, pad_id),
        "segments": pad(segments, gist_mask.PADDING),
        "targets": pad(targets, IGNORE_INDEX),
    }


def batch_order(lengths, batch_size, seed):
    """One epoch as batches of indices, shuffled, with rows of similar lengths in each batch.

    Shuffle all, sort by length within stretches of 50 batches, cut into batches, shuffle these. So
    little of a batch is padding.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    stretch = 50 * batch_size
    batches = []
    for start in range(0, len(order), stretch):
        rows = sorted(order[start : start + stretch], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


# ---- Tokenizers ----
#
# Text is only ever text: a "</s>" in it is four characters, not the end. The gist token is one id
# after the tokenizer's own. `files` is what a checkpoint has of a tokenizer: name -> content.


class SentencePieceTokenizer:
    """A SentencePiece model: LLaMA's tokenizer.model, T5's spiece.model, or one trained here.

    name: that of its file. Raises ValueError.
    """

    prefix = ""  # SentencePiece puts a space before the text itself

    def __init__(self, model, name="tokenizer.model"):
        self.sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        if sp.eos_id() < 0:
            raise ValueError("it has no token for the end of a text")
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id, self.pad_id = sp.eos_id(), max(sp.pad_id(), 0)
        n_extra = 100 if name == "spiece.model" else 0  # T5 has them after the model's own
        self.gist_id = sp.vocab_size() + n_extra
        self.vocab_size = self.gist_id + 1
        self.files = {name: model}

    def encode(self, text):
        return self.sp.encode(text.encode("utf-8", "replace"))

    def decode(self, ids):
        size, unknown = self.sp.vocab_size(), self.sp.unk_id()
        return self.sp.decode([i for i in ids if i < size and i != unknown])


@dataclass
class BPETokenizer:
    """Byte-level byte-pair encoding (LLaMA 3, SmolLM2): cut a text into pieces, merge each one."""

    tokens: dict[int, bytes]  # earlier merges have lower ids
    added: dict[str, int]  # text that is always one token
    pattern: str  # the regular expression that cuts a text into pieces: all of it is in one
    bos_id: int | None
    eos_id: int
    gist_id: int
    files: dict[str, bytes]
    prefix = " "  # a word in the middle of a text begins with its space

    def __post_init__(self):
        self.pad_id = self.eos_id  # any token will do: nobody sees it
        self.vocab_size = self.gist_id + 1
        ranks = {token: i for i, token in self.tokens.items()}
        # SmolLM2 has no token for 21 bytes that never came up. tiktoken needs an id for each, and
        # `encode` drops them.
        for b in range(256):
            ranks.setdefault(bytes([b]), self.vocab_size + b)
        self.bpe = tiktoken.Encoding(
            "", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.texts = self.tokens | {i: text.encode() for text, i in self.added.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # or nothing

    def encode(self, text):
        ids = []
        for part in re.split(f"({self.added_pattern})", text):
            ids += [self.added[part]] if part in self.added else self.bpe.encode_ordinary(part)
        return [i for i in ids if i < self.vocab_size]

    def decode(self, ids):
        return b"".join(self.texts.get(i, b"") for i in ids).decode(errors="replace")


Tokenizer = SentencePieceTokenizer | BPETokenizer


# What every example has is one piece each, so sequences are a sixth shorter. \u2581 is a space.
LAYOUT_PIECES = ["\n", "\u2581Instruction:", "\u2581Input:", "\nOutput:", "\u2581Output:"]


def train_tokenizer(records, vocab_size):
    """Train a SentencePiece model: byte-pair encoding, with bytes for what it has not seen."""
    text = "".join(
        f"Instruction: {r['instruction']}\nInput: {r['input']}\nOutput: {r['output']}\n"
        for r in records[:20_000]
    )
    # SentencePiece skips lines of more than 4,192 bytes, which 1,000 characters never have.
    lines = filter(str.strip, re.findall(".{1,1000}", text))
    model = io.BytesIO()
    with one_line_errors(f"--vocab_size {vocab_size}", "give one that fits the training text"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            pad_id=3,
            user_defined_symbols=LAYOUT_PIECES,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    return SentencePieceTokenizer(model.getvalue())


def load_tokenizer(folder):
    """The tokenizer of a checkpoint, of any kind; None if there is none. Raises DataError."""
    for name in ("tokenizer.model", "spiece.model", "tokenizer.json"):
        file = folder / name
        if file.is_file():
            with one_line_errors(file, "no tokenizer that can be used here; download it again"):
                return read_tokenizer(file)
    return None


def read_tokenizer(file):
    """SentencePiece (LLaMA 1, 2, T5), lines of "base64 rank" (LLaMA 3), or tokenizer.json."""
    if file.suffix == ".json":
        return read_tokenizer_json(file)
    content = read_utf8(file)
    if not re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        return SentencePieceTokenizer(content, file.name)
    pairs = [line.split() for line in content.splitlines()]
    tokens = {int(rank): base64.b64decode(token) for token, rank in pairs}
    n = max(tokens) + 1  # 256 special tokens follow, first those that begin and end a text
    ids = dict(bos_id=n, eos_id=n + 1, gist_id=n + 256)
    return BPETokenizer(tokens, {}, LLAMA3_PATTERN, files={file.name: content}, **ids)


# How tokenizer.json says what cuts a text into pieces, and the regular expression that does so.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same where numbers are cut out before: digit by digit, and no space goes with them.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
DIGITS = dict(type="Digits", individual_digits=True)
SPLIT = dict(type="Split", pattern={"Regex": LLAMA3_PATTERN}, behavior="Isolated", invert=False)
PRE_TOKENIZERS = [
    ([BYTE_LEVEL], GPT2_PATTERN),
    ([DIGITS, BYTE_LEVEL], DIGITS_PATTERN),  # SmolLM2
    ([SPLIT, BYTE_LEVEL | {"use_regex": False}], LLAMA3_PATTERN),
]


def read_tokenizer_json(file):
    """Byte-level BPE as the `tokenizers` library writes it.

    Raises Unsupported for other kinds, or what a broken file can.
    """
    spec = read_json(file)
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        needed = "add the model's own tokenizer.model or, of a T5, spiece.model"
        raise Unsupported(f"of SentencePiece's kind, which is not read from here; {needed}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(key):
            raise Unsupported(f"{key} {model[key]!r} is not supported")
    if spec.get("normalizer"):
        raise Unsupported(f"normalizer {spec['normalizer']['type']} is not supported")
    pattern, vocab = read_pre_tokenizer(spec["pre_tokenizer"]), model["vocab"]
    # "a b", or, in newer files, ["a", "b"]
    merged_ids = [vocab["".join(merge).replace(" ", "")] for merge in model["merges"]]
    if merged_ids != sorted(merged_ids):
        raise Unsupported("merges in another order than their ids are not supported")
    # A letter stands for each byte: itself where it can be seen, chr(256), chr(257), ... elsewhere.
    invisible = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
    byte_of = dict(enumerate(invisible, 256))
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    plain = vocab.keys() - added.keys()
    tokens = {vocab[token]: token.translate(byte_of).encode("latin-1") for token in plain}

    config = file.with_name("tokenizer_config.json")
    settings = read_json(config)
    ids = []
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        ids.append(added.get(token["content"] if isinstance(token, dict) else token))
    bos_id, eos_id = ids
    if eos_id is None:
        raise ValueError("no eos_token in tokenizer_config.json")
    texts = read_text_tokens(spec["added_tokens"], ids)
    need_merges = {vocab[token] for token in plain if len(token) != 1}
    if not model.get("ignore_merges") and need_merges - set(merged_ids):
        raise Unsupported("tokens that no merge makes are not supported")
    gist_id = max(*vocab.values(), *added.values()) + 1
    files = {f.name: f.read_bytes() for f in (file, config)}
    return BPETokenizer(tokens, texts, pattern, bos_id, eos_id, gist_id, files)


def read_pre_tokenizer(spec):
    """The pattern that cuts a text into pieces. Raises Unsupported if it is not known."""
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
    steps[-1].setdefault("use_regex", True)  # GPT-2's own file does not say
    for known, pattern in PRE_TOKENIZERS:
        if steps == known:
            return pattern
    raise Unsupported(f"the pre-tokenizer {json.dumps(steps)} is not supported")


def read_text_tokens(added, special_ids):
    """The added tokens that text can spell. Raises Unsupported for rules that we do not have."""
    added = [token for token in added if not token["special"] and token["id"] not in special_ids]
    for token in added:
        # Those that are "normalized" are looked for after the others. We look for all at once.
        same = added[0]["normalized"]
        rules = dict(normalized=same, lstrip=False, rstrip=False, single_word=False)
        for rule, ours in rules.items():
            if token[rule] != ours:
                raise Unsupported(f"{rule} of the token {token['content']!r} is not supported")
    return {token["content"]: token["id"] for token in added}


# ---- Checkpoints ----
#
# A checkpoint is a directory. Read are Hugging Face's layout, with safetensors or PyTorch pickles,
# in one file or several; Meta's, where each file has a part of every tensor; and weights released
# as a delta from others. Written is the first of them. Tensors are mapped from their files, not
# read into memory, so that nothing is there twice. What is known about an architecture, its
# configuration's keys and its tensors' names in other layouts, stands beside its model.

ARCHITECTURES = {"llama": (LlamaConfig, Llama), "t5": (T5Config, T5)}  # model_type -> ours
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "BOOL": torch.bool}  # of buffers
HF_FILES = (  # the first of them that is there; an index says which file holds which tensor
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What some files carry beside the weights: copies of the embedding, and what no model reads.
COPIES = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = r"rope\.freqs|.*(rotary_emb\.inv_freq|EncDecAttention\.relative_attention_bias\.weight)"
PUBLISHED_SUMS = {  # of all weights recovered from the paper's released deltas
    "llama-7b-gist": 50547.957,
    "llama-7b-pos_control": 50596.914,
    "llama-7b-neg_control": 50503.879,
}


@torch.no_grad()
def load_model(
    path: AnyPath,
    base: AnyPath | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Model, Tokenizer | None]:
    """Read a checkpoint of any layout: the model and its tokenizer, None if there is none.

    path: a directory; base: that of the original model, if `path` holds a weight delta; dtype: what
    the weights become, by default what the embedding is in the file. Weights that need no
    conversion stay mapped from the file. Raises DataError.
    """
    folder = Path(path)
    model = open_checkpoint(folder)
    dtype = dtype or model.embedding.weight.dtype
    # The final norm is near 1 in every LLaMA; where it is near 0, all weights are a delta.
    is_delta = isinstance(model, Llama) and model.norm.weight.float().abs().mean() < 0.05
    if is_delta and base is None:
        raise DataError(f"{path}: a weight delta; name the original LLaMA-7B with --base DIR")
    if base is not None:
        if not is_delta:
            raise DataError(f"{path}: whole weights, not a weight delta; leave --base out")
        add_base(model, Path(base), dtype, folder.resolve().name)
    model.to(device, dtype)
    tokenizer = load_tokenizer(folder) or load_tokenizer(Path(base or folder))
    if tokenizer is not None and tokenizer.gist_id > model.config.vocab_size:
        advice = "use its own tokenizer, or rename the spiece.model of a T5 without extra ids to "
        raise DataError(f"{path}: more tokens than embeddings; {advice}tokenizer.model")
    return model.eval(), tokenizer


def read_config(path):
    """A checkpoint's config.json, or Meta's params.json. Runs of ours have the key "gisting".

    Raises DataError.
    """
    for name in ("config.json", "params.json"):
        if (Path(path) / name).is_file():
            return read_json(Path(path) / name)
    raise DataError(
        f"{path}: no checkpoint, it has neither config.json nor params.json; give a folder that "
        "train.py made, or weights of: hf download REPOSITORY --local-dir FOLDER"
    )


def open_checkpoint(folder):
    """A directory's model, its weights mapped. Raises DataError if they are not the model's."""
    raw = read_config(folder)
    with one_line_errors(folder, "use weights, configuration and code that belong together"):
        kind = raw.get("model_type", "llama")
        if kind not in ARCHITECTURES:
            raise Unsupported(f"a model of type {kind} is not supported")
        make_config, make_model = ARCHITECTURES[kind]
        if "dim" in raw:  # Meta's layout
            tensors = read_meta(folder, raw)
            d_ff = len(tensors["layers.0.feed_forward.w1.weight"])
            config = make_config.from_meta(raw, len(tensors["output.weight"]), d_ff)
            names = config.meta_names
        else:
            tensors = read_hf(folder)
            config = make_config.from_hf(raw)
            names = config.hf_names
        n_layers = config.n_layers + getattr(config, "n_decoder_layers", 0)
        if n_layers > len(tensors):  # before they are made
            raise ValueError(f"{n_layers} layers are more than the weights' tensors")
        with torch.device("meta"):  # shapes without memory
            model = make_model(config)
        load_weights(model, tensors, names, bool(raw.get("tie_word_embeddings")))
    return model


def load_weights(model, tensors, names, is_tied):
    """Give a model its weights, which are named as in `names`. Raises what wrong ones can.

    is_tied: an output head that their file lacks is the embedding.
    """
    ours = {rename(name, names): name for name, _ in model.named_parameters()}
    embedding = tensors[rename("embedding.weight", names)]
    head = rename("output.weight", names)
    if is_tied and head in ours:
        # Newer T5s tie their head, but do not scale its logits as our tied head does: copy it.
        tensors.setdefault(head, embedding.clone())
    weights = {}
    for name, tensor in tensors.items():
        is_copy = name in COPIES and name not in ours
        if is_copy and not torch.equal(tensor, embedding):
            raise ValueError(f"{name} is not the embedding, of which it should be a copy")
        if not is_copy and not re.fullmatch(UNUSED, name):
            weights[ours.get(name, name)] = tensor
    model.load_state_dict(weights, assign=True)  # raises if one is missing, or too many


def rename(name, names):
    """A parameter's name in another layout: that of the table `names`, or the same."""
    number = "".join(re.findall(r"\.\d+\.", name))  # ".3." of layer 3
    key = re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight")
    if key not in names:
        return name
    return names[key].replace(".N.", number) + ".weight"


def read_hf(folder):
    """All tensors of a directory in Hugging Face's layout. Raises DataError."""
    files = [folder / name for name in HF_FILES if (folder / name).is_file()]
    if not files:
        problem = f"no weights; expected {' or '.join(HF_FILES)}"
        if (folder / "checkpoint.pt").exists():
            problem = "not finished; train on with its command and --resume"
        raise DataError(f"{folder}: {problem}")
    file = files[0]
    if file.suffix != ".json":
        return read_tensors(file)
    with one_line_errors(file):
        shard_of = read_json(file)["weight_map"]  # tensor -> file
        shards = {name: read_tensors(folder / name) for name in sorted(set(shard_of.values()))}
        return {name: shards[shard][name] for name, shard in shard_of.items()}


def read_tensors(file):
    """The tensors of a file, mapped. Raises DataError."""
    with one_line_errors(file):
        return read_safetensors(file) if file.suffix == ".safetensors" else dict(unpickle(file))


def read_safetensors(file):
    """The tensors of a safetensors file. Raises what a broken file can.

    The file: 8 bytes with the length of a JSON header, the header, the tensors' bytes.
    """
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            advice = "download the model in bf16 or fp32"
            raise Unsupported(f"quantized weights ({entry['dtype']}); {advice}")
        start, end = entry["data_offsets"]
        # Copy on write: what is changed in memory does not change the file.
        content = np.memmap(file, np.uint8, "c", offset=8 + length + start, shape=end - start)
        tensors[name] = torch.from_numpy(content).view(dtype).view(entry["shape"])
    return tensors


def unpickle(file):
    """What torch.save wrote, tensors mapped. Code is never run. Raises what a broken file can."""
    try:
        is_zip = zipfile.is_zipfile(file)  # the kind of before 2020 is not, and cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise ValueError("holds more than tensors, which could run code: not opened") from None


def read_meta(folder, raw):
    """All tensors of a directory in Meta's layout, whose files have a part of each.

    Meta rotates neighboring rows of queries and keys; here the two halves of a head are rotated, as
    in Hugging Face's layout, so the rows of these tensors change places. Raises what broken files
    can.
    """
    shards = [read_tensors(file) for file in sorted(folder.glob("consolidated*.pth"))]
    if not shards:
        raise ValueError("no weights, expected consolidated.00.pth beside params.json")
    n_pairs = raw["dim"] // raw["n_heads"] // 2  # of a head
    tensors = {}
    for name, tensor in shards[0].items():
        if len(shards) > 1 and tensor.ndim == 2:  # all have the norms, and a part of the others
            is_cut_in_rows = tensor.shape[1] == raw["dim"]
            parts = [shard[name] for shard in shards]
            tensor = torch.cat(parts, dim=0 if is_cut_in_rows else 1)
        if name.endswith(("wq.weight", "wk.weight")):
            pairs = tensor.unflatten(0, (-1, n_pairs, 2))
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        tensors[name] = tensor
    return tensors


def add_base(model, base, dtype, name):
    """Make weights of a weight delta: add the original's, in fp32. Raises DataError.

    name: if the delta is one of those released, the sum of the weights has to be the published one.
    """
    originals = dict(open_checkpoint(base).named_parameters())
    # The published sums count the rotary tables, which old checkpoints stored.
    total = model.config.n_layers * rope_frequencies(model.config).sum().item()
    with one_line_errors(base, "name the model that the delta was taken from"):
        for key, delta in model.named_parameters():
            weight, original = delta.float(), originals.pop(key)
            weight[: len(original)] += original  # it has no row for the gist token: add nothing
            total += weight.sum().item()
            delta.data = weight.to(dtype)
        for released, published in PUBLISHED_SUMS.items():
            if released in name and not abs(total - published) < 0.5:
                raise ValueError(f"the weights sum to {total:.3f}, published is {published}")


@torch.no_grad()
def add_gist_token(model: Model, tokenizer: Tokenizer) -> None:
    """Give a stock model a row for the gist token: the mean of the tokenizer's other rows.

    Embedding and output head grow if they have no row to spare; FLAN-T5 has 28.
    """
    n = tokenizer.gist_id
    for layer in (model.embedding, model.output):
        if layer is not None:
            weight = layer.weight
            row = weight[:n].float().mean(dim=0, keepdim=True).to(weight)  # (1, D)
            layer.weight = nn.Parameter(torch.cat([weight[:n], row, weight[n + 1 :]]))
    model.config = replace(model.config, vocab_size=len(model.embedding.weight))


def save_model(
    path: AnyPath,
    model: Model,
    tokenizer: Tokenizer | None = None,
    gisting: dict | None = None,
    weights: Tensors | None = None,
) -> None:
    """Write a checkpoint in Hugging Face's layout; `gisting` goes into config.json.

    weights: whole ones under the model's names, if the model itself holds only parts of them.
    """
    if weights is None:
        weights = model.state_dict()
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        header[rename(name, model.config.hf_names)] = {
            "dtype": dtype_names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    header_bytes = json.dumps(header).encode()
    n_padding = -(8 + len(header_bytes)) % 64  # so that tensors begin at a multiple of 64 bytes
    header_bytes += b" " * n_padding
    save_config(path, model, tokenizer, gisting)
    with replacing(Path(path) / "model.safetensors") as f:
        f.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for tensor in weights.values():
            f.write(tensor.cpu().flatten().view(torch.uint8).numpy())


def save_config(path, model, tokenizer, gisting):
    """Write a checkpoint without its weights: config.json and the tokenizer's files."""
    Path(path).mkdir(parents=True, exist_ok=True)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = model.config.to_hf() | {"torch_dtype": dtype}
    if gisting is not None:
        config["gisting"] = gisting
    if tokenizer is not None:
        for name, content in tokenizer.files.items():
            write_file(Path(path) / name, content)
        config["bos_token_id"] = tokenizer.bos_id
        config["eos_token_id"] = tokenizer.eos_id
        config["pad_token_id"] = tokenizer.pad_id
    write_file(Path(path) / "config.json", json.dumps(config, indent=2).encode())


# ---- Files ----


@contextmanager
def replacing(file):
    """Write a file under a temporary name, flush it to the disk, and rename it.

    There is never half a file, and the old one stays until the new one is whole.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say where
            error.filename = str(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(file, content):
    """Replace a file by one with this content."""
    with replacing(file) as f:
        f.write(content)


def read_utf8(file):
    """A text file's bytes, without the byte order mark that some editors write."""
    return file.read_bytes().removeprefix(codecs.BOM_UTF8)


def read_json(file):
    """A JSON object. Raises DataError."""
    with one_line_errors(file):
        content = json.loads(read_utf8(file))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


# ---- The built-in instructions ----
#
# A model trained from scratch cannot learn the world in minutes, so these ask for what it can learn
# and still needs the instruction for: what to do with a short list of everyday words. The words and
# the phrasings are in assets/builtin.json. Slots of a phrasing: {a} {b} {c} words, {n} two or
# three, {nth} first, second or third, {list} a name for the list.

BUILTIN = json.loads((ASSETS / "builtin.json").read_text())
WORDS, LIST_NAMES = BUILTIN["words"], BUILTIN["lists"]
NUMBERS, ORDINALS = BUILTIN["numbers"], BUILTIN["ordinals"]
PHRASINGS = BUILTIN["phrasings"]  # by kind, the common ones first
SEARCHING = BUILTIN["searching"]  # the kinds that look for the word {a} in the list
STEP_KINDS = BUILTIN["steps"]  # those that can be one of two steps
TASK_KINDS, TWO_STEPS = tuple(PHRASINGS), "two steps"
# As in a language, a few phrasings are common and many are rare: the one at rank r comes r ** -1.3
# times as often as the first. These are running sums, for more ranks than any kind has.
FREQUENCIES = list(accumulate(rank**-1.3 for rank in range(1, 100)))


def follow(kind, w, a, b, c, n, nth):
    """What an instruction of a kind makes of a list of words w; a, b, c, n, nth fill its slots."""
    # fmt: off
    match kind:
        # a word to find in the list
        case "replace":          return [b if word == a else word for word in w]
        case "remove":           return [word for word in w if word != a]
        case "is there":         return ["yes" if a in w else "no"]
        case "if there":         return [b if a in w else c]
        case "which":            return [a if a in w else b]
        case "next":             return [dict(zip(w, w[1:])).get(a, "nothing")]
        # the same, with an answer for every word
        case "mark":             return ["yes" if word == a else "no" for word in w]
        case "mark with":        return [b if word == a else c for word in w]
        case "before a":         return [x for word in w for x in ([b, a] if word == a else [word])]
        case "after a":          return [x for word in w for x in ([a, b] if word == a else [word])]
        # the order of the list
        case "reverse":          return w[::-1]
        case "first to end":     return w[1:] + w[:1]
        case "swap ends":        return w[-1:] + w[1:-1] + w[:1]
        # parts of it
        case "keep first":       return w[:n]
        case "keep last":        return w[-n:]
        case "drop first":       return w[1:]
        case "drop last":        return w[:-1]
        case "nth":              return [w[nth]]
        # repeating and counting
        case "double":           return [x for word in w for x in (word, word)]
        case "repeat nth":       return w[: nth + 1] + w[nth:]
        case "count":            return [NUMBERS[len(w)]]
        # a word to insert
        case "prepend":          return [a] + w
        case "append":           return w + [a]
        case "surround":         return [a] + w + [b]
        case "insert after nth": return w[: nth + 1] + [a] + w[nth + 1 :]
        case "set nth":          return w[:nth] + [a] + w[nth + 1 :]
        case "join":             return [x for word in w for x in (word, a)][:-1]
        case "before each":      return [x for word in w for x in (a, word)]
        case "instead":          return [a, b]
        case "say for each":     return [a] * len(w)
    # fmt: on


@dataclass
class Task:
    """One instruction: its text, its kind, and what fills its slots."""

    text: str
    kind: str
    slots: tuple  # a, b, c, n and nth (from 0) of `follow`; of two steps, these

    def solve(self, words: list[str]) -> list[str]:
        if self.kind == TWO_STEPS:
            first, second = self.slots
            return second.solve(first.solve(words))
        return follow(self.kind, words, *self.slots)


def make_task(rng: random.Random, kind: str) -> Task:
    """Fill one phrasing of a kind with words and numbers, or let one such step follow another."""
    if kind == TWO_STEPS:
        first = make_task(rng, rng.choice(STEP_KINDS))
        second = make_task(rng, rng.choice(STEP_KINDS))
        return in_turn(first, second)
    phrasings = PHRASINGS[kind]
    phrasing = rng.choices(phrasings, cum_weights=FREQUENCIES[: len(phrasings)])[0]
    a, b, c = rng.sample(WORDS, 3)
    n, nth, name = rng.choice((2, 3)), rng.randrange(len(ORDINALS)), rng.choice(LIST_NAMES)
    text = phrasing.format(a=a, b=b, c=c, n=NUMBERS[n], nth=ORDINALS[nth], list=name)
    return Task(text[0].upper() + text[1:], kind, (a, b, c, n, nth))


def in_turn(first: Task, second: Task) -> Task:
    """Two steps: the second works on what the first makes of the list."""
    text = f"{first.text[:-1]}, then {second.text[0].lower()}{second.text[1:]}"
    return Task(text, TWO_STEPS, (first, second))


def make_record(task: Task, rng: random.Random) -> dict:
    """An example of an instruction: a random list of 3 to 5 words, and the answer."""
    asked = task.slots[:3]  # none of these words is in the list by chance (two steps: it may be)
    words = [word for word in rng.sample(WORDS, 8) if word not in asked]
    words = words[: rng.randint(3, 5)]
    place = rng.randrange(len(words))
    if task.kind == "which":
        words[place] = rng.choice(asked[:2])
    elif task.kind == "next":
        words[place] = asked[0]
    elif task.kind in SEARCHING:
        # With 0.2, half of all lists have the word: yes is as frequent as no.
        often = 0.2 if task.kind in ("is there", "if there") else 0.5
        for i in range(len(words)):
            if i != place and rng.random() < often:
                words[i] = asked[0]
    return {
        "instruction": task.text,
        "input": " ".join(words),
        "output": " ".join(task.solve(words)),
        "source": task.kind,
    }


def unknown_words(text: str) -> list[str]:
    """The words of a text that no built-in instruction or list has."""
    known = set(re.findall(r"\w+", (ASSETS / "builtin.json").read_text().lower()))
    return [word for word in re.findall(r"\w+", text.lower()) if word not in known]


def is_held_out(instruction: str) -> bool:
    """Is it kept for the unseen split? One in ten is, by a hash that never changes."""
    return hashlib.sha256(instruction.encode()).digest()[0] % 10 == 0


def builtin(n_train: int = 100_000, n_valid: int = 620, seed: int = 0) -> dict[str, list[dict]]:
    """The built-in data set, generated.

    Unseen instructions never occur in training; seen ones do, with other inputs. Both have equally
    many of every kind. Training has four times as many of what is hard to learn. `human` is written
    by hand in free phrasing (assets/human.json); no phrasing of ours makes these.
    """
    rng = random.Random(seed)
    kinds, hard = [*TASK_KINDS, TWO_STEPS], {*SEARCHING, TWO_STEPS}
    shares = list(accumulate(4 if kind in hard else 1 for kind in kinds))
    train, unseen = [], []
    trained = {}  # kind -> the training set's tasks
    while len(train) < n_train:
        task = make_task(rng, rng.choices(kinds, cum_weights=shares)[0])
        if not is_held_out(task.text):
            train.append(make_record(task, rng))
            trained.setdefault(task.kind, []).append(task)
    while len(unseen) < n_valid:
        task = make_task(rng, kinds[len(unseen) % len(kinds)])
        if is_held_out(task.text):
            unseen.append(make_record(task, rng))
    in_rotation = islice(cycle(trained.values()), n_valid)  # one kind after the other
    seen = [make_record(rng.choice(tasks), rng) for tasks in in_rotation]
    human = read_records(ASSETS / "human.json")
    return dict(train=train, seen=seen, unseen=unseen, human=human)


# ---- Errors and flags ----


class DataError(Exception):
    """What the user has to know, in one line: what is wrong, in which file, what to do."""


@contextmanager
def one_line_errors(subject, remedy="download it again"):
    """Turn whatever goes wrong inside into one line: with which file or flag, what, the remedy."""
    try:
        yield
    except DataError:
        raise
    except Unsupported as error:  # whole, but of a kind that we do not have
        raise DataError(f"{subject}: {one_line(error)}") from None
    except Exception as error:
        raise DataError(f"{subject}: {one_line(error)}; {remedy}") from None


def one_line(error):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    return " ".join(str(error).split())[:250] or type(error).__name__


def run(main):
    """Run a script's main function.

    Bad input, and files that cannot be read or written, end it with one line and exit status 2.
    """
    status = 2
    # A hundred thousand examples are not garbage, and looking through them takes seconds.
    gc.set_threshold(100_000)
    # What a console cannot show is printed as in a Python string: \u4f60.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output, like `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except DataError as error:
        message = error
    except OSError as error:  # a full disk, a folder that may not be written
        advice = "check its path, the permissions and the free space"
        message = f"{error.filename or 'a file'}: {one_line(error)}; {advice}"
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def at_least(low, kind=int, at_most=4_294_967_295):
    """A type for argparse: a number in a range; not-a-number and infinity are in none."""

    def parse(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {low:,}")
        if value > at_most:
            raise argparse.ArgumentTypeError(f"{text} is too large: at most {at_most:,}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value: 'x'"
    return parse


FLAG_TYPES = {  # type hint -> what argparse has to know of it
    "str": {},
    "list[str]": {"nargs": "+", "action": "extend"},
    "list[int]": {"nargs": "+", "action": "extend", "type": at_least(1)},
    "int": {"type": at_least(1), "metavar": "N"},
    "float": {"type": at_least(0, float), "metavar": "X"},
    "bool": {"action": "store_true"},
}


def add_arguments(parser, function, options, only_flags=True):
    """Make flags of a function's or dataclass's keyword-only parameters; arguments of the others.

    A line "name: text" of the docstring is the parameter's help. options: by name, what argparse
    has to know besides. The default is only shown: with argument_default=SUPPRESS, what is not
    given is not among the arguments, and the function fills it in.
    """
    helps = dict(re.findall(r"^(\w+): (.+)", inspect.getdoc(function), re.MULTILINE))
    for name, p in inspect.signature(function).parameters.items():
        if p.kind == p.VAR_KEYWORD or (only_flags and p.kind != p.KEYWORD_ONLY):
            continue
        settings = FLAG_TYPES[p.annotation.removesuffix(" | None")] | options.get(name, {})
        settings["help"] = helps.get(name, "").replace("%", "%%")
        if p.kind == p.KEYWORD_ONLY:
            name = f"--{name}"
            settings["required"] = p.default is p.empty
            if p.annotation != "bool" and p.default not in (p.empty, None):
                settings["help"] += f" (default: {p.default})"
        parser.add_argument(name, **settings)


def make_parser(description, commands, options):
    """A parser of commands, each made of functions: see `run_command`."""
    parser = argparse.ArgumentParser(description=description)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, (function, *others) in commands.items():
        summary = inspect.getdoc(function).split("\n\n")[0].replace("%", "%%")
        p = subparsers.add_parser(
            command, help=summary, description=summary, argument_default=argparse.SUPPRESS
        )
        p.set_defaults(function=function)
        add_arguments(p, function, options, only_flags=False)
        for other in others:
            add_arguments(p, other, options)
    return parser


def run_command(description, commands, options):
    """Call the function that the command line names, with its arguments.

    commands: by name, a function and those to which it hands its **flags on. A docstring's first
    paragraph is the command's help. options: as in `add_arguments`.
    """
    arguments = vars(make_parser(description, commands, options).parse_args())
    arguments.pop("function")(**arguments)


# ---- Figures and devices ----


def new_figure(width, height, panels=1):
    """A matplotlib figure for a file, and its axes side by side. Sizes are in inches."""
    from matplotlib.figure import Figure  # without pyplot: no display, and nothing to close

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels)


def save_figure(figure, file):
    """Write a figure in the format that the file's ending names. Raises DataError.

    A $ in a text is a dollar, not the beginning of a formula.
    """
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode("utf-8", "replace").decode())  # of strange folders
    with one_line_errors(file, "give a file like results.png"), replacing(Path(file)) as f:
        figure.savefig(f, dpi=120, format=Path(file).suffix[1:])


def check_picture(file):
    """Raise DataError if no picture can be written to this file. Changes nothing."""
    with one_line_errors(file, "give a file like results.png"):
        trial = Path(file).with_stem(f"{Path(file).stem}-trial-{os.getpid()}")
    save_figure(new_figure(1, 1)[0], trial)
    trial.unlink()


def find_device(name: str | None = None) -> str:
    """The device to use: `name`, or the first of cuda, mps and cpu. Raises DataError."""
    device = name or "cpu"
    if name is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    with one_line_errors(f"--device {device}", "give one that this machine has, like cpu"):
        if device.startswith("cuda") and torch.cuda.is_available():
            # Memory statistics and events are of the current device: of torchrun's, or the first.
            _, _, number = device.partition(":")
            torch.cuda.set_device(int(number or os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).cpu()
    return device


# ---- One record on its way ----


def main():
    """Print the tokens of a record, and what the mask, the model and the loss get of them."""
    records = builtin(5000, 1)["train"]
    tokenizer = train_tokenizer(records, 1200)
    record = records[1]
    batch = collate([layout(record, tokenizer, n_gist=1)], tokenizer.pad_id)
    batch["positions"] = gist_mask.positions(batch["segments"])
    columns = [batch[name][0] for name in ("tokens", "segments", "positions", "targets")]
    print(
        f"{json.dumps(record)}\n"
        "target: the next token if it is to be learned, or -100\n"
        "  id  segment  position  target  piece"
    )
    for token, segment, position, target in zip(*columns):
        is_gist = token == tokenizer.gist_id
        piece = "<G>" if is_gist else tokenizer.sp.id_to_piece(int(token))
        print(f"{token:4} {gist_mask.NAMES[segment]:>8} {position:9} {target:7}  {piece!r}")


if __name__ == "__main__":
    run(main)
