"""Who may attend to whom: the gist masks, which are all that gisting changes in instruction tuning.

A sequence is cut into three segments by its gist tokens G: the prompt before them, the gist tokens,
and the input after them (in a decoder, the output belongs to the input). The input may not look at
the prompt, so whatever it needs from the prompt has to pass through the gist tokens. The paper's
Figure 2, for "prompt prompt G input input" and a decoder:

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

    mask[q, k] = TABLE[condition][segment(q)][segment(k)]  and  k is not padding
                 and, in a decoder, k <= q;      or  k = q: every token sees itself

A sequence without gist tokens is not masked, except for padding and, in a decoder, later tokens.

TABLE is the only place that knows a condition. Training, answering and measuring all ask this file,
so a new entry there is a new condition everywhere.

Mu, Li & Goodman, "Learning to Compress Prompts with Gist Tokens", NeurIPS 2023, section 3. Run this
file to see the masks.
"""

import argparse

import torch
from torch import Tensor

PROMPT, GIST, INPUT = 0, 1, 2

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


def segments(tokens: Tensor, gist_id: int) -> Tensor:
    """Label every token: 1 gist, 2 input (after the last gist token), 0 prompt (all others).

    tokens: (B, T) int64. Returns (B, T) int64. A sequence without gist tokens is all input.
    """
    is_gist = tokens == gist_id  # (B, T)
    gists_so_far = is_gist.cumsum(dim=1)  # (B, T) this token included
    gists_in_row = is_gist.sum(dim=1, keepdim=True)  # (B, 1)
    is_after = (gists_so_far == gists_in_row) & ~is_gist
    return torch.where(is_gist, GIST, torch.where(is_after, INPUT, PROMPT))


def positions(tokens: Tensor, gist_id: int) -> Tensor:
    """Count positions from the gist: 0 at the first gist token, negative in the prompt.

    tokens: (B, T) int64. Returns (B, T) int64. A sequence without gist tokens counts from its
    first column. Only differences of positions enter the models, so where the count starts changes
    no output. But a gist that was computed once then fits any input.
    """
    first_gist = (tokens == gist_id).int().argmax(dim=1, keepdim=True)  # (B, 1)
    return torch.arange(tokens.shape[1], device=tokens.device) - first_gist


def table(condition: str, device: torch.device | None = None) -> Tensor:
    """A condition's table, (3, 3) bool. Raises ValueError for a condition that TABLE lacks."""
    if condition not in TABLE:
        raise ValueError(f"no condition {condition!r} in TABLE, which has {', '.join(TABLE)}")
    return torch.tensor(TABLE[condition], dtype=torch.bool, device=device)


def encoder_mask(
    tokens: Tensor,
    gist_id: int,
    condition: str = "gist",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The mask of an encoder: the table, looked up for every pair of query and key.

    tokens: (B, T) int64; attention_mask: (B, T) bool, False on padding. Returns (B, 1, T, T) bool,
    True = may attend. A sequence without gist tokens is not masked, whatever the table says. Every
    token sees itself, padding too, so that no softmax is over nothing.
    """
    segment = segments(tokens, gist_id)  # (B, T)
    mask = table(condition, tokens.device)[segment[:, :, None], segment[:, None, :]]  # (B, T, T)
    has_gist = (tokens == gist_id).any(dim=1)  # (B,)
    mask = mask | ~has_gist[:, None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, :]
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return (mask | itself)[:, None]


def decoder_mask(
    tokens: Tensor,
    gist_id: int,
    condition: str = "gist",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The mask of a decoder: the encoder's, and no token sees a later one. Shapes as there."""
    return encoder_mask(tokens, gist_id, condition, attention_mask).tril()


def cross_mask(
    tokens: Tensor,
    gist_id: int,
    condition: str = "gist",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """What the input sees of these tokens: the table's input row.

    This is the mask of T5's cross-attention, and it says what a cache has to keep of a prompt.
    tokens: (B, T) int64; attention_mask: (B, T) bool. Returns (B, 1, 1, T) bool.
    """
    mask = table(condition, tokens.device)[INPUT][segments(tokens, gist_id)]  # (B, T)
    has_gist = (tokens == gist_id).any(dim=1, keepdim=True)  # (B, 1)
    mask = mask | ~has_gist
    if attention_mask is not None:
        mask = mask & attention_mask
    return mask[:, None, None]


def prompt_sees_input(condition: str) -> bool:
    """Does the table let prompt or gist look at the input?

    Then an encoder cannot encode the prompt until the input is known. (A decoder always
    can: its tokens see no later ones.)
    """
    return bool(table(condition)[:INPUT, INPUT].any())


# ---- An example to look at ----

EXAMPLE = "Translate to French <G> The cheese Output: Le fromage"


def example(n_gist=1):
    """The words of the example, and their tokens (1, T) int64: 1 for a gist token, 0 for others."""
    words = EXAMPLE.replace("<G>", "<G> " * n_gist).split()
    return words, torch.tensor([[int(word == "<G>") for word in words]])


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
    parser.add_argument("--n_gist", type=int, default=1, help="number of gist tokens (%(default)s)")
    words, tokens = example(parser.parse_args().n_gist)
    for condition in TABLE:
        mask = decoder_mask(tokens, gist_id=1, condition=condition)[0, 0]
        print(f"{condition}\n{as_text(words, mask)}\n")


if __name__ == "__main__":
    import data

    data.run(main)
