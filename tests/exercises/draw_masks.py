"""Draw the masks of all conditions side by side, as at the top of the README.

    python -m tests.exercises.draw_masks --n_gist 1 --out masks.png        # seconds

Draw the mask for two gist tokens by hand first, and compare. A row is a query, a column a key; a
square is colored where the query sees the key, in the color of the key's segment. A condition that
you add to gist_mask.TABLE is drawn, too.
"""

import argparse

import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from torch import Tensor

import data
import gist_mask
from gist_mask import GIST, INPUT, PROMPT

COLORS = {PROMPT: "tab:blue", GIST: "tab:red", INPUT: "tab:green"}
UNSEEN = (0.94, 0.94, 0.94)  # light gray


def draw(ax, words: list[str], segments: Tensor, mask: Tensor) -> None:
    """One mask, (T, T) bool. segments: (T,) int64, the labels of the words."""
    colors = [COLORS[label] for label in segments.tolist()]
    of_keys = torch.tensor([to_rgb(color) for color in colors])  # (T, 3)
    ax.imshow(torch.where(mask[:, :, None], of_keys, torch.tensor(UNSEEN)))
    ax.set_xticks(range(len(words)), words, rotation=90)
    ax.set_yticks(range(len(words)), words)
    for axis in (ax.xaxis, ax.yaxis):
        for label, color in zip(axis.get_ticklabels(), colors):
            label.set_color(color)
        axis.set_ticks([i - 0.5 for i in range(len(words))], minor=True)
    ax.grid(which="minor", color="white", linewidth=2)  # white lines between the squares
    ax.tick_params(which="both", length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the masks of a small example.")
    parser.add_argument("--n_gist", type=data.at_least(0), default=1)
    parser.add_argument("--out", default="masks.png")
    flags = parser.parse_args()
    words, segments = gist_mask.example(flags.n_gist)
    n = len(gist_mask.TABLE)
    figure, axes = data.new_figure(4.2 * n, 4.9, n)
    for ax, condition in zip(axes, gist_mask.TABLE):
        draw(ax, words, segments[0], gist_mask.decoder_mask(segments, condition)[0, 0])
        ax.set_title(condition)
    axes[0].set(xlabel="... sees these keys", ylabel="query: this token ...")
    names = ("prompt", "gist", "input and output")
    patches = [Patch(color=color, label=name) for color, name in zip(COLORS.values(), names)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    data.save_figure(figure, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
