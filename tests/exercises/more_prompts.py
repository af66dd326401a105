"""Would more prompts help? The share that a gist keeps, against the number of different prompts.

    python train.py --n_gist 1 ... --epochs 1 --eval_every 100 --out_dir out/gist
    python eval.py run out/pos_control out/neg_control
    python -m tests.exercises.more_prompts out/gist out/pos_control out/neg_control

In the first pass through the data every batch brings new prompts, so the losses of validation that
--eval_every puts into the log say what so many prompts have taught. The share of the way from
neg_control's loss to pos_control's is drawn against them, with a line that is fitted to it:

    share = a + b log(prompts)

Where would 52,000 prompts (Alpaca) get, and 130,000 (the paper's Alpaca+)? The line goes on, but
that is an extrapolation: nothing says that the share does. And the learning rate falls during a
run, which alone lowers the loss towards its end: the line is too steep rather than too flat.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import data


def logged_losses(run: str, split: str) -> dict[int, float]:
    """Validation losses of a run by the examples that it has learned from, of its first pass."""
    log = Path(run) / "train_log.jsonl"
    with data.one_line_errors(log, "give a run of train.py"):
        entries = [json.loads(line) for line in log.read_bytes().splitlines()]
        size = data.read_config(run)["gisting"]["batch_size"]
    losses = {e["step"] * size: e[f"loss_{split}"] for e in entries if f"loss_{split}" in e}
    if len(losses) < 2:
        raise data.DataError(f"{log}: no two losses of {split}; train it with --eval_every N")
    return losses


def evaluated_loss(run: str, split: str) -> float:
    """The loss of an evaluated run."""
    file = Path(run) / "metrics.json"
    with data.one_line_errors(file, f"first: python eval.py run {run}"):
        return json.loads(file.read_bytes())[split]["loss"]


def fit_line(prompts: list[int], shares: list[float]) -> tuple[float, float]:
    """a and b of share = a + b log(prompts), by least squares."""
    x, y = np.log(prompts), np.array(shares)
    b = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return y.mean() - b * x.mean(), b


def main() -> None:
    parser = argparse.ArgumentParser(description="The share that a gist keeps, by prompts.")
    parser.add_argument("gist", help="a run with --eval_every, of one pass")
    parser.add_argument("pos_control", help="an evaluated run")
    parser.add_argument("neg_control", help="an evaluated run")
    parser.add_argument("--split", default="unseen", choices=data.SPLITS)
    parser.add_argument("--more", type=int, nargs="+", default=[52_000, 130_000])
    parser.add_argument("--out", default="more_prompts.png")
    flags = parser.parse_args()
    losses = logged_losses(flags.gist, flags.split)
    best = evaluated_loss(flags.pos_control, flags.split)
    worst = evaluated_loss(flags.neg_control, flags.split)
    shares = {n: 100 * (worst - loss) / (worst - best) for n, loss in losses.items()}
    a, b = fit_line(list(shares), list(shares.values()))
    print("prompts     loss   share, %   the line, %")
    for n, share in shares.items():
        print(f"{n:7,}  {losses[n]:7.3f}  {share:9.1f}  {a + b * np.log(n):12.1f}")
    for n in flags.more:
        print(f"{n:7,}  {'':7}  {'':9}  {a + b * np.log(n):12.1f}  an extrapolation")

    figure, ax = data.new_figure(7, 4)
    ax.semilogx(list(shares), list(shares.values()), "ko", label="measured")
    inside, beyond = [min(shares), max(shares)], [max(shares), *flags.more]
    ax.plot(inside, a + b * np.log(inside), "b-", label="a line through these")
    ax.plot(beyond, a + b * np.log(beyond), "b--", label="the same line: a guess")
    ax.set(xlabel="different prompts trained on", ylabel="share of the prompt kept (loss), %")
    ax.legend()
    data.save_figure(figure, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
