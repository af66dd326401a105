"""A run that was stopped, killed or out of disk space ends with the weights of one that was not."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data

ROOT = Path(__file__).parent.parent
SMALL = ["--d_model", "16", "--n_layers", "1", "--n_heads", "2", "--batch_size", "4"]
SMALL += ["--vocab_size", "400", "--device", "cpu", "--no_eval"]
KILLS = 20


def write_records(file, records):
    file.write_text("\n".join(json.dumps(record) for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "a_train.json", data.builtin(60, 1)["train"])
    return folder


def flags(folder, out, steps=160, save_every=2):
    out_flags = ["--out_dir", out, "--max_steps", steps, "--save_every", save_every]
    return [*SMALL, "--data", str(folder), *map(str, out_flags)]


def run_train(argv, stderr, limit):
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *argv]
    import train

    data.run(train.main)


@pytest.fixture(scope="module")
def start():
    """start(argv) begins `python train.py argv` without the seconds that importing torch takes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.figure"])

    def start(argv, stderr=os.devnull, limit=None):
        arguments = ([str(a) for a in argv], str(stderr), limit)
        process = processes.Process(target=run_train, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture
def finish(start, tmp_path):
    """finish(argv, limit): status and last line of a run that may write files of `limit` bytes."""

    def finish(argv, limit=None):
        stderr = tmp_path / "stderr"
        process = start(argv, stderr, limit)
        process.join()
        assert "Traceback" not in stderr.read_text()
        return process.exitcode, stderr.read_text().splitlines()[-1]

    return finish


def steps_saved(out):
    """The step of the checkpoint, 0 if there is none. It is whole whenever one looks."""
    file = out / "checkpoint.pt"
    return data.unpickle(file)["gisting"]["steps"] if file.exists() else 0


def test_a_run_killed_at_random_moments_ends_with_the_same_weights_and_log(
    start, finish, folder, tmp_path
):
    assert finish(flags(folder, tmp_path / "whole"))[0] == 0
    out, rng, seen = tmp_path / "killed", random.Random(), set()
    log = out / "train_log.jsonl"
    for kill in range(KILLS):
        before = steps_saved(out)
        process = start(flags(folder, out) + ["--resume"] * log.exists())
        # Every other time, wait until it trains.
        while kill % 2 and steps_saved(out) <= before and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster than we
            break
        assert process.exitcode == -signal.SIGKILL
        assert steps_saved(out) >= before, "the last checkpoint is gone"
        seen.add(steps_saved(out))
    assert finish(flags(folder, out) + ["--resume"] * log.exists())[0] == 0
    assert len(seen) > 2  # the kills met different moments
    for name in ("model.safetensors", "train_log.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert steps_saved(out) == 160 and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_finish_the_step_save_and_say_how_to_go_on(
    number, status, folder, tmp_path
):
    out = tmp_path / "a run"
    command = [sys.executable, ROOT / "train.py", *flags(folder, out, 100_000, 100_000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = out / "train_log.jsonl"
    while not log.exists() or not log.stat().st_size:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == status
    steps = steps_saved(out)
    assert 0 < steps < 100_000 and len(log.read_text().splitlines()) == steps
    config = json.loads((out / "config.json").read_text())
    assert config["gisting"]["steps"] == steps and (out / "model.safetensors").exists()
    last = stderr.splitlines()[-1]
    assert last.startswith("stopped and saved") and "--resume" in last
    assert "Traceback" not in stderr


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_when_there_is_space(
    finish, folder, tmp_path
):
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert finish(flags(folder, whole, steps=8))[0] == 0
    argv = flags(folder, full, steps=8)
    status, line = finish(argv, limit=30_000)  # not even the first checkpoint has space
    assert status == 2 and "checkpoint.pt" in line and "free space" in line
    assert not steps_saved(full) and not list(full.glob("*.tmp"))
    assert finish(argv[:-3] + ["4", "--save_every", "4"])[0] == 2  # other flags, nothing deleted
    assert finish(argv + ["--resume"], limit=30_000)[0] == 2
    assert finish(argv + ["--resume"])[0] == 0
    weights = (whole / "model.safetensors").read_bytes()
    assert (full / "model.safetensors").read_bytes() == weights
    assert finish(argv + ["--resume"], limit=30_000)[0] == 2  # no space for the weights again
    assert steps_saved(full) == 8
    assert finish(argv + ["--resume"])[0] == 0
    assert (full / "model.safetensors").read_bytes() == weights


def test_weights_are_on_disk_once_while_a_run_goes_on(start, finish, folder, tmp_path):
    out = tmp_path / "run"
    assert finish(flags(folder, out, steps=2))[0] == 0
    shutil.rmtree(out)
    process = start(flags(folder, out, steps=100_000, save_every=3))
    while not steps_saved(out):
        time.sleep(0.01)
    assert not (out / "model.safetensors").exists()
    with pytest.raises(data.DataError, match="--resume"):
        data.load_model(out)
    process.terminate()  # stopped: now the weights are there
    process.join()
    assert (out / "model.safetensors").exists()
    process = start([*flags(folder, out, steps=100_000, save_every=3), "--resume"])
    while (out / "model.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.join()


@pytest.fixture
def finished(finish, folder, tmp_path):
    """A finished run, the flags that resume it, and all of its files."""
    out = tmp_path / "run"
    argv = flags(folder, out, steps=4)
    assert finish(argv)[0] == 0
    return out, [*argv, "--resume"], contents(out)


def contents(out):
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def test_a_run_goes_on_with_the_flags_it_began_with(start, finish, folder, tmp_path):
    """None has to be repeated."""
    more = ["--see_start", "--n_gist", "2", "--schedule", "cosine", "--optimizer", "adamw"]
    for out in ("whole", "stopped"):
        argv = [*flags(folder, tmp_path / out, steps=400, save_every=5), *more]
        if out == "whole":
            assert finish(argv)[0] == 0
            continue
        process = start(argv)
        while not steps_saved(tmp_path / out):
            time.sleep(0.01)
        process.terminate()
        process.join()
    assert 0 < steps_saved(tmp_path / "stopped") < 400
    assert finish(["--out_dir", str(tmp_path / "stopped"), "--resume"])[0] == 0
    whole, stopped = (tmp_path / out / "model.safetensors" for out in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    config = data.read_config(tmp_path / "stopped")["gisting"]
    assert config["see_start"] and config["n_gist"] == 2 and config["steps"] == 400


def test_a_run_without_a_checkpoint_needs_its_flags_again(start, finish, folder, tmp_path):
    """It begins once more, and with the defaults it would be another run."""
    out = tmp_path / "run"
    process = start(flags(folder, out, steps=100_000, save_every=100_000))
    while not (out / "train_log.jsonl").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    before = contents(out)
    status, line = finish(["--out_dir", str(out), "--resume"])
    assert status == 2 and "before its first checkpoint" in line and contents(out) == before
    assert finish([*flags(folder, out, steps=3), "--resume"])[0] == 0


@pytest.mark.parametrize(
    "more, says",
    [
        (["--lr", "1e-4"], "lr 0.003"),
        (["--max_steps", "6"], "max_steps 4"),
        (["--n_gist", "2"], "n_gist 1"),
    ],
)
def test_only_the_same_run_is_resumed(more, says, finish, finished):
    out, argv, before = finished
    status, line = finish(argv + more)
    assert status == 2 and says in line and contents(out) == before


def test_other_texts_of_the_same_number_are_not_resumed(finish, finished, folder):
    out, argv, before = finished
    file = folder / "a_train.json"
    records = file.read_text()
    write_records(file, data.builtin(60, 1, seed=1)["train"])
    status, line = finish(argv)
    file.write_text(records)
    assert status == 2 and "data" in line and contents(out) == before


def test_a_resumed_run_keeps_its_tokenizer(finish, folder, tmp_path):
    """Even if training one again would give another."""
    out = tmp_path / "run"
    other = data.train_tokenizer(data.builtin(60, 1, seed=1)["train"], 400)
    assert finish(flags(folder, out, steps=4))[0] == 0
    tokenizer = out / "tokenizer.model"
    assert tokenizer.read_bytes() != other.files["tokenizer.model"]
    tokenizer.write_bytes(other.files["tokenizer.model"])  # other ids: other training data
    status, line = finish([*flags(folder, out, steps=4), "--resume"])
    assert status == 2 and "data_hash" in line
    assert tokenizer.read_bytes() == other.files["tokenizer.model"]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_here",)


@pytest.mark.parametrize("change", ["cut", "garbage", "code", "other", "empty"])
def test_a_broken_or_malicious_checkpoint_ends_in_one_line_and_runs_no_code(
    change, finish, finished, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out, argv, before = finished
    file = out / "checkpoint.pt"
    content, gisting = file.read_bytes(), data.unpickle(file)["gisting"]
    new = {"cut": content[: len(content) // 2], "garbage": b"\x80\x04x\xff" * 50, "empty": b""}
    file.write_bytes(new.get(change, b""))
    if change == "code":
        torch.save({"gisting": Malicious()}, file)
    elif change == "other":
        torch.save({"gisting": gisting}, file)
    after = contents(out)
    status, line = finish(argv)
    assert status == 2 and "checkpoint.pt" in line
    assert contents(out) == after and not list(tmp_path.rglob("was_here"))


def test_a_run_without_its_checkpoint_cannot_be_resumed(finish, finished):
    out, argv, _ = finished
    (out / "checkpoint.pt").unlink()
    before = contents(out)
    for flags in (argv, ["--out_dir", str(out), "--resume"]):
        status, line = finish(flags)
        assert status == 2 and "nothing to resume" in line and contents(out) == before


def test_an_older_run_without_the_newest_settings_goes_on(finish, folder, tmp_path):
    out = tmp_path / "run"
    assert finish(flags(folder, out, steps=4))[0] == 0
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    for name in ("max_length_human", "generation_max_length"):
        del content["gisting"][name]
    torch.save(content, out / "checkpoint.pt")
    assert finish([*flags(folder, out, steps=4), "--resume"])[0] == 0


def test_a_flag_that_is_given_on_resuming_counts(finish, folder, tmp_path):
    """Even where another one that the run began with says the same thing otherwise."""
    out = tmp_path / "run"
    argv = flags(folder, out)
    steps = argv.index("--max_steps")
    argv[steps : steps + 2] = ["--epochs", "0.3"]  # five steps of 60 examples, four at once
    assert finish(argv)[0] == 0
    assert data.read_config(out)["gisting"]["max_steps"] == 5
    again = ["--out_dir", str(out), "--resume"]
    assert finish(again)[0] == 0
    for more, says in (
        (["--max_steps", "9"], "max_steps"),
        (["--preset", "llama-7b"], "begun with"),
    ):
        status, line = finish(again + more)
        assert status == 2 and says in line
