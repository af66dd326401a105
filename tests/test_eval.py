"""Evaluating runs: answers, losses, outputs files, tables, and what a user can do wrong."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import gist_mask
import train
from model import Llama, LlamaConfig
from t5 import T5, T5Config

ROOT = Path(__file__).parent.parent


def command(*args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, ROOT / "eval.py", *map(str, args)], capture_output=True, text=True, cwd=cwd
    )


def train_run(folder, out, **changes):
    """A run of two gist tokens, hardly trained."""
    sizes = dict(d_model=16, n_layers=2, n_heads=2, batch_size=4, vocab_size=400, max_steps=6)
    settings = dict(n_gist=2, data=str(folder), out_dir=str(out), device="cpu") | sizes | changes
    train.train(train.Config(**settings))
    return str(out)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return {arch: train_run(folder, out / arch, arch=arch) for arch in ("llama", "t5")}


@pytest.fixture(scope="module")
def evaluated(runs):
    return {arch: evaluation.evaluate_run(path, device="cpu") for arch, path in runs.items()}


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_metrics_and_outputs_are_left_for_every_split_that_there_is(arch, runs, evaluated):
    out = Path(runs[arch])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == evaluated[arch]
    described = {key: metrics[key] for key in ("condition", "n_gist", "arch", "steps")}
    assert described == {"condition": "gist", "n_gist": 2, "arch": arch, "steps": 6}
    assert metrics["unseen"]["n"] == 6 and metrics["human"]["n"] == 3 and "seen" not in metrics
    scores = [metrics["unseen"][m] for m in ("exact_match", "rouge1", "rouge2", "rougeL")]
    assert all(0 <= score <= 1 for score in scores) and metrics["unseen"]["loss"] > 0
    assert {f.name for f in out.glob("outputs*")} == {"outputs-unseen.csv", "outputs-human.csv"}


def test_outputs_files_hold_the_questions_and_references(runs, evaluated, folder):
    with open(Path(runs["llama"]) / "outputs-human.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for row, r in zip(rows, data.load_instructions(str(folder))["human"], strict=True):
        assert row["x"] == f"Instruction: {r['instruction']}\nInput: {r['input']}"
        assert row["y_true"] == r["output"]


def test_one_table_shows_all_runs_and_the_score_command_agrees(runs, capsys):
    evaluation.evaluate_runs(list(runs.values()), device="cpu")
    printed = capsys.readouterr().out
    for path in runs.values():
        assert f"{path} unseen" in printed and f"{path} human" in printed
    evaluation.score_files([f"{runs['llama']}/outputs-unseen.csv"])
    scores = capsys.readouterr().out.splitlines()[1].split()[1:]
    row = next(line for line in printed.splitlines() if line.startswith(f"{runs['llama']} unseen"))
    assert row.split()[2 : 2 + len(scores)] == scores


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_loss_is_the_mean_of_a_token_and_answers_come_in_order(arch, runs, folder):
    model, tokenizer, config = evaluation.open_run(runs[arch], device="cpu")
    records = data.load_instructions(str(folder))["unseen"]
    examples, _ = data.make_examples(records, tokenizer, 2, arch)

    single = [evaluation.evaluate(model, tokenizer, [e], "gist", 5) for e in examples]
    loss, answers = evaluation.evaluate(model, tokenizer, examples, "gist", 5)
    labels = [len(e.output) for e in examples]
    total = sum(one * n for (one, _), n in zip(single, labels))
    assert loss == pytest.approx(total / sum(labels), rel=1e-5)
    assert answers == [texts[0] for _, texts in single]

    e = examples[0]
    output = torch.tensor([e.output])
    if arch == "llama":
        tokens = torch.tensor([e.prompt + e.input + e.output])
        segments = torch.tensor([e.segments + [gist_mask.INPUT] * len(e.output)])
        mask = gist_mask.decoder_mask(segments)
        logits = model(tokens, mask, gist_mask.positions(segments))[0, -labels[0] - 1 : -1]
    else:
        segments = torch.tensor([e.segments])
        masks = {"mask": gist_mask.encoder_mask(segments)}
        masks["cross_mask"] = gist_mask.cross_mask(segments)
        masks["positions"] = gist_mask.positions(segments)
        logits = model(torch.tensor([e.prompt + e.input]), output, **masks)[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(e.output)).item()
    assert single[0][0] == pytest.approx(expected, rel=1e-5)


def test_a_batch_has_a_largest_number_of_tokens(runs, folder, monkeypatch):
    model, tokenizer, _ = evaluation.open_run(runs["llama"], device="cpu")
    records = data.load_instructions(str(folder))["unseen"]
    examples, _ = data.make_examples(records, tokenizer, 2)
    sizes, answer = [], evaluation.answer

    def spy(model, tokenizer, some, *args):
        sizes.append((len(some), max(len(e) for e in some)))
        return answer(model, tokenizer, some, *args)

    monkeypatch.setattr(evaluation, "answer", spy)
    expected = evaluation.evaluate(model, tokenizer, examples, "gist", 5)
    assert len(sizes) == 1
    limit = 3 * (max(len(e) for e in examples) + 5)
    for tokens, largest in ((limit, 3), (1, 1)):
        monkeypatch.setattr(evaluation, "MAX_TOKENS", tokens)
        sizes.clear()
        loss, answers = evaluation.evaluate(model, tokenizer, examples, "gist", 5)
        assert max(n for n, _ in sizes) == largest
        assert answers == expected[1] and loss == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("preset", ["llama-7b", "flan-t5-base"])
def test_a_preset_trains_and_evaluates_by_the_papers_rule(preset, tmp_path, monkeypatch, capsys):
    """On stand-ins for weights and data: the cuts of every split, and where answers end."""
    records = data.builtin(60, 3)["train"]
    tokenizer = data.train_tokenizer(records, 400)

    def long(n, where):  # a record of which one part has n tokens or some more
        tokens_of_100 = len(tokenizer.encode("fox " * 100))
        return records[0] | {where: "fox " * (n * 100 // tokens_of_100)}

    files = {
        "train": [*records[:3], long(600, "output")],
        "validation_unseen": [*records[3:5], long(300, "instruction"), long(600, "instruction")],
        "validation_human": [
            *(records[5], long(600, "instruction"), long(900, "instruction")),
            long(1000, "output"),
        ],
    }
    for split, some in files.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(some))
    shape = dict(vocab_size=tokenizer.vocab_size - 1, d_model=16, n_layers=1, n_heads=2, head_dim=8)
    if preset == "llama-7b":
        model = Llama(LlamaConfig(**shape, n_kv_heads=2, d_ff=16))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=1, d_ff=16))
    model.init_weights(torch.Generator().manual_seed(0))
    data.save_model(tmp_path / "weights", model, tokenizer)
    where = ["--init_from", tmp_path / "weights", "--data", tmp_path, "--out_dir", tmp_path / "run"]
    flags = ["--preset", preset, *where, "--max_steps", 1, "--micro_batch", 4, "--device", "cpu"]
    flags += ["--eval_every", 1, "--no_eval"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()
    (log,) = (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()

    splits, evaluate, decode = [], evaluation.evaluate, data.SentencePieceTokenizer.decode
    lengths = []  # of answers, in tokens

    def spy_evaluate(model, tokenizer, examples, *args):
        splits.append(examples)
        with monkeypatch.context() as patch:
            patch.setattr(data.SentencePieceTokenizer, "decode", spy_decode)
            return evaluate(model, tokenizer, examples, *args)

    def spy_decode(tokenizer, ids):
        lengths.append(len(ids))
        return decode(tokenizer, ids)

    monkeypatch.setattr(evaluation, "evaluate", spy_evaluate)
    metrics = evaluation.evaluate_run(str(tmp_path / "run"), device="cpu")
    unseen, human = splits
    # Hardly trained, the model finds no end.
    if preset == "llama-7b":
        expected = [max(1, 512 - len(e.prompt + e.input)) for e in unseen + human]
    else:
        expected = [128 for e in unseen + human]
    assert sorted(lengths) == sorted(expected)
    skipped = capsys.readouterr().out
    if preset == "llama-7b":  # 600 words of instruction are beyond 512 tokens, but not beyond 768
        assert (len(unseen), len(human)) == (3, 3) and max(len(e) for e in human) == 768
        assert "unseen: 1 examples" in skipped and "human: 1 examples" in skipped
    else:  # a source of 128 or 384 tokens: longer instructions leave no room for their gist
        assert (len(unseen), len(human)) == (2, 2)
        assert len(human[1].output) == 384
    assert metrics["human"]["n"] == len(human)
    assert metrics["human"]["loss"] == pytest.approx(json.loads(log)["loss_human"], rel=0.02)
    named = ("max_length", "max_length_human", "generation_max_length")
    assert [metrics[name] for name in named] == (
        [512, 768, 512] if preset == "llama-7b" else [128, 384, 128]
    )
    lengths.clear()
    evaluation.evaluate_run(str(tmp_path / "run"), device="cpu", max_length=100, max_new_tokens=5)
    assert max(len(e.prompt + e.input) for e in splits[-1]) <= 100 and max(lengths) == 5


def test_weights_are_evaluated_in_the_dtype_that_is_asked_for(runs):
    model, _, _ = evaluation.open_run(runs["llama"], device="cpu", dtype="bfloat16")
    assert model.embedding.weight.dtype == torch.bfloat16
    model, _, _ = evaluation.open_run(runs["llama"], device="cpu")
    assert model.embedding.weight.dtype == torch.float32


def test_on_a_gpu_the_weights_get_the_dtype_of_the_training(runs, monkeypatch):
    monkeypatch.setattr(data, "find_device", lambda name: "cuda")
    config = data.read_config(runs["llama"])
    config["gisting"]["dtype"] = "bfloat16"
    monkeypatch.setattr(data, "read_config", lambda path: config)
    asked, load_model = [], data.load_model

    def spy(path, base, dtype, device):
        asked.append((dtype, device))
        return load_model(path, base, dtype, "cpu")

    monkeypatch.setattr(data, "load_model", spy)
    evaluation.open_run(runs["llama"])
    assert asked == [(torch.bfloat16, "cuda")]


def test_runs_that_skipped_different_examples_stand_in_one_table(runs, folder, tmp_path, capsys):
    lengths = [len(e) for e in all_examples(runs["llama"], folder)]
    short = train_run(folder, tmp_path / "short", max_length=sorted(lengths)[3], max_steps=1)
    evaluation.evaluate_runs([runs["llama"], short], device="cpu")
    printed = capsys.readouterr().out
    assert "skipped" in printed and f"{short} unseen" in printed


def all_examples(run, folder):
    _, tokenizer, _ = evaluation.open_run(run, device="cpu")
    return data.make_examples(data.load_instructions(str(folder))["unseen"], tokenizer, 2)[0]


def test_an_evaluation_that_finds_nothing_leaves_the_earlier_results(
    runs, evaluated, folder, tmp_path
):
    text = (folder / "a_train.json").read_text().splitlines()[0]
    (tmp_path / "train.json").write_text(text)
    before = (Path(runs["llama"]) / "metrics.json").read_bytes()
    for options in ({"data_dir": str(tmp_path)}, {"max_length": 1}):
        with pytest.raises(data.DataError, match="nothing to evaluate"):
            evaluation.evaluate_run(runs["llama"], device="cpu", **options)
    assert (Path(runs["llama"]) / "metrics.json").read_bytes() == before


def test_runs_before_one_that_cannot_be_opened_have_their_table(runs, tmp_path):
    done = command("run", runs["llama"], runs["t5"], "nowhere", "--device", "cpu", cwd=tmp_path)
    table = done.stdout.splitlines()[-6:-1]  # and the legend
    assert done.returncode == 2 and "nowhere: no checkpoint" in done.stderr
    assert "rougeL" in table[0] and table[1].startswith(runs["llama"])
    assert table[-1].startswith(f"{runs['t5']} human")


def test_outputs_of_built_in_instructions_have_their_family(runs, monkeypatch):
    monkeypatch.setattr(data, "load_instructions", lambda *args: data.builtin(10, 8))
    evaluation.evaluate_run(runs["llama"], device="cpu", max_new_tokens=3)
    rows = evaluation.read_outputs(f"{runs['llama']}/outputs-unseen.csv")
    sources = [record["source"] for record in data.builtin(10, 8)["unseen"]]
    assert [row["family"] for row in rows] == sources
    human = evaluation.read_outputs(f"{runs['llama']}/outputs-human.csv")
    assert {row["family"] for row in human} == {""}


def test_a_finished_run_of_an_older_version_still_opens(runs, tmp_path):
    """Its configuration has settings that are gone, and lacks those that came later."""
    for file in Path(runs["llama"]).glob("[!ocl]*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = data.read_config(runs["llama"])
    config["gisting"] |= {"tfidf": None, "overwrite": True}
    del config["gisting"]["eval_every"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, _, opened = evaluation.open_run(str(tmp_path), device="cpu")
    assert opened["n_gist"] == 2 and opened["eval_every"] is None


def test_a_released_model_is_opened_by_its_flags(runs, tmp_path):
    for file in Path(runs["llama"]).glob("[!ocl]*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = data.read_config(runs["llama"])
    del config["gisting"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.DataError, match="give --n_gist"):
        evaluation.open_run(str(tmp_path), device="cpu")
    _, _, opened = evaluation.open_run(str(tmp_path), device="cpu", n_gist=2)
    assert (opened["n_gist"], opened["condition"], opened["arch"]) == (2, "gist", "llama")


# ---- Outputs files ----


def test_an_outputs_file_is_scored_against_its_references(tmp_path, capsys):
    file = tmp_path / "a.csv"
    rows = [("x", "y_pred", "y_true"), ("q", "the red fox", "the red dog"), ("q", "two", "two ")]
    with open(file, "w", newline="") as f:
        csv.writer(f).writerows(rows)
    evaluation.score_files([str(file)])
    header, row = capsys.readouterr().out.splitlines()
    assert dict(zip(header.split(), row.split()[1:])) == {
        "n": "2",
        "exact_match": "50",
        "rouge1": "83.333",
        "rouge2": "25",
        "rougeL": "83.333",
        "commonest": "50",
    }


@pytest.mark.parametrize(
    "content, says",
    [
        ("x,y_true\na,b\n", "y_pred"),
        ("x,y_pred,y_true\n", "no rows"),
        ("", "no rows"),
        ("\ufeffx,y_pred,y_true\na,b\n", "too few columns"),  # with a byte order mark
        ("x,y_pred,y_true\na,b\n", "too few columns"),
        ("x,y_pred,y_true\na,b,c\nd\n", "too few columns"),
        (b"x,y_pred,y_true\na,\xff,c\n", "utf-8"),
    ],
)
def test_an_outputs_file_of_another_shape_is_refused(tmp_path, content, says):
    file = tmp_path / "o.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.DataError, match=f"(?s)o.csv.*{says}"):
        evaluation.score_files([str(file)])


# ---- What a user can do wrong ----


@pytest.mark.parametrize(
    "args, says",
    [
        (["run", "nowhere"], "nowhere: no checkpoint"),
        (["score", "nowhere.csv"], "nowhere.csv"),
        (["run", "nowhere", "--max_length", "0"], "--max_length"),
        (["run", "nowhere", "--n_gist", "1", "--condition", "magic"], "--condition"),
        (["run", "{run}", "--condition", "neg_control"], "leave out --n_gist, --condition"),
        (["run", "{run}", "--n_gist", "1"], "leave out --n_gist, --condition"),
        (["run", "{run}", "--device", "cpu:banana"], "cpu:banana"),
        ([], "required"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(args, says, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", *(a.format(run=runs["llama"]) for a in args)])
    with pytest.raises(SystemExit) as stop:
        data.run(evaluation.main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and says in printed.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_a_condition_that_the_table_lacks_ends_in_one_line(runs, monkeypatch):
    config = data.read_config(runs["llama"])
    config["gisting"]["condition"] = "gone"
    monkeypatch.setattr(data, "read_config", lambda path: config)
    with pytest.raises(data.DataError, match="gone.*gist, pos_control, neg_control"):
        evaluation.open_run(runs["llama"], device="cpu")


def test_the_commands_are_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        data.make_parser("", evaluation.COMMANDS, evaluation.OPTIONS).parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} +\w+ \w+", shown, re.M) for name in evaluation.COMMANDS)


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--n_gist=-1", "-1 is too small: at least 1"),
        ("--n_gist=99999999999", "99999999999 is too large: at most 4,294,967,295"),
        ("--n_gist=x", "invalid int value: 'x'"),
    ],
)
def test_a_number_out_of_range_is_explained(flag, says, capsys):
    with pytest.raises(SystemExit) as stop:
        data.make_parser("", evaluation.COMMANDS, {}).parse_args(["run", "x", flag])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_every_command_explains_its_flags_and_shows_their_defaults(capsys):
    for name, functions in evaluation.COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            data.make_parser("", evaluation.COMMANDS, evaluation.OPTIONS).parse_args([name, "-h"])
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        for function in functions:
            for flag, default in (function.__kwdefaults__ or {}).items():
                helps = re.search(rf"--{flag} [A-Z{{].*?(?= --|$)", shown.split("options:")[1])[0]
                assert len(helps.split()) > 4
                assert default is None or f"(default: {default})" in helps


def test_the_script_runs(runs, evaluated):
    done = command("score", f"{runs['llama']}/outputs-unseen.csv")
    assert done.returncode == 0 and "rougeL" in done.stdout, done.stderr


def test_a_table_has_counts_as_whole_numbers_and_shares_in_percent(capsys):
    evaluation.print_table({"a": {"n": 1_234_567, "rougeL": 0.51, "loss": 2.5}})
    assert capsys.readouterr().out.split() == ["n", "rougeL", "loss", "a", "1,234,567", "51", "2.5"]
