"""How much of a prompt does the gist keep, and does it keep more with more training?

    for s in 100 200 400; do for c in gist pos_control neg_control; do
        python train.py --condition $c --max_steps $s --out_dir out/$c-$s; done; done
    python -m tests.exercises.learning_curve out/*control-* out/gist-* --out curve.png

`neg_control` sees nothing of the prompt, `pos_control` all of it. The gist's share of the way from
one to the other is what it keeps:  share = (gist - neg_control) / (pos_control - neg_control).
For every number of steps that all three conditions were trained for, this prints the three scores
(ROUGE-L by default) of a split and the share, with its 95% interval: the middle 950
of 1,000 shares, each from examples drawn with replacement, the same for all three. Seconds.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import data
import eval


def read_scores(run: str, split: str, metric: str) -> tuple[int, str, np.ndarray]:
    """A run's steps, its condition, and the score of every example, (N,)."""
    file = Path(run) / "metrics.json"
    with data.reading(file, f"first: python eval.py run {run}"):
        metrics = json.loads(file.read_bytes())
    rows = eval.read_outputs(Path(run) / f"outputs-{split}.csv")
    scores = [eval.score([(row["y_pred"], row["y_true"])])[metric] for row in rows]
    return metrics["steps"], metrics["condition"], np.array(scores)


def share(neg: np.ndarray, gist: np.ndarray, pos: np.ndarray) -> float:
    return (gist.mean() - neg.mean()) / (pos.mean() - neg.mean())


def interval(neg: np.ndarray, gist: np.ndarray, pos: np.ndarray) -> tuple[float, float]:
    """The share's 95% interval, by the bootstrap."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(gist), size=(1000, len(gist)))  # indices of examples
    shares = [share(neg[i], gist[i], pos[i]) for i in drawn]
    return tuple(np.quantile(shares, (0.025, 0.975)))


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of the prompt that a gist keeps.")
    parser.add_argument("runs", nargs="+", help="evaluated runs of all three conditions")
    parser.add_argument("--split", default="unseen", choices=data.SPLITS)
    parser.add_argument("--metric", default="rougeL", help="exact_match, rouge1, rouge2 or rougeL")
    parser.add_argument("--out", default="curve.png")
    flags = parser.parse_args()
    curve = {}  # steps -> condition -> scores
    for run in flags.runs:
        steps, condition, scores = read_scores(run, flags.split, flags.metric)
        curve.setdefault(steps, {})[condition] = scores
    names = ("neg_control", "gist", "pos_control")
    curve = {steps: [c[n] for n in names] for steps, c in curve.items() if set(names) <= c.keys()}
    if not curve:
        raise data.DataError("no number of steps has runs of all three conditions; give more runs")

    figure, (left, right) = data.new_figure(10, 4, panels=2)
    print("steps  " + "  ".join(f"{name:>11}" for name in (*names, "share")))
    for steps, scores in sorted(curve.items()):
        low, high = interval(*scores)
        kept = share(*scores)
        means = [100 * x.mean() for x in scores]
        print(f"{steps:5}  " + "  ".join(f"{mean:11.1f}" for mean in means), end="")
        print(f"  {100 * kept:11.1f} ({100 * low:.1f} to {100 * high:.1f})")
        spread = [[max(0, 100 * (kept - low))], [max(0, 100 * (high - kept))]]
        right.errorbar(steps, 100 * kept, yerr=spread, fmt="ko")
    for i, name in enumerate(names):
        means = [100 * scores[i].mean() for _, scores in sorted(curve.items())]
        left.plot(sorted(curve), means, "o-", label=name)
    left.set(xlabel="steps", ylabel=f"{flags.metric}, {flags.split}, %", ylim=(0, 100))
    right.set(xlabel="steps", ylabel="share that the gist keeps, %", ylim=(0, 100))
    left.legend()
    data.save_figure(figure, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
