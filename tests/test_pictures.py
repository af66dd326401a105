"""Pictures of results, and what the gist looks at."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_compress import make_run

import data
import eval as evaluation

from exercises import attention, draw_results  # isort: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of both architectures with random weights, and metrics as if they were evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    for arch, condition, n_gist in (
        ("llama", "gist", 1),
        ("llama", "gist", 2),
        ("llama", "pos_control", 1),
        ("t5", "gist", 2),
    ):
        path = Path(make_run(folder / f"{arch}-{condition}-{n_gist}", arch, condition, n_gist))
        scores = {"n": 4, "exact_match": 0.5, "rougeL": 0.75, "commonest": 0.25, "loss": 1.0}
        metrics = dict(condition=condition, n_gist=n_gist, arch=arch, steps=2)
        metrics |= {"seen": scores, "unseen": scores}
        (path / "metrics.json").write_text(json.dumps(metrics))
        log = [json.dumps({"step": i, "loss": 4.0 - i}) for i in range(3)]
        (path / "train_log.jsonl").write_text("\n".join(log))
    return folder


@pytest.mark.parametrize("run", ["llama-gist-2", "t5-gist-2"])
def test_the_weights_are_those_that_attention_uses(runs, run, monkeypatch):
    """Weights times values are what torch's attention returns, layer by layer."""
    model, tokenizer, config = evaluation.open_run(str(runs / run), device="cpu")
    e = evaluation.lay_out("Put lamp at the end.", "", tokenizer, config)
    tokens, segments = evaluation.prompts_of([e], tokenizer)
    seen, fused = [], F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        out = fused(q, k, v, **kwargs)
        of_heads = out.unflatten(2, (tokens.shape[1], -1)).transpose(2, 3).flatten(1, 2)
        group = of_heads.shape[1] // v.shape[1]
        seen.append((v.repeat_interleave(group, dim=1), of_heads))  # (B, H, T, K), both
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layers = attention.attention_weights(model, tokens, segments, "gist")
    assert len(layers) == len(seen) == 2
    for weights, (v, out) in zip(layers, seen):
        assert torch.allclose(weights @ v, out, atol=1e-5)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(1, 2, *tokens.shape), atol=1e-5)


@pytest.mark.parametrize("run", ["llama-gist-2", "t5-gist-2", "llama-gist-1"])
@pytest.mark.parametrize("instruction", ["Put lamp at the end.", r"Is $5 more than $3? \frac"])
def test_attention_is_drawn(runs, run, instruction, tmp_path):
    file = tmp_path / "a.png"
    attention.draw(str(runs / run), instruction, str(file), device="cpu")
    assert file.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [file]


def test_a_run_without_gist_tokens_has_no_attention_to_draw(tmp_path):
    run = make_run(tmp_path / "run", "llama", "pos_control", n_gist=0)
    with pytest.raises(data.DataError, match="no gist tokens"):
        attention.draw(run, "Say it.", str(tmp_path / "a.png"), device="cpu")


@pytest.mark.parametrize("kind", ["bars", "loss"])
@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_results_of_runs_are_drawn(runs, kind, ending, tmp_path):
    out = tmp_path / f"r.{ending}"
    evaluation.plot([str(p) for p in sorted(runs.iterdir())], kind=kind, out=str(out))
    assert out.stat().st_size > 1000 and list(tmp_path.iterdir()) == [out]


def drawn(monkeypatch, draw, *args, **options):
    """The figure that a function draws, as it goes into the file."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: kept.append(figure))
    draw(*args, **options)
    return kept[0]


def bars_of(ax):
    """By color, the heights of the bars; and the ranges beside them. NaN is not drawn."""
    heights, ranges = {}, []
    for container in ax.containers:
        for bar in container.patches if hasattr(container, "patches") else ():
            if not math.isnan(bar.get_height()):
                heights.setdefault(bar.get_facecolor(), []).append(bar.get_height())
    for lines in ax.collections:
        ranges += [segment[:, 1].tolist() for segment in lines.get_segments() if len(segment)]
    return list(heights.values()), ranges


def test_bars_have_a_color_for_every_run_and_reach_their_values(runs, monkeypatch, tmp_path):
    paths = [str(p) for p in sorted(runs.iterdir())]
    out = str(tmp_path / "a.png")
    figure = drawn(monkeypatch, evaluation.plot, paths, metric="exact_match", out=out)
    heights, _ = bars_of(figure.axes[0])
    assert heights == [[50, 50]] * 4  # seen and unseen, but not human
    assert [t.get_text().strip() for t in figure.legends[0].get_texts()] == paths
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(data.SPLITS)
    assert figure.axes[0].get_ylim() == (0, 100)


def test_runs_that_differ_in_their_seed_only_share_a_bar(monkeypatch, tmp_path):
    for name, seed, lr, share in (("a0", 0, 1, 0.2), ("b", 0, 2, 0.9), ("a1", 1, 1, 0.4)):
        (tmp_path / name).mkdir()
        config = {"seed": seed, "lr": lr, "out_dir": name, "data_hash": name, "seconds": share}
        (tmp_path / name / "metrics.json").write_text(
            json.dumps(config | {"seen": {"bleu": share}})
        )
    monkeypatch.chdir(tmp_path)
    figure = drawn(monkeypatch, evaluation.plot, ["a0", "b", "a1"], metric="bleu")
    heights, ranges = bars_of(figure.axes[0])
    assert [row[0] for row in heights] == [pytest.approx(30), pytest.approx(90)]
    assert sorted(ranges)[-2:] == [pytest.approx([20, 40]), pytest.approx([90, 90])]
    assert [t.get_text().strip() for t in figure.legends[0].get_texts()] == ["a* (2)", "b"]


def test_families_are_drawn_with_the_commonest_answer(tmp_path):
    """One of two answers in each family is right; a family's references are the same, or not."""
    rows = ["x,y_pred,y_true,family", "q,b,b,next", "q,c,b,next", "q,b,b,double", "q,d,c,double"]
    (tmp_path / "outputs-unseen.csv").write_text("\n".join(rows))
    _, ax = data.new_figure(3, 3)
    draw_results.draw_families(ax, [str(tmp_path)] * 2, "exact_match")
    assert len(ax.containers) == 2
    assert all([bar.get_height() for bar in bars] == [50, 50] for bars in ax.containers)
    guesses = [path.vertices[:, 1].tolist() for path in ax.collections[0].get_paths()]
    assert guesses == [[50, 50], [100, 100]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["double (2)", "next (2)"]


def test_lines_over_n_gist_join_the_runs_of_a_condition(runs):
    _, axes = data.new_figure(3, 3, panels=3)
    draw_results.draw_n_gist(axes, [str(p) for p in sorted(runs.iterdir())], "rougeL")
    seen, unseen, human = ([line.get_label() for line in ax.get_lines()] for ax in axes)
    assert seen == unseen == ["llama gist", "llama pos_control", "t5 gist"] and human == []
    assert axes[1].get_lines()[0].get_xydata().tolist() == [[1, 75], [2, 75]]
    assert axes[0].get_lines()[1].get_ydata() == [75, 75]  # one n_gist: a level


def test_win_rates_are_drawn(tmp_path):
    results = [{"choice": "a"}, {"choice": "tie"}]
    content = {"names": {"a": "x", "b": "y"}, "results": results}
    (tmp_path / "j.json").write_text(json.dumps(content))
    figure, ax = data.new_figure(3, 3)
    draw_results.draw_winrates(ax, [str(tmp_path / "j.json")])
    data.save_figure(figure, tmp_path / "w.png")
    assert (tmp_path / "w.png").stat().st_size > 1000
    assert ax.containers[0].lines[0].get_xdata() == [0.75]


FORMULA = r"Is $5 more than $3? \frac"


def texts(figure):
    from matplotlib.text import Text

    return [t for t in figure.findobj(Text) if "$" in t.get_text()]


def test_dollars_stay_dollars_in_an_instruction(runs, monkeypatch, tmp_path):
    run, out = str(runs / "llama-gist-1"), str(tmp_path / "a.png")
    shown = texts(drawn(monkeypatch, attention.draw, run, FORMULA, out, device="cpu"))
    assert shown and not any(t.get_parse_math() for t in shown)


@pytest.mark.parametrize("kind", ["bars", "loss"])
def test_a_folder_may_be_called_like_a_broken_formula(runs, kind, tmp_path, monkeypatch):
    folder = tmp_path / r"$\frac$_$"
    shutil.copytree(runs / "llama-gist-1", folder)
    evaluation.plot([str(folder)], kind=kind, out=str(tmp_path / "a.png"))
    out = str(tmp_path / "b.png")
    figure = drawn(monkeypatch, evaluation.plot, [str(folder)], kind=kind, out=out)
    assert texts(figure) and not any(t.get_parse_math() for t in texts(figure))


@pytest.mark.parametrize(
    "args, says",
    [
        (["plot", "nowhere"], "eval.py run nowhere"),
        (["plot", "nowhere", "--kind", "loss"], "nowhere"),
        (["plot", "{runs}/llama-gist-1", "--metric", "bleu"], "bleu"),
        (["plot", "{runs}/llama-gist-1", "--out", "/nowhere/a.png"], "/nowhere/a.png"),
        (["plot", "{runs}/llama-gist-1", "--out", "a.txt.zzz"], "zzz"),
        (["plot", "{runs}/llama-gist-1", "--out", "."], "results.png"),
        (["plot", "{runs}/llama-gist-1", "--out", "picture"], "picture"),
    ],
)
def test_a_mistake_ends_in_one_line(runs, args, says, tmp_path, monkeypatch, capsys):
    ends_in_one_line(evaluation.main, runs, args, says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "args, says",
    [
        (["{runs}/llama-gist-1", "--instruction", " "], "empty"),
        (["nowhere", "--instruction", "x"], "nowhere"),
    ],
)
def test_so_does_one_in_drawing_attention(runs, args, says, tmp_path, monkeypatch, capsys):
    ends_in_one_line(attention.main, runs, args, says, tmp_path, monkeypatch, capsys)


def ends_in_one_line(main, runs, args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", *(a.format(runs=runs) for a in args)])
    with pytest.raises(SystemExit) as stop:
        data.run(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and says in printed and len(printed.splitlines()) == 1, printed
    assert not any(tmp_path.iterdir())
