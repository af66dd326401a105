"""Would more prompts help? What a gist lacks, against the number of different prompts.

    for c in gist pos_control neg_control; do
        python train.py --n_gist 1 --condition $c ... --epochs 1 --out_dir out/$c; done
    python -m tests.exercises.more_prompts out/{gist,pos_control,neg_control}

In the first pass through the data every batch brings new prompts, and train.py logs its loss before
it learns from them. So the logs of the three runs say at every step what share of the way from
neg_control to pos_control the gist keeps on prompts that it has not trained on (`learning_curve`).
At each step, all three have had as much training and have the same learning rate. What the gist
lacks, 100% - share, is drawn against the prompts so far, both on logarithmic axes, with a line that
is fitted to it:

    log(lacking) = a + b log(prompts)

What would 52,000 prompts (Alpaca) give, or 130,000 (the paper's Alpaca+)? Extending the line is only
a guess: steps grow with prompts, and the learning rate falls. For SmolLM2-135M and 6,600 prompts,
see assets/results.md.
"""

import argparse

import numpy as np

import data
from tests.exercises import learning_curve


def lacking(runs: list[str], window: int) -> dict[float, tuple[float, float, float]]:
    """What the gist lacks in percent, with its 95% interval, by the prompts so far.

    runs: one of each condition. Every point covers `window` steps, and stands at their middle.
    Raises data.DataError.
    """
    points = {}
    curve = learning_curve.read_losses(runs, window)
    size = data.read_config(runs[0])["gisting"]["batch_size"]  # that of all
    for end, losses in curve.items():
        low, high = learning_curve.interval(*losses)
        shares = np.array([learning_curve.share(*losses), high, low])
        points[(end - window / 2) * size] = tuple(100 * (1 - shares))
    return points


def fit_line(prompts: list[float], lacks: list[float]) -> tuple[float, float]:
    """a and b of log(lacking) = a + b log(prompts), by least squares. Raises data.DataError."""
    if len(lacks) < 2 or not all(lack > 0 for lack in lacks):  # or NaN
        raise data.DataError(
            "no line: it needs two points, and a gist that is worse than pos_control in all; give "
            "another --window"
        )
    x, y = np.log(prompts), np.log(lacks)
    b = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return y.mean() - b * x.mean(), b


def main() -> None:
    parser = argparse.ArgumentParser(description="What a gist lacks, by the number of prompts.")
    parser.add_argument("runs", nargs=3, help="a run of each condition, of one pass")
    parser.add_argument("--more", type=int, nargs="+", default=[52_000, 130_000])
    parser.add_argument("--window", type=data.at_least(1), default=100, help="steps of a point")
    parser.add_argument("--out", default="more_prompts.png")
    flags = parser.parse_args()
    points = lacking(flags.runs, flags.window)
    prompts, lacks = list(points), [lack for lack, _, _ in points.values()]
    a, b = fit_line(prompts, lacks)

    def line(n):
        return np.exp(a + b * np.log(n))

    print("prompts   lacking, %                    the line")
    for n, (lack, low, high) in points.items():
        print(f"{n:7,.0f}  {lack:11.1f} ({low:.1f} to {high:.1f})  {line(n):11.1f}")
    for n in flags.more:
        print(f"{n:7,}  {'an extrapolation':>26}  {line(n):11.1f}")

    figure, ax = data.new_figure(7, 4)
    spread = [[lack - low, high - lack] for lack, low, high in points.values()]
    ax.errorbar(prompts, lacks, yerr=np.transpose(spread), fmt="ko", label="measured")
    inside, beyond = np.array([prompts[0], prompts[-1]]), np.array([prompts[-1], *flags.more])
    ax.loglog(inside, line(inside), "b-", label="fitted line")
    ax.loglog(beyond, line(beyond), "b--", label="extrapolation")
    ax.set(
        xlabel="different prompts trained on", ylabel="what the gist lacks of the prompt (loss), %"
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter("")
    ax.set_yticks([5, 10, 20, 50, 100])
    ax.legend()
    data.save_figure(figure, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
