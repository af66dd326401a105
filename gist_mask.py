"""Who may attend to whom: the gist masks, which are all that gisting changes in instruction tuning.

A row of tokens is cut into three segments by its gist tokens G: the prompt before them, the gist
tokens, and the input after them (in a decoder, the output belongs to the input). The input may not
look at the prompt, so whatever it needs from the prompt has to pass through the gist tokens. The
paper's Figure 2, for "prompt prompt G input input" and a decoder:

         gist               pos_control          neg_control
      p p G i i             p p G i i            p p G i i
    p 1 . . . .           p 1 . . . .          p 1 . . . .
    p 1 1 . . .           p 1 1 . . .          p 1 1 . . .
    G 1 1 1 . .           G 1 1 1 . .          G 1 1 1 . .
    i . . 1 1 .           i 1 1 1 1 .          i . . . 1 .
    i . . 1 1 1           i 1 1 1 1 1          i . . . 1 1

`gist` is the method. `pos_control` is ordinary instruction tuning, the quality to reach.
`neg_control` hides the prompt altogether: what a model gets right there, it gets right without the
instruction.

    mask[q, k] = TABLE[condition][segment(q)][segment(k)]  and, in a decoder,  k <= q
    mask[q, q] = 1: every token sees itself

Which segment a token belongs to is decided once, when a text is laid out (`data.layout`). Masks,
positions, and what a cache keeps of a prompt follow from the segments and the condition, and from
nothing else. TABLE is the only place that knows a condition: a new entry there is a new condition
in training, answering and measuring.

Mu, Li & Goodman, "Learning to Compress Prompts with Gist Tokens", NeurIPS 2023, section 3. Run this
file to see the masks.

Letters of the shapes: B batch, T tokens of a row, C columns of a cache, which come before the T.
"""

import argparse
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# The segments of tokens. TABLE covers the middle three. Nobody sees PADDING, which is 0, so
# filling with zeros is right everywhere. Everybody sees START, which is for the first token of a
# pretrained decoder (--see_start); in the paper, that token belongs to the prompt.
PADDING, PROMPT, GIST, INPUT, START = range(5)
NAMES = ("padding", "prompt", "gist", "input", "start")

# A row for the segment of the query, a column for the segment of the key; 1 = may attend.
# fmt: off
TABLE = {
    #                    key: prompt  gist  input
    "gist":        [[1, 1, 0],    # query: prompt
                    [1, 1, 0],    #        gist
                    [0, 1, 1]],   #        input
    "pos_control": [[1, 1, 1],
                    [1, 1, 1],
                    [1, 1, 1]],
    "neg_control": [[1, 1, 0],
                    [1, 1, 0],
                    [0, 0, 1]],
}
# fmt: on


def table(condition: str, device: torch.device | None = None) -> Tensor:
    """A condition's table for all five segments: may a query of segment q see a key of segment k?

    Returns (5, 5) bool. Raises ValueError for a condition that TABLE lacks.
    """
    if condition not in TABLE:
        raise ValueError(f"no condition {condition!r} in TABLE, which has {', '.join(TABLE)}")
    sees = torch.zeros(len(NAMES), len(NAMES), dtype=torch.bool)  # so far, nobody sees anything
    sees[PROMPT:START, PROMPT:START] = torch.tensor(TABLE[condition]).bool()
    sees[:, START] = True
    return sees.to(device)


# ---- Masks and positions, from the segments ----


def encoder_mask(segments: Tensor, condition: str = "gist") -> Tensor:
    """The mask of an encoder: the table, looked up for every pair of query and key.

    segments: (B, T) int64, that of every token. Returns (B, 1, T, T) bool, True = may attend.
    Every token sees itself, padding too, so that no softmax is over nothing.
    """
    sees = table(condition, segments.device)  # (5, 5)
    query, key = segments[:, :, None], segments[:, None, :]  # (B, T, 1) and (B, 1, T)
    mask = sees[query, key]  # (B, T, T)
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return (mask | itself)[:, None]


def decoder_mask(segments: Tensor, condition: str = "gist") -> Tensor:
    """The mask of a decoder: the encoder's, and no token sees a later one. Shapes as there."""
    return encoder_mask(segments, condition).tril()


def cross_mask(segments: Tensor, condition: str = "gist") -> Tensor:
    """What the input sees of these tokens: the table's input row.

    This is the mask of T5's cross-attention, and it says which columns a cache keeps of a prompt.
    segments: (B, T) int64. Returns (B, 1, 1, T) bool.
    """
    sees = table(condition, segments.device)[INPUT]  # (5,)
    return sees[segments][:, None, None]


def positions(segments: Tensor) -> Tensor:
    """Count positions from the input: 0 at its first token, negative before it.

    segments: (B, T) int64. Returns (B, T) int64. Only differences of positions enter the models, so
    where the count starts changes no output. But a prompt's positions then do not depend on the
    input, and a gist that was computed once fits any. A row without an input (a prompt to be
    cached) ends at -1, so prompts are padded on the left.
    """
    before_input = (segments == INPUT).cumsum(dim=1) == 0  # (B, T) no input token so far
    n_before = before_input.sum(dim=1, keepdim=True)  # (B, 1) where the input begins
    columns = torch.arange(segments.shape[1], device=segments.device)  # (T,)
    return columns - n_before


def segments(tokens: Tensor, gist_id: int) -> Tensor:
    """The segments of rows made by hand, without padding; `data.layout` decides a record's.

    tokens: (B, T) int64. Returns (B, T) int64: GIST is every gist token, INPUT what follows the
    last of them, PROMPT all others. A row without gist tokens is all INPUT: nothing is masked.
    """
    is_gist = tokens == gist_id  # (B, T)
    gists_so_far = is_gist.cumsum(dim=1)  # (B, T) this token included
    gists_in_row = is_gist.sum(dim=1, keepdim=True)  # (B, 1)
    is_after = gists_so_far == gists_in_row  # the last gist token itself, too
    prompt_or_input = torch.where(is_after, INPUT, PROMPT)
    return torch.where(is_gist, GIST, prompt_or_input)


# ---- What a model is handed ----


def masking(
    model,
    segments: Tensor,
    condition: str = "gist",
    cache=None,
    *,
    target: Tensor | None = None,
    n_new: int = 0,
) -> dict[str, Tensor]:
    """A model's arguments for rows with these segments: `mask` and `positions`; for an
    encoder-decoder, `cross_mask` and `target`, too.

    Training, answering and compressing all call this; only here do masks depend on whether a model
    is an encoder-decoder. segments: (B, T) int64, of the tokens that it is to read. cache: what it
    has read before, B rows or one (`eval.compress_prompts`); then the mask is the whole row's, cut
    to the T new queries. n_new: how many tokens a decoder is going to write. target: (B, T_out)
    int64, what an encoder-decoder learns to write; a decoder's is in its row.

    Raises ValueError if these rows cannot be answered from a cache (`check_cache`).
    """
    C, rows = 0, segments
    if cache is not None:
        if cache.segments is None:
            raise ValueError("a cache needs segments: make it with compress_prompts")
        cached = cache.expand(len(segments)).segments  # (B, C)
        check_cache(model, cached, segments, condition)
        C, rows = cache.length, torch.cat([cached, segments], dim=1)  # (B, C + T)
    if not hasattr(model, "encoder"):
        rows = F.pad(rows, (0, n_new), value=INPUT)  # what it writes belongs to the input
        return {
            "mask": decoder_mask(rows, condition)[:, :, C:],  # (B, 1, T + n_new, C + T + n_new)
            "positions": positions(rows)[:, C:],  # (B, T + n_new)
        }
    arguments = {
        "mask": encoder_mask(rows, condition)[:, :, C:],  # (B, 1, T, C + T)
        "positions": positions(rows)[:, C:],  # (B, T)
        "cross_mask": cross_mask(rows, condition),  # (B, 1, 1, C + T)
    }
    return arguments if target is None else arguments | {"target": target}


def check_cache(model, before: Tensor, after: Tensor, condition: str) -> None:
    """Raise ValueError if a cache cannot stand for a prompt: it would give other answers.

    before, after: segments, (B, T) int64, the prompt's and those of what follows. A cache has been
    computed before anything followed, it keeps only what the input sees, and it ends where the
    input begins. So
    - nothing else may follow before the input;
    - no token of the prompt may be part of the input;
    - in an encoder, no token of the prompt or the gist may see what follows (a decoder's tokens see
      no later ones anyway);
    - what follows may see nothing of the prompt that the input does not see.
    """
    if ((positions(after) < 0) & (after != PADDING)).any():
        raise ValueError("a cache ends where the input begins, but other tokens follow it")
    sees = table(condition)
    # The columns of prompt and gist may be gone from the cache, but it was computed with them.
    segments_before = {PROMPT, GIST, *before.unique().tolist()} - {PADDING}
    segments_after = set(after.unique().tolist()) - {PADDING}
    if INPUT in segments_before:
        raise ValueError(
            "part of the prompt is labeled INPUT, so it is not compressed; label a token that all "
            "are to see START"
        )
    for earlier, later in product(segments_before, segments_after):
        if hasattr(model, "encoder") and sees[earlier, later]:
            raise ValueError(
                f"an encoder cannot read a prompt before its input under {condition!r}: "
                f"{NAMES[earlier]} tokens see {NAMES[later]} tokens, which follow"
            )
        if sees[later, earlier] and not sees[INPUT, earlier]:
            raise ValueError(
                f"a cache cannot stand for this prompt under {condition!r}: {NAMES[later]} tokens, "
                f"which follow, see {NAMES[earlier]} tokens, which it does not keep"
            )


# ---- An example to look at ----

EXAMPLE = "Translate to French <G> The cheese Output: Le fromage"


def example(n_gist=1):
    """The words of the example, and their segments, (1, T) int64."""
    words = EXAMPLE.replace("<G>", "<G> " * n_gist).split()
    tokens = torch.tensor([[int(word == "<G>") for word in words]])
    return words, segments(tokens, gist_id=1)


def as_text(words, mask):
    """A line for every query, a column for every key. mask: (T, T) bool."""
    width = max(len(word) for word in words)
    lines = [" " * width + " " + " ".join(words)]
    for word, row in zip(words, mask.tolist()):
        columns = [("x" if seen else ".").center(len(key)) for seen, key in zip(row, words)]
        lines.append(f"{word:>{width}} {' '.join(columns)}".rstrip())
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Print the masks of a small example.")
    about = "number of gist tokens (%(default)s)"
    parser.add_argument(
        "--n_gist", type=int, default=1, choices=range(1, 21), metavar="N", help=about
    )
    words, row = example(parser.parse_args().n_gist)
    for condition in TABLE:
        mask = decoder_mask(row, condition)[0, 0]
        print(f"{condition}\n{as_text(words, mask)}\n")


if __name__ == "__main__":
    main()
