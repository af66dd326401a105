"""Several processes train the same model as one, whatever each of them holds, and any number can go on where others stopped."""
import json
import multiprocessing
import os
import socket
import sys
from itertools import islice

import pytest
import torch

import data
import train

pytestmark = pytest.mark.skipif(torch.__version__ < "2.8", reason="FSDP2 on CPUs came with torch 2.8")
RUNS = {"llama": [], "t5": ["--arch", "t5"], "adamw": ["--optimizer", "adamw"]}


def flags(folder, run, out, *more):
    return [*RUNS[run], "--data", str(folder), "--out_dir", str(out), "--n_gist", "2", "--d_model", "32", "--n_layers", "1", "--n_heads", "2",
            "--batch_size", "7", "--vocab_size", "400", "--device", "cpu", "--no_eval", "--max_steps", "20", "--save_every", "10", *more]


def work(rank, world, port, calls):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    runs = []
    for function, argv in calls:
        sys.argv = ["train.py", *argv]
        runs.append((function, train.parse_args()))
    with train.process_group(runs[0][1]):
        for function, args in runs:
            function(args)


def together(world, calls):
    """Let `world` processes make calls of function(flags), one after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot"])
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, world, port, calls)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def losses(out):
    return torch.tensor([json.loads(line)["loss"] for line in (out / "train_log.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 examples: nine batches of 7 and one of a single example, for which four processes have one between them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a_train.json").write_text("\n".join(json.dumps(r) for r in data.builtin(64, 1)["train"]))
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    together(1, [(train.train_run, flags(folder, run, out / run)) for run in RUNS])
    return out


def check(out, alone):
    assert losses(out).shape == (20,) and (losses(out) - losses(alone)).abs().max() < 1e-4
    model, expected = data.load_model(out)[0], data.load_model(alone)[0]
    for (name, weight), other in zip(model.named_parameters(), expected.parameters()):
        assert (weight - other).abs().max() < 1e-3, name


def first_half(args):
    """Ten steps, of a run that is to have twenty."""
    steps = train.steps
    train.steps = lambda *a: islice(steps(*a), 10)
    train.train_run(args)
    train.steps = steps


def generate_in_parts(args):
    """A model in parts, read from a checkpoint, gives the answers of the whole one, from a gist cache too."""
    model, tokenizer = train.make_model(args, [])
    tokens = torch.randint(5, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    prompt = torch.cat([tokens, torch.full((3, 2), tokenizer.gist_id)], dim=1)

    def answers():
        return model.generate(tokens, max_new_tokens=8), model.generate(tokens, cache=model.compress(prompt, tokenizer.gist_id), max_new_tokens=8)

    expected = answers()
    train.shard_model(model, args)
    n_whole = sum(p.numel() for p in model.parameters())
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * n_whole
    assert answers() == expected


def test_two_processes_train_and_answer_as_one_and_one_goes_on(folder, alone, tmp_path):
    ways = {"fsdp": [], "ddp": ["--parallel", "ddp"], "recomputed": ["--checkpoint_activations", "--micro_batch", "2"]}
    calls = [(train.train_run, flags(folder, run, tmp_path / f"{run}-{way}", *more)) for run in RUNS for way, more in ways.items()]
    calls += [(first_half, flags(folder, run, tmp_path / f"{run}-half")) for run in RUNS]
    calls += [(generate_in_parts, flags(folder, run, tmp_path / "none", "--init_from", str(alone / run))) for run in RUNS]
    together(2, calls)
    together(1, [(train.train_run, flags(folder, run, tmp_path / f"{run}-half", "--resume")) for run in RUNS])
    for run in RUNS:
        for way in [*ways, "half"]:
            check(tmp_path / f"{run}-{way}", alone / run)


def test_four_processes_train_as_one_and_go_on_with_what_two_began(folder, alone, tmp_path):
    together(2, [(first_half, flags(folder, run, tmp_path / f"{run}-half")) for run in RUNS])
    together(4, [(train.train_run, flags(folder, run, tmp_path / f"{run}-{way}", *more))
                 for run in RUNS for way, more in (("new", []), ("half", ["--resume"]))])
    for run in RUNS:
        check(tmp_path / f"{run}-new", alone / run)
        check(tmp_path / f"{run}-half", alone / run)
