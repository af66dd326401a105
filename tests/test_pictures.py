"""Pictures of results, and what the gist looks at."""

import json
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
        families = {name: dict(scores, n=2) for name in ("double", "next")}
        metrics = dict(condition=condition, n_gist=n_gist, arch=arch, steps=2)
        metrics |= {"seen": scores, "unseen": scores | {"families": families}}
        (path / "metrics.json").write_text(json.dumps(metrics))
        log = [json.dumps({"step": i, "loss": 4.0 - i}) for i in range(3)]
        (path / "train_log.jsonl").write_text("\n".join(log))
    return folder


def open_prompts(run, instruction="Put lamp at the end."):
    model, tokenizer, config = evaluation.open_run(str(run), device="cpu")
    tokens, _ = evaluation.compress_instruction(instruction, model, tokenizer, config)
    return model, tokenizer, tokens


@pytest.mark.parametrize("run", ["llama-gist-2", "t5-gist-2"])
def test_the_weights_are_those_that_attention_uses(runs, run, monkeypatch):
    """Weights times values are what torch's attention returns, layer by layer."""
    model, tokenizer, tokens = open_prompts(runs / run)
    seen, fused = [], F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        out = fused(q, k, v, **kwargs)
        seen.append((v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), out))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layers = attention.attention_weights(model, tokens, tokenizer.gist_id, "gist")
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


@pytest.mark.parametrize("kind", ["bars", "families", "loss"])
@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_results_of_runs_are_drawn(runs, kind, ending, tmp_path):
    out = tmp_path / f"r.{ending}"
    evaluation.plot([str(p) for p in sorted(runs.iterdir())], kind=kind, out=str(out))
    assert out.stat().st_size > 1000 and list(tmp_path.iterdir()) == [out]


def drawn_axes(monkeypatch, runs, **options):
    kept = []
    monkeypatch.setattr(data, "save_figure", lambda figure, file: kept.append(figure))
    evaluation.plot([str(p) for p in sorted(runs.iterdir())], **options)
    return kept[0].axes[0]


def test_bars_have_a_color_for_every_run_and_reach_their_values(runs, monkeypatch):
    ax = drawn_axes(monkeypatch, runs, kind="families", metric="exact_match")
    assert len(ax.containers) == 4 and len(ax.collections) == 4
    assert {y for guesses in ax.collections for y in guesses.get_paths()[0].vertices[:, 1]} == {
        25.0
    }
    assert len({bars[0].get_facecolor() for bars in ax.containers}) == 4
    assert {bar.get_height() for bars in ax.containers for bar in bars} == {50.0}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["double (2)", "next (2)"]
    assert ax.get_ylim() == (0, 100)


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


def test_dollars_stay_dollars(runs, monkeypatch):
    from matplotlib.text import Text

    kept = []
    monkeypatch.setattr(data, "save_figure", lambda figure, file: kept.append(figure))
    text = r"Is $5 more than $3? \frac"
    attention.draw(str(runs / "llama-gist-1"), text, "a.png", device="cpu")
    shown = [t for t in kept[0].findobj(Text) if "$" in t.get_text()]
    assert shown and not any(t.get_parse_math() for t in shown)


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
        (["{runs}/llama-pos_control-1", "--instruction", "x"], "cannot compress"),
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
