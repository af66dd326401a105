"""Gist fine-tuning: ordinary instruction tuning under a gist mask (the paper's section 3).

    python train.py --n_gist 1                             # random weights, built-in instructions
    python train.py --n_gist 1 --init_from DIR --data DIR  # a pretrained model, real instructions
    torchrun --nproc_per_node 4 train.py ...               # several GPUs, part of the model on each

    loss = - sum log p(output token | what the mask lets it see) / number of output tokens

The gist tokens get no loss of their own. They learn to hold the prompt because the output cannot
look past them. The paper's controls train the same way under other masks (`--condition`). Its
discrete baseline has no gist tokens: the instruction is cut down to its N words of highest TF-IDF,
`--condition pos_control --n_gist 0 --tfidf N`.

In a notebook, `train(Config(n_gist=1))` does what the command does, except for the evaluation.
`fit` is the loop alone, for your own model, examples and loss.

A run leaves its weights, configuration and tokenizer in out_dir (Hugging Face's layout), with
train_log.jsonl, loss.png and a folder checkpoint-STEP from which --resume goes on. Then eval.py
answers every validation split.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path

# Threads that spin while they wait make a busy machine ten times slower; those that never spin make
# a quiet one 1.4 times slower. A short spin avoids both. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import gist_mask
from data import DataError
from model import IGNORE_INDEX, Llama, LlamaConfig
from t5 import T5, T5Config

# ---- The loss, a step, the loop ----


def batch_loss(model, batch: dict[str, Tensor], gist_id: int, condition: str) -> Tensor:
    """Cross-entropy of a batch's outputs, in nats, summed over its labels: a scalar.

    batch: from `data.collate`, tokens (B, T) int64, attention_mask (B, T) bool, targets int64.
    """
    logits, labels = label_logits(model, batch, gist_id, condition)
    return F.cross_entropy(logits, labels, reduction="sum")


def label_logits(model, batch, gist_id, condition):
    """The logits (N, V) of a batch's labels (N,), under the mask of a condition; and the labels."""
    tokens, targets = batch["tokens"], batch["targets"]
    row = (tokens, gist_id, condition, batch["attention_mask"])  # what a mask depends on
    masks = [gist_mask.decoder_mask(*row)]  # (B, 1, T, T)
    if isinstance(model, T5):  # (B, 1, T, T) and (B, 1, 1, T)
        masks = [gist_mask.encoder_mask(*row), gist_mask.cross_mask(*row)]
    positions = gist_mask.positions(tokens, gist_id)  # (B, T)
    return model.label_logits(tokens, targets, *masks, positions)


def accumulate_gradients(model, examples, tokenizer, config, loss_function=batch_loss):
    """Add the gradient of a batch's mean loss per label to the weights' .grad.

    Every process takes its share of the examples and returns its share of the loss. Each sum is
    divided by the labels of the whole batch, so how the batch is cut changes nothing.
    """
    _, world = rank_and_world()
    n_labels = max(1, sum(len(example.output) for example in examples))
    parts = micro_batches(examples, tokenizer, config)
    loss = 0.0
    for batch in parts:
        if world > 1:  # Gradients travel once, with the last micro-batch. Until then every process
            # keeps whole ones, 4 bytes a parameter.
            model.set_requires_gradient_sync(batch is parts[-1])
        share = loss_in_dtype(model, batch, tokenizer, config, loss_function) / n_labels
        (share * world).backward()  # gradients are averaged over processes; we want their sum
        loss += share.detach()  # stays on the device until it is whole
    return loss.item()


def micro_batches(examples, tokenizer, config):
    """This process's share of the examples, in batches of a size that fits, on its device."""
    rank, world = rank_and_world()
    share = examples[rank::world]
    largest_share = math.ceil(len(examples) / world)
    size = config.micro_batch or config.batch_size
    batches = []
    for start in range(0, largest_share, size):
        part = share[start : start + size]
        batch = data.collate(part or examples[:1], tokenizer.pad_id, config.arch)
        if not part:  # processes compute together, even if one has nothing left to learn from
            batch["targets"].fill_(IGNORE_INDEX)
        batches.append({name: tensor.to(config.device) for name, tensor in batch.items()})
    return batches


def loss_in_dtype(model, batch, tokenizer, config, loss_function=batch_loss):
    """The loss of a batch, with its matrix products in the run's dtype."""
    device_type = torch.device(config.device).type
    with torch.autocast(device_type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return loss_function(model, batch, tokenizer.gist_id, config.condition)


@torch.no_grad()
def validation_losses(model, splits, tokenizer, config):
    """The mean loss of a label, in nats, for every split. splits: lists of data.Example by name."""
    losses = {}
    for split, examples in splits.items():
        loss = 0.0
        for batch in micro_batches(sorted(examples, key=len), tokenizer, config):
            loss += loss_in_dtype(model, batch, tokenizer, config).item()
        if examples:
            losses[f"loss_{split}"] = sum(from_all(loss)) / sum(len(e.output) for e in examples)
    return losses


def fit(
    model, tokenizer, examples, config, loss_function=batch_loss, out_dir=None, validation=None
) -> int | None:
    """Train a model on a list of data.Example, to step config.max_steps.

    config: as `fill_in` returns it. loss_function(model, batch, gist_id, condition): the loss of a
    batch of `data.collate` in nats, summed over its labels. out_dir: a Path that is to keep the
    log, a checkpoint every config.save_every steps, and the weights at the end; None: nothing is
    written. validation: lists of data.Example by name, whose `batch_loss` the log gets every
    config.eval_every steps.

    Ctrl-C and SIGTERM end training after the current step. Returns the signal's number, else None.
    Raises DataError if loss or weights are no longer finite, or if out_dir does not allow this run.
    """
    prepare(model, config)
    optimizers = make_optimizers(model, config)
    data_hash = hashlib.sha256(repr(examples).encode()).hexdigest()
    run = asdict(config) | {"data_hash": data_hash, "steps": 0, "seconds": 0.0}
    log_file = open_run(out_dir, config, model, tokenizer, optimizers, run)
    step, ema, signals = run["steps"], None, []  # not at 0, if the run is resumed
    bar = tqdm(total=config.max_steps, initial=step, desc="train", disable=not is_first())
    model.train()
    with open(log_file, "a") as log, bar, caught_signals() as caught:
        for rows in batches(examples, config, step):
            began = time.perf_counter()
            batch = [examples[i] for i in rows]
            factor = lr_factor(step, config)
            step += 1
            share = accumulate_gradients(model, batch, tokenizer, config, loss_function)
            loss = sum(from_all(share))
            signals = sum(from_all(caught), [])  # if one has to stop, all of them stop
            norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)).item()
            update(optimizers, factor)
            weights = whole(nn.utils.get_total_norm(model.parameters())).item()
            check_finite(step, loss=loss, gradient=norm, weights=weights)

            n, lr = sum(map(len, batch)), factor * config.lr
            entry = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": n}
            seconds = time.perf_counter() - began
            is_last = step == config.max_steps
            if validation and config.eval_every and (is_last or step % config.eval_every == 0):
                entry |= validation_losses(model, validation, tokenizer, config)
            print(json.dumps(entry), file=log, flush=True)
            run["steps"] = step
            run["seconds"] += seconds
            ema = 0.95 * (ema or loss) + 0.05 * loss  # the loss, smoothed
            bar.set_postfix(ema=f"{ema:.3f}", tokens_s=f"{n / seconds:,.0f}", refresh=False)
            bar.update()
            if out_dir and (is_last or signals or step % config.save_every == 0):
                save_checkpoint(out_dir, model, optimizers, run)
            if signals:
                break
    if out_dir:
        save_weights(out_dir, model, tokenizer, run)
    return signals[0] if signals else None


def batches(examples, config, start):
    """The batch of every step from `start` to max_steps, as indices, epoch after epoch.

    It depends on the seed and the step alone, however often a run was resumed.
    """
    lengths = [len(example) for example in examples]
    per_epoch = math.ceil(len(examples) / config.batch_size)
    for step in range(start, config.max_steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == start:
            seed = config.seed * 1_000_003 + epoch
            order = data.batch_order(lengths, config.batch_size, seed)
        yield order[place]


def check_finite(step, **values):
    """Raise DataError if a value is infinite or NaN (for a norm, one such number is enough)."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise DataError(
                f"at step {step} the {name} is {value}: stopped, and this step is not saved; start "
                "over with a smaller --lr"
            )


@contextmanager
def caught_signals():
    """A list that collects Ctrl-C and SIGTERM instead of ending the program. A second one does."""
    caught = []

    def catch(number, frame):
        if caught and not dist.is_initialized():  # torchrun repeats what its processes got already
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- The optimizer ----


class Muon(Optimizer):
    """Momentum, orthogonalized: a matrix moves by the (semi-)orthogonal matrix nearest to it.

    All directions of the update get the same size, even those whose gradients are small, and a tiny
    model needs fewer steps than with AdamW. For matrices inside the layers; those of a group have
    one shape. In fp32, as bf16 is emulated on many CPUs. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            momentum, updates = group["momentum"], []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].mul_(momentum).add_(p.grad)
                updates.append(p.grad + momentum * mean)  # Nesterov: look a step ahead
            updates = orthogonalize_shared(torch.stack(updates))  # (N, m, n)
            m, n = updates.shape[1:]
            for p, update in zip(group["params"], updates, strict=True):
                p.add_(update, alpha=-group["lr"] * max(1, m / n) ** 0.5)


def orthogonalize_shared(x):
    """Orthogonalize matrices (N, m, n). Processes that hold parts of each share the work:

    every process collects N / processes whole matrices, and gives their parts back.
    """
    if not isinstance(x, DTensor):
        return orthogonalize(x)
    by_matrix = x.redistribute(placements=[Shard(0)])
    return orthogonalize(by_matrix).redistribute(placements=x.placements)


# Of x <- a x + b (xx')x + c (xx')^2 x, three steps that bring singular values from 0.01 to 1 close
# to 1, each step the best after those before it: Amsel et al. 2025, "The Polar Express".
NEWTON_SCHULZ = [
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
]


def orthogonalize(x):
    """Move all singular values of x (..., m, n) close to 1, by Newton-Schulz steps."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT).mT
    bound = (x @ x.mT).norm(dim=(-2, -1), keepdim=True).sqrt()  # on the largest singular value
    x = x / (bound + 1e-15)
    for a, b, c in NEWTON_SCHULZ:
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x


def make_optimizers(model, config):
    """AdamW for all weights; or Muon for the layers' matrices, and AdamW for the others."""
    options = {
        "lr": config.lr,
        "betas": (0.9, config.beta2),
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "adamw":
        return [AdamW([{"params": model.parameters(), "peak_lr": config.lr}], **options)]
    matrices, others = {}, []
    for name, p in model.named_parameters():
        # T5's two peculiarities need other steps. Its position biases start near 0 and have to
        # reach several units before a head finds a place. It does not divide attention by sqrt(K):
        # its queries are that much smaller instead, and so are their steps.
        scale = 1.0
        if "relative_bias" in name:
            scale = 30.0
        elif isinstance(model, T5) and name.endswith("wq.weight"):
            scale = model.config.head_dim**-0.5
        if "layers." in name and p.ndim == 2:
            matrices.setdefault((p.shape, scale), []).append(p)
        else:
            others.append({"params": [p], "peak_lr": scale * config.lr})
    groups = [{"params": ps, "peak_lr": s * config.muon_lr} for (_, s), ps in matrices.items()]
    return [AdamW(others, **options), Muon(groups, {"lr": config.muon_lr, "momentum": 0.9})]


def update(optimizers, factor):
    """Move the weights, at this fraction of the peak learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad()


def lr_factor(step, config):
    """The fraction of the peak learning rate at a step: linear warm-up, then the schedule."""
    warmup = max(1, round(config.warmup * config.max_steps))
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / (config.max_steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if config.schedule == "linear" else 1.0


# ---- Layers and processes ----


def prepare(model, config):
    """Compile the layers, checkpoint their activations, and put the model where it computes.

    A checkpointed layer keeps only its input, and computes what is inside once more when the
    gradient comes back. All layers share one compiled function, for batches of any length.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack]
    for layer in layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if config.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if dist.is_initialized():
        shard(model, layers, config)
    else:
        model.to(config.device).float()


def shard(model, layers, config):
    """Leave every process its part of every weight, in fp32: FSDP2.

    A layer's whole weights are there only while it computes. With bfloat16 they travel as bf16;
    gradients are summed in fp32.
    """
    _, world = rank_and_world()
    mesh = dist.init_device_mesh(torch.device(config.device).type, (world,))
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    split = partial(fully_shard, mesh=mesh, mp_policy=policy)
    for layer in layers:
        layer.float()
        if hasattr(layer, "cross_attention"):  # used before its layer, when T5 encodes
            split(layer.cross_attention)
            register_fsdp_forward_method(layer.cross_attention, "keys_values")
        split(layer)
    fully_shard(model.float(), mesh=mesh)
    register_fsdp_forward_method(model, "label_logits")


@contextmanager
def processes(device):
    """Join the other processes, if torchrun started this one. Raises DataError."""
    on_cuda = device.startswith("cuda")
    if on_cuda:  # round the factors of fp32 products to TF32: 10 bits, and many times faster
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        with data.reading("RANK is set", "start with torchrun, or unset RANK"):
            dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_world():
    """Which process this is, and of how many."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first():
    return rank_and_world()[0] == 0


def from_all(value):
    """Every process's value, the same list in all of them. They wait here for each other."""
    _, world = rank_and_world()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def whole(x):
    """A tensor of which every process holds a part, put together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- What a run keeps in out_dir ----
#
# torch.distributed.checkpoint saves weights and optimizer state: every process writes and reads its
# own parts, and a different number of processes can resume from them. One process does the same.

LOG = "train_log.jsonl"  # where this is, there is a run
# fmt: off
FILES = ("checkpoint-*", "config.json", "model.safetensors", "tokenizer.*", "spiece.model",
         "loss.png", "metrics.json", "outputs-*.csv")
PROGRESS = ("steps", "seconds")
MAY_CHANGE = ("resume", "overwrite", "out_dir", "no_eval", "save_every", "eval_every", "device",
              "micro_batch", "checkpoint_activations", "compile")  # when a run is resumed
METADATA = ("Metadata", "MetadataIndex", "StorageMeta", "_StorageInfo", "TensorStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "_get_layout",
            "Size", "float32", "bfloat16", "int64", "PosixPath", "WindowsPath")
# fmt: on
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def files_of_run(out_dir):
    return [file for pattern in FILES for file in out_dir.glob(pattern)]


def check_out_dir(out_dir, config):
    """Is out_dir free, or what the flags say it is? Returns the checkpoint to resume from, or None.

    Changes nothing. Raises DataError.
    """
    if config.init_from and out_dir.resolve() == Path(config.init_from).resolve():
        raise DataError(f"{out_dir}: both --init_from and --out_dir; give another --out_dir")
    is_run = (out_dir / LOG).exists()
    if not is_run and files_of_run(out_dir):
        raise DataError(f"{out_dir}: holds files that no run has left; give another --out_dir")
    if config.resume:
        checkpoints = out_dir.glob("checkpoint-*[0-9]")
        last = max(checkpoints, key=lambda folder: int(folder.name[11:]), default=None)
        if last is None and (not is_run or (out_dir / "model.safetensors").exists()):
            raise DataError(f"{out_dir}: nothing to resume; start without --resume")
        return last
    if is_run and not config.overwrite:
        raise DataError(
            f"{out_dir} holds another run: go on with it (--resume), start over (--overwrite), or "
            "give another --out_dir"
        )
    return None


def open_run(out_dir, config, model, tokenizer, optimizers, run):
    """Load the checkpoint to resume from, or delete an older run's files. Returns the log.

    run: the configuration, the data's hash, and PROGRESS, which is filled in. Everything is checked
    before anything is deleted. Raises DataError.
    """
    if not out_dir:
        return os.devnull
    checkpoint = check_out_dir(out_dir, config)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizers, run)
    from_all(None)  # wait until every process has seen what the first one now changes
    if not is_first():
        return os.devnull
    log = out_dir / LOG
    out_dir.mkdir(parents=True, exist_ok=True)
    log.touch()
    lines = log.read_bytes().splitlines(keepends=True)
    data.write_file(log, b"".join(lines[: run["steps"]]))  # none of a new run
    if checkpoint:
        (out_dir / "model.safetensors").unlink(missing_ok=True)
    else:
        for file in files_of_run(out_dir):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        data.save_config(out_dir, model, tokenizer, run)
    return log


@contextmanager
def first_cause():
    """dcp raises what all processes raised, in one exception: raise the first of them instead."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def save_checkpoint(out_dir, model, optimizers, run):
    """Write checkpoint-STEP under another name, rename it when whole, delete the older ones."""
    weights, states = get_state_dict(model, optimizers)
    folder = out_dir / f"checkpoint-{run['steps']}"
    unfinished = folder.with_suffix(".tmp")
    try:
        with data.reading(folder, "check the free space, then --resume"), first_cause():
            dcp.save({"model": weights, "state": states["state"]}, checkpoint_id=unfinished)
        if is_first():
            data.write_file(unfinished / "run.json", json.dumps(run).encode())
            unfinished.rename(folder)
            for older in set(out_dir.glob("checkpoint-*")) - {folder}:
                shutil.rmtree(older)
    finally:
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)


def load_checkpoint(folder, model, optimizers, run):
    """Put weights and optimizer state back, steps and seconds into `run`. Raises DataError."""
    begun = data.read_json(folder / "run.json")
    for name, now in run.items():
        if name not in PROGRESS + MAY_CHANGE and begun.get(name) != now:
            raise DataError(
                f"{folder} was begun with {name} {begun.get(name)}, not {now}: resume it with the "
                "same flags and data, or give another --out_dir"
            )
    weights, states = get_state_dict(model, optimizers)  # tensors that dcp.load fills
    with data.reading(folder, "start over with --overwrite"), first_cause():
        run |= {name: begun[name] for name in PROGRESS}
        with open(folder / ".metadata", "rb") as file:
            MetadataUnpickler(file).load()
        dcp.load({"model": weights, "state": states["state"]}, checkpoint_id=folder)
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states)


class MetadataUnpickler(pickle.Unpickler):
    """Reads a checkpoint's table of contents, and refuses one that could run code."""

    def find_class(self, module, name):
        if module.split(".")[0] not in ("torch", "pathlib") or name not in METADATA:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which could run code")
        return super().find_class(module, name)


def save_weights(out_dir, model, tokenizer, run):
    """Write config.json and model.safetensors, one weight after the other; draw the loss."""
    weights = ((name, whole(p)) for name, p in model.named_parameters())
    if is_first():
        data.save_model(out_dir, model, tokenizer, run, weights)
        draw_losses([out_dir], out_dir / "loss.png")
    for _ in weights:  # every process helps to put each weight together
        pass


def draw_losses(runs, file):
    """Draw the logs of runs: the loss of every step, its running mean, and that of validation."""
    figure, ax = data.new_figure(6, 3.5)
    for out_dir in runs:
        log = Path(out_dir) / LOG
        with data.reading(log, "give a run of train.py"):
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            losses = [entry["loss"] for entry in entries]
        mean = list(accumulate(losses, lambda mean, x: 0.98 * mean + 0.02 * x))
        (line,) = ax.plot(mean, label=out_dir)
        color = line.get_color()
        ax.plot(losses, color=color, alpha=0.3, linewidth=0.7)
        for split, marker in zip(data.SPLITS, "os^"):
            points = [(e["step"], e[f"loss_{split}"]) for e in entries if f"loss_{split}" in e]
            if points:
                ax.plot(*zip(*points), marker, color=color, label=f"{out_dir}, {split}")
    ax.set(xlabel="step", ylabel="loss (nats per output token)", ylim=(0, None))
    ax.legend()
    data.save_figure(figure, file)


# ---- The command line ----


@dataclass
class Config:
    """One run. Every field is a flag; `fill_in` replaces None. Comments are the flags' help."""

    n_gist: int = 1  # gist tokens after the prompt
    condition: str = "gist"  # what the input sees of the prompt: an entry of gist_mask.TABLE
    tfidf: int | None = None  # shorten instructions to their N words of highest TF-IDF
    arch: str = "llama"  # decoder or encoder-decoder; --init_from decides it by itself

    data: str = "builtin"  # a directory in the Alpaca+ layout, or builtin
    init_from: str | None = None  # start from this checkpoint (random weights)
    base: str | None = None  # the original LLaMA, if --init_from holds a weight delta
    out_dir: str | None = None  # where the run is kept (out/ARCH-CONDITION-N_GIST)
    resume: bool = False  # go on with the run in --out_dir; give the flags that it began with
    overwrite: bool = False  # delete the run in --out_dir and start over
    max_length: int | None = None  # longest example in tokens (512); t5: longest source (128)
    max_target: int = 256  # t5: longest output in tokens

    d_model: int = 128  # width of a new model
    n_layers: int | None = None  # its layers (4; t5: 3 in the encoder and 3 in the decoder)
    n_heads: int = 4  # its attention heads
    vocab_size: int = 2048  # largest size of its tokenizer, which is trained on the data

    max_steps: int = 3000  # optimizer steps
    epochs: float | None = None  # passes through the training data, instead of --max_steps
    batch_size: int = 64  # examples a step
    micro_batch: int | None = None  # examples in memory at once; their gradients add up (all)
    optimizer: str | None = None  # muon is fast from random weights (muon; adamw with --init_from)
    lr: float | None = None  # peak learning rate of AdamW (3e-3; 2e-5 with --init_from)
    muon_lr: float = 0.01  # peak learning rate of Muon
    beta2: float = 0.95  # how slowly AdamW's second moment changes
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.03  # part of the steps in which the learning rate rises
    schedule: str = "linear"  # the learning rate after that
    seed: int = 0  # of weights, data and order

    device: str | None = None  # cuda, mps or cpu (the first of these that is there)
    dtype: str | None = None  # of matrix products (bfloat16 on cuda, else float32)
    checkpoint_activations: bool = False  # less memory, a third more time
    compile: bool = False  # compile the layers: a slow start, then faster steps
    save_every: int = 500  # steps between checkpoints
    eval_every: int | None = None  # steps between validation losses in the log (none)
    no_eval: bool = False  # do not evaluate at the end


CHOICES = {
    "condition": gist_mask.TABLE,
    "arch": ("llama", "t5"),
    "optimizer": ("muon", "adamw"),
    "schedule": ("linear", "cosine", "constant"),
    "dtype": ("float32", "bfloat16"),
}
MAY_BE_0 = ("n_gist", "max_steps", "seed")
AT_MOST = {"beta2": 0.9999, "warmup": 1}

# The paper's hyperparameters (section 4.1 and appendix A) for the pretrained model in --init_from.
# Its code sets no betas, so they are AdamW's usual ones. What differs here: T5's dropout of 0.1 was
# active in the paper's training; our T5 has none.
PRESETS = {
    "llama-7b": {
        "max_steps": 3000,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 2e-5,
        "beta2": 0.999,
        "schedule": "cosine",
        "dtype": "bfloat16",
        "max_length": 512,
    },
    "flan-t5-xxl": {
        "max_steps": 16000,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 5e-5,
        "beta2": 0.999,
        "schedule": "constant",
        "warmup": 0.0,
        "dtype": "bfloat16",
        "max_length": 128,
    },
}


def read_flags() -> Config:
    """The command line; what it does not give is the preset's, then Config's."""
    parser = argparse.ArgumentParser(
        description="Train a model to compress prompts, evaluate it.",
        argument_default=argparse.SUPPRESS,  # parse only what the command line gives
    )
    parser.add_argument("--preset", choices=PRESETS, help="the paper's values for --init_from")
    helps = dict(re.findall(r"^    (\w+): .*  # (.*)", inspect.getsource(Config), re.M))
    for field in fields(Config):
        name, kind = field.name, field.type.split()[0]
        options = {"help": helps[name]}
        if kind == "bool":
            options["action"] = "store_true"
        elif kind == "int":
            options["type"] = data.at_least(0 if name in MAY_BE_0 else 1)
        elif kind == "float":
            options["type"] = data.at_least(0, float, AT_MOST.get(name, 1e6))
        else:
            options["choices"] = CHOICES.get(name)
        parser.add_argument(f"--{name}", **options)
    given = vars(parser.parse_args())
    preset = PRESETS.get(given.pop("preset", None), {})
    return Config(**preset | given)


def fill_in(config: Config) -> Config:
    """Replace every None by what follows from the other fields and the machine.

    Raises DataError for what makes no sense.
    """
    arch, device, pretrained = config.arch, data.find_device(config.device), config.init_from
    if pretrained:
        is_t5 = data.read_config(pretrained).get("model_type") == "t5"
        arch = "t5" if is_t5 else "llama"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = data.find_device("cuda:" + os.environ["LOCAL_RANK"])
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in (None, *choices):
            raise DataError(f"--{name} {value}: choose from {', '.join(choices)}")
    if config.n_gist == 0 and not gist_mask.table(config.condition).all():
        raise DataError(
            f"--condition {config.condition} needs a gist token: give --n_gist 1, or more"
        )
    if config.d_model % (2 * config.n_heads):
        raise DataError("--d_model must be an even multiple of --n_heads")
    follows = {
        "out_dir": f"out/{arch}-{config.condition}-{config.n_gist}",
        "max_length": 128 if arch == "t5" else 512,
        "n_layers": 3 if arch == "t5" else 4,
        "optimizer": "adamw" if pretrained else "muon",
        "lr": 2e-5 if pretrained else 3e-3,
        "dtype": "bfloat16" if device.startswith("cuda") else "float32",
    }
    given = {name: value for name, value in asdict(config).items() if value is not None}
    return Config(**follows | given | {"arch": arch, "device": device})


def make_model(config: Config, records: list[dict], tokenizer=None):
    """The model and its tokenizer: from config.init_from, or new. On the CPU.

    A gist token that is new starts as the mean of all others. That is close to zero, so from the
    first layer on, the token is what attention has added.
    """
    if config.init_from:
        model, own = data.load_model(config.init_from, base=config.base)
        tokenizer = tokenizer or own
        if tokenizer is None:
            raise DataError(f"{config.init_from}: no tokenizer; add the model's")
        if "gisting" in data.read_config(config.init_from):
            return model, tokenizer
    else:
        tokenizer = tokenizer or data.train_tokenizer(records, config.vocab_size)
        model = new_model(config, tokenizer)
    data.add_gist_token(model, tokenizer)
    return model, tokenizer


def new_model(config, tokenizer):
    """A small model with random weights."""
    d, heads, layers = config.d_model, config.n_heads, config.n_layers
    shape = {"d_model": d, "n_layers": layers, "n_heads": heads, "head_dim": d // heads}
    shape["vocab_size"] = tokenizer.vocab_size
    if config.arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=heads, d_ff=3 * d))
    else:
        shape |= {"n_decoder_layers": layers, "start_id": tokenizer.pad_id}
        model = T5(T5Config(**shape, d_ff=2 * d, tie_embeddings=True))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def train(config: Config, loss_function=batch_loss) -> int | None:
    """One whole run, except for its evaluation. Takes and returns what `fit` does.

    Raises DataError.
    """
    config = fill_in(config)
    out_dir = Path(config.out_dir)
    with processes(config.device):
        resumed = check_out_dir(out_dir, config)
        tokenizer = data.load_tokenizer(out_dir) if resumed else None  # a run keeps its own
        splits = data.load_instructions(config.data, config.seed, config.tfidf)
        model, tokenizer = make_model(config, splits["train"], tokenizer)
        sizes = (config.n_gist, config.arch, config.max_length, config.max_target)
        examples, skipped = data.make_examples(splits.pop("train"), tokenizer, *sizes)
        validation = {}
        if config.eval_every:
            for split, records in splits.items():
                validation[split], _ = data.make_examples(records, tokenizer, *sizes)
        if not examples:
            raise DataError(f"{config.data}: --max_length cuts off every output; raise it")
        if config.epochs:
            config.max_steps = math.ceil(
                config.epochs * math.ceil(len(examples) / config.batch_size)
            )
        if is_first():
            n = sum(p.numel() for p in model.parameters())
            print(
                f"{out_dir}: {n:,} parameters, {len(examples):,} examples ({skipped} skipped)",
                flush=True,
            )
        return fit(model, tokenizer, examples, config, loss_function, out_dir, validation)


def main():
    config = fill_in(read_flags())
    stopped = train(config)
    if os.environ.get("RANK", "0") != "0":  # only the first process has more to do
        return
    if stopped:
        print("stopped and saved; go on with the same command and --resume", file=sys.stderr)
        sys.exit(128 + stopped)
    if not config.no_eval:  # in place of this process, so that all its memory is free
        script = Path(__file__).with_name("eval.py")
        command = [sys.executable, script, "run", config.out_dir, "--device", config.device]
        os.execv(sys.executable, command)


if __name__ == "__main__":
    data.run(main)
