"""The worked solutions run, and gists that they cache answer exactly as their masks say."""

import json
import random
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
from model import Llama, LlamaConfig
from t5 import T5, T5Config

from exercises import (  # isort: skip
    accumulating_gists,
    attention_sink,
    cartridge,
    distillation,
    gist_library,
    gist_pretraining,
    learning_curve,
    live_table,
    long_prompts,
    mean_of_two_gists,
    several_gists,
    what_else_to_keep,
)

ROOT = Path(__file__).parent.parent
G = 9  # the gist's id in rows made by hand


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

    def make(arch, condition="gist"):
        folder = tmp_path_factory.mktemp(arch)
        config = asdict(train.fill_in(train.Config(arch=arch, n_gist=2, condition=condition)))
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


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "exercises").glob("*.py")))
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
    command += ["--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "another --seed" in done.stderr


def test_attention_sink_trains_and_evaluates_a_run(folder, make_run, tmp_path):
    model, tokenizer = data.load_model(make_run("llama"))
    data.save_model(tmp_path / "pretrained", model, tokenizer)
    out_dir = tmp_path / "sink"
    flags = ("--data", folder, "--max_steps", 2, "--batch_size", 4, "--device", "cpu")
    flags += ("--out_dir", out_dir, "--max_new_tokens", 5)
    text = run("attention_sink", "--init_from", tmp_path / "pretrained", *flags)
    assert f"{out_dir} unseen" in text
    metrics = json.loads((out_dir / "metrics.json").read_text())
    assert metrics["steps"] == 2
    run("attention_sink", "--init_from", tmp_path / "pretrained", *flags, "--resume")
    assert json.loads((out_dir / "metrics.json").read_text()) == metrics
    command = [sys.executable, "-m", "tests.exercises.attention_sink", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--init_from" in done.stderr


def test_attention_sink_learns_from_a_teacher_under_its_own_masks(folder, make_run, tmp_path):
    pretrained, teacher, out_dir = (tmp_path / name for name in ("pretrained", "teacher", "sink"))
    data.save_model(pretrained, *data.load_model(make_run("llama")))
    same = {"data": str(folder), "init_from": str(pretrained), "max_steps": 1, "device": "cpu"}
    same["batch_size"] = 60  # all examples
    train.train(train.Config(condition="pos_control", out_dir=str(teacher), **same))
    flags = [text for name, value in same.items() for text in (f"--{name}", str(value))]
    run("attention_sink", "--teacher", teacher, *flags, "--no_eval", "--out_dir", out_dir)
    logged = json.loads((out_dir / "train_log.jsonl").read_text())["loss"]

    model, tokenizer = data.load_model(pretrained)
    data.add_gist_token(model, tokenizer)
    examples, _ = data.make_examples(data.load_instructions(str(folder))["train"], tokenizer, 1)
    batch = data.collate(examples, tokenizer.pad_id)
    rest = (batch, tokenizer.gist_id, "gist", data.load_model(teacher)[0], "pos_control")
    usual = distillation.distillation_loss(model, *rest)
    with attention_sink.first_token_is_input(tokenizer.bos_id):
        loss = distillation.distillation_loss(model, *rest)
    n_labels = sum(len(e.output) for e in examples)
    assert logged == pytest.approx(loss.item() / n_labels, rel=1e-5)
    assert logged != pytest.approx(usual.item() / n_labels, rel=1e-5)


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


def test_every_way_to_cut_a_cache_down_keeps_as_many_columns(tokenizer):
    model = small("llama", tokenizer.vocab_size)
    cache = model.compress(torch.arange(7)[None])
    attended = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.1, 0.2, 0.1])
    for name, keep in what_else_to_keep.WAYS.items():
        kept = keep(cache, 2, attended)
        assert kept.length == (7 if name == "all" else 2)
        assert kept.next_position.item() == cache.next_position.item()
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


def test_learning_curve_of_losses_takes_the_same_batches_of_all_three(tmp_path):
    level = {"neg_control": 3.0, "gist": 2.5, "pos_control": 1.0}
    for condition, loss in level.items():
        folder = tmp_path / condition
        folder.mkdir()
        config = {"condition": condition, "data_hash": "", "batch_size": 8, "seed": 0}
        (folder / "config.json").write_text(json.dumps({"gisting": config}))
        losses = [loss + 0.1 * step for step in range(7 if condition == "gist" else 9)]
        lines = [json.dumps({"step": i + 1, "loss": x}) for i, x in enumerate(losses)]
        (folder / "train_log.jsonl").write_text("\n".join(lines))
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
            encoder = gist_mask.encoder_mask(live_table.ROW, G, name)
            assert not torch.equal(encoder, gist_mask.encoder_mask(live_table.ROW, G)) or (
                query == key and query != 0  # a gist token and an input token see themselves
            )


# ---- Several gists ----


def random_row(rng):
    """One to three prompts with gist tokens, then an input; segment, pair and position of each."""
    tokens, labels, n_gist, n_pairs = [], [], rng.randint(1, 3), rng.randint(1, 3)
    for pair in range(n_pairs):
        p = rng.randint(0 if pair == 0 else 1, 4)
        tokens += [rng.randrange(G) for _ in range(p)] + [G] * n_gist
        first = pair * n_gist
        labels += [("prompt", pair, first - p + i) for i in range(p)]
        labels += [("gist", pair, first + i) for i in range(n_gist)]
    q = rng.randint(0, 3)
    tokens += [rng.randrange(G) for _ in range(q)]
    return tokens, labels + [("input", None, n_pairs * n_gist + i) for i in range(q)]


@pytest.mark.parametrize("seed", range(30))
def test_masks_and_positions_of_several_pairs_are_those_of_the_rule(seed):
    tokens, labels = random_row(random.Random(seed))
    row = torch.tensor([tokens])
    everything = torch.ones_like(row, dtype=torch.bool)
    assert several_gists.positions(row, G)[0].tolist() == [at for _, _, at in labels]
    mask = several_gists.pair_mask(row, G, everything)[0, 0]
    accumulated = accumulating_gists.rule_mask(row, G, everything, "accumulate")[0, 0]
    for q, (query, query_pair, _) in enumerate(labels):
        for k, (key, key_pair, _) in enumerate(labels):
            sees = key != "prompt" if query == "input" else key_pair == query_pair
            earlier = query != "input" and key == "gist" and key_pair < query_pair
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
        everything = torch.ones_like(row, dtype=torch.bool)
        mask = several_gists.pair_mask(row, tokenizer.gist_id, everything)
        positions = several_gists.positions(row, tokenizer.gist_id)
        cache = several_gists.compress_apart(model, e.prompt, tokenizer.gist_id)
        assert cache.length == n_gist * len(e.record["steps"])
        with torch.no_grad():
            if arch == "llama":
                whole = model(row, mask.tril(), positions)[:, -len(e.input) :]
                cached = model(given, cache=cache)
            else:
                target = torch.tensor([[0, *e.output]])
                seen = gist_mask.segments(row, tokenizer.gist_id) != gist_mask.PROMPT
                whole = model(row, target, mask, seen[:, None, None], positions=positions)
                cached = model(given, target, cache=cache)
        assert (whole - cached).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_training_sees_the_pairs_as_they_are_answered(arch, records, tokenizer):
    """The loss of a batch of rows with one and two prompts is that from their joined caches."""
    model = small(arch, tokenizer.vocab_size)
    examples = two_step_examples(tokenizer, 2, arch)
    batch = data.collate(examples, tokenizer.pad_id, arch)
    loss = several_gists.pair_loss(model, batch, tokenizer.gist_id, "")
    alone = 0.0
    for e in examples:
        cache = several_gists.compress_apart(model, e.prompt, tokenizer.gist_id)
        with torch.no_grad():
            if arch == "llama":
                logits = model(torch.tensor([e.input + e.output[:-1]]), cache=cache)
            else:
                target = torch.tensor([[0, *e.output[:-1]]])
                logits = model(torch.tensor([e.input]), target, cache=cache)
        logits = logits[0, -len(e.output) :]
        alone += F.cross_entropy(logits, torch.tensor(e.output), reduction="sum").item()
    assert loss.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_batch_answers_from_several_gists_as_each_row_alone(arch, records, tokenizer):
    model = small(arch, tokenizer.vocab_size)
    examples = two_step_examples(tokenizer, 1, arch)
    together = several_gists.answer(model, tokenizer, examples, 6)
    assert together == [several_gists.answer(model, tokenizer, [e], 6)[0] for e in examples]


def test_joined_caches_keep_their_order(tokenizer):
    model = small("llama", tokenizer.vocab_size)
    a, b = (model.compress(torch.tensor([[5, word]])) for word in (6, 7))
    both = several_gists.join([a, b])
    assert both.length == 4
    assert torch.equal(both.keys[:, :2], a.keys) and torch.equal(both.values[:, 2:], b.values)


def test_parts_compressed_one_after_the_other_are_those_of_one_pass(tokenizer):
    """Under `accumulate`, the gists of the first parts do not depend on the later ones."""
    model = small("llama", tokenizer.vocab_size)
    record = accumulating_gists.make_records(1, held_out=True)[0]
    prompt = accumulating_gists.layout(record, tokenizer, "accumulate").prompt
    ends = [i + 1 for i, token in enumerate(prompt) if token == tokenizer.gist_id]
    keys = []
    for end in ends:
        row = torch.tensor([prompt[:end]])
        everything = torch.ones_like(row, dtype=torch.bool)
        mask = accumulating_gists.rule_mask(row, tokenizer.gist_id, everything, "accumulate")
        at = several_gists.positions(row, tokenizer.gist_id)
        at = torch.cat([at, at[:, -1:] + 1], dim=1)
        cache = model.compress(row, mask=mask, positions=at, keep=row[0] == tokenizer.gist_id)
        keys.append(cache.keys)
    assert torch.allclose(keys[0], keys[2][:, :1], atol=1e-5)
    assert torch.allclose(keys[1], keys[2][:, :2], atol=1e-5)


# ---- The attention sink ----


@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_with_the_sink_the_input_sees_the_first_token_and_prompts_do_not(condition):
    rng, bos = random.Random(0), 1
    for _ in range(20):
        kinds = ["first"] + ["prompt"] * rng.randint(0, 4) + ["gist"] * rng.randint(1, 3)
        kinds += ["input"] * rng.randint(0, 4)
        ids = {"first": bos, "gist": G}
        tokens = torch.tensor([[ids.get(kind, rng.randrange(2, G)) for kind in kinds]])
        with attention_sink.first_token_is_input(bos):
            mask = gist_mask.decoder_mask(tokens, G, condition)[0, 0]
        unseen = set()
        if condition != "pos_control":
            unseen = {("prompt", "first"), ("gist", "first"), ("input", "prompt")}
        if condition == "neg_control":
            unseen.add(("input", "gist"))
        for q, query in enumerate(kinds):
            for k, key in enumerate(kinds):
                assert mask[q, k] == (k <= q and (query, key) not in unseen)
    after = gist_mask.decoder_mask(torch.tensor([[bos, 2, G, 3]]), G)  # the usual masks are back
    assert after[0, 0, 3].tolist() == [False, False, True, True]


@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_with_the_sink_a_batch_answers_from_the_cache_as_the_whole_row(
    condition, records, tokenizer
):
    model = small("llama", tokenizer.vocab_size)
    gist_id = tokenizer.gist_id
    examples = [data.layout(record, tokenizer, 2) for record in records["unseen"][:6]]
    assert len({len(e.prompt) for e in examples}) > 1
    with attention_sink.first_token_is_input(tokenizer.bos_id):
        answers = eval.answer(model, tokenizer, examples, condition, 6)
        for e, text in zip(examples, answers):
            row, new = e.prompt + e.input, []
            while len(new) < 6 and new[-1:] != [tokenizer.eos_id]:
                tokens = torch.tensor([row + new])
                mask = gist_mask.decoder_mask(tokens, gist_id, condition)
                with torch.no_grad():
                    logits = model(tokens, mask, gist_mask.positions(tokens, gist_id))
                new.append(logits[0, -1].argmax().item())
            assert text == tokenizer.decode([i for i in new if i != tokenizer.eos_id]).strip()
        prompts = eval.pad_left([examples[0].prompt], model, tokenizer)
        cache = eval.compress_prompts(model, *prompts, gist_id, condition)
    kept = {"gist": 1 + 2, "pos_control": len(examples[0].prompt), "neg_control": 1}
    assert cache.length == kept[condition]


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


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_pretraining_cuts_running_text_into_span_and_continuation(arch, tokenizer, tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(200))
    middle = text.index("line 90")
    (tmp_path / "a.txt").write_text(text[:middle])
    (tmp_path / "b.txt").write_text(text[middle:])
    running = [i for line in text.splitlines() for i in tokenizer.encode(line)]
    joined = " ".join(map(str, running * 3))
    examples = gist_pretraining.text_examples(str(tmp_path), tokenizer, 2, arch, 300)
    assert len(examples) == 300 and len({len(e.prompt) for e in examples}) > 30
    for e in examples:
        span = [i for i in e.prompt if i not in (tokenizer.bos_id, tokenizer.gist_id)]
        assert 4 <= len(span) <= 64 and len(e.output) == 32
        assert e.prompt[-2:] == [tokenizer.gist_id] * 2
        assert " ".join(map(str, span + e.output)) in joined


@pytest.mark.parametrize("content", ["", "too short"])
def test_too_little_text_is_an_error(content, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(data.DataError, match="text"):
        gist_pretraining.text_examples(str(tmp_path / "a.txt"), tokenizer, 1, "llama", 10)


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
    gist_id = tokenizer.gist_id

    def logits(model, e, condition):
        source = torch.tensor([e.prompt + e.input + (e.output if arch == "llama" else [])])
        where = gist_mask.positions(source, gist_id)
        if arch == "llama":
            mask = gist_mask.decoder_mask(source, gist_id, condition)
            return model(source, mask, where)[0, -1 - len(e.output) : -1]
        mask = gist_mask.encoder_mask(source, gist_id, condition)
        cross_mask = gist_mask.cross_mask(source, gist_id, condition)
        target = torch.tensor([[model.config.start_id] + e.output[:-1]])
        return model(source, target, mask, cross_mask, positions=where)[0]

    slow, slow_of_labels = 0.0, 0.0
    for e in examples:
        p = logits(teacher, e, "pos_control").softmax(-1).detach()
        log_p = logits(model, e, "gist").log_softmax(-1)
        slow -= (p * log_p).sum()
        slow_of_labels -= sum(log_p[place, token] for place, token in enumerate(e.output))
    slow.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    batch = data.collate(examples, tokenizer.pad_id, arch)
    loss = distillation.distillation_loss(model, batch, gist_id, "gist", teacher, "pos_control")
    loss.backward()
    of_labels = train.batch_loss(model, batch, gist_id, "gist")
    torch.testing.assert_close(of_labels, slow_of_labels.float())
    torch.testing.assert_close(loss, slow.float())  # the models are in fp64, their logits in fp32
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- A cartridge ----


def test_the_loss_from_a_cache_is_that_of_the_whole_row_and_moves_the_cache(records, tokenizer):
    model = small("llama", tokenizer.vocab_size)
    e = data.layout(records["train"][0], tokenizer, 1)
    gist_id = tokenizer.gist_id
    prompt, attention_mask = data.pad([e.prompt], tokenizer.pad_id)
    gist = eval.compress_prompts(model, prompt, attention_mask, gist_id)
    batch = data.collate([e], tokenizer.pad_id)
    whole = train.batch_loss(model, batch, gist_id, "gist") / len(e.output)
    before = cartridge.cached_loss(model, gist, [e])
    assert before.item() == pytest.approx(whole.item(), rel=1e-5)
    trained = cartridge.train_cartridge(model, gist, [e], steps=20, lr=0.05)
    assert cartridge.cached_loss(model, trained, [e]) < before
    assert torch.equal(trained.positions, gist.positions)


@pytest.mark.parametrize("n_gist", [0, 2])
def test_draw_masks_writes_a_picture(n_gist, tmp_path):
    picture = tmp_path / "masks.png"
    assert f"wrote {picture}" in run("draw_masks", "--n_gist", n_gist, "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [picture]


# ---- Gists in files ----


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_gist_comes_back_from_its_file_in_any_dtype(arch, tmp_path):
    model, file = small(arch, 30), tmp_path / "a.gist"
    gist = eval.compress_prompts(model, torch.tensor([[3, 4, 5, G], [6, 7, 8, G]]), None, G)
    gist_library.save_gist(file, gist, model, "Say é.")
    again, instruction = gist_library.load_gist(file, model)
    assert instruction == "Say é."
    for name, value in vars(gist).items():
        assert torch.equal(value, vars(again)[name])
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


def test_gist_library_answers_from_the_file_as_from_the_prompt(make_run, tokenizer, tmp_path):
    folder, file = make_run("llama"), tmp_path / "lamp.gist"
    text = "Put lamp at the front."
    made = run("gist_library", folder, file, "--instruction", text, "--input", "fox cup")
    used = run("gist_library", folder, file, "--input", "fox cup")
    assert made.splitlines()[1:] == used.splitlines() and text in used
    model, tokenizer, config = eval.open_run(str(folder))
    record = {"instruction": text, "input": "fox cup", "output": ""}
    e = data.layout(record, tokenizer, config["n_gist"], config["arch"])
    answers = eval.answer(model, tokenizer, [e], config["condition"], 64)
    assert used.partition("\n")[2].strip() == f"fox cup -> {answers[0]}"
