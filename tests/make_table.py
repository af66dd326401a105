"""The tables of README.md and assets/results.md, from the runs' own files.

    python tests/make_table.py out/results/*      # puts them into assets/results.json, prints all
    python tests/make_table.py                    # prints them again from assets/results.json

A row is a setting, with the mean over its seeds and, where there are several, their range. Runs of
an older recipe do not leave by themselves: when the recipe changes, begin with {} in results.json.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "assets" / "results.json"
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
        row = {key: metrics[key] for key in ("arch", "condition", "n_gist", "tfidf", "steps")}
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
    return NAMES[run["arch"]], what


def setting_order(run: dict) -> tuple[str, bool, int, str]:
    return run["arch"], bool(run["tfidf"]), run["n_gist"], run["condition"]


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


if __name__ == "__main__":
    if sys.argv[1:]:
        runs = json.loads(FILE.read_text()) | read_runs(sys.argv[1:])
        ordered = sorted(runs.items(), key=lambda item: (*setting_order(item[1]), item[0]))
        FILE.write_text(json.dumps(dict(ordered), indent=1) + "\n")
    print("\n".join(rows(json.loads(FILE.read_text())).values()))
