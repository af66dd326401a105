"""Gist fine-tuning: ordinary instruction tuning under a gist mask (the paper's section 3).

    python train.py --n_gist 1                             # random weights, built-in instructions
    python train.py --n_gist 1 --init_from DIR --data DIR  # a pretrained model, real instructions
    torchrun --nproc_per_node 4 train.py ...               # several GPUs, part of the model on each

    loss = - sum log p(output token | what the mask lets it see) / number of output tokens

The gist tokens get no loss of their own. They learn to hold the prompt because the output cannot
look past them. The paper's controls train the same way under other masks (`--condition`).

In a notebook, `train(Config(n_gist=1))` does what the command does, except for the evaluation.
`fit` is the loop alone, for your own model, examples and loss.

A run leaves its weights, configuration and tokenizer in out_dir (Hugging Face's layout), with
train_log.jsonl, loss.png and checkpoint.pt, from which --resume goes on. Then eval.py answers every
validation split.

The file reads in this order: the loss, a step, the loop; the optimizer; layers and processes; what
a run keeps; the command line.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean

# Threads that spin while they wait make a busy machine ten times slower; those that never spin make
# a quiet one 1.4 times slower. A short spin avoids both. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import data
import gist_mask
from data import DataError
from model import IGNORE_INDEX, Llama, LlamaConfig
from t5 import T5, T5Config

# ---- The loss, a step, the loop ----


def batch_loss(model, batch: dict[str, Tensor], condition: str) -> Tensor:
    """Cross-entropy of a batch's outputs, in nats, summed over its labels: a scalar.

    batch: from `data.collate`, tokens and segments (B, T) int64, targets int64.
    """
    # What every token may see, and where it stands: all that gisting changes.
    masked = gist_mask.masking(model, batch["segments"], condition, target=batch["targets"])
    logits, labels = label_logits(model, batch, masked)
    return F.cross_entropy(logits, labels, reduction="sum")


def label_logits(model, batch, masked):
    """Logits (N, V), fp32, of a batch's labels (N,), and the labels.

    masked: what `gist_mask.masking` gives, or other arguments of the model.
    """
    # Only the output has labels. The prompt, the gist and the input get no loss of their own.
    is_label = batch["targets"] != IGNORE_INDEX
    logits = model(batch["tokens"], **masked, where=is_label)  # (N, V)
    return logits.float(), batch["targets"][is_label]


def accumulate_gradients(model, examples, tokenizer, config, loss_function=batch_loss):
    """Add the gradient of a batch's mean loss per label to the weights' .grad. Returns that loss.

    Every process takes its share of the examples. Each part of the loss is divided by the labels of
    the whole batch, so how the batch is cut changes nothing.
    """
    _, world = rank_and_world()
    n_labels = max(1, sum(len(example.output) for example in examples))
    total = 0.0
    for loss in micro_losses(model, examples, tokenizer, config, loss_function):
        share = loss / n_labels
        (share * world).backward()  # gradients are averaged over processes; we want their sum
        total += share.detach()  # stays on the device until it is whole
    return sum(from_all(total.item()))


def micro_losses(model, examples, tokenizer, config, loss_function):
    """The losses of this process's share of the examples, in micro-batches, one after the other."""
    rank, world = rank_and_world()
    size = world * (config.micro_batch or config.batch_size)  # of all processes together
    device_type = torch.device(config.device).type
    for start in range(0, len(examples), size):
        part = examples[start : start + size][rank::world]
        batch = data.collate(part or examples[:1], tokenizer.pad_id)
        if not part:  # processes compute together, even if one has nothing left to learn from
            batch["targets"].fill_(IGNORE_INDEX)
        batch = {name: tensor.to(config.device) for name, tensor in batch.items()}
        # Gradients travel once, with the last micro-batch. Until then every process keeps whole
        # ones, 4 bytes a parameter.
        if world > 1:
            model.set_requires_gradient_sync(start + size >= len(examples))
        # In bfloat16, only matrix products are: the weights stay in fp32.
        with torch.autocast(device_type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_function(model, batch, config.condition)
        yield loss


def train_step(model, examples, tokenizer, optimizers, step, config, loss_function):
    """Learn from one batch of data.Example. Returns its line of the log. Raises DataError."""
    model.train()
    # The loss and its gradient.
    loss = accumulate_gradients(model, examples, tokenizer, config, loss_function)
    # A gradient that is longer than grad_clip is made as long as that.
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)).item()
    # Every weight moves, at this step's part of its peak learning rate.
    factor = lr_factor(step - 1, config)
    update(optimizers, factor)
    # If one number is not finite, neither is the norm of all. Then this step is not saved.
    weight_norm = whole(nn.utils.get_total_norm(model.parameters())).item()
    if not math.isfinite(loss + norm + weight_norm):
        raise DataError(
            f"at step {step} the loss is {loss}, the gradient's norm {norm}, that of the weights "
            f"{weight_norm}: stopped, and this step is not saved; start over with a smaller --lr"
        )
    n_tokens = sum(map(len, examples))
    lr = factor * config.lr
    return {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": n_tokens}


@torch.no_grad()
def validation_losses(model, splits, tokenizer, config, caught=()):
    """The mean loss of a label, in nats, for every split. splits: lists of data.Example by name.

    caught: of `caught_signals`; a signal ends it between two batches, and there are no losses.
    """
    model.eval()
    losses = {}
    for split, examples in splits.items():
        total = 0.0
        in_order = sorted(examples, key=len)  # so little of a batch is padding
        for loss in micro_losses(model, in_order, tokenizer, config, batch_loss):
            total += loss.item()
            if any(from_all(bool(caught))):
                return {}
        if examples:
            n_labels = sum(len(example.output) for example in examples)
            losses[f"loss_{split}"] = sum(from_all(total)) / n_labels
    return losses


def fit(
    model, tokenizer, examples, config, loss_function=batch_loss, out_dir=None, validation=None
) -> int | None:
    """Train a model on a list of data.Example, to step config.max_steps.

    config: as `fill_in` returns it. loss_function(model, batch, condition): the loss of a batch of
    `data.collate` in nats, summed over its labels. out_dir: a Path that is to keep the log, a
    checkpoint every config.save_every steps, and the weights at the end; None: nothing is written.
    validation: lists of data.Example by name, whose `batch_loss` the log gets every
    config.eval_every steps.

    Ctrl-C and SIGTERM end training after the current step. Returns the signal's number, or None.
    Raises DataError if loss or weights are no longer finite, or if out_dir does not allow this run.
    """
    prepare(model, config)
    optimizers = make_optimizers(model, config)
    gisting = describe(config, examples, loss_function)
    gisting = open_out_dir(out_dir, model, optimizers, gisting)  # at the step of its checkpoint
    done = gisting["steps"]
    losses, stopped = [], None
    order = batches(examples, config, done)  # for every step, the indices of its examples
    bar = tqdm(order, "train", config.max_steps, initial=done, disable=not is_first())
    with bar, caught_signals() as caught:
        for step, indices in enumerate(bar, done + 1):
            # Learn from one batch, and show how it goes.
            began = time.perf_counter()
            chosen = [examples[i] for i in indices]
            entry = train_step(model, chosen, tokenizer, optimizers, step, config, loss_function)
            gisting["steps"] = step
            gisting["seconds"] += time.perf_counter() - began
            losses.append(entry["loss"])
            bar.set_postfix(loss=f"{fmean(losses[-50:]):.3f}", refresh=False)
            # From time to time, ask how well it does on examples that it does not learn from.
            is_last = step == config.max_steps
            if validation and config.eval_every and (is_last or step % config.eval_every == 0):
                entry |= validation_losses(model, validation, tokenizer, config, caught)
            # Write it down. If one process has to stop, all of them do.
            write_log(out_dir, entry)
            stopped = max(itertools.chain(*from_all(caught)), default=None)
            if stopped:
                break
            if step % config.save_every == 0 and not is_last:
                save(out_dir, model, tokenizer, optimizers, gisting)
        save(out_dir, model, tokenizer, optimizers, gisting, is_end=True)
    from_all(None)  # no process leaves while the first one writes
    model.eval()
    return stopped


def batches(examples, config, start):
    """The batch of every step from `start` to max_steps, as indices, epoch after epoch.

    It depends on the seed and the step alone, however often a run was resumed.
    """
    assert examples
    lengths = [len(example) for example in examples]
    seeds = itertools.count(config.seed * 1_000_003)  # one for each epoch
    epochs = (data.batch_order(lengths, config.batch_size, seed) for seed in seeds)
    return itertools.islice(itertools.chain.from_iterable(epochs), start, config.max_steps)


@contextmanager
def caught_signals():
    """A list that collects Ctrl-C and SIGTERM instead of ending the program; a second one ends it.

    In any other thread than the main one, which alone gets signals, it stays empty.
    """
    caught = []
    is_main = threading.current_thread() is threading.main_thread()

    def catch(number, frame):
        if caught and not dist.is_initialized():  # torchrun sends on what its processes got, too
            raise KeyboardInterrupt
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- The optimizer ----


class Muon(Optimizer):
    """Momentum, orthogonalized: a matrix moves by the (semi-)orthogonal one nearest its momentum.

    All directions of the update get the same size, even those whose gradients are small, and a tiny
    model needs fewer steps than with AdamW. For matrices inside the layers; those of a group have
    one shape. In fp32, as bf16 is emulated on many CPUs. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            momentum, updates = group["momentum"], []
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                velocity = state["momentum"].mul_(momentum).add_(p.grad)
                updates.append(p.grad + momentum * velocity)  # Nesterov: look a step ahead
            updates = orthogonalize_shared(torch.stack(updates))  # (N, m, n)
            m, n = updates.shape[1:]
            for p, update in zip(params, updates):
                p.add_(update, alpha=-group["lr"] * max(1, m / n) ** 0.5)


def orthogonalize_shared(x):
    """Orthogonalize matrices (N, m, n). Processes that hold parts of each share the work:

    every process collects N / processes whole matrices, and gives their parts back.
    """
    if not isinstance(x, DTensor):
        return orthogonalize(x)
    by_matrix = x.redistribute(placements=[Shard(0)])
    return orthogonalize(by_matrix).redistribute(placements=x.placements)


# The a, b, c of x <- a x + b (xx')x + c (xx')^2 x, of three steps that together bring singular
# values between 0.01 and 1 close to 1: Amsel et al. 2025, "The Polar Express".
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
    """AdamW for all weights; or Muon for the layers' matrices, and AdamW for the others.

    Weights with requires_grad=False stay as they are.
    """
    groups = {AdamW: {}, Muon: {}}  # weights of one shape and rate, which take steps together
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind, lr = AdamW, config.lr
        if config.optimizer == "muon":
            if "layers." in name and p.ndim == 2:
                kind, lr = Muon, config.muon_lr
            # T5's peculiarities need other steps. Its position biases start near 0 and have to
            # reach several units before a head finds a place. It does not divide attention by
            # sqrt(K): its queries are that much smaller instead, and so are their steps. Its
            # embeddings have std 1.
            if "relative_bias" in name:
                lr *= 30
            elif isinstance(model, T5) and name.endswith("wq.weight"):
                lr *= model.config.head_dim**-0.5
            elif isinstance(model, T5) and name == "embedding.weight":
                lr *= model.config.d_model**0.5
        group = groups[kind].setdefault((p.shape, lr), {"params": [], "peak_lr": lr})
        group["params"].append(p)
    options = {
        AdamW: dict(betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True),
        Muon: dict(defaults={"lr": config.muon_lr, "momentum": 0.9}),
    }
    if not any(groups.values()):
        raise DataError("no weight is to be trained: set requires_grad of some")
    return [kind(list(some.values()), **options[kind]) for kind, some in groups.items() if some]


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
    return SCHEDULES[config.schedule](left)


SCHEDULES = {  # after the warm-up, the fraction of the peak, from that of the steps that are left
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "constant": lambda left: 1.0,
}


# ---- Layers and processes ----


def prepare(model, config):
    """Compile the layers, checkpoint their activations, and put the model where it computes.

    A checkpointed layer keeps only its input, and computes what is inside once more when the
    gradient comes back. All layers share one compiled function, for batches of any length. Once
    per model.
    """
    if config.device.startswith("cuda"):  # factors of fp32 products get TF32's 10 bits: much faster
        torch.set_float32_matmul_precision("high")
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = list(itertools.chain(*stacks))
    for layer in layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if config.checkpoint_activations:
            layer.forward = partial(recompute, layer.forward, use_reentrant=False)
    if dist.is_initialized():
        shard(model, layers, config)
    else:
        model.to(config.device).float()


def shard(model, layers, config):
    """Leave every process its part of every weight, in fp32: FSDP2.

    A layer's whole weights are there only while it computes. With bfloat16 they travel as bf16;
    gradients are summed in fp32.
    """
    mesh = dist.init_device_mesh(torch.device(config.device).type, (dist.get_world_size(),))
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard_one = partial(fully_shard, mesh=mesh, mp_policy=policy)
    for layer in layers:
        layer.float()
        if hasattr(layer, "cross_attention"):  # used before its layer, when T5 encodes
            shard_one(layer.cross_attention)
            register_fsdp_forward_method(layer.cross_attention, "keys_values")
        shard_one(layer)
    fully_shard(model.float(), mesh=mesh)


@contextmanager
def processes(device):
    """Join the other processes, if torchrun started this one. Raises DataError."""
    if "RANK" in os.environ:
        with data.one_line_errors("RANK is set", "start with torchrun, or unset RANK"):
            # Two hours: all wait while the first one writes what a large model has to keep.
            backend = "nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
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
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def whole(x):
    """A tensor of which every process holds a part, put together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- What a run keeps in out_dir ----

LOG = "train_log.jsonl"  # where this is, there is a run
CHECKPOINT = "checkpoint.pt"  # weights, optimizer state, and what the run has to be: `describe`
RESULTS = ["model.safetensors", "metrics.json", *(f"outputs-{split}.csv" for split in data.SPLITS)]
# What may change when a run goes on. (max_steps says what epochs said.)
# fmt: off
MAY_CHANGE = ("steps", "seconds", "resume", "out_dir", "no_eval", "save_every", "eval_every",
              "device", "micro_batch", "checkpoint_activations", "compile", "epochs")
# fmt: on
# For a checkpoint, the first process collects all parts of all tensors in its CPU memory, so any
# number of processes can go on from it. It is read with weights_only: it can run no code.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def describe(config, examples, loss_function):
    """What config.json says of a run, in its key "gisting". `fit` counts steps and seconds."""
    return asdict(config) | {
        "loss": getattr(loss_function, "__name__", type(loss_function).__name__),
        "data_hash": hashlib.sha256(repr(examples).encode()).hexdigest(),
        "steps": 0,
        "seconds": 0.0,
    }


def check_out_dir(out_dir, resume):
    """Is out_dir free, or with --resume a run? Raises DataError."""
    if resume:
        # A run that was stopped before its first checkpoint begins once more.
        has_weights = (out_dir / "model.safetensors").exists()
        is_new_run = (out_dir / LOG).exists() and not has_weights
        if not (out_dir / CHECKPOINT).exists():
            if any(out_dir.glob("checkpoint-*")):
                raise DataError(f"{out_dir}: begun with an older version; give another --out_dir")
            if not is_new_run:
                raise DataError(f"{out_dir}: nothing to resume; start without --resume")
    elif out_dir.exists() and any(out_dir.iterdir()):
        raise DataError(
            f"{out_dir} is not empty: give another --out_dir; or, if it holds another run, go on "
            f"with that (--resume), or delete the folder {out_dir} to start over"
        )


def open_out_dir(out_dir, model, optimizers, gisting):
    """Begin a run in out_dir, or go on with the one there. Returns gisting, at that step.

    Raises DataError if out_dir does not allow this run; then nothing in it has changed.
    """
    if not out_dir:
        return gisting
    check_out_dir(out_dir, gisting["resume"])
    log, file = out_dir / LOG, out_dir / CHECKPOINT
    if file.exists():
        gisting = load_checkpoint(file, model, optimizers, gisting)
    from_all(None)  # wait until every process has read it
    if is_first():
        # Delete what is later than the checkpoint: lines of the log, results.
        out_dir.mkdir(parents=True, exist_ok=True)
        if log.exists():
            lines = log.read_bytes().splitlines(keepends=True)
            data.write_file(log, b"".join(lines[: gisting["steps"]]))
        if gisting["steps"] < gisting["max_steps"]:
            for name in RESULTS:
                (out_dir / name).unlink(missing_ok=True)
    return gisting


def write_log(out_dir, entry):
    """Append the line of a step. A run that fails before its first one leaves no file."""
    if out_dir and is_first():
        with open(out_dir / LOG, "a") as log:
            print(json.dumps(entry), file=log)


def save(out_dir, model, tokenizer, optimizers, gisting, is_end=False):
    """Replace the checkpoint by one of this step; at the end, write the weights and draw the loss.

    Raises DataError.
    """
    if not out_dir:
        return
    weights, states = get_state_dict(model, optimizers, options=WHOLE)
    if not is_first():
        return
    file = out_dir / CHECKPOINT
    data.save_config(out_dir, model, tokenizer, gisting)
    with (
        data.one_line_errors(file, "check the free space, then --resume"),
        data.replacing(file) as f,
    ):
        torch.save({"gisting": gisting, "model": weights, "optimizers": states}, f)
    if is_end:
        data.save_model(out_dir, model, tokenizer, gisting, weights)
        (out_dir / LOG).touch()  # a run of no steps has none yet
        draw_losses([out_dir], out_dir / "loss.png")


def load_checkpoint(file, model, optimizers, gisting):
    """Put weights and optimizer state back. Returns gisting, at that step. Raises DataError."""
    with data.one_line_errors(file, "delete the folder and start over"):
        content = data.unpickle(file)  # mapped: processes share it, and take their parts
        begun = asdict(Config()) | content["gisting"]  # an older run lacks what came later
        for name, now in gisting.items():
            if name not in MAY_CHANGE and begun[name] != now:
                raise DataError(
                    f"{file} was begun with {name} {begun[name]}, not {now}: resume it with the "
                    "same command and data; or start from its weights, --init_from "
                    f"{file.parent}, with another --out_dir"
                )
        set_state_dict(
            model,
            optimizers,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizers"],
            options=WHOLE,
        )
    return gisting | {"steps": begun["steps"], "seconds": begun["seconds"]}


def draw_losses(runs, file):
    """Draw the logs of runs: the mean of the last 50 losses, and those of validation.

    Labels begin with a space, as matplotlib leaves out those that begin with "_".
    """
    figure, ax = data.new_figure(6, 3.5)
    for out_dir in runs:
        log = Path(out_dir) / LOG
        with data.one_line_errors(log, "give a run of train.py"):
            entries = [json.loads(line) for line in data.read_utf8(log).splitlines()]
            losses = [entry["loss"] for entry in entries]
        steps = range(1, len(losses) + 1)
        ax.plot(steps, [fmean(losses[max(0, n - 50) : n]) for n in steps], label=f" {out_dir}")
        for split in data.SPLITS:
            points = {e["step"]: e[f"loss_{split}"] for e in entries if f"loss_{split}" in e}
            if points:
                ax.plot(points.keys(), points.values(), "o", label=f" {out_dir}, {split}")
    ax.set(xlabel="step", ylabel="loss (nats per output token)", ylim=(0, None))
    ax.legend()
    data.save_figure(figure, file)


# ---- The command line ----


@dataclass(kw_only=True)
class Config:
    """One run. Every field is a flag; `fill_in` replaces None.

    n_gist: gist tokens after the prompt
    condition: what the input sees of the prompt
    arch: decoder or encoder-decoder; --init_from decides it
    see_start: all see the first token, <s>, as pretrained decoders expect
    data: a directory in the Alpaca+ layout, or builtin
    init_from: start from this checkpoint (default: random weights)
    base: the original LLaMA, if --init_from holds a weight delta
    out_dir: keep the run there (default: out/ARCH-CONDITION-N_GIST)
    resume: go on with the run in --out_dir; other flags are those it began with
    max_length: longest example in tokens (default: 512); t5: longest source (default: 128)
    max_target: t5: longest output in tokens
    max_length_human: max_length of the human split (default: the same)
    max_target_human: max_target of the human split (default: the same)
    generation_max_length: longest answer; llama: with prompt and input (default: longest reference)
    d_model: width of a new model
    n_layers: its layers (default: 4; t5: 3 in the encoder and 3 in the decoder)
    n_heads: its attention heads
    vocab_size: largest size of its tokenizer, which is trained on the data
    max_steps: optimizer steps
    epochs: passes through the training data, instead of --max_steps
    batch_size: examples a step
    micro_batch: examples in memory at once; their gradients add up (default: all of a step)
    optimizer: default: muon, or adamw with --init_from
    lr: peak learning rate of AdamW (default: 3e-3, or 2e-5 with --init_from)
    muon_lr: peak learning rate of Muon
    beta2: how slowly AdamW's second moment changes
    weight_decay: of AdamW; Muon has none
    grad_clip: largest norm of the gradient
    warmup: part of the steps in which the learning rate rises
    schedule: the learning rate after that
    seed: of weights, data and order
    device: default: the first that is there of cuda, mps and cpu
    dtype: of matrix products (default: bfloat16 on cuda, else float32)
    checkpoint_activations: less memory, a third more time
    compile: compile the layers: a slow start, then faster steps
    save_every: steps between checkpoints
    eval_every: steps between validation losses in the log (default: none)
    no_eval: do not evaluate at the end
    """

    n_gist: int = 1
    condition: str = "gist"
    arch: str = "llama"
    see_start: bool = False

    data: str = "builtin"
    init_from: str | None = None
    base: str | None = None
    out_dir: str | None = None
    resume: bool = False
    max_length: int | None = None
    max_target: int = 256
    max_length_human: int | None = None
    max_target_human: int | None = None
    generation_max_length: int | None = None

    d_model: int = 128
    n_layers: int | None = None
    n_heads: int = 4
    vocab_size: int = 2048

    max_steps: int = 3000
    epochs: float | None = None
    batch_size: int = 64
    micro_batch: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    muon_lr: float = 0.01
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup: float = 0.03
    schedule: str = "linear"
    seed: int = 0

    device: str | None = None
    dtype: str | None = None
    checkpoint_activations: bool = False
    compile: bool = False
    save_every: int = 500
    eval_every: int | None = None
    no_eval: bool = False


CHOICES = {  # what the flags take, besides their types
    "condition": gist_mask.TABLE,
    "arch": ("llama", "t5"),
    "optimizer": ("muon", "adamw"),
    "schedule": SCHEDULES,
    "dtype": ("float32", "bfloat16"),
}
FROM_ZERO = {"type": data.at_least(0)}
OPTIONS = {name: {"choices": choices} for name, choices in CHOICES.items()} | {
    "n_gist": FROM_ZERO,
    "max_steps": FROM_ZERO,
    "seed": FROM_ZERO,
    "beta2": {"type": data.at_least(0, float, 0.9999)},
    "warmup": {"type": data.at_least(0, float, 1)},
}

# The paper's hyperparameters (section 4.1 and appendix A) for the pretrained model in --init_from,
# and its rule for the evaluation. Its code sets no betas, so they are AdamW's usual ones. What
# differs here: T5's dropout of 0.1 was active in the paper's training, but our T5 has none; and we
# evaluate the last step, not the one with the best ROUGE-L on unseen.
# fmt: off
FLAN_T5 = dict(
    max_steps=16000, batch_size=16, optimizer="adamw", lr=5e-5, beta2=0.999, schedule="constant",
    warmup=0.0, max_length=128, max_target=256, max_length_human=384, max_target_human=384,
    generation_max_length=128)
HYPERPARAMETERS = {
    "llama-7b": dict(
        max_steps=3000, batch_size=128, optimizer="adamw", lr=2e-5, beta2=0.999, schedule="cosine",
        max_length=512, max_length_human=768, generation_max_length=512, dtype="bfloat16"),
    "flan-t5-xxl": FLAN_T5 | dict(dtype="bfloat16"),
    "flan-t5-base": FLAN_T5 | dict(dtype="float32"),
}
# fmt: on


def read_flags() -> Config:
    """The command line. What it does not give is the resumed run's, the preset's, or Config's."""
    parser = argparse.ArgumentParser(
        description="Train a model to compress prompts, evaluate it.",
        argument_default=argparse.SUPPRESS,  # parse only what the command line gives
    )
    about = "the paper's values of the flags below, for this model in --init_from"
    parser.add_argument("--preset", choices=HYPERPARAMETERS, help=about)
    data.add_arguments(parser, Config, OPTIONS)
    given = vars(parser.parse_args())
    preset = HYPERPARAMETERS.get(given.pop("preset", None), {})
    begun = {}
    if given.get("resume") and "out_dir" in given:
        out_dir = Path(given["out_dir"])
        check_out_dir(out_dir, resume=True)
        if (out_dir / CHECKPOINT).exists():
            begun = begun_with(out_dir)
        elif not preset and given.keys() == {"resume", "out_dir"}:
            raise DataError(
                f"{out_dir}: stopped before its first checkpoint, so it has to start over: give "
                "its other flags, too, or delete the folder"
            )
    return Config(**begun | preset | given)


def begun_with(out_dir):
    """What the run in out_dir began with, on whatever device: fields of a Config."""
    begun = data.read_config(out_dir).get("gisting", {})
    names = (Config.__annotations__.keys() & begun.keys()) - {"device", "epochs"}
    return {name: begun[name] for name in names}


def fill_in(config: Config) -> Config:
    """Replace every None by what follows from the other fields and the machine.

    Raises DataError for what makes no sense.
    """
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in (None, *choices):
            raise DataError(f"--{name} {value}: choose from {', '.join(choices)}")
    if config.n_gist == 0 and any(0 in row for row in gist_mask.TABLE[config.condition]):
        raise DataError(
            f"--condition {config.condition} needs a gist token: give --n_gist 1, or more"
        )
    arch, device = config.arch, data.find_device(config.device)
    if config.init_from:
        arch = data.read_config(config.init_from).get("model_type", "llama")
    follows = {
        "out_dir": f"out/{arch}-{config.condition}-{config.n_gist}",
        "max_length": 128 if arch == "t5" else 512,
        "n_layers": 3 if arch == "t5" else 4,
        "optimizer": "adamw" if config.init_from else "muon",
        "lr": 2e-5 if config.init_from else 3e-3,
        "dtype": "bfloat16" if device.startswith("cuda") else "float32",
    }
    missing = {name: x for name, x in follows.items() if getattr(config, name) is None}
    return replace(config, arch=arch, device=device, **missing)


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
        has_row = model.config.vocab_size == tokenizer.gist_id + 1  # released gist models do
        if has_row or "gisting" in data.read_config(config.init_from):
            return model, tokenizer
    else:
        tokenizer = tokenizer or data.train_tokenizer(records, config.vocab_size)
        with data.one_line_errors("--d_model and --n_heads", "give others"):
            model = untrained_model(config, tokenizer)
    data.add_gist_token(model, tokenizer)
    return model, tokenizer


def untrained_model(config, tokenizer):
    """A small model with random weights."""
    d, heads, layers = config.d_model, config.n_heads, config.n_layers
    shape = dict(d_model=d, n_layers=layers, n_heads=heads, head_dim=d // heads)
    shape["vocab_size"] = tokenizer.vocab_size
    if config.arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=heads, d_ff=3 * d))
    else:
        more = dict(n_decoder_layers=layers, start_id=tokenizer.pad_id, tie_embeddings=True)
        model = T5(T5Config(**shape, **more, d_ff=2 * d))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def layout_options(config: dict, split: str) -> dict:
    """The arguments of `data.make_examples` for a split. config: the fields of a Config."""
    names = ("n_gist", "arch", "see_start", "max_length", "max_target")
    options = {name: config[name] for name in names}
    if split == "human":  # in the paper, its examples may be longer
        for name in ("max_length", "max_target"):
            options[name] = config[f"{name}_human"] or config[name]
    return options


def train(config: Config, loss_function=batch_loss, make_model=make_model):
    """One whole run, except for its evaluation: what the command does, for notebooks.

    loss_function: as in `fit`. make_model: for a model or a tokenizer of your own. Returns the
    model, its tokenizer, the configuration with every None filled in, and what `fit` returns.
    Raises DataError.
    """
    config = fill_in(config)
    out_dir = Path(config.out_dir)
    check_out_dir(out_dir, config.resume)  # before minutes of loading; `fit` asks again
    with processes(config.device):
        splits = data.load_instructions(config.data, config.seed)
        records = splits.pop("train")
        tokenizer = data.load_tokenizer(out_dir) if config.resume else None  # a run keeps its own
        model, tokenizer = make_model(config, records, tokenizer)
        if config.see_start and (config.arch == "t5" or tokenizer.bos_id is None):
            raise DataError("--see_start: this model has no first token <s>; leave it out")
        options = layout_options(vars(config), "train")
        examples, skipped = data.make_examples(records, tokenizer, **options)
        if not examples:
            raise DataError(f"{config.data}: --max_length cuts off every output; raise it")
        validation = {
            split: data.make_examples(others, tokenizer, **layout_options(vars(config), split))[0]
            for split, others in splits.items()
        }
        if config.epochs is not None:
            n_batches = math.ceil(len(examples) / config.batch_size)
            config = replace(config, max_steps=math.ceil(config.epochs * n_batches))
        if not any(splits.values()):  # no validation files
            config = replace(config, no_eval=True)
        if is_first():
            n = sum(weight.numel() for weight in model.parameters())
            counts = f"{n:,} parameters, {len(examples):,} examples ({skipped} skipped)"
            print(f"{out_dir}: {counts}", flush=True)
        stopped = fit(model, tokenizer, examples, config, loss_function, out_dir, validation)
    return model, tokenizer, config, stopped


def exit_if_stopped(signal_number):
    """End the program, with the usual status, if a signal stopped its training."""
    if signal_number:
        print("stopped and saved; go on with the same command and --resume", file=sys.stderr)
        sys.exit(128 + signal_number)


def main():
    _, _, config, stopped = train(read_flags())
    if os.environ.get("RANK", "0") != "0":  # only the first process has more to do
        return
    exit_if_stopped(stopped)
    if not config.no_eval:  # in place of this process, so that all its memory is free
        script = Path(__file__).with_name("eval.py")
        flags = ["--device", config.device, "--dtype", config.dtype]
        os.execv(sys.executable, [sys.executable, script, "run", config.out_dir, *flags])


if __name__ == "__main__":
    data.run(main)
