"""The checks of a handout's tasks: what a right answer does, on small examples.

`python -m tests.grade` runs them. A check is a function whose name begins with check_; it passes if
it raises nothing. tests/handout.py says which task it belongs to.

No check needs another task's answer. While a task is checked, the functions of all others are
replaced by ORACLES (at the end of this file): slow and plain, a pair or a number at a time, as the
rule reads in words. They are there to be compared with, not to be copied: an answer has no loop
over tokens, unless its task is about one.
"""

from __future__ import annotations

import io
import itertools
import profile
import re
from collections import Counter
from contextlib import contextmanager, redirect_stderr
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

import data
import eval
import gist_mask
import model
import t5
import train
from gist_mask import GIST, INPUT, NAMES, PADDING, PROMPT, START, TABLE
from model import IGNORE_INDEX, Llama, LlamaConfig
from t5 import T5, T5Config
from tests.exercises import own_condition

P, G, In = PROMPT, GIST, INPUT

# ---- To compare, and to say what differs ----


def same(what: str, got, expected) -> None:
    """Whole numbers, texts, lists of them, or tensors, with shape and dtype."""
    if isinstance(expected, Tensor):
        same_kind(what, got, expected)
        assert got.dtype == expected.dtype, f"{what}: expected {expected.dtype}, got {got.dtype}"
        got, expected = got.tolist(), expected.tolist()
    space = " " if isinstance(expected, int) else "\n"
    assert got == expected, f"{what}: expected{space}{expected}, got{space}{got}"


def close(what: str, got, expected, tolerance=1e-4) -> None:
    """Numbers with fractions, or tensors of them: says the first that is not close."""
    if not isinstance(expected, Tensor):
        got, expected = torch.tensor(float(got)), torch.tensor(float(expected))
    same_kind(what, got, expected)
    wrong = ~torch.isclose(got.float(), expected.float(), tolerance, tolerance)
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        text = f"{what}: expected {expected[first]:.6g}, got {got[first]:.6g}"
        many = f" at {list(first)}; {wrong.sum()} of {wrong.numel()} numbers are wrong"
        raise AssertionError(text + (many if first else ""))


def same_kind(what, got, expected):
    assert isinstance(got, Tensor), f"{what}: expected a tensor, got {type(got).__name__}"
    shape, wanted = tuple(got.shape), tuple(expected.shape)
    assert shape == wanted, f"{what}: expected the shape {wanted}, got {shape}"


def same_mask(what: str, got: Tensor, segments: Tensor, condition: str, expected: Tensor) -> None:
    """Masks (B, 1, T or 1, T) of rows with these segments: says the first pair that differs."""
    same_kind(what, got, expected)
    assert got.dtype == torch.bool, f"{what}: expected bool, got {got.dtype}"
    wrong = (got != expected).nonzero().tolist()
    if wrong:
        b, _, q, k = wrong[0]
        row = names(segments[b])
        query = f"token {q} ({row[q]})" if got.shape[2] > 1 else "the input"
        may = "has to see" if expected[b, 0, q, k] else "must not see"
        raise AssertionError(
            f"{what}, under {condition!r}, of the row\n{' '.join(row)}\n"
            f"{query} {may} token {k} ({row[k]}); {len(wrong)} pairs are wrong"
        )


def picture(rows: str) -> Tensor:
    """A mask from a picture: 1 = may attend. Returns (1, 1, rows, columns) bool."""
    return torch.tensor([[[[x == "1" for x in row] for row in rows.split()]]])


def names(row):
    return [NAMES[label] for label in row.tolist()]


def ragged_rows(seed: int, n_gist: int = 2) -> Tensor:
    """Segments of random rows, with padding on both sides: (4, T) int64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    rows = []
    for i in range(4):
        parts = [START] * (i % 2) + [PROMPT] * draw(1, 4) + [GIST] * n_gist + [INPUT] * draw(1, 4)
        rows.append([PADDING] * draw(0, 3) + parts + [PADDING] * draw(0, 3))
    T = max(map(len, rows))
    return torch.tensor([row + [PADDING] * (T - len(row)) for row in rows])


@contextmanager
def a_new_table(entries):
    """`with a_new_table(entries) as name`: TABLE has one more condition."""
    TABLE["a new condition"] = entries
    try:
        yield "a new condition"
    finally:
        del TABLE["a new condition"]


# Every entry of these differs from its mirror image, or from those of the paper's conditions.
NEW_TABLES = [[[0, 1, 0], [0, 1, 1], [1, 0, 1]], [[1, 0, 1], [1, 0, 0], [0, 1, 0]]]

# ---- 1. Segments, and the masks ----


def check_segments():
    for tokens, expected in [
        ([3, 4, 9, 9, 5, 6], [P, P, G, G, In, In]),
        ([9, 5, 6, 7, 8, 3], [G, In, In, In, In, In]),
        ([3, 4, 5, 6, 7, 9], [P, P, P, P, P, G]),
        ([3, 9, 5, 9, 6, 7], [P, G, P, G, In, In]),  # INPUT follows the last gist token
        ([3, 4, 5, 6, 7, 8], [In] * 6),
    ]:
        got = gist_mask.segments(torch.tensor([tokens]), gist_id=9)
        same(f"segments of {tokens}, with gist_id 9,", got, torch.tensor([expected]))


def check_segments_of_a_batch():
    rows = torch.tensor([[3, 9, 5, 6], [3, 4, 9, 6], [5, 6, 7, 8]])
    expected = torch.tensor([[1, 2, 3, 3], [1, 1, 2, 3], [3, 3, 3, 3]])
    same("segments of three rows", gist_mask.segments(rows, gist_id=9), expected)


def check_encoder_mask():
    """Without a causal part, tokens see later ones, too."""
    row = torch.tensor([[P, P, G, In, In]])
    for condition, rows in [
        ("gist", "111.. 111.. 111.. ..111 ..111"),
        ("pos_control", "11111 11111 11111 11111 11111"),
        ("neg_control", "111.. 111.. 111.. ...11 ...11"),
    ]:
        mask = gist_mask.encoder_mask(row, condition)
        same_mask("encoder_mask", mask, row, condition, picture(rows))


def check_encoder_mask_of_padded_rows():
    for seed in range(5):
        rows = ragged_rows(seed)
        with a_new_table(NEW_TABLES[0]) as name:
            for condition in ("gist", "neg_control", name):
                mask = gist_mask.encoder_mask(rows, condition)
                same_mask("encoder_mask", mask, rows, condition, slow_encoder_mask(rows, condition))


def check_decoder_mask():
    """The paper's Figure 2."""
    row = torch.tensor([[P, P, G, In, In]])
    for condition, of_input in [
        ("gist", "..11. ..111"),
        ("pos_control", "1111. 11111"),
        ("neg_control", "...1. ...11"),
    ]:
        mask = gist_mask.decoder_mask(row, condition)
        expected = picture(f"1.... 11... 111.. {of_input}")
        same_mask("decoder_mask", mask, row, condition, expected)


def check_decoder_mask_of_padded_rows():
    """Nobody sees padding, wherever it stands, but itself; everybody after it sees START."""
    for seed, condition in itertools.product(range(5), [*TABLE]):
        rows = ragged_rows(seed)
        mask = gist_mask.decoder_mask(rows, condition)
        same_mask("decoder_mask", mask, rows, condition, slow_decoder_mask(rows, condition))


def check_decoder_mask_of_a_new_condition():
    """The mask follows TABLE, whatever it says."""
    for entries in NEW_TABLES:
        with a_new_table(entries) as name:
            rows = ragged_rows(5)
            mask = gist_mask.decoder_mask(rows, name)
            same_mask(f"decoder_mask by {entries}", mask, rows, name, slow_decoder_mask(rows, name))


# ---- 2. Positions ----


def check_positions():
    for row, expected in [
        ([P, P, G, In, In], [-3, -2, -1, 0, 1]),
        ([In, In, In], [0, 1, 2]),
        ([START, P, G, G, In], [-4, -3, -2, -1, 0]),
        ([P, G, In, G, In], [-2, -1, 0, 1, 2]),  # a gist token once more, after the input
    ]:
        row = torch.tensor([row])
        what = f"positions of {' '.join(names(row[0]))}"
        same(what, gist_mask.positions(row), torch.tensor([expected]))


def check_positions_of_a_prompt_to_cache():
    """It ends where its input is going to begin."""
    got = gist_mask.positions(torch.tensor([[PROMPT, PROMPT, GIST], [PADDING, PROMPT, GIST]]))
    same("positions of two prompts", got, torch.tensor([[-3, -2, -1]] * 2))


def check_positions_of_padded_rows():
    for seed in range(5):
        rows = ragged_rows(seed)
        same(f"positions of\n{rows}\n", gist_mask.positions(rows), slow_positions(rows))


# ---- 3. The mask of the cross-attention ----


def check_cross_mask():
    """The decoder of T5 sees of the source what the input sees."""
    row = torch.tensor([[START, PROMPT, GIST, INPUT, PADDING]])
    for condition, seen in [("gist", "1.11."), ("pos_control", "1111."), ("neg_control", "1..1.")]:
        mask = gist_mask.cross_mask(row, condition)
        same_mask("cross_mask", mask, row, condition, picture(seen))


def check_cross_mask_of_padded_rows():
    for seed, entries in itertools.product(range(5), NEW_TABLES):
        rows = ragged_rows(seed)
        with a_new_table(entries) as name:
            mask = gist_mask.cross_mask(rows, name)
            same_mask(f"cross_mask by {entries}", mask, rows, name, slow_cross_mask(rows, name))


# ---- 4. The targets of a batch ----

# Two rows of different lengths, and their batches; 9 is the gist token, 7 the padding token, 0 a
# token like others. A label stands where the token before it is read; T5 shifts its targets itself.
no = IGNORE_INDEX
TWO_ROWS = [([11, 12, 9], [13, 14], [15, 16]), ([21, 9], [22], [0])]
BATCHES = {
    "llama": {
        "tokens": [[11, 12, 9, 13, 14, 15, 16], [21, 9, 22, 0, 7, 7, 7]],
        "segments": [[P, P, G, In, In, In, In], [P, G, In, In, 0, 0, 0]],
        "targets": [[no, no, no, no, 15, 16, no], [no, no, 0, no, no, no, no]],
    },
    "t5": {
        "tokens": [[11, 12, 9, 13, 14], [21, 9, 22, 7, 7]],
        "segments": [[P, P, G, In, In], [P, G, In, 0, 0]],
        "targets": [[15, 16], [0, no]],
    },
}


def example(prompt, input, output=(), arch="llama", start=PROMPT) -> data.Example:
    """Of token ids. start: the label of the first token, if it is no gist token."""
    labels = [GIST if token == 9 else PROMPT for token in prompt] + [INPUT] * len(input)
    if labels[0] == PROMPT:
        labels[0] = start
    return data.Example([*prompt], [*input], [*output], labels, record={}, arch=arch)


def a_batch(arch):
    return {name: torch.tensor(rows) for name, rows in BATCHES[arch].items()}


def collate_as(arch):
    batch = data.collate([example(*row, arch) for row in TWO_ROWS], pad_id=7)
    same("the keys of a batch", sorted(batch), ["segments", "targets", "tokens"])
    for name, expected in a_batch(arch).items():
        same(f"{name} for {arch}", batch[name], expected)


def check_collate_for_a_decoder():
    collate_as("llama")


def check_collate_for_an_encoder_decoder():
    collate_as("t5")


def check_collate_keeps_labels():
    """Whatever they are: START, here."""
    batch = data.collate([example(*TWO_ROWS[0], start=START)], pad_id=7)
    same(
        "segments of a row with START", batch["segments"], torch.tensor([[START, P, G, *[In] * 4]])
    )


# ---- 5. Attention ----


def check_rotate():
    x = torch.randn(2, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(2, 3, 1, 3, generator=torch.Generator().manual_seed(1))
    got = model.rotate(x, angles.cos(), angles.sin())
    close("rotate(x, cos, sin), whose pairs are (x[i], x[i + K/2]),", got, slow_rotate(x, angles))
    got = model.rotate(x.bfloat16(), angles.cos(), angles.sin())
    assert got.dtype == torch.bfloat16, f"bfloat16 is to stay bfloat16, not become {got.dtype}"


def small_attention(n_kv_heads):
    """An attention of 4 query heads, 5 tokens in 2 rows, and their angles."""
    config = LlamaConfig(vocab_size=8, d_model=12, n_heads=4, n_kv_heads=n_kv_heads, head_dim=6)
    attention = model.Attention(config)
    generator = torch.Generator().manual_seed(0)
    for weight in attention.parameters():
        weight.data.normal_(0, 0.7, generator=generator)
    x = torch.randn(2, 5, 12, generator=generator)
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    angles = torch.arange(-2.0, 3.0)[None, :, None, None] * torch.tensor([1.0, 0.3, 0.1])
    return attention, x, mask, angles.expand(2, -1, -1, -1)


def check_queries_keys_values():
    attention, x, _, angles = small_attention(n_kv_heads=2)
    got = attention.queries_keys_values(x, angles.cos(), angles.sin())
    weights = (attention.wq, attention.wk, attention.wv)
    for i, name in enumerate(["queries", "keys", "values"]):
        expected = weights[i](x).view(2, 5, -1, 6)
        if name != "values":
            expected = slow_rotate(expected, angles)
        close(f"{name} of queries_keys_values", got[i], expected)


@torch.no_grad()
def check_attention():
    """4 query heads, and 4, 2 and 1 heads of keys and values."""
    for n_kv_heads in (4, 2, 1):
        attention, x, mask, angles = small_attention(n_kv_heads)
        got = attention(x, mask, angles.cos(), angles.sin(), None)
        expected = slow_attention(attention, x, mask, angles.cos(), angles.sin(), None)
        close(f"Attention with {n_kv_heads} key-value heads for 4 query heads", got, expected)


@torch.no_grad()
def check_attention_of_a_mask_for_all_rows():
    attention, x, mask, angles = small_attention(2)
    got = attention(x, mask[:1], angles.cos(), angles.sin(), None)
    mask = mask[:1].expand(2, -1, -1, -1)
    expected = slow_attention(attention, x, mask, angles.cos(), angles.sin(), None)
    close("Attention with one mask for both rows", got, expected)


@torch.no_grad()
def check_attention_after_a_cache():
    """The last two tokens, after three that `past` holds, as all five at once."""
    attention, x, mask, angles = small_attention(2)
    mask = mask.tril()
    whole = slow_attention(attention, x, mask, angles.cos(), angles.sin(), None)
    past = (torch.zeros(2, 5, 2, 6), torch.zeros(2, 5, 2, 6))
    for start, end in ((0, 3), (3, 5)):
        some = angles[:, start:end]
        seen = mask[:, :, start:end, :end]
        got = attention(x[:, start:end], seen, some.cos(), some.sin(), past)
        close(f"Attention of tokens {start} to {end - 1}", got, whole[:, start:end])


# ---- 6. The loss of a batch ----


def labels_one_by_one(network, condition):
    """Of `TWO_ROWS`, the logits and the labels of the output's tokens, each row without padding."""
    logits, labels = [], []
    for prompt, input, output in TWO_ROWS:
        tokens, segments = prompt + input, example(prompt, input).segments
        if isinstance(network, Llama):  # reads the output in the same row, one place earlier
            tokens, segments = tokens + output[:-1], segments + [INPUT] * len(output[:-1])
        masked = slow_masking(network, segments, condition, torch.tensor([output]))
        with torch.no_grad():
            logits.append(network(torch.tensor([tokens]), **masked)[0, -len(output) :])
        labels += output
    return torch.cat(logits), torch.tensor(labels)


def check_logits_of_the_labels():
    """With any arguments that a model takes, here those of each condition."""
    for arch, condition in itertools.product(("llama", "t5"), TABLE):
        network, batch = small_model(arch), a_batch(arch)
        masked = slow_masking(network, batch["segments"], condition, batch["targets"])
        logits, labels = train.label_logits(network, batch, masked)
        expected_logits, expected_labels = labels_one_by_one(network, condition)
        what = f"of label_logits for {arch} under {condition!r}"
        same(f"the labels {what}", labels, expected_labels)
        close(f"the logits {what}", logits, expected_logits)


def check_loss_of_a_batch():
    for arch, condition in itertools.product(("llama", "t5"), TABLE):
        network = small_model(arch)
        logits, labels = labels_one_by_one(network, condition)
        p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        expected = -sum(p[i, label].log() for i, label in enumerate(labels))
        what = f"batch_loss for {arch} under {condition!r}, a sum over 3 labels in nats"
        close(what, train.batch_loss(network, a_batch(arch), condition), expected)


def check_loss_is_in_fp32():
    network = small_model("llama")
    in_bfloat16 = lambda *tokens, **masked: network(*tokens, **masked).bfloat16()
    loss = train.batch_loss(in_bfloat16, a_batch("llama"), "gist")
    assert loss.dtype == torch.float32, (
        f"a loss from bfloat16 logits: expected float32, got {loss.dtype}"
    )


def check_loss_can_be_learned_from():
    network = small_model("llama")
    train.batch_loss(network, a_batch("llama"), "gist").backward()
    gradient = network.embedding.weight.grad
    assert gradient is not None and gradient.any(), "the loss has no gradient"


# ---- 7. Keep the gist's columns, and answer from them ----

# Prompts and inputs of different lengths; 9 is the gist token.
QUESTIONS = [([11, 12, 13, 9, 9], [21, 22]), ([14, 9, 9], [23, 24, 25, 26]), ([15, 16, 9, 9], [27])]
TOKENIZER = SimpleNamespace(
    pad_id=7, eos_id=None, gist_id=9, decode=lambda ids: " " + " ".join(map(str, ids))
)


def small_model(arch):
    shape = dict(vocab_size=40, d_model=16, n_layers=2, n_heads=2, head_dim=8, d_ff=24)
    if arch == "llama":
        network = Llama(LlamaConfig(**shape, n_kv_heads=1))
    else:
        network = T5(T5Config(**shape, n_decoder_layers=1))
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():  # large weights: what is seen decides what is said
        if weight.ndim > 1:
            weight.data.normal_(0, 0.6, generator=generator)
        else:
            weight.data.fill_(1)
    if arch == "llama":
        network.generate = partial(generate_with_room, network.generate)
    return network.eval()


def generate_with_room(generate, tokens, mask=None, *others, max_new_tokens=256, **options):
    """`Llama.generate`, which says so if its mask lacks the tokens to be written."""
    T = tokens.shape[1]
    assert mask is None or mask.shape[2] == T + max_new_tokens, (
        f"generate reads {T} tokens and writes {max_new_tokens}: its mask has to have a row for "
        f"each of the {T + max_new_tokens}, got {mask.shape[2]}; see `n_new` of `masking`"
    )
    return generate(tokens, mask, *others, max_new_tokens=max_new_tokens, **options)


def questions(arch, start=PROMPT):
    return [example(*question, arch=arch, start=start) for question in QUESTIONS]


def prompts(examples):
    """Tokens and segments, padded on the left: two of (B, P)."""
    tokens = data.pad([e.prompt for e in examples], 7, side="left")
    labels = [e.segments[: len(e.prompt)] for e in examples]
    return tokens, data.pad(labels, PADDING, side="left")


@torch.no_grad()
def slow_answer(network, e, condition, n_new):
    """One example, whole and without padding, a token at a time, by nothing but `forward`."""
    tokens, labels, new = e.prompt + e.input, list(e.segments), []
    for _ in range(n_new):
        masked = slow_masking(network, labels, condition, torch.tensor([[*new, 0]]))
        if isinstance(network, Llama):
            logits = network(torch.tensor([tokens + new]), **masked)
            labels.append(INPUT)
        else:
            logits = network(torch.tensor([tokens]), **masked)
        new.append(logits[0, -1].argmax().item())
    return " ".join(map(str, new))


def same_answers(what, got, network, examples, condition, n_new):
    assert isinstance(got, list) and len(got) == len(examples), f"answer: {len(examples)} texts"
    for e, text in zip(examples, got):
        what_of = (
            f"the answer to input {e.input} of prompt {e.prompt} {what} ({e.arch}, {condition!r})"
        )
        same(what_of, text, slow_answer(network, e, condition, n_new))


@torch.no_grad()
def compressed(network, e, condition):
    """The cache of one example's prompt."""
    segments = torch.tensor([e.segments[: len(e.prompt)]])
    masked = slow_masking(network, segments, condition)
    keep = slow_cross_mask(segments, condition)[0, 0, 0]
    cache = network.compress(torch.tensor([e.prompt]), masked["mask"], masked["positions"], keep)
    cache.segments = segments[:, keep]
    return cache


def check_cache_keeps_the_gist():
    """As many columns as gist tokens; a prompt among others as the prompt alone."""
    with a_new_table([[1, 1, 0], [0, 1, 0], [0, 1, 1]]) as name:  # where the gist does not see it
        for arch, condition in itertools.product(("llama", "t5"), ("gist", name)):
            network, examples = small_model(arch), questions(arch)
            cache = eval.compress_prompts(network, *prompts(examples), condition)
            same(f"the number of columns for two gist tokens ({arch})", cache.length, 2)
            same("the cache's field segments", cache.segments, torch.tensor([[GIST, GIST]] * 3))
            for row, e in enumerate(examples):
                alone = compressed(network, e, condition)
                what = (
                    f"of the gist of prompt {e.prompt}, padded to 5 tokens ({arch}, {condition!r})"
                )
                close(f"the keys {what}", cache.keys[row], alone.keys[0])
                close(f"the values {what}", cache.values[row], alone.values[0])


def check_cache_keeps_what_the_input_sees():
    """Of a prompt of 5 tokens: everything under pos_control, nothing under neg_control, START."""
    network = small_model("llama")
    for condition, start, expected in [
        ("pos_control", PROMPT, [1, 1, 1, 2, 2]),
        ("neg_control", PROMPT, []),
        ("gist", START, [4, 2, 2]),
        ("neg_control", START, [4]),
    ]:
        tokens, segments = prompts(questions("llama", start)[:1])
        cache = eval.compress_prompts(network, tokens, segments, condition)
        what = f"segments in the cache of {segments.tolist()} under {condition!r}"
        same(what, cache.segments, torch.tensor([expected], dtype=torch.int64))
    rows = prompts(questions("llama", START))
    cache = eval.compress_prompts(network, *rows, "gist")
    # Each column is that of <s> in one of the rows, so none can go. It keeps its label.
    same("segments in the cache of rows whose START is ragged", cache.segments, rows[1])


def check_cache_is_refused_where_it_would_be_wrong():
    tokens, segments = prompts(questions("t5"))
    right = (tokens.flip(1), segments.flip(1))
    for what, arch, rows, condition in [
        ("prompts that are padded on the right", "llama", right, "gist"),
        ("an encoder whose prompt sees the input", "t5", (tokens, segments), "pos_control"),
    ]:
        try:
            eval.compress_prompts(small_model(arch), *rows, condition)
        except ValueError:
            continue
        raise AssertionError(f"compress_prompts has to raise ValueError for {what}")


def check_answers_of_whole_rows():
    """Prompts and inputs of different lengths in one batch, as each of them alone."""
    conditions = [
        ("gist", PROMPT),
        ("gist", START),
        ("pos_control", PROMPT),
        ("neg_control", START),
    ]
    for arch, (condition, start) in itertools.product(("llama", "t5"), conditions):
        network, examples = small_model(arch), questions(arch, start)
        got = eval.answer(network, TOKENIZER, examples, condition, 4)
        same_answers("in a batch", got, network, examples, condition, 4)


def check_answers_end():
    """At the tokenizer's eos_id: here, what would be the third token of the first answer."""
    network, examples = small_model("llama"), questions("llama")
    whole = [slow_answer(network, e, "gist", 5).split() for e in examples]
    end = whole[0][2]
    tokenizer = SimpleNamespace(**vars(TOKENIZER) | {"eos_id": int(end)})
    got = eval.answer(network, tokenizer, examples, "gist", 5)
    before = [" ".join(itertools.takewhile(lambda token: token != end, words)) for words in whole]
    same(f"the answers, which end before eos_id {end}", got, before)


def check_answers_from_the_cache():
    """The same tokens as from the whole row; inputs have different lengths."""
    for arch, condition in [("llama", "gist"), ("llama", "neg_control"), ("t5", "gist")]:
        network, examples = small_model(arch), questions(arch)
        cache = model.Cache.cat([compressed(network, e, condition) for e in examples])
        got = eval.answer(network, TOKENIZER, examples, condition, 5, cache)
        same_answers("from a cache", got, network, examples, condition, 5)


def check_three_answers_from_one_gist():
    network, prompt = small_model("llama"), QUESTIONS[0][0]
    examples = [example(prompt, input) for _, input in QUESTIONS]
    gist = compressed(network, examples[0], "gist")
    got = eval.answer(network, TOKENIZER, examples, "gist", 5, gist)
    same_answers("from one gist for all", got, network, examples, "gist", 5)


# ---- 8. The longest common subsequence, and ROUGE ----


def check_lcs_length():
    for a, b, expected in [
        ("abcd", "abcd", 4),
        ("abcd", "xaxbxcxd", 4),  # not side by side
        ("abcd", "dcba", 1),
        ("aab", "ab", 2),  # a word counts as often as it is there
        ("abcb", "bcab", 3),
        ("abc", "", 0),
        ("", "", 0),
        ("xyz", "abc", 0),
    ]:
        same(f"lcs_length of {[*a]} and {[*b]}", eval.lcs_length([*a], [*b]), expected)


def check_lcs_length_of_random_lists():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        n, m = torch.randint(1, 8, (2,), generator=generator).tolist()
        a = torch.randint(3, (n,), generator=generator).tolist()
        b = torch.randint(3, (m,), generator=generator).tolist()
        same(f"lcs_length of {a} and {b}", eval.lcs_length(a, b), slow_lcs_length(a, b))


# Prediction, reference, ROUGE-1, ROUGE-2, ROUGE-L: counted by hand.
BY_HAND = [
    ("the cat sat", "the cat sat", 1, 1, 1),
    ("cat the sat", "the cat sat", 1, 0, 2 / 3),
    ("the the the", "the cat", 2 / 5, 0, 2 / 5),  # "the" is matched once
    ("a dog ran far away", "a dog ran", 6 / 8, 4 / 6, 6 / 8),
    ("one two three four", "two one four three", 1, 0, 1 / 2),
    ("the cat saw the dog", "the dog saw the bird", 8 / 10, 4 / 8, 6 / 10),
    ("Relational models!", "related model", 1, 1, 1),  # stems are compared
    ("", "a word", 0, 0, 0),
    ("word", "word", 1, 0, 1),
]


def check_rouge():
    for prediction, reference, *expected in BY_HAND:
        got = eval.rouge(prediction, reference)
        names = ["rouge1", "rouge2", "rougeL"]
        same("the keys of rouge", list(got), names)
        for name, value in zip(names, expected):
            close(f"{name} of {prediction!r} for {reference!r}", got[name], value, 1e-6)


def check_rouge_is_symmetric():
    for prediction, reference, *_ in BY_HAND:
        there, back = eval.rouge(prediction, reference), eval.rouge(reference, prediction)
        what = f"F of {prediction!r} and {reference!r} has to be the same both ways"
        assert there == back, f"{what}: got {there} and {back}"


# ---- 9. FLOPs ----


SHAPE = dict(vocab_size=50, d_model=12, n_layers=3, n_heads=4, head_dim=8, d_ff=20)


def same_flops(kind, shape, new, keys, **n_logits):
    """Against the matrices that the model has; `new` tokens that see `keys` in all."""
    config = kind(**shape)
    got = profile.flops(config, new, keys, **n_logits)
    parts = slow_flops(config, new, keys, **n_logits)
    expected = sum(parts.values())
    what = f"flops({kind.__name__}, new={new}, keys={keys}, {n_logits}) of\n{shape}\n"
    assert got == expected, f"{what}expected {expected}, the sum of\n{parts}, got\n{got}"


def check_flops_of_a_decoder():
    for n_kv_heads in (4, 2):
        shape = SHAPE | {"n_kv_heads": n_kv_heads}
        for new, keys, n in [(7, 7, 7), (7, 7, 1), (3, 10, 1), (1, 5, 1)]:
            same_flops(LlamaConfig, shape, new, keys, n_logits=n)


def check_flops_of_one_logit():
    """If it is not said how many."""
    same_flops(LlamaConfig, SHAPE | {"n_kv_heads": 4}, 5, 5)


def check_flops_of_an_encoder_decoder():
    for gated in (True, False):
        shape = SHAPE | {"n_decoder_layers": 2, "gated": gated}
        for new, keys, n in [(7, 7, 1), (3, 10, 1), (6, 6, 4)]:
            same_flops(T5Config, shape, new, keys, n_logits=n)


def check_flops_are_the_papers():
    """The means over the 252 prompts that the paper measured, in GFLOPs (its section 5)."""
    for name, config, nothing, gist in [
        ("llama-7b", LlamaConfig.from_name("llama-7b"), 915, 552),
        ("flan-t5-xxl", T5Config.from_name("flan-t5-xxl"), 716, 427),
    ]:
        counts = {"nothing": [], "the gist": []}
        for p, n, q in profile.human_lengths(name):
            for kept, new, keys in [("nothing", p + n + q, p + n + q), ("the gist", q, n + q)]:
                n_logits = new if name == "llama-7b" else 1
                counts[kept].append(profile.flops(config, new, keys, n_logits))
        for kept, expected in (("nothing", nothing), ("the gist", gist)):
            gflops = round(sum(counts[kept]) / len(counts[kept]) / 1e9)
            same(f"GFLOPs of {name} when {kept} is cached", gflops, expected)


# ---- 10. T5's buckets of distances ----

# Where each bucket begins: (bidirectional, n_buckets, max_distance) -> distances. The first two are
# T5's own, of its encoder and its decoder.
STARTS = {
    (True, 32, 128): [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91],
    (False, 32, 128): [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
    (True, 8, 18): [0, 1, 2, 6],
    (False, 6, 24): [0, 1, 2, 3, 6, 12],
}


def same_buckets(distances):
    for setting in STARTS:
        got = t5.relative_buckets(distances, *setting)
        expected = slow_relative_buckets(distances, *setting)
        same_kind("buckets", got, expected)
        what = "with bidirectional {}, n_buckets {}, max_distance {}".format(*setting)
        for distance, *buckets in zip(distances.tolist(), got.tolist(), expected.tolist()):
            same(f"the bucket of {distance:+}, {what}", *buckets)


def check_buckets_of_keys_before_the_query():
    same_buckets(torch.arange(-200, 1))


def check_buckets_of_keys_after_the_query():
    """An encoder has as many for these; to a decoder they are as near as the query itself."""
    same_buckets(torch.arange(1, 200))


def check_buckets_of_any_shape():
    distances = torch.tensor([[[3, -3, 0]], [[-200, 200, 8]]])
    got = t5.relative_buckets(distances, True, 32, 128)
    same("buckets of (2, 1, 3) distances", got, torch.tensor([[[19, 3, 0]], [[15, 31, 24]]]))


# ---- 11. A condition of one's own ----


def check_own_table():
    """3 by 3, of 0 and 1, and in a decoder unlike the three that there are."""
    entries = own_condition.own_table()
    assert isinstance(entries, list) and len(entries) == 3, "own_table is to give three rows"
    assert all(len(row) == 3 for row in entries), "a row of the table has three entries"
    assert all(entry in (0, 1) for row in entries for entry in row), "an entry is 0 or 1"
    row = torch.tensor([[P, P, G, G, In, In]])
    with a_new_table(entries) as name:
        for condition in TABLE:
            if condition != name:
                masks = slow_decoder_mask(row, name), slow_decoder_mask(row, condition)
                assert not torch.equal(*masks), (
                    f"in a decoder, your table is the same as that of {condition!r}"
                )


def check_own_prediction():
    """One sentence that can turn out wrong: it names a number, or a condition to compare."""
    text = own_condition.own_prediction()
    assert isinstance(text, str) and text.strip().endswith("."), "own_prediction is a sentence."
    assert len(text.split()) >= 8, "say in your sentence why, too: 8 words at least"
    compared = re.search(r"\d|" + "|".join(TABLE), text)
    assert compared, f"a prediction names a number, or one of {', '.join(TABLE)}"


def check_own_condition_trains():
    """Two steps of a tiny model, with nothing but your own functions: the loss is a number."""
    with a_new_table(own_condition.own_table()) as name:
        network = small_model("llama")
        examples = [example([11, 12, 9], [21, 22], [23, 24], start=START)] * 4
        config = train.Config(condition=name, max_steps=2, batch_size=2, device="cpu")
        before = network.embedding.weight.clone()
        with redirect_stderr(io.StringIO()):  # no progress bar
            train.fit(network, TOKENIZER, examples, train.fill_in(config))
        weight = network.embedding.weight
        assert weight.isfinite().all(), "the weights are no longer finite"
        assert not torch.equal(weight, before), "the weights have not changed"


# ---- Oracles: the same functions, slow and plain ----


def sees(query: int, key: int, condition: str) -> bool:
    """May a token of the one label see a token of the other?"""
    if key == START:
        return True
    if PADDING in (query, key) or query == START:
        return False
    of = (PROMPT, GIST, INPUT).index
    return TABLE[condition][of(query)][of(key)] == 1


def slow_encoder_mask(segments, condition="gist"):
    B, T = segments.shape
    mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for q, k in itertools.product(range(T), range(T)):
            mask[b, 0, q, k] = q == k or sees(row[q], row[k], condition)
    return mask


def slow_decoder_mask(segments, condition="gist"):
    mask = slow_encoder_mask(segments, condition)
    for q, k in itertools.product(range(mask.shape[2]), range(mask.shape[3])):
        if k > q:
            mask[:, :, q, k] = False
    return mask


def slow_cross_mask(segments, condition="gist"):
    rows = [[[[sees(INPUT, key, condition) for key in row]]] for row in segments.tolist()]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), 1, 1, -1)


def slow_positions(segments):
    rows = []
    for row in segments.tolist():
        begin = row.index(INPUT) if INPUT in row else len(row)
        rows.append([column - begin for column in range(len(row))])
    return torch.tensor(rows)


def slow_masking(network, segments, condition, target=None):
    """A model's arguments. segments: a list, of one row, or (B, T). target: T5's, if any."""
    segments = torch.tensor([segments]) if isinstance(segments, list) else segments
    if isinstance(network, Llama):
        mask = slow_decoder_mask(segments, condition)
        return {"mask": mask, "positions": slow_positions(segments)}
    masked = {
        "mask": slow_encoder_mask(segments, condition),
        "positions": slow_positions(segments),
        "cross_mask": slow_cross_mask(segments, condition),
    }
    return masked if target is None else masked | {"target": target}


def slow_rotate(x, angles):
    """Every pair is a complex number, which e^(i angle) turns. x: (..., K), angles: (..., K/2)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].float(), x[..., half:].float())
    turned = pairs * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def slow_queries_keys_values(self, x, cos, sin):
    angles = torch.atan2(sin, cos)
    heads = lambda weights: weights(x).reshape(*x.shape[:2], -1, self.head_dim)
    q, k, v = heads(self.wq), heads(self.wk), heads(self.wv)
    return slow_rotate(q, angles), slow_rotate(k, angles), v


def slow_attention(self, x, mask, cos, sin, past):
    """A query of a head at a time, by nothing but sums."""
    q, k, v = slow_queries_keys_values(self, x, cos, sin)
    S = mask.shape[-1]
    if past is not None:
        for whole, new in zip(past, (k, v)):
            whole[:, S - x.shape[1] : S] = new
        k, v = past[0][:, :S], past[1][:, :S]
    B, T, H, K = q.shape
    out = torch.zeros(B, T, H, K)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        shared = h * k.shape[2] // H  # the first heads share the first, and so on
        row = mask[min(b, len(mask) - 1), 0, t]
        scores = (k[b, :, shared] * q[b, t, h]).sum(dim=-1) / K**0.5
        weights = torch.where(row, scores.exp(), 0.0)
        out[b, t, h] = (weights[:, None] * v[b, :, shared]).sum(dim=0) / weights.sum()
    return self.wo(out.reshape(B, T, H * K))


def slow_lcs_length(a, b):
    """The longest of all subsequences of a that b has, too."""
    for n in range(len(a), -1, -1):
        of_b = {*itertools.combinations(b, n)}
        if any(words in of_b for words in itertools.combinations(a, n)):
            return n


def slow_flops(config, new, keys, n_logits=1):
    """2 for every entry of every matrix that a token passes, and for attention's two products."""
    with torch.device("meta"):
        network = (T5 if isinstance(config, T5Config) else Llama)(config)
    parts = Counter()
    for name, weight in network.named_parameters():
        if "layers." not in name or weight.ndim < 2:
            continue
        part, tokens = "weights of the layers", new
        if name.startswith("decoder"):
            is_of_source = re.search("cross_attention.w[kv]", name)
            part, tokens = "weights of the decoder", keys if is_of_source else n_logits
        parts[part] += 2 * tokens * weight.numel()
    width = config.n_heads * config.head_dim
    parts["attention"] = config.n_layers * 2 * 2 * new * keys * width
    if isinstance(config, T5Config):
        pairs = n_logits * (n_logits + keys)
        parts["attention of the decoder"] = config.n_decoder_layers * 2 * 2 * pairs * width
    parts["logits"] = 2 * n_logits * config.vocab_size * config.d_model
    return dict(parts)


def slow_relative_buckets(relative_position, bidirectional, n_buckets, max_distance):
    starts = STARTS[bidirectional, n_buckets, max_distance]
    buckets = []
    for distance in relative_position.flatten().tolist():
        is_after = distance > 0
        if is_after and not bidirectional:
            distance = 0
        bucket = max(i for i, start in enumerate(starts) if start <= abs(distance))
        buckets.append(bucket + is_after * bidirectional * n_buckets // 2)
    return torch.tensor(buckets).view(relative_position.shape)


# What stands in for another task's function while a task is checked. A function that no other
# task's checks use needs no oracle.
ORACLES = {
    "gist_mask.decoder_mask": slow_decoder_mask,
    "gist_mask.encoder_mask": slow_encoder_mask,
    "gist_mask.cross_mask": slow_cross_mask,
    "gist_mask.positions": slow_positions,
    "model.Attention.forward": slow_attention,
    "t5.relative_buckets": slow_relative_buckets,
}
