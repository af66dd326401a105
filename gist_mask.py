"""Who may attend to whom: the gist masks, which are the whole of gisting's change to instruction tuning.

A sequence is cut into three segments by its gist tokens G: the prompt before them, the gist tokens, and the input
after them (in a decoder, the output belongs to the input). The input may not look at the prompt, so whatever it needs
of the prompt has to pass through the gist tokens. The paper's Figure 2, for "prompt prompt G input input" and a decoder:

         gist               pos_control          neg_control
      p p G i i             p p G i i            p p G i i
    p 1 . . . .           p 1 . . . .          p 1 . . . .
    p 1 1 . . .           p 1 1 . . .          p 1 1 . . .
    G 1 1 1 . .           G 1 1 1 . .          G 1 1 1 . .
    i . . 1 1 .           i 1 1 1 1 .          i . . . 1 .
    i . . 1 1 1           i 1 1 1 1 1          i . . . 1 1

`gist` is the method. `pos_control` is ordinary instruction tuning, the quality to reach. `neg_control` hides the
prompt altogether: what a model gets right there, it gets right without the instruction.

    mask[q, k] = TABLE[condition][segment(q), segment(k)]  and  (k <= q, in a decoder)  and  k is not padding

A row may hold several prompts, each with gist tokens behind it. Prompts and gist tokens then see their own pair only, and the
input sees all the gists: each prompt can be compressed alone, and the caches joined.

Mu, Li & Goodman, "Learning to Compress Prompts with Gist Tokens", NeurIPS 2023, section 3. Run this file to see the masks.
"""
import argparse
import os

import torch
import torch.nn.functional as F
from torch import Tensor

CONDITIONS = ("gist", "pos_control", "neg_control")
PROMPT, GIST, INPUT = 0, 1, 2

# Rows: the segment of the query; columns: the segment of the key; 1 = may attend.
TABLE = {
    #              key: prompt  gist  input
    "gist": torch.tensor([[1, 1, 0],         # prompt
                          [1, 1, 0],         # gist
                          [0, 1, 1]]).bool(),  # input
    "pos_control": torch.tensor([[1, 1, 1],
                                 [1, 1, 1],
                                 [1, 1, 1]]).bool(),
    "neg_control": torch.tensor([[1, 1, 0],
                                 [1, 1, 0],
                                 [0, 0, 1]]).bool(),
}


def segments(tokens: Tensor, gist_id: int) -> Tensor:
    """Label every token: 0 prompt (before a gist token), 1 gist, 2 input (after the last).

    tokens: (B, T) int64. Returns (B, T) int64. A row without gist tokens is all input, so that nothing of it is masked.
    """
    is_gist = tokens == gist_id                                     # (B, T)
    after = is_gist.flip(1).cumsum(dim=1).flip(1) == 0              # (B, T) no gist token from here on
    return torch.where(after, INPUT, torch.where(is_gist, GIST, PROMPT))


def pairs(tokens: Tensor, gist_id: int) -> Tensor:
    """Number the pairs of a prompt and its gist tokens: how many ended before every token. tokens: (B, T) int64. Returns (B, T) int64."""
    is_gist = (tokens == gist_id).int()
    return (F.pad(is_gist, (1, 0)).diff(dim=1) < 0).cumsum(dim=1)   # (B, T)


def positions(tokens: Tensor, gist_id: int) -> Tensor:
    """Positions counted from the gist: 0 at the first gist token, negative in the prompt, n_gist at the first input token.

    tokens: (B, T) int64. Returns (B, T) int64. A row without gist tokens counts from its first column. Only differences
    of positions enter the models, so this changes no output; but a gist computed once then fits any input. With several
    pairs, a gist follows the one before, as if there were no prompts, and every prompt ends right before its own gist.
    """
    prompt, pair = segments(tokens, gist_id) == PROMPT, pairs(tokens, gist_id)                       # (B, T)
    not_counted = prompt[:, None, :] & (pair[:, None, :] <= pair[:, :, None])                       # (B, T, T)
    return torch.arange(tokens.shape[1], device=tokens.device) - not_counted.sum(dim=2)


def encoder_mask(tokens: Tensor, gist_id: int, condition: str = "gist", valid: Tensor | None = None) -> Tensor:
    """The mask of an encoder: the table, looked up for every pair of query and key.

    tokens: (B, T) int64; valid: (B, T) bool, False on padding. Returns (B, 1, T, T) bool, True = may attend.
    A padded query sees itself, so that no softmax row is empty.
    """
    s = segments(tokens, gist_id)                                         # (B, T)
    mask = TABLE[condition].to(tokens.device)[s[:, :, None], s[:, None, :]]    # (B, T, T)
    if condition != "pos_control":                                        # of several prompts, each is seen by its own gist only
        pair = pairs(tokens, gist_id)                                     # (B, T)
        mask = mask & ((pair[:, :, None] == pair[:, None, :]) | (s == INPUT)[:, :, None])
    if valid is not None:
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        mask = mask & valid[:, None, :] | itself
    return mask[:, None]


def decoder_mask(tokens: Tensor, gist_id: int, condition: str = "gist", valid: Tensor | None = None) -> Tensor:
    """The mask of a decoder: the encoder's, and no token sees a later one.

    tokens: (B, T) int64; valid: (B, T) bool, False on padding. Returns (B, 1, T, T) bool, True = may attend.
    """
    return encoder_mask(tokens, gist_id, condition, valid).tril()


def cross_mask(tokens: Tensor, gist_id: int, condition: str = "gist", valid: Tensor | None = None) -> Tensor:
    """What an encoder-decoder's decoder sees of the encoder: the table's input row.

    tokens: (B, T) int64, the encoder's; valid: (B, T) bool, False on padding. Returns (B, 1, 1, T) bool.
    """
    mask = TABLE[condition].to(tokens.device)[INPUT, segments(tokens, gist_id)]    # (B, T)
    if valid is not None:
        mask = mask & valid
    return mask[:, None, None]


# ---- An example to look at ----

EXAMPLE = "Translate to French <G> The cheese Output: Le fromage"
SHADE = {PROMPT: "tab:blue", GIST: "tab:red", INPUT: "tab:green"}


def example_masks(n_gist: int) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    """The example's words, their segments (T,), and its (T, T) decoder mask for every condition."""
    words = [w for word in EXAMPLE.split() for w in ([word] * n_gist if word == "<G>" else [word])]
    tokens = torch.tensor([[1 if word == "<G>" else 0 for word in words]])
    return words, segments(tokens, gist_id=1)[0], {c: decoder_mask(tokens, 1, c)[0, 0] for c in CONDITIONS}


def as_text(words: list[str], mask: Tensor) -> str:
    """One line a query; a column a key, headed by the first letter of its word."""
    lines = [" " * 12 + " ".join(word.strip("<")[0] for word in words)]
    lines += [f"{word:>11} " + " ".join("x" if seen else "." for seen in row) for word, row in zip(words, mask.tolist())]
    return "\n".join(lines)


def draw(words: list[str], segment: Tensor, masks: dict[str, Tensor], path: str) -> None:
    """Draw the masks side by side into the image file `path`: a coloured square where the query (row) sees the key (column)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    shade = torch.tensor([to_rgb(SHADE[s]) for s in segment.tolist()])    # (T, 3) a colour for every key
    figure, axes = plt.subplots(1, len(masks), figsize=(4.2 * len(masks), 5.4), constrained_layout=True)
    for ax, (condition, mask) in zip(axes, masks.items()):
        ax.imshow(torch.where(mask[:, :, None], shade, torch.tensor(0.94)).numpy())
        ax.set_title(condition)
        ax.set_xticks(range(len(words)), words, rotation=90)
        ax.set_yticks(range(len(words)), words)
        ax.set_xticks([i - 0.5 for i in range(len(words))], minor=True)
        ax.set_yticks([i - 0.5 for i in range(len(words))], minor=True)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="both", length=0)
        for label, s in list(zip(ax.get_xticklabels(), segment.tolist())) + list(zip(ax.get_yticklabels(), segment.tolist())):
            label.set_color(SHADE[s])
    axes[0].set_ylabel("query: this token ...")
    axes[0].set_xlabel("... sees these keys")
    names = {PROMPT: "prompt", GIST: "gist", INPUT: "input and output"}
    figure.legend(handles=[Patch(color=SHADE[s], label=names[s]) for s in names], loc="outside lower center", ncols=3, frameon=False)
    root, ext = os.path.splitext(path)
    figure.savefig(f"{root}.tmp{ext}", dpi=120)
    os.replace(f"{root}.tmp{ext}", path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print (and draw) the attention masks of the three conditions for a small example.")
    parser.add_argument("--n_gist", type=int, default=1, help="number of gist tokens in the example (default 1)")
    parser.add_argument("--out", metavar="FILE.png", help="also draw the masks, side by side, into this file")
    args = parser.parse_args()
    if args.n_gist < 0:
        parser.error("--n_gist must be 0 or more")
    words, segment, masks = example_masks(args.n_gist)
    for condition, mask in masks.items():
        print(f"{condition}\n{as_text(words, mask)}\n")
    if args.out:
        try:
            draw(words, segment, masks, args.out)
        except (OSError, ValueError) as error:
            parser.error(f"--out {args.out}: cannot write the picture: {error}")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
