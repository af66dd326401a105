"""The worked solutions run, and gists that they cache answer exactly as their masks say."""

import ast
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import eval
import gist_mask
import train
from gist_mask import GIST, INPUT, PADDING, PROMPT, START
from model import Llama, LlamaConfig
from t5 import T5, T5Config

from exercises import (  # isort: skip
    accumulating_gists,
    attention,
    attention_sink,
    cartridge,
    distillation,
    gist_embedding_only,
    gist_library,
    gist_lora,
    gist_pretraining,
    gist_starts,
    keywords,
    learning_curve,
    live_table,
    long_prompts,
    loss_share,
    mean_of_two_gists,
    micro,
    more_prompts,
    several_gists,
    what_else_to_keep,
    where_one_token_fails,
)

ROOT = Path(__file__).parent.parent
G = 9  # the gist token's id in rows made by hand


@pytest.fixture(scope="module")
def records():
    return data.builtin(200, 60)


@pytest.fixture(scope="module")
def tokenizer(records):
    return data.train_tokenizer(records["train"], 400)


def small(arch, vocab_size):
    shape = dict(vocab_size=vocab_size, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=64)
    if arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=1))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=2, start_id=0))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def make_run(tokenizer, tmp_path_factory):
    """Makes what train.py leaves, as far as the exercises can tell."""

    def make(arch, condition="gist", **changes):
        folder = tmp_path_factory.mktemp(arch)
        config = train.Config(arch=arch, n_gist=2, condition=condition, **changes)
        config = asdict(train.fill_in(config))
        model = small(arch, tokenizer.vocab_size)
        data.save_model(folder, model, tokenizer, config | {"steps": 1, "seconds": 1.0})
        return folder

    return make


def run(name, *flags):
    """Run a solution as its docstring says, and return what it prints."""
    command = [sys.executable, "-m", f"tests.exercises.{name}", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Every solution runs ----


SOLUTIONS = {*(ROOT / "tests/exercises").glob("*.py")} - {ROOT / "tests/exercises/data.py"}


@pytest.mark.parametrize("file", sorted(SOLUTIONS))
def test_a_solution_is_short_and_says_how_to_run_it(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert f"python -m tests.exercises.{file.stem}" in text.split('"""')[1]


SHORT = ("--max_steps", 2, "--n_train", 100)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_several_gists_runs(arch):
    assert "2 steps: " in run("several_gists", "--arch", arch, *SHORT)


def test_long_prompts_runs_and_draws(tmp_path):
    picture = tmp_path / "out.png"
    flags = ("--n_shots", 0, 2, *SHORT, "--n_valid", 10, "--out", picture)
    lines = run("long_prompts", *flags).splitlines()
    assert ["n_shots 0.0" in lines[0], "n_shots 2.0" in lines[1]] == [True, True]
    assert picture.stat().st_size > 5000


def test_gist_pretraining_leaves_a_model_to_go_on_from(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"fox cup {i} sun\n" for i in range(200)))
    out_dir = tmp_path / "pretrained"
    flags = ("--max_steps", 2, "--batch_size", 4, "--text", tmp_path / "text.txt")
    run("gist_pretraining", *flags, "--out_dir", out_dir)
    model, tokenizer = data.load_model(out_dir)
    assert tokenizer.gist_id < model.config.vocab_size


def test_distillation_trains_a_run_and_wants_the_tokenizer_of_its_teacher(folder, tmp_path):
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 400, "batch_size": 4}
    same = sizes | {"data": str(folder), "max_steps": 3, "device": "cpu"}
    teacher, distilled = str(tmp_path / "teacher"), tmp_path / "distilled"
    train.train(train.Config(condition="pos_control", out_dir=teacher, **same))
    flags = [text for name, value in same.items() for text in (f"--{name}", str(value))]
    flags += ["--eval_every", "3", "--out_dir", str(distilled)]
    run("distillation", "--teacher", teacher, *flags)
    last = json.loads((distilled / "train_log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and "loss_unseen" in last
    assert eval.open_run(str(distilled), device="cpu")[2]["condition"] == "gist"
    command = [sys.executable, "-m", "tests.exercises.distillation", "--teacher", teacher, *flags]
    for more, says in (
        (["--vocab_size", "390", "--out_dir", str(tmp_path / "other")], "another tokenizer"),
        (["--n_gist", "2", "--out_dir", str(tmp_path / "other")], "another --n_gist"),
        (["--out_dir", teacher], "another run"),
        (["--out_dir", teacher, "--condition", "pos_control", "--resume"], "loss batch_loss"),
    ):
        done = subprocess.run(command + more, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
    labels = train.Config(**same, eval_every=3, out_dir=str(distilled), resume=True)
    with pytest.raises(data.DataError, match="loss distillation"):
        train.train(labels)


def test_a_stopped_distillation_says_how_to_go_on(monkeypatch, capsys):
    """With the status of a stopped training."""
    monkeypatch.setattr(train, "train", lambda *args: (None, None, None, 15))
    monkeypatch.setattr(distillation, "from_teacher", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["distillation", "--teacher", "a run"])
    with pytest.raises(SystemExit) as stop:
        distillation.main()
    assert stop.value.code == 143 and "--resume" in capsys.readouterr().err


def test_attention_sink_prints_a_line_for_every_mask_and_draws(folder, make_run, tmp_path):
    pretrained, picture = tmp_path / "pretrained", tmp_path / "sink.png"
    model, tokenizer = data.load_model(make_run("llama"))
    data.save_model(pretrained, model.bfloat16(), tokenizer)  # as most are published
    flags = ("--data", folder, "--n_test", 3, "--out", picture)
    rows = [line.split() for line in run("attention_sink", pretrained, *flags).splitlines()]
    values = {" ".join(row[:-4]): [float(value) for value in row[-4:]] for row in rows[1:-1]}
    assert list(values) == list(attention_sink.SETTINGS)
    assert values["neg_control"][1:3] == [0, 0] and values["gist"][1] == 0
    assert min(values["pos_control"]) > 0 and min(values["gist --see_start"]) > 0
    assert picture.stat().st_size > 5000


def test_attention_sink_wants_a_decoder(make_run):
    command = [sys.executable, "-m", "tests.exercises.attention_sink", str(make_run("t5"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no decoder" in done.stderr


def test_accumulating_gists_runs():
    lines = run("accumulating_gists", *SHORT, "--n_test", 3).splitlines()
    assert [line.split(":")[0] for line in lines] == list(accumulating_gists.RULES)


def test_cartridge_runs(make_run):
    flags = ("--instructions", 1, "--n_train", 4, "--n_test", 4, "--steps", 2)
    text = run("cartridge", make_run("llama"), *flags)
    assert "written: " in text and "trained: " in text


def test_what_else_to_keep_compares_every_way(make_run):
    runs = make_run("llama"), make_run("llama", "pos_control")
    lines = run("what_else_to_keep", *runs, "--n_shots", 1, "--n_test", 3).splitlines()
    assert [line.split()[0] for line in lines] == ["gist", "last", "attended", "average", "all"]


def test_what_else_to_keep_wants_a_run_that_sees_the_whole_prompt(make_run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, [make_run("llama")] * 2)])
    with pytest.raises(data.DataError, match="pos_control"):
        what_else_to_keep.main()


def test_every_way_to_cut_a_cache_down_keeps_as_many_columns(tokenizer):
    model = small("llama", tokenizer.vocab_size)
    segments = torch.full((1, 7), gist_mask.PROMPT)
    cache = eval.compress_prompts(model, torch.arange(7)[None], segments, "pos_control")
    attended = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.1, 0.2, 0.1])
    for name, keep in what_else_to_keep.WAYS.items():
        kept = keep(cache, 2, attended)
        assert kept.length == (7 if name == "all" else 2)
        assert kept.segments.shape == (1, kept.length)
    most = what_else_to_keep.keep_attended(cache, 1, attended)
    assert torch.equal(most.keys, cache.keys[:, 1:2])
    mean = what_else_to_keep.keep_average(cache, 1, attended)
    assert torch.allclose(mean.values, cache.values.mean(dim=1, keepdim=True))


def test_count_flops_counts_the_same_three_times():
    lines = run("count_flops", "--preset", "llama-tiny").splitlines()
    for start in (7, 17):
        assert len({line.split()[-1] for line in lines[start : start + 3]}) == 1


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_sixteen_users_get_the_answers_that_each_would_get_alone(arch, make_run):
    assert "16 of 16 answers are the same" in run("sixteen_users", make_run(arch))


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_mean_of_two_gists_begins_and_ends_with_one_of_them(arch, make_run, tokenizer):
    lines = run("mean_of_two_gists", make_run(arch), "--points", 3).splitlines()
    assert [line.split()[0] for line in lines] == ["0.00", "0.50", "1.00"]
    model = small(arch, tokenizer.vocab_size)
    a, b = (model.compress(torch.tensor([[5, word, 6]])) for word in (7, 8))
    for t, end in ((0.0, a), (1.0, b)):
        assert torch.equal(mean_of_two_gists.blend(a, b, t).keys, end.keys)


def test_learning_curve_gives_the_share_and_the_interval_of_a_binomial(tmp_path):
    """Where neg_control is always wrong and pos_control always right, the share is a proportion."""
    n, right = 400, {"neg_control": 0, "gist": 120, "pos_control": 400}
    for condition, k in right.items():
        folder = tmp_path / condition
        folder.mkdir()
        rows = [f"x,{'fox' if i < k else 'cup'},fox" for i in range(n)]
        (folder / "outputs-unseen.csv").write_text("\n".join(["x,y_pred,y_true", *rows]))
        metrics = {"steps": 7, "condition": condition, "arch": "llama"}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    picture = tmp_path / "curve.png"
    text = run("learning_curve", *map(tmp_path.joinpath, right), "--out", picture)
    assert text.splitlines()[1].split()[:5] == ["7", "0.0", "30.0", "100.0", "30.0"]
    files = learning_curve.read_runs([str(tmp_path / c) for c in right], "unseen")
    scores = learning_curve.read_scores(files[7], "rougeL")
    spread = 1.96 * (0.3 * 0.7 / n) ** 0.5
    assert learning_curve.interval(*scores) == pytest.approx((0.3 - spread, 0.3 + spread), abs=0.01)
    assert picture.stat().st_size > 5000
    for runs, says in ((["gist"], "all three"), (["gist", "gist"], "a second run of gist")):
        with pytest.raises(data.DataError, match=says):
            learning_curve.read_runs([str(tmp_path / run) for run in runs], "unseen")
    rows = (tmp_path / "gist" / "outputs-unseen.csv").read_text().replace("x,fox", "y,fox")
    (tmp_path / "gist" / "outputs-unseen.csv").write_text(rows)
    with pytest.raises(data.DataError, match="other examples"):
        learning_curve.read_scores(files[7], "rougeL")
    metrics["arch"] = "t5"
    (tmp_path / "pos_control" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(data.DataError, match="llama and t5"):
        learning_curve.read_runs([str(tmp_path / c) for c in right], "unseen")


def test_more_prompts_draws_the_line_on_which_the_points_lie(tmp_path):
    def lacking(n):  # percent, after n prompts
        return 2000 * n**-0.5

    steps, level = range(1, 41), {"gist": None, "pos_control": 0.0, "neg_control": 100.0}
    for condition, loss in level.items():
        losses = [lacking(8 * step - 4) if loss is None else loss for step in steps]
        write_log(tmp_path / condition, condition, losses)
    runs, picture = [tmp_path / condition for condition in level], tmp_path / "more.png"
    flags = ("--window", 1, "--more", 1000, "--out", picture)
    lines = run("more_prompts", *runs, *flags).splitlines()
    assert len(lines) == 1 + len(steps) + 2
    for line, step in zip(lines[1:], steps):
        n = 8 * step - 4  # the middle of the step
        numbers = [float(number) for number in re.findall(r"[\d.]+", line.replace(",", ""))]
        assert numbers == pytest.approx([n] + 4 * [lacking(n)], abs=0.051)
    assert lines[-2].split()[-1] == f"{lacking(1000):.1f}"
    assert picture.stat().st_size > 5000
    for lacks in ([50.0], [50.0, 0.0], [50.0, math.nan]):
        with pytest.raises(data.DataError, match="--window"):
            more_prompts.fit_line([8.0, 16.0], lacks)
    (tmp_path / "gist" / "config.json").write_text("{}")  # a model, but no run of train.py
    with pytest.raises(data.DataError, match="give a run"):
        more_prompts.lacking([str(path) for path in runs], 1)


def write_log(folder, condition, losses):
    """What a run of train.py leaves, as far as the learning curve can tell."""
    folder.mkdir()
    config = {"condition": condition, "data_hash": "", "batch_size": 8, "seed": 0}
    (folder / "config.json").write_text(json.dumps({"gisting": config}))
    lines = [json.dumps({"step": i + 1, "loss": x}) for i, x in enumerate(losses)]
    (folder / "train_log.jsonl").write_text("\n".join(lines))
    return config


def test_learning_curve_of_losses_takes_the_same_batches_of_all_three(tmp_path):
    level = {"neg_control": 3.0, "gist": 2.5, "pos_control": 1.0}
    for condition, loss in level.items():
        losses = [loss + 0.1 * step for step in range(7 if condition == "gist" else 9)]
        config = write_log(tmp_path / condition, condition, losses)
    runs = [str(tmp_path / condition) for condition in level]
    picture = tmp_path / "curve.png"
    flags = (*runs, "--metric", "loss", "--window", 3, "--out", picture)
    rows = [line.split() for line in run("learning_curve", *flags).splitlines()[1:-1]]
    means = [(3, 3.1, 2.6, 1.1), (6, 3.4, 2.9, 1.4)]  # step 7 does not fill a window
    assert [tuple(map(float, row[:4])) for row in rows] == means
    assert [row[4:] for row in rows] == [["25.0", "(25.0", "to", "25.0)"]] * 2
    assert picture.stat().st_size > 5000
    for some, window, says in ((runs[:2], 3, "one run"), (runs, 8, "7 steps")):
        with pytest.raises(data.DataError, match=says):
            learning_curve.read_losses(some, window)
    text = json.dumps({"gisting": config | {"seed": 1}})
    (tmp_path / "pos_control" / "config.json").write_text(text)
    with pytest.raises(data.DataError, match="another data_hash, batch_size, seed"):
        learning_curve.read_losses(runs, 3)
    (tmp_path / "gist" / "train_log.jsonl").write_text('{"loss": null}')
    with pytest.raises(data.DataError, match="train_log"):
        learning_curve.read_losses(runs, 3)


def test_loss_share_has_the_losses_of_the_evaluation(make_run, folder):
    runs = [str(make_run("llama", c, data=str(folder))) for c in learning_curve.NAMES]
    losses = [eval.evaluate_run(path, max_new_tokens=1)["human"]["loss"] for path in runs]
    lines = run("loss_share", *runs, "--split", "human").splitlines()
    printed = [float(line.split()[1]) for line in lines[:3]]
    assert printed == pytest.approx(losses, abs=6e-4)
    of_examples = [loss_share.output_losses(path, "human") for path in runs]
    assert all(len(x) == 3 and x.std() > 0 for x in of_examples)
    neg, gist, pos = [x.mean() for x in of_examples]
    assert lines[3].split()[:2] == ["share", f"{100 * (neg - gist) / (neg - pos):.1f}%"]
    with pytest.raises(data.DataError, match="--split"):
        loss_share.output_losses(runs[0], "seen")


# ---- The table ----


def test_a_flipped_entry_breaks_the_cached_gist_only_where_the_input_is_involved(monkeypatch):
    monkeypatch.setattr(gist_mask, "TABLE", dict(gist_mask.TABLE))
    llama, t5 = live_table.small_models()
    for query in range(3):
        for key in range(3):
            name = live_table.flipped(query, key)
            for model, breaks in (
                (llama, {"input -> prompt"}),
                (t5, {"input -> prompt", "prompt -> input", "gist -> input"}),
            ):
                error = live_table.error_of_cached_gist(model, name)
                assert (error > 3e-5) == (name in breaks), (name, error)
            flipped, usual = (
                gist_mask.encoder_mask(live_table.SEGMENTS, condition)
                for condition in (name, "gist")
            )
            assert not torch.equal(flipped, usual)


# ---- Several gists ----


def random_row(rng):
    """One to three prompts with gist tokens, then an input; the label, pair and position of each."""
    labels, n_gist, n_pairs = [], rng.randint(1, 3), rng.randint(1, 3)
    for pair in range(n_pairs):
        p = rng.randint(0 if pair == 0 else 1, 4)
        first = (pair - n_pairs) * n_gist
        labels += [(PROMPT, pair, first - p + i) for i in range(p)]
        labels += [(GIST, pair, first + i) for i in range(n_gist)]
    return labels + [(INPUT, None, i) for i in range(rng.randint(0, 3))]


@pytest.mark.parametrize("seed", range(30))
def test_masks_and_positions_of_several_pairs_are_those_of_the_rule(seed):
    rng = random.Random(seed)
    labels = random_row(rng)
    n, has_input = len(labels), labels[-1][0] == INPUT
    n_padding = rng.randint(0, 3) if has_input else 0  # as in training
    segments = torch.tensor([[label for label, _, _ in labels] + [PADDING] * n_padding])
    assert several_gists.positions(segments)[0, :n].tolist() == [at for _, _, at in labels]
    encoder, decoder = small("t5", 10), small("llama", 10)
    mask = several_gists.pair_masking(encoder, segments)["mask"][0, 0]
    accumulated = accumulating_gists.rule_masking(decoder, segments, "accumulate")["mask"][0, 0]
    assert not mask[:n, n:].any() and not accumulated[:n, n:].any()
    for q, (query, query_pair, _) in enumerate(labels):
        for k, (key, key_pair, _) in enumerate(labels):
            sees = key != PROMPT if query == INPUT else key_pair == query_pair
            earlier = query != INPUT and key == GIST and key_pair < query_pair
            assert mask[q, k] == sees
            assert accumulated[q, k] == (k <= q and (sees or earlier))


def two_step_examples(tokenizer, n_gist, arch):
    records = several_gists.make_records(6, held_out=False)
    assert {len(record["steps"]) for record in records} == {1, 2}
    return [several_gists.layout(record, tokenizer, n_gist, arch) for record in records]


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("n_gist", [1, 3])
def test_prompts_compressed_apart_answer_as_under_the_mask(arch, n_gist, tokenizer):
    """Every logit of the input from the joined caches is that of the whole row."""
    model = small(arch, tokenizer.vocab_size)
    for e in two_step_examples(tokenizer, n_gist, arch):
        row, given = torch.tensor([e.prompt + e.input]), torch.tensor([e.input])
        segments, target = torch.tensor([e.segments]), torch.tensor([e.output])
        assert segments.shape == row.shape
        cache = several_gists.compress_apart(model, tokenizer, e)
        assert cache.length == n_gist * len(e.record["steps"])
        with torch.no_grad():
            whole = model(row, **several_gists.pair_masking(model, segments, target))
            # Everything is seen, as a decoder's input sees all columns that are left.
            cached = model(given, cache=cache, **({"target": target} if arch == "t5" else {}))
        assert (whole[:, -cached.shape[1] :] - cached).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_training_sees_the_pairs_as_they_are_answered(arch, tokenizer):
    """The loss of a batch of rows with one and two prompts is that from their joined caches."""
    model = small(arch, tokenizer.vocab_size)
    examples = two_step_examples(tokenizer, 2, arch)
    batch = data.collate(examples, tokenizer.pad_id)
    loss = several_gists.pair_loss(model, batch, "")
    alone = 0.0
    for e in examples:
        cache = several_gists.compress_apart(model, tokenizer, e)
        with torch.no_grad():
            if arch == "llama":
                logits = model(torch.tensor([e.input + e.output[:-1]]), cache=cache)
            else:
                logits = model(torch.tensor([e.input]), torch.tensor([e.output]), cache=cache)
        logits = logits[0, -len(e.output) :]
        alone += F.cross_entropy(logits, torch.tensor(e.output), reduction="sum").item()
    assert loss.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_batch_answers_from_several_gists_as_each_row_alone(arch, tokenizer):
    model = small(arch, tokenizer.vocab_size)
    examples = two_step_examples(tokenizer, 1, arch)
    together = several_gists.answer(model, tokenizer, examples, 6)
    assert together == [several_gists.answer(model, tokenizer, [e], 6)[0] for e in examples]


def test_caches_side_by_side_keep_their_order(tokenizer):
    model = small("llama", tokenizer.vocab_size)
    a, b = (model.compress(torch.tensor([[5, word]])) for word in (6, 7))
    both = several_gists.side_by_side([a, b])
    assert both.length == 4
    assert torch.equal(both.keys[:, :2], a.keys) and torch.equal(both.values[:, 2:], b.values)


def test_parts_compressed_one_after_the_other_are_those_of_one_pass(tokenizer):
    """Under `accumulate`, the gists of the first parts do not depend on the later ones."""
    model = small("llama", tokenizer.vocab_size)
    record = accumulating_gists.make_records(1, held_out=True)[0]
    e = accumulating_gists.layout(record, tokenizer, "accumulate")
    tokens, segments = eval.prompts_of([e], tokenizer)
    masked = accumulating_gists.rule_masking(model, segments, "accumulate")
    gists = []
    for end in [i + 1 for i, label in enumerate(e.segments) if label == GIST]:
        mask, at = masked["mask"][:, :, :end, :end], masked["positions"][:, :end]
        cache = model.compress(tokens[:, :end], mask, at, keep=segments[0, :end] == GIST)
        gists.append((cache.keys, cache.values))
    for n in (1, 2):
        for part, whole in zip(gists[n - 1], gists[2]):
            assert torch.allclose(part, whole[:, :n], atol=1e-5)


# ---- Attention ----


@pytest.mark.parametrize("setting", attention_sink.SETTINGS)
def test_the_input_s_attention_is_that_of_a_slow_sum(setting, records, tokenizer):
    condition, see_start = attention_sink.SETTINGS[setting]
    model = small("llama", tokenizer.vocab_size)
    e = data.layout(records["unseen"][0], tokenizer, 2, see_start=see_start)
    batch = data.collate([e], tokenizer.pad_id)
    layers = attention.attention_weights(model, batch["tokens"], batch["segments"], condition)
    P, T = len(e.prompt), len(e)
    places = [{0}, {P - 2, P - 1}, {P}]
    measured = attention_sink.attention_of_input(model, batch, condition)
    for weights, parts in zip(layers, measured, strict=True):
        for place, part in zip(places, parts, strict=True):
            seen = [
                weights[0, h, q, k].item() for h in range(2) for q in range(P + 1, T) for k in place
            ]
            assert part == pytest.approx(100 * sum(seen) / (2 * (T - P - 1)), abs=1e-4)


def test_a_gist_token_and_the_first_token_have_names_and_so_has_every_word(tokenizer):
    e = data.layout({"instruction": "Put lamp", "input": "", "output": ""}, tokenizer, 1)
    names = [attention.name_of(token, tokenizer) for token in e.prompt]
    assert names[0] == "<s>" and names[-1] == "<G>" and "Instruction" in names[1]


# ---- Long prompts ----


@pytest.mark.parametrize("n_shots", [1, 3])
def test_worked_examples_obey_the_instruction_and_stand_in_the_prompt(n_shots, tokenizer):
    for record in long_prompts.make_records(50, n_shots, held_out=False, seed=0):
        text, *shots = record["instruction"].split("\nInput: ")
        assert len(shots) == n_shots and not data.is_held_out(text)
        pairs = [shot.split("\nOutput: ") for shot in shots]
        if record["source"] == "reverse":
            assert all(answer.split() == given.split()[::-1] for given, answer in pairs)
        prompt = tokenizer.decode(data.layout(record, tokenizer, 1).prompt)
        assert all(f"Input: {given}\nOutput: {answer}" in prompt for given, answer in pairs)


# ---- Gist pretraining ----


@pytest.mark.parametrize("arch, see_start", [("llama", False), ("llama", True), ("t5", False)])
def test_pretraining_cuts_running_text_into_span_and_continuation(
    arch, see_start, tokenizer, tmp_path
):
    text = "".join(f"line {i} of the text\n" for i in range(200))
    middle = text.index("line 90")
    (tmp_path / "a.txt").write_text(text[:middle])
    (tmp_path / "b.txt").write_text(text[middle:])
    running = [i for line in text.splitlines() for i in tokenizer.encode(line)]
    joined = " ".join(map(str, running * 3))
    examples = gist_pretraining.text_examples(str(tmp_path), tokenizer, 300, 2, arch, see_start)
    assert len(examples) == 300 and len({len(e.prompt) for e in examples}) > 30
    for e in examples:
        span = [i for i in e.prompt if i not in (tokenizer.bos_id, tokenizer.gist_id)]
        assert 4 <= len(span) <= 64 and len(e.output) == 32
        assert e.prompt[-2:] == [tokenizer.gist_id] * 2
        labels = [START if see_start else PROMPT] + [PROMPT] * (len(e.prompt) - 3) + [GIST] * 2
        assert e.segments == labels + [INPUT] * len(e.input)
        assert " ".join(map(str, span + e.output)) in joined


@pytest.mark.parametrize("content", ["", "too short"])
def test_too_little_text_is_an_error(content, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(data.DataError, match="text"):
        gist_pretraining.text_examples(str(tmp_path / "a.txt"), tokenizer, 10, 1, "llama", False)


# ---- Distillation ----


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_distillation_has_the_gradient_of_the_slow_sum_over_places_and_tokens(
    arch, records, tokenizer
):
    """One example at a time, without padding, from the logits of every place."""
    model, teacher = small(arch, tokenizer.vocab_size), small(arch, tokenizer.vocab_size)
    teacher.init_weights(torch.Generator().manual_seed(1))
    model, teacher = model.double(), teacher.double()
    examples = [data.layout(record, tokenizer, 2, arch) for record in records["train"][:5]]

    def logits(model, e, condition):
        output = e.output if arch == "llama" else []
        source = torch.tensor([e.prompt + e.input + output])
        segments = torch.tensor([e.segments + [INPUT] * len(output)])
        masked = gist_mask.masking(model, segments, condition, target=torch.tensor([e.output]))
        whole = model(source, **masked)[0]
        return whole[-1 - len(e.output) : -1] if arch == "llama" else whole

    slow, slow_of_labels = 0.0, 0.0
    for e in examples:
        p = logits(teacher, e, "pos_control").softmax(-1).detach()
        log_p = logits(model, e, "gist").log_softmax(-1)
        slow -= (p * log_p).sum()
        slow_of_labels -= sum(log_p[place, token] for place, token in enumerate(e.output))
    slow.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    batch = data.collate(examples, tokenizer.pad_id)
    loss = distillation.distillation_loss(model, batch, "gist", teacher, "pos_control")
    loss.backward()
    of_labels = train.batch_loss(model, batch, "gist")
    torch.testing.assert_close(of_labels, slow_of_labels.float())
    torch.testing.assert_close(loss, slow.float())  # the models are in fp64, their logits in fp32
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- A cartridge ----


def test_the_loss_from_a_cache_is_that_of_the_whole_row_and_moves_the_cache(records, tokenizer):
    model = small("llama", tokenizer.vocab_size)
    same = [record | {"instruction": "Say it."} for record in records["train"][:3]]
    examples = [data.layout(record, tokenizer, 1) for record in same]
    gist = eval.compress_prompts(model, *eval.prompts_of(examples[:1], tokenizer))
    batch = data.collate(examples, tokenizer.pad_id)
    whole = train.batch_loss(model, batch, "gist") / sum(len(e.output) for e in examples)
    before = cartridge.cached_loss(model, gist, examples)
    assert before.item() == pytest.approx(whole.item(), rel=1e-5)
    trained = cartridge.train_cartridge(model, gist, examples, steps=20, lr=0.05)
    assert cartridge.cached_loss(model, trained, examples) < before
    assert torch.equal(trained.segments, gist.segments)


@pytest.mark.parametrize("n_gist", [0, 2])
def test_draw_masks_writes_a_picture(n_gist, tmp_path):
    picture = tmp_path / "masks.png"
    assert f"wrote {picture}" in run("draw_masks", "--n_gist", n_gist, "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [picture]


# ---- Gists in files ----


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_gist_comes_back_from_its_file_in_any_dtype(arch, tmp_path):
    model, file = small(arch, 30), tmp_path / "a.gist"
    tokens = torch.tensor([[3, 4, 5, G], [6, 7, 8, G]])
    gist = eval.compress_prompts(model, tokens, gist_mask.segments(tokens, G))
    gist_library.save_gist(file, gist, model, "Say é.")
    again, instruction = gist_library.load_gist(file, model)
    assert instruction == "Say é."
    for name, value in vars(gist).items():
        loaded = vars(again)[name]
        assert loaded is None if value is None else torch.equal(value, loaded)
    again, _ = gist_library.load_gist(file, model.bfloat16())
    assert again.keys.dtype == again.values.dtype == torch.bfloat16
    model.generate(torch.tensor([[3], [4]]), cache=again, max_new_tokens=2)
    gist_library.save_gist(file, again, model, "Say é.")
    assert gist_library.load_gist(file, model.float())[0].keys.dtype == torch.float32


def test_a_gist_of_another_model_and_half_a_file_are_refused(tmp_path):
    model, file = small("llama", 30), tmp_path / "a.gist"
    gist_library.save_gist(file, model.compress(torch.tensor([[5, 6, 7]])), model, "Say a.")
    with torch.no_grad():
        model.layers[1].attention.wq.weight[0, 0] += 1
    with pytest.raises(data.DataError, match="a.gist: a gist of another model"):
        gist_library.load_gist(file, model)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(data.DataError, match="a.gist: .*--instruction"):
        gist_library.load_gist(file, model)


def test_an_empty_instruction_is_no_gist(make_run, monkeypatch, tmp_path):
    flags = [make_run("llama"), tmp_path / "a.gist", "--instruction", ""]
    monkeypatch.setattr(sys, "argv", ["gist_library", *map(str, flags)])
    with pytest.raises(data.DataError, match="empty"):
        gist_library.main()


def test_gist_library_answers_from_the_file_as_from_the_prompt(make_run, tokenizer, tmp_path):
    folder, file = make_run("llama"), tmp_path / "lamp.gist"
    text = "Put lamp at the front."
    made = run("gist_library", folder, file, "--instruction", text, "--input", "fox cup")
    used = run("gist_library", folder, file, "--input", "fox cup")
    assert made.splitlines()[1:] == used.splitlines() and text in used
    model, tokenizer, config = eval.open_run(str(folder))
    e = eval.lay_out(text, "fox cup", tokenizer, config)
    answers = eval.answer(model, tokenizer, [e], config["condition"], 64)
    assert used.partition("\n")[2].strip() == f"fox cup -> {answers[0]}"


# ---- The whole method in one file ----


def test_micro_imports_only_torch_and_the_standard_library():
    tree = ast.parse((ROOT / "tests" / "exercises" / "micro.py").read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    assert sorted(names) == ["random", "torch", "torch"]


@pytest.mark.parametrize("condition", ["gist", "pos_control", "neg_control"])
def test_micro_masks_are_those_of_the_paper(condition):
    segments = ["prompt"] * 3 + ["gist"] + ["input"] * 11
    hidden = {"gist": ["prompt"], "pos_control": [], "neg_control": ["prompt", "gist"]}[condition]
    mask = micro.gist_mask(condition)
    assert mask.shape == (15, 15)
    for query in range(15):
        for key in range(15):
            is_hidden = segments[query] == "input" and segments[key] in hidden
            assert mask[query, key] == (key <= query and not is_hidden)


def test_micro_outputs_are_what_the_instructions_ask_for():
    patterns = {"front": "xyabcd", "back": "abcdxy", "ends": "xabcdy", "middle": "abxycd"}
    instructions = [(kind, x, y) for kind in patterns for x, y in ("ab", "ca", "pp")]
    for row in micro.make_rows(instructions, 200, random.Random(0)):
        kind, x, y, gist, a, b, c, d, equals, *output = [micro.VOCABULARY[token] for token in row]
        letters = {"x": x, "y": y, "a": a, "b": b, "c": c, "d": d}
        assert output == [letters[name] for name in patterns[kind]]
        assert (gist, equals) == ("G", "=")


def test_micro_gives_the_same_logits_from_one_cached_gist_as_from_whole_rows():
    torch.manual_seed(0)
    model = micro.Transformer().requires_grad_(False)
    rows = torch.randint(len(micro.VOCABULARY), (5, micro.END))
    rows[:, : micro.INPUT] = rows[0, : micro.INPUT]  # one prompt, five inputs
    mask = micro.gist_mask("gist")
    whole, _ = model(rows, torch.arange(15), mask)
    gist = micro.compress(model, rows[:1, : micro.INPUT])
    assert [column.shape for column in gist] == [(1, 1, 128)] * 2
    cached, _ = model(rows[:, 4:], torch.arange(4, 15), mask[4:, 3:], gist)
    torch.testing.assert_close(cached, whole[:, 4:])


def test_micro_answers_token_by_token_what_the_model_finds_likeliest():
    torch.manual_seed(0)
    model = micro.Transformer().requires_grad_(False)
    tokens = torch.randint(len(micro.VOCABULARY), (3, micro.OUTPUT))
    for condition in micro.HIDDEN:
        row = torch.cat([tokens, micro.answer(model, tokens, condition)], dim=1)
        logits, _ = model(row, torch.arange(15), micro.gist_mask(condition))
        assert torch.equal(logits[:, 8:14].argmax(dim=2), row[:, 9:])
    gists = micro.compress(model, tokens[:, : micro.INPUT])
    from_gists = micro.answer(model, tokens[:, micro.INPUT :], "gist", gists)
    assert torch.equal(from_gists, micro.answer(model, tokens, "gist"))


def test_micro_runs(capsys):
    micro.main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["neg_control", "pos_control", "gist"]
    assert lines[3].endswith("True")
    assert len(lines[4].removeprefix("one of them: ").split()) == micro.END


def test_micro_trains_to_the_same_weights_every_time():
    rows = micro.make_rows([("ends", "a", "b")], 20, random.Random(0))
    first, second = (micro.train("gist", rows, 2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_learns_one_instruction_in_a_few_steps():
    rows = micro.make_rows([("ends", "a", "b")], 1_000, random.Random(0))
    model = micro.train("neg_control", rows, 60)  # one instruction needs no prompt
    right = micro.answer(model, rows[:, : micro.OUTPUT], "neg_control") == rows[:, micro.OUTPUT :]
    assert right[:, [0, 5]].all() and right.float().mean() > 0.5


# ---- Facts ----


@pytest.mark.parametrize("n_facts, n_asked", [(1, 1), (2, 1), (8, 1), (8, 3), (8, 8)])
def test_a_record_of_facts_asks_for_some_of_them(n_facts, n_asked):
    record = where_one_token_fails.make_record(n_facts, n_asked, random.Random(0))
    facts = [fact.split() for fact in record["instruction"].split(", ")]
    values = dict(facts)
    assert len(facts) == len(values) == n_facts  # no name twice
    asked = record["input"].split()
    assert len(set(asked)) == n_asked and facts[record["place"]][0] == asked[0]
    assert record["output"].split() == [word for name in asked for word in (name, values[name])]


def test_percentages_of_facts_are_those_of_their_group():
    places = {1: [0], 2: [0, 1], 4: [0, 1, 2, 3]}
    tests = [{"n_facts": n, "place": place} for n, some in places.items() for place in some]
    right = [True, False, True, False, True, False, True]
    assert where_one_token_fails.by_number(right, tests) == {1: 100, 2: 50, 4: 50}
    assert where_one_token_fails.by_place(right, tests) == {"first": 0, "middle": 50, "last": 100}


def test_where_one_token_fails_runs_and_draws(make_run, tmp_path):
    picture, start = tmp_path / "facts.png", make_run("llama", "pos_control")
    flags = (start, "--n_gist", 1, 2, "--max_facts", 3, *SHORT, "--n_test", 4, "--out", picture)
    lines = run("where_one_token_fails", *flags).splitlines()
    assert [line.split(" 1: ")[0] for line in lines] == [
        "gist, 1 tokens",
        "gist, 2 tokens",
        "pos_control",
    ]
    assert picture.stat().st_size > 5000


# ---- Only the gist is trained ----


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_gist_embedding_only_moves_one_row_and_nothing_else(arch, records, tokenizer):
    model = small(arch, tokenizer.vocab_size)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    examples, _ = data.make_examples(records["train"][:20], tokenizer, 1, arch)
    gist_embedding_only.train_under_gist_mask(model, tokenizer, examples, True, 2, 8, 0.01)
    moved = {}
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, before[name]):
            moved[name] = (weight != before[name]).any(dim=1).nonzero().flatten().tolist()
    assert moved == {"embedding.weight": [tokenizer.gist_id]}


def test_gist_embedding_only_runs(make_run):
    flags = ("--steps", 2, "--batch_size", 4, "--n_train", 100, "--n_test", 5)
    lines = run("gist_embedding_only", make_run("llama", "pos_control"), *flags).splitlines()
    results = [line.split("  ")[0] for line in lines if "right" in line]
    assert results == ["as it was"] * 3 + ["gist's embedding trained", "all weights trained"]


@pytest.fixture
def lora(tokenizer):
    """A frozen model, and the same with a change that is not 0 for gist tokens."""
    frozen = small("llama", tokenizer.vocab_size)
    model = gist_lora.GistLora(frozen, tokenizer.gist_id, rank=3).eval()
    for part in model.changed:
        torch.nn.init.normal_(part.b.weight, std=0.5)
    return frozen, model


@torch.no_grad()
def test_gist_lora_changes_what_follows_a_gist_and_no_other_text(lora, tokenizer):
    frozen, model = lora
    text = torch.randint(tokenizer.gist_id, (2, 9))
    assert torch.equal(model(text), frozen(text))
    text[:, 4] = tokenizer.gist_id
    assert torch.equal(model(text)[:, :4], frozen(text)[:, :4])
    assert ((model(text) - frozen(text)).abs().amax(dim=2) > 1e-3)[:, 4:].all()


def test_gist_lora_begins_as_the_model_and_trains_nothing_of_it(records, tokenizer):
    frozen = small("llama", tokenizer.vocab_size)
    model = gist_lora.GistLora(frozen, tokenizer.gist_id, rank=3)
    text = torch.tensor([[5, 6, tokenizer.gist_id, 7]])
    assert torch.equal(model(text), frozen(text))
    examples, _ = data.make_examples(records["train"][:20], tokenizer, 1)
    config = train.fill_in(train.Config(max_steps=2, optimizer="adamw", device="cpu"))
    train.fit(model, tokenizer, examples, config)
    # In the last layer, nothing goes on from a gist but its keys and values.
    moved = [part.b.weight.any().item() for part in model.changed]
    assert moved == [True, True, True, True] + [False, True, True, False]
    for name, weight in frozen.state_dict().items():
        after = model.state_dict()
        assert torch.equal(weight, after[name] if name in after else after[in_lora(name)])


def in_lora(name):
    """Where a projection's own weights are: wq.weight becomes wq.frozen.weight."""
    return name.replace(".weight", ".frozen.weight")


def test_gist_lora_answers_from_a_cached_gist_as_from_the_whole_row(lora, records, tokenizer):
    _, model = lora
    examples, _ = data.make_examples(records["train"][:5], tokenizer, 2)
    cache = eval.compress_prompts(model, *eval.prompts_of(examples, tokenizer))
    whole = eval.answer(model, tokenizer, examples, "gist", 8)
    assert eval.answer(model, tokenizer, examples, "gist", 8, cache) == whole


def test_gist_lora_trains_like_train_py_and_goes_on(make_run, folder, tmp_path):
    start, out = make_run("llama", "pos_control"), tmp_path / "lora"
    begin = ("--init_from", start, "--data", folder, "--out_dir", out)
    flags = (*begin, "--rank", 2, "--n_test", 5, "--max_steps", 2, "--lr", 1e-2, "--n_gist", 2)
    text = run("gist_lora", *flags)
    assert "LoRA of rank 2" in text and text.splitlines()[-1].endswith("True")
    assert "LoRA of rank 2" in run("gist_lora", *flags, "--resume")  # nothing left to train
    command = [sys.executable, "train.py", "--resume", "--out_dir", out]
    refused = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and "LoRA of rank 2" in refused.stderr


def test_keywords_are_the_words_of_the_highest_tfidf():
    """Against a slow count: words of the training instructions are common, others rarest."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=6)) for _ in range(60)]
    train, given = set(texts[:40]), texts[40:] + ["a new word, a NEW one", "?!"]

    def idf(word):
        have = sum(word in text.split() for text in train)
        return math.log(len(train) / have) if have else math.inf

    rarest = max(idf(word) for text in train for word in text.split())
    for n in (1, 2, 5):
        for text in given:
            words = re.findall(r"\w+", text.lower())
            score = {word: words.count(word) * min(idf(word), rarest) for word in words}
            kept = keywords.keywords(text, keywords.inverse_frequencies(train), n).split()
            assert len(kept) == min(n, len(score)) and kept == sorted(kept, key=words.index)
            least = min([score[word] for word in kept], default=0)
            assert all(score[word] <= least for word in score.keys() - set(kept))


def test_keywords_writes_a_data_set_like_the_one_that_it_reads(folder, tmp_path):
    run("keywords", "--data", folder, "--n", 2, "--out", tmp_path / "short")
    whole, short = map(data.load_instructions, (str(folder), str(tmp_path / "short")))
    for split, records in whole.items():
        assert len(short[split]) == len(records)
        for before, after in zip(records, short[split]):
            assert len(after["instruction"].split()) == 2
            assert (before["input"], before["output"]) == (after["input"], after["output"])


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 3])
def test_a_gist_that_starts_as_its_prompt_is_the_mean_of_the_tokens_before_it(n_gist, tokenizer):
    model = small("llama", tokenizer.vocab_size)
    weight = model.embedding.weight.clone()
    gist, pad = tokenizer.gist_id, tokenizer.pad_id
    gist_starts.start_gist(model, tokenizer, "prompt")
    model.embedding.weight[gist] = 0.5  # what the row has learned
    rows = [[5, 6, 7] + [gist] * n_gist + [8, 9], [pad, pad, 4] + [gist] * n_gist + [6, 5]]
    for row, x in zip(rows, model.embedding(torch.tensor(rows))):
        prompt = [weight[token] for token in row[:3] if token != pad]
        for token, vector in zip(row, x):
            expected = 0.5 + sum(prompt) / len(prompt) if token == gist else weight[token]
            torch.testing.assert_close(vector, expected)
    torch.testing.assert_close(model.embedding(torch.tensor([[5, 6]]))[0], weight[[5, 6]])


@torch.no_grad()
def test_a_gist_starts_as_the_row_that_is_named(tokenizer):
    for start, token in (("first", tokenizer.bos_id), ("a:", tokenizer.encode("a:")[-1])):
        model = small("llama", tokenizer.vocab_size)
        gist_starts.start_gist(model, tokenizer, start)
        weight = model.embedding.weight
        assert torch.equal(weight[tokenizer.gist_id], weight[token])


def test_gist_starts_trains_a_run_that_eval_opens_unless_the_embedding_is_a_function(
    folder, records, tokenizer, tmp_path
):
    base = tmp_path / "base"
    shape = dict(vocab_size=tokenizer.gist_id, d_model=16, n_layers=1, d_ff=32)
    model = Llama(LlamaConfig(**shape, n_heads=2, n_kv_heads=2, head_dim=8))
    model.init_weights(torch.Generator().manual_seed(0))
    data.save_model(base, model, tokenizer)
    flags = [
        "--init_from",
        base,
        "--data",
        folder,
        "--max_steps",
        2,
        "--batch_size",
        4,
        "--no_eval",
    ]
    for start in ("first", "prompt"):
        out = tmp_path / start
        run("gist_starts", "--start", start, *flags, "--out_dir", out, "--eval_every", 2)
        assert "loss_unseen" in (out / "train_log.jsonl").read_text().splitlines()[-1]
    eval.open_run(str(tmp_path / "first"), device="cpu")
    with pytest.raises(data.DataError, match="of_mean"):
        eval.open_run(str(tmp_path / "prompt"), device="cpu")
