"""Compressing a prompt for use: the command, its files, and gists that do not fit."""

import dataclasses
import os
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


def make_run(folder, arch="llama", condition="gist", n_gist=2, seed=0, **changes):
    """A run with random weights, as train.py would have left it."""
    tokenizer = data.train_tokenizer(data.builtin(200, 2)["train"], 400)
    shape = dict(d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=48)
    shape["vocab_size"] = tokenizer.vocab_size
    if arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=1))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=2, start_id=tokenizer.pad_id))
    model.init_weights(torch.Generator().manual_seed(seed))
    config = train.Config(condition=condition, n_gist=n_gist, arch=arch, **changes)
    gisting = dataclasses.asdict(config) | {"steps": 0, "seconds": 0.0}
    data.save_model(folder, model, tokenizer, gisting=gisting)
    return str(folder)


def compress(run, capsys, **options):
    evaluation.compress(run, max_new_tokens=5, device="cpu", **options)
    return capsys.readouterr().out


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_it_answers_as_the_evaluation_does(arch, tmp_path, capsys):
    run = make_run(tmp_path / "run", arch)
    model, tokenizer, config = evaluation.open_run(run, device="cpu")
    record = {"instruction": "Say it.", "input": "fox cup", "output": ""}
    e = data.layout(record, tokenizer, 2, arch)
    expected = evaluation.answer(model, tokenizer, [e], "gist", 5)[0]
    printed = compress(run, capsys, instruction="Say it.", input=["fox cup"])
    assert f"answer  {expected}\n" in printed


def test_several_inputs_and_none_are_answered(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    printed = compress(run, capsys, instruction="Say it.", input=["key", "pen ring", ""])
    assert printed.count("\nanswer  ") == 3 and "input   pen ring\n" in printed
    assert compress(run, capsys, instruction="Say it.").count("\nanswer  ") == 1


def test_words_that_training_never_had_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    printed = compress(run, capsys, instruction="Put Elephant at the front.", input=["fox quokka"])
    assert re.findall(r"'(\w+)' was never seen", printed) == ["elephant", "quokka"]
    assert "never seen" not in compress(run, capsys, instruction="Put lamp first", input=["fox"])


def test_what_cannot_be_compressed_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for path, instruction, says in [
        (run, "  ", "empty"),
        (run, "", "empty"),
        (str(tmp_path), "Say a.", "no checkpoint"),
    ]:
        with pytest.raises(data.DataError, match=says):
            compress(path, capsys, instruction=instruction)


@pytest.mark.parametrize(
    "arch, condition, kept",
    [
        ("llama", "gist", "2 gist"),
        ("llama", "pos_control", "PROMPT + 2 gist"),
        ("llama", "neg_control", "nothing"),
        ("t5", "gist", "2 gist"),
        ("t5", "neg_control", "nothing"),
    ],
)
def test_a_control_answers_too_and_says_what_its_cache_keeps(
    arch, condition, kept, tmp_path, capsys
):
    run = make_run(tmp_path / "run", arch, condition)
    model, tokenizer, _ = evaluation.open_run(run, device="cpu")
    record = {"instruction": "Say it.", "input": "fox cup", "output": ""}
    e = data.layout(record, tokenizer, 2, arch)
    expected = evaluation.answer(model, tokenizer, [e], condition, 5)[0]
    printed = compress(run, capsys, instruction="Say it.", input=["fox cup"])
    prompt = f"{len(e.prompt) - 2} prompt"
    assert f"whole prompt: {prompt} + 2 gist: " in printed
    assert f"answer  {expected}\n" in printed
    assert f"kept:         {kept.replace('PROMPT', prompt)}: " in printed


def test_an_encoder_that_sees_everything_cannot_compress(tmp_path, capsys):
    run = make_run(tmp_path / "run", "t5", "pos_control")
    with pytest.raises(data.DataError, match="cannot compress: an encoder cannot read a prompt"):
        compress(run, capsys, instruction="Say a.")


def test_a_run_with_its_first_token_in_sight_is_compressed_with_it(tmp_path, capsys):
    run = make_run(tmp_path / "run", see_start=True)
    model, tokenizer, config = evaluation.open_run(run, device="cpu")
    e = evaluation.lay_out("Say it.", "fox cup", tokenizer, config)
    assert e.segments[0] == gist_mask.START
    expected = evaluation.answer(model, tokenizer, [e], "gist", 5)[0]
    printed = compress(run, capsys, instruction="Say it.", input=["fox cup"])
    assert "kept:         1 start + 2 gist: " in printed and f"answer  {expected}\n" in printed


def test_a_released_gist_model_answers_as_the_run_that_it_was(tmp_path, capsys):
    """A delta from a base whose matrices are all zero and whose norms are one: adding is exact."""
    run = make_run(tmp_path / "run")
    released, base_folder = str(tmp_path / "released"), str(tmp_path / "base")
    model, tokenizer = data.load_model(run)
    base = Llama(dataclasses.replace(model.config, vocab_size=model.config.vocab_size - 1))
    with torch.no_grad():
        for weight in base.parameters():
            weight.fill_(float(weight.ndim == 1))
        for weight in model.parameters():
            weight.mul_(weight.ndim > 1)
    data.save_model(base_folder, base, tokenizer)
    data.save_model(released, model)
    what = dict(instruction="Put lamp at the front.", input=["fox cup", "sun"])
    expected = compress(run, capsys, **what)
    assert compress(released, capsys, base=base_folder, n_gist=2, **what) == expected
    for path, options, says in (
        (released, {}, "give --n_gist"),
        (released, {"n_gist": 2}, "--base"),
        (base_folder, {"n_gist": 2}, "no row for a gist token"),
        (run, {"n_gist": 2}, "leave out --n_gist"),
        (run, {"condition": "gist"}, "--condition"),
    ):
        with pytest.raises(data.DataError, match=says):
            compress(path, capsys, **options, **what)
    # What training starts from it keeps the gist token that it has; a stock model gets a new one.
    for init_from, base, is_kept in ((released, base_folder, True), (base_folder, None, False)):
        config = train.Config(init_from=init_from, base=base, n_gist=2, device="cpu")
        start, _ = train.make_model(train.fill_in(config), [], tokenizer)
        rows = start.embedding.weight
        assert len(rows) == tokenizer.vocab_size
        assert torch.equal(rows[-1], rows[:-1].mean(dim=0)) is not is_kept


def test_the_command_that_is_shown_next_works_for_a_released_model(folder, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    model, tokenizer = data.load_model(run)
    released = str(tmp_path / "released")
    data.save_model(released, model, tokenizer)
    options = dict(n_gist=2, condition="gist", device="cpu", data_dir=str(folder))
    evaluation.evaluate_runs([released], max_new_tokens=1, **options)
    _, _, *command = capsys.readouterr().out.splitlines()[-1].split()  # next: python eval.py ...
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "answer" in done.stdout, done.stderr


def test_a_run_without_gist_tokens_has_nothing_to_compress_into(tmp_path, capsys):
    run = make_run(tmp_path / "run", condition="pos_control", n_gist=0)
    with pytest.raises(data.DataError, match="without gist tokens"):
        compress(run, capsys, instruction="Say a.")


def test_the_command_ends_quietly_when_its_reader_has_seen_enough(tmp_path):
    run = make_run(tmp_path / "run")
    command = [sys.executable, ROOT / "eval.py", "compress", run, "--instruction", "Say a."]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""
