"""The tables of README.md and assets/results.md and the picture of results, from runs' own files.

    python tests/make_table.py out/results/*      # puts them into assets/results.json, prints all
    python tests/make_table.py                    # the same from assets/results.json alone

The picture is assets/results.png.

A row is a setting, with the mean over its seeds and, where there are several, their range. Runs of
an older recipe do not leave by themselves: when the recipe changes, begin with {} in results.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import gist_mask  # noqa: E402

FILE = Path(__file__).parent.parent / "assets" / "results.json"
STEPS = 3000  # of the main job; what has others says so
NAMES = {"llama": "LLaMA", "t5": "T5"}
COLUMNS = [("seen", "exact_match"), ("unseen", "exact_match"), ("human", "exact_match")]
COLUMNS += [("unseen", "rougeL")]


def read_runs(folders: list[str]) -> dict:
    """Of every run, its setting and the scores of COLUMNS."""
    runs = {}
    for folder in sorted(map(Path, folders)):
        file = folder / "metrics.json"
        if not file.exists():
            continue
        metrics = json.loads(file.read_text())
        row = {key: metrics[key] for key in ("arch", "condition", "n_gist", "steps")}
        data = Path(metrics["data"]).name  # keywords-N, from tests/exercises/keywords.py
        row["tfidf"] = int(data.removeprefix("keywords-")) if row["n_gist"] == 0 else None
        row["scores"] = [round(100 * metrics[split][name], 1) for split, name in COLUMNS]
        runs[folder.name] = row
    return runs


def setting(run: dict) -> tuple[str, str]:
    """The first two cells of a row: the architecture, and what was trained."""
    what = f"`{run['condition']}`"
    if run["tfidf"]:
        what = f"TF-IDF, {run['tfidf']} word"
    elif run["n_gist"] != 1:
        what += f", {run['n_gist']} tokens"
    if run["steps"] != STEPS:
        what += f", {run['steps']:,} steps"
    return NAMES[run["arch"]], what


def setting_order(run: dict) -> tuple[str, bool, int, str, int]:
    return run["arch"], bool(run["tfidf"]), run["n_gist"], run["condition"], run["steps"]


def cell(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.1f} ({min(values)} to {max(values)})" if len(values) > 1 else f"{mean:.1f}"


def rows(runs: dict) -> dict[tuple[str, str], str]:
    """A line of Markdown for every setting."""
    groups = {}
    for run in runs.values():
        groups.setdefault(setting(run), []).append(run["scores"])
    lines = {}
    for key, scores in groups.items():
        cells = [cell(list(values)) for values in zip(*scores)]
        lines[key] = f"| {' | '.join([*key, *cells])} |"
    return lines


def draw(runs: dict, file: str) -> None:
    """A panel for each architecture: of every condition with one gist token, mean and range."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    splits = [split for split, _ in COLUMNS[:3]]
    for ax, arch in zip(figure.subplots(1, 2, sharey=True), NAMES):
        for i, condition in enumerate(gist_mask.TABLE):
            bar = (NAMES[arch], f"`{condition}`")
            chosen = [run for run in runs.values() if setting(run) == bar]
            scores = np.array([run["scores"][:3] for run in chosen])  # (seeds, splits)
            mean = scores.mean(axis=0)
            around = [mean - scores.min(axis=0), scores.max(axis=0) - mean]
            places = np.arange(3) + 0.27 * (i - 1)
            ax.bar(places, mean, 0.25, yerr=around, capsize=3, color=f"C{i}", label=condition)
        ax.set_xticks(range(3), splits)
        ax.set(title=NAMES[arch], ylim=(0, 100))
        ax.set_ylabel("exact match, %" if arch == "llama" else "")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:]:
        runs = json.loads(FILE.read_text()) | read_runs(sys.argv[1:])
        ordered = sorted(runs.items(), key=lambda item: (*setting_order(item[1]), item[0]))
        FILE.write_text(json.dumps(dict(ordered), indent=1) + "\n")
    runs = json.loads(FILE.read_text())
    draw(runs, FILE.with_name("results.png"))
    print("\n".join(rows(runs).values()))
