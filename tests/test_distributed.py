"""Several processes train the same model as one, and any number goes on where others stopped."""

import json
import multiprocessing
import os
import socket
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

import data
import train

pytestmark = pytest.mark.skipif(torch.__version__ < "2.8", reason="FSDP2 on CPUs: torch 2.8")
RUNS = {"llama": {}, "t5": {"arch": "t5"}, "adamw": {"optimizer": "adamw"}}
TOGETHER = {
    "fsdp": ("llama", {}),
    "recomputed": ("llama", {"checkpoint_activations": True, "micro_batch": 2}),
    "t5": ("t5", {"micro_batch": 2, "checkpoint_activations": True}),
    "adamw": ("adamw", {}),
}
PATIENCE = 1800  # seconds that processes may take together; here they take a few


def config(folder, run, out, **changes):
    settings = {"data": str(folder), "out_dir": str(out), "n_gist": 2, "device": "cpu"}
    settings |= {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 400}
    settings |= {"batch_size": 7, "max_steps": 10, "save_every": 5, "eval_every": 5}
    return train.Config(**settings | RUNS[run] | changes)


def work(rank, world, ports, calls):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    for port, (function, *arguments) in zip(ports, calls, strict=True):
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        function(*arguments)


def free_ports(n):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def together(world, calls):
    """Let `world` processes make calls of function(*arguments), one after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    preload = ["train", "torch._dynamo", "matplotlib.figure"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    arguments = (world, free_ports(len(calls)), calls)
    context = start_processes(work, arguments, world, join=False, start_method="forkserver")
    deadline = time.monotonic() + PATIENCE
    try:  # join raises the error of the process that failed first
        while not context.join(timeout=10):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 examples: nine batches of 7 and one of a single example, which four processes share.

    And five to validate on.
    """
    folder = tmp_path_factory.mktemp("data")
    splits = data.builtin(64, 5)
    for name, records in (("train", splits["train"]), ("validation_unseen", splits["unseen"])):
        text = "\n".join(json.dumps(record) for record in records)
        (folder / f"a_{name}.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    for run in RUNS:
        train.train(config(folder, run, out / run))
    return out


def losses(out, name="loss"):
    entries = map(json.loads, (out / "train_log.jsonl").read_text().splitlines())
    return torch.tensor([e[name] for e in entries if name in e], dtype=torch.float64)


def check(out, alone):
    assert losses(out).shape == (10,)
    difference = (losses(out) / losses(alone) - 1).abs()
    assert difference[:5].max() < 1e-6  # a few units in the last place of an fp32 number
    assert difference.max() < 1e-4  # rounding grows
    validation = losses(out, "loss_unseen")  # at steps 5 and 10
    assert validation.shape == (2,)
    assert (validation / losses(alone, "loss_unseen") - 1).abs().max() < 1e-4
    model, expected = data.load_model(out)[0], data.load_model(alone)[0]
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (weight - other).abs().max() < 1e-3, name


def first_half(config):
    """Five steps, of a run that is to have ten."""
    batches = train.batches
    train.batches = lambda *arguments: islice(batches(*arguments), 5)
    train.train(config)
    train.batches = batches


def resumed(config):
    train.train(replace(config, resume=True))


def count_parts(config):
    """Every process has its part of the weights and of the optimizer state, and no more."""
    with train.processes("cpu"):
        config = train.fill_in(config)
        records = data.load_instructions(config.data)["train"]
        model, tokenizer = train.make_model(config, records)
        n_weights = sum(p.numel() for p in model.parameters())
        examples, _ = data.make_examples(records, tokenizer, 2, config.arch)
        make_optimizers, optimizers = train.make_optimizers, []
        train.make_optimizers = lambda *a: optimizers.extend(make_optimizers(*a)) or optimizers
        train.fit(model, tokenizer, examples, config)
        train.make_optimizers = make_optimizers
        assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * n_weights
        state = [x for o in optimizers for s in o.state.values() for x in s.values() if x.ndim]
        n_state = sum(x.to_local().numel() for x in state)
        assert len(state) >= len(list(model.parameters())) and n_state < 1.2 * n_weights


def count_reductions(config):
    """Gradients travel between processes once a step, however many micro-batches it has."""
    with train.processes("cpu"):
        records = data.load_instructions(config.data)["train"]
        counts = []
        for micro_batch in (None, 1):
            changed = train.fill_in(replace(config, micro_batch=micro_batch, max_steps=1))
            model, tokenizer = train.make_model(changed, records)
            examples, _ = data.make_examples(records[:6], tokenizer, 2, changed.arch)
            train.prepare(model, changed)
            with torch.profiler.profile() as profile:
                train.accumulate_gradients(model, examples, tokenizer, changed)
            names = [event.name for event in profile.events()]
            counts.append(sum("reduce_scatter" in name for name in names))
        assert counts[0] == counts[1] > 0


def fail():
    """An error in the training leaves no process group behind."""
    try:
        with train.processes("cpu"):
            raise KeyError
    except KeyError:
        assert not torch.distributed.is_initialized()


def share_the_work():
    """Matrices in parts are orthogonalized as whole ones are, each in one process only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    def local(x):
        return x.to_local() if isinstance(x, DTensor) else x

    with train.processes("cpu"):
        _, world = train.rank_and_world()
        done, orthogonalize = [], train.orthogonalize
        train.orthogonalize = lambda x: done.append(len(local(x))) or orthogonalize(x)
        mesh = init_device_mesh("cpu", (world,))
        for n in (1, 3, 4):
            x = torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(n))
            parts = [distribute_tensor(m, mesh, [Shard(0)]) for m in x]
            done.clear()
            result = train.orthogonalize_shared(torch.stack(parts))
            assert done[0] <= -(-n // world)
            assert [p.to_local().shape for p in result] == [p.to_local().shape for p in parts]
            assert (result.full_tensor() - orthogonalize(x)).abs().max() < 1e-5
        train.orthogonalize = orthogonalize


def test_two_processes_train_as_one_and_one_goes_on(folder, alone, tmp_path):
    calls = []
    for way, (run, changes) in TOGETHER.items():
        calls.append((train.train, config(folder, run, tmp_path / way, **changes)))
    half = config(folder, "llama", tmp_path / "half")
    together(2, [*calls, (first_half, half)])
    resumed(half)
    check(tmp_path / "half", alone / "llama")
    for way, (run, _) in TOGETHER.items():
        check(tmp_path / way, alone / run)


def test_four_processes_train_as_one_and_go_on_with_what_two_or_one_began(folder, alone, tmp_path):
    new, half, single = (config(folder, run, tmp_path / run) for run in RUNS)
    together(2, [(first_half, half)])
    first_half(single)
    calls = [(train.train, new), (resumed, half), (resumed, single)]
    together(4, calls)
    for run in RUNS:
        check(tmp_path / run, alone / run)


def test_two_processes_share_weights_optimizer_state_and_work(folder, tmp_path):
    runs = [config(folder, run, tmp_path, max_steps=2) for run in RUNS]
    calls = [(function, run) for function in (count_parts, count_reductions) for run in runs]
    together(2, [*calls, (share_the_work,), (fail,)])


def test_a_stopped_process_stops_all_of_them_after_the_same_step(folder, alone, tmp_path):
    together(2, [(stop_the_second, config(folder, "llama", tmp_path))])
    assert len(losses(Path(tmp_path))) == 5 and (tmp_path / "checkpoint.pt").exists()


def stop_the_second(config):
    accumulate_gradients, calls = train.accumulate_gradients, []

    def stop_at_step_5(*arguments):
        calls.append(1)
        if len(calls) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), 15)
        return accumulate_gradients(*arguments)

    train.accumulate_gradients = stop_at_step_5
    assert train.train(config)[-1] == 15
