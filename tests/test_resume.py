"""A run that is stopped, killed, or out of disk space loses nothing, and ends with the weights of one that was not."""
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).parent.parent
SMALL = ["--d_model", "16", "--n_layers", "1", "--n_heads", "2", "--batch_size", "4", "--vocab_size", "400", "--device", "cpu", "--no_eval"]
KILLS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a_train.json").write_text("\n".join(json.dumps(r) for r in data.builtin(60, 1)["train"]))
    return folder


def flags(folder, out, steps=80, save_every=2):
    return [*SMALL, "--data", str(folder), "--out_dir", str(out), "--max_steps", str(steps), "--save_every", str(save_every)]


def run_train(argv, told, limit):
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *argv]
    import train
    data.run(train.main)


@pytest.fixture(scope="module")
def start():
    """start(argv) begins `python train.py argv` in a process of its own, but without the seconds that importing torch takes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.pyplot"])

    def start(argv, told=os.devnull, limit=None):
        process = processes.Process(target=run_train, args=([str(a) for a in argv], str(told), limit))
        process.start()
        return process

    return start


@pytest.fixture
def finish(start, tmp_path):
    """finish(argv, limit) gives the exit status, and the last line it tells, of a run that may write files of `limit` bytes."""
    def finish(argv, limit=None):
        told = tmp_path / "told"
        process = start(argv, told, limit)
        process.join()
        assert "Traceback" not in told.read_text()
        return process.exitcode, told.read_text().splitlines()[-1]

    return finish


def saved(state):
    """Changes with every checkpoint."""
    return state.stat().st_mtime_ns if state.exists() else None


def test_a_run_killed_at_random_moments_ends_with_the_same_weights_and_log(start, finish, folder, tmp_path):
    assert finish(flags(folder, tmp_path / "whole"))[0] == 0
    out, rng, seen = tmp_path / "killed", random.Random(), set()
    log, state = out / "train_log.jsonl", out / "train_state.pt"
    for kill in range(KILLS):
        process, old = start(flags(folder, out) + ["--resume"] * log.exists()), saved(state)
        while kill % 2 and saved(state) == old and process.is_alive():   # every other time: wait until it trains
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.add(saved(state))
    assert finish(flags(folder, out) + ["--resume"] * log.exists())[0] == 0
    assert len(seen) > KILLS / 4
    for name in ("model.safetensors", "train_log.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_finish_the_step_save_and_say_how_to_go_on(number, status, folder, tmp_path):
    out = tmp_path / "a run"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags(folder, out, 100_000, 100_000)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (out / "train_log.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    _, told = process.communicate()
    state = data.torch.load(out / "train_state.pt", weights_only=True)
    assert process.returncode == status and 0 < state["step"] < 100_000
    assert len((out / "train_log.jsonl").read_text().splitlines()) == state["step"]
    last = told.splitlines()[-1]
    assert last.startswith("stopped and saved") and last.endswith("--resume") and f"'{out}'" in last and "Traceback" not in told


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_when_there_is_space(finish, folder, tmp_path):
    run, full = tmp_path / "whole", tmp_path / "full"
    assert finish(flags(folder, run, steps=8))[0] == 0
    argv = flags(folder, full, steps=8)
    assert finish(argv, limit=20_000)[0] == 2                             # not even the first checkpoint has space
    assert not (full / "train_state.pt").exists()
    status, told = finish(argv + ["--resume"], limit=20_000)
    assert status == 2 and "train_state.pt" in told and "free space" in told
    assert not list(full.glob("*.tmp"))
    assert finish(argv + ["--resume"])[0] == 0
    assert (full / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    before = (full / "train_state.pt").read_bytes()
    assert finish(argv + ["--resume"], limit=20_000)[0] == 2              # nothing left to train, no space to save
    assert (full / "train_state.pt").read_bytes() == before


def test_only_the_same_run_is_resumed(finish, folder, tmp_path):
    out = tmp_path / "run"
    argv = [*flags(folder, out, steps=4), "--resume"]
    assert finish(argv[:-1])[0] == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    for more, says in ((["--lr", "1e-4"], "--lr 0.003"), (["--max_steps", "6"], "--max_steps 4"), (["--n_gist", "2"], "--n_gist 1")):
        status, told = finish(argv + more)
        assert status == 2 and says in told
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a_train.json").write_text("\n".join((folder / "a_train.json").read_text().splitlines()[:50]))
    (folder / "a_train.json").rename(folder / "kept")
    (folder / "a_train.json").write_text((tmp_path / "other" / "a_train.json").read_text())
    status, told = finish(argv)
    (folder / "kept").rename(folder / "a_train.json")
    assert status == 2 and "50" in told and "60" in told
    (out / "train_state.pt").write_bytes(before["train_state.pt"][:1000])
    status, told = finish(argv)
    assert status == 2 and "cannot be read" in told
    (out / "train_state.pt").unlink()
    assert finish(argv)[0] == 2
    assert {f.name: f.read_bytes() for f in out.iterdir()} | {"train_state.pt": before["train_state.pt"]} == before
