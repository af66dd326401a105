"""More pictures: scores over the number of gist tokens, by families of instructions, win rates.

    python -m tests.exercises.draw_results n_gist out/llama-gist-* --metric exact_match
    python -m tests.exercises.draw_results families out/llama-gist-1 --metric exact_match
    python -m tests.exercises.draw_results winrates judged.json

Seconds each. Results are plain files, so a picture of your own is a short program: `metrics.json`
has every score of a run, a file of judgments every choice. Is the second gist token worth more than
the tenth? Is a model's lead larger than its interval?
"""

import argparse
import json
from pathlib import Path

import data
import eval


def draw_n_gist(axes, runs: list[str], metric: str) -> None:
    """A panel for every split, and in it every architecture and condition by its n_gist.

    What was trained with one n_gist only, as the controls, is a dotted level to compare with.
    """
    lines = {}  # (split, label) -> (n_gist, score) of every run
    for run in runs:
        file = Path(run) / "metrics.json"
        with data.one_line_errors(file, f"first: python eval.py run {run}"):
            metrics = json.loads(file.read_bytes())
            for split in metrics.keys() & set(data.SPLITS):
                label = f"{metrics['arch']} {metrics['condition']}"
                point = (metrics["n_gist"], 100 * metrics[split][metric])
                lines.setdefault((split, label), []).append(point)
    colors = {label: f"C{i}" for i, label in enumerate(sorted({label for _, label in lines}))}
    for ax, split in zip(axes, data.SPLITS):
        for label, color in colors.items():
            points = sorted(lines.get((split, label), []))
            if len(points) == 1:
                ax.axhline(points[0][1], color=color, linestyle=":", label=label)
            elif points:
                ax.plot(*zip(*points), "o-", color=color, label=label)
        ax.set(title=split, xlabel="n_gist", ylabel=f"{metric}, %", ylim=(0, 100))


def score_families(file: str) -> dict[str, dict]:
    """The scores of an outputs file by family. Raises data.DataError."""
    pairs = {}
    for row in eval.read_outputs(file):
        with data.one_line_errors(file, "evaluate again, with built-in instructions"):
            pairs.setdefault(row["family"], []).append((row["y_pred"], row["y_true"]))
    return {name: eval.score(pairs[name]) for name in sorted(pairs)}


def draw_families(ax, runs: list[str], metric: str) -> None:
    """A bar for every run and family of unseen instructions; dotted: always the commonest answer.

    The scores are printed, too. Families are of the built-in instructions.
    """
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        families = score_families(f"{run}/outputs-unseen.csv")
        print(f"\n{run}")
        eval.print_table(families)
        with data.one_line_errors(f"--metric {metric}", "choose one of eval.score"):
            heights = [100 * scores[metric] for scores in families.values()]
            guesses = [100 * scores["commonest"] for scores in families.values()]
        left = [place + i * width for place in range(len(families))]
        right = [place + width for place in left]
        ax.bar(left, heights, width, align="edge", label=run)
        ax.hlines(guesses, left, right, "black", "dotted")
    names = [f"{name} ({scores['n']})" for name, scores in families.items()]
    ax.set_xticks([x + 0.4 for x in range(len(names))], names, rotation=30, ha="right")
    ax.set(ylabel=f"{metric}, %", ylim=(0, 100), xlim=(-0.2, len(names)))


def draw_winrates(ax, files: list[str]) -> None:
    """A point with its 95% interval for every file of judgments."""
    for file in files:
        row = eval.winrate_of(file)
        below, above = row["rate"] - row["low"], row["high"] - row["rate"]
        ax.errorbar(row["rate"], file, xerr=[[below], [above]], fmt="o", label=file)
    ax.axvline(0.5, color="gray", linestyle=":")
    ax.set(xlim=(0, 1), xlabel="win rate (ties count half)", yticks=[])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scores or win rates.")
    parser.add_argument("kind", choices=("n_gist", "families", "winrates"))
    parser.add_argument("results", nargs="+", help="runs, or files of judgments")
    parser.add_argument("--metric", default="rougeL", help="one of metrics.json (%(default)s)")
    parser.add_argument("--out", default="results.png")
    flags = parser.parse_args()
    if flags.kind == "n_gist":
        figure, axes = data.new_figure(10, 4, panels=3)
        draw_n_gist(axes, flags.results, flags.metric)
        ax = axes[0]
    elif flags.kind == "families":
        figure, ax = data.new_figure(14, 5)
        draw_families(ax, flags.results, flags.metric)
    else:
        figure, ax = data.new_figure(8, 5)
        draw_winrates(ax, flags.results)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize="small")
    data.save_figure(figure, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
