"""Gist fine-tuning: ordinary instruction tuning, but for the attention mask.

    python train.py --n_gist 1                             # from scratch on the built-in instructions, minutes on a CPU
    python train.py --n_gist 1 --init_from DIR --data DIR  # from a pretrained model, on real instructions
    torchrun --nproc_per_node 4 train.py ...               # on several GPUs, each with a part of the model

    loss = - sum log p(output token | what the mask lets it see) / number of output tokens          (the paper's section 3)

The gist tokens get no loss of their own: they learn to hold the prompt because the output cannot look past them. The two
controls of the paper train the same way with other masks: `pos_control` sees the whole prompt, `neg_control` none of it. Its
discrete baseline, `tfidf`, has no gist tokens: the prompt is shortened to its n_gist most informative words.

A run leaves its checkpoint (Hugging Face layout), train_log.jsonl, loss.png and train_state.pt (for --resume) in --out_dir;
then eval.py answers every validation split.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # footgun: on a busy machine, threads that spin while they wait train ten times slower
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import gist_mask
from model import IGNORE, Llama, LlamaConfig
from t5 import T5, T5Config

# The paper's hyperparameters (section 4.1 and appendix A), for fine-tuning the pretrained model in --init_from.
PRESETS = {
    "llama-7b": dict(arch="llama", max_steps=3000, batch_size=128, optimizer="adamw", lr=2e-5, weight_decay=0.0, schedule="cosine", warmup=0.03,
                     dtype="bfloat16", max_length=512),
    "flan-t5-xxl": dict(arch="t5", max_steps=16000, batch_size=16, optimizer="adamw", lr=5e-5, weight_decay=0.0, schedule="constant", warmup=0.0,
                        dtype="bfloat16", max_length=128, max_target=256),
}


# ---- Loss ----

def batch_loss(model, batch: dict[str, Tensor], gist_id: int, condition: str) -> Tensor:
    """The cross-entropy of a batch (see `data.collate`), in nats, summed over its labels."""
    tokens, valid = batch["tokens"], batch["valid"]
    condition = "pos_control" if condition == "tfidf" else condition      # nothing of the shortened prompt is hidden
    if isinstance(model, T5):
        mask, cross = (make(tokens, gist_id, condition, valid) for make in (gist_mask.encoder_mask, gist_mask.cross_mask))
        several = gist_mask.pairs(tokens, gist_id).max() > 1              # one gist needs no positions of its own: only differences count
        return model.loss(tokens, batch["targets"], mask, cross, gist_mask.positions(tokens, gist_id) if several else None)
    mask, positions = gist_mask.decoder_mask(tokens, gist_id, condition, valid), gist_mask.positions(tokens, gist_id)
    return model.loss(tokens, batch["targets"], mask, positions)


def accumulate_gradients(model, examples: list[data.Example], tokenizer, args) -> float:
    """Add the gradient of a batch's mean loss to the weights' .grad, --micro_batch examples at a time. Returns the loss, nats per label.

    Every process takes its share of the examples, and returns its share of the loss. What it adds up is divided by the labels
    of the whole batch, so how the batch is cut changes nothing.
    """
    rank, world = rank_and_world()
    labels, loss = sum(len(e.output) for e in examples), 0.0
    mine, share = examples[rank::world], math.ceil(len(examples) / world)
    size = args.micro_batch or share
    for start in range(0, share, size):
        part = mine[start:start + size]
        batch = data.collate(part or examples[:1], tokenizer.pad_id, args.arch)
        if not part:                                   # all processes compute together, even if one has nothing left to learn from
            batch["targets"].fill_(IGNORE)
        batch = {k: v.to(args.device) for k, v in batch.items()}
        with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
            part_loss = batch_loss(model, batch, tokenizer.gist_id, args.condition) / labels
        (part_loss * world).backward()                 # the processes' gradients are averaged, and a sum is wanted
        loss = loss + part_loss.detach()               # stays on the device until it is whole
    return loss.item()


def layers_of(model) -> list[nn.Module]:
    return [*model.encoder.layers, *model.decoder.layers] if isinstance(model, T5) else [*model.layers]


def prepare_layers(model, args) -> None:
    """Compile every layer, which takes a minute and makes steps faster; checkpoint its activations, which saves memory and takes time.

    A checkpointed layer keeps only its input, and computes what is inside once more when the gradient comes back. All layers
    share one compiled function, which takes batches of any length.
    """
    for layer in layers_of(model):
        if args.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if args.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ---- Many processes ----

def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def process_group(args) -> Iterator[None]:
    """Join the other processes, if torchrun started this one. Raises data.DataError."""
    if "RANK" not in os.environ:
        yield
        return
    on_cuda = args.device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(args.device)
    elif torch.__version__ < "2.8":
        raise data.DataError(f"several processes without GPUs need torch 2.8 or newer, this is {torch.__version__}: install it, "
                             "or start train.py with python")
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard_model(model, args) -> None:
    """Leave every process its part of every weight, in fp32: FSDP2. The whole weights of a layer are there only while it computes.

    --parallel ddp is the same with a mesh of N copies in one part each: every process keeps all, and only gradients are exchanged.
    With bfloat16 a layer's weights travel as bf16; gradients are summed in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _, world = rank_and_world()
    device = torch.device(args.device).type
    mesh = init_device_mesh(device, (1, world) if args.parallel == "fsdp" else (world, 1), mesh_dim_names=("copies", "parts"))
    policy = MixedPrecisionPolicy(torch.bfloat16 if args.dtype == "bfloat16" else None, torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model):
        layer.float()
        if hasattr(layer, "cross_attention"):          # its keys and values are computed before the layer, see T5.read
            fully_shard(layer.cross_attention, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(layer.cross_attention, "keys_values")
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model.float(), mesh=mesh)
    for name in ("loss", "compress", "generate"):
        register_fsdp_forward_method(model, name)


def summed(*values: float) -> list[float]:
    """Numbers, each added up over all processes."""
    if not dist.is_initialized():
        return [*values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def whole(x):
    """A state (tensors in dicts and lists) in whole tensors on the CPU of rank 0. All processes have to call this together."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    if isinstance(x, list):
        return [whole(value) for value in x]
    if not hasattr(x, "full_tensor"):                  # not a DTensor
        return x
    full = x.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole tensor: as much as it has of `like`, a weight of the same shape."""
    if not hasattr(like, "full_tensor") or full.shape != like.shape:
        return full
    from torch.distributed.tensor import DTensor, Replicate
    return DTensor.from_local(full.to(like.device), like.device_mesh, [Replicate()] * like.device_mesh.ndim).redistribute(placements=like.placements)


# ---- Optimizer ----

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every weight matrix moves by the nearest (semi-)orthogonal matrix to its momentum.

    All directions of the update get the same size, also those whose gradients are small, and a tiny model needs fewer
    steps than with AdamW. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. In fp32, as bf16 is emulated on many CPUs.
    For matrices inside the layers only; embeddings, head and norms belong to AdamW.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():                        # matrices of a shape go together, in one batch
                updates = []
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad + group["momentum"] * m               # Nesterov's look ahead
                    updates.append(update.full_tensor() if hasattr(update, "full_tensor") else update)
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    p.add_(part_of(update, p), alpha=-scale)


def orthogonalize(x: Tensor) -> Tensor:
    """Move all singular values of x (..., m, n) close to 1, by five Newton-Schulz steps x <- a x + b (xx')x + c (xx')^2 x."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(5):
        xx = x @ x.mT
        x = 3.4445 * x + (-4.7750 * xx + 2.0315 * xx @ xx) @ x
    return x if wide else x.mT


def make_optimizers(model, args) -> list[torch.optim.Optimizer]:
    """AdamW for all weights; or, with --optimizer muon, Muon for the layers' matrices and AdamW for the others."""
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)]
    # T5's two peculiarities need other steps. Its position biases start near 0 and have to reach several units before a head
    # finds a place. It does not divide attention by sqrt(K): its queries are that much smaller instead, and so are their steps.
    small = model.config.head_dim ** -0.5 if isinstance(model, T5) else 1.0
    biases, queries, matrices, others = [], [], [], []
    for name, p in model.named_parameters():
        if "relative_bias" in name:
            biases.append(p)
        elif "layers." not in name or p.ndim != 2:
            others.append(p)
        else:
            (queries if name.endswith("wq.weight") else matrices).append(p)
    adamw = torch.optim.AdamW([{"params": others}, {"params": biases, "lr": 30 * args.lr}], lr=args.lr, betas=(0.9, 0.95),
                              weight_decay=args.weight_decay)
    return [adamw, Muon([{"params": matrices}, {"params": queries, "lr": args.muon_lr * small}], lr=args.muon_lr)]


def lr_factor(step: int, args) -> float:
    """What part of the peak learning rate to use at a step: linear warm-up, then the chosen schedule."""
    warmup = max(1, round(args.warmup * args.max_steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, args.max_steps - warmup)
    if args.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if args.schedule == "linear":                      # flat, then straight down to 0 over the last part
        return min(1.0, (1 - done) / args.decay)
    return 1.0


# ---- One run ----

def steps(examples: list[data.Example], batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """Batches of indices, epoch after epoch, from step `start` on: the same batches, however often a run was resumed."""
    lengths = [len(e) for e in examples]
    per_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in count(start // per_epoch):
        batches = data.batch_order(lengths, batch_size, seed=seed * 1_000_003 + epoch)
        yield from batches[start % per_epoch if epoch == start // per_epoch else 0:]


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that fills with the signals that come, Ctrl-C and SIGTERM, instead of ending the program; the second one does end it."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number, frame) -> None:
        caught.append(number)
        if not dist.is_initialized():                  # torchrun passes on what its processes got already
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model, examples: list[data.Example], tokenizer, args, save: Callable[[int], None], optimizers, start: int = 0) -> int | None:
    """Train from step `start` to args.max_steps with a bar and a log. save(step) is called every args.save_every steps and at the end.

    Returns None; or, on Ctrl-C or SIGTERM, the signal's number, after finishing and saving the step. Raises data.DataError if the loss
    is no longer finite; the checkpoint saved last is then still good.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
    model.train()
    began, tokens, smooth, first = time.perf_counter(), 0, None, rank_and_world()[0] == 0
    bar = tqdm(total=args.max_steps, initial=start, desc="train", unit="step", mininterval=0.5, disable=not first)
    log_file = Path(args.out_dir) / "train_log.jsonl" if first else os.devnull
    with open(log_file, "a", encoding="utf-8") as log, bar, caught_signals() as caught:
        for step, rows in zip(range(start, args.max_steps), steps(examples, args.batch_size, args.seed, start)):
            batch = [examples[i] for i in rows]
            loss, stop = summed(accumulate_gradients(model, batch, tokenizer, args), bool(caught))
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise data.DataError(f"at step {step + 1} the loss is {loss} and the gradient's norm {norm}: stopped; try a smaller "
                                     f"--lr. The last checkpoint in {args.out_dir} is still good")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * lr_factor(step, args)
                optimizer.step()
                optimizer.zero_grad()
            read = sum(len(e) - len(e.output) * (args.arch == "t5") for e in batch)     # T5: of the source
            tokens += read
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            log.write(json.dumps({"step": step + 1, "loss": loss, "lr": optimizers[0].param_groups[0]["lr"], "grad_norm": norm, "tokens": read}) + "\n")
            bar.set_postfix(loss=f"{smooth:.3f}", tokens_s=f"{tokens / (time.perf_counter() - began):,.0f}", refresh=False)
            bar.update()
            if (step + 1) % args.save_every == 0 or step + 1 == args.max_steps or stop:
                log.flush()
                if first:
                    os.fsync(log.fileno())             # the log is never behind the checkpoint
                save(step + 1)
            if stop and step + 1 < args.max_steps:
                return caught[0] if caught else signal.SIGTERM


def draw_loss(out_dir: Path) -> None:
    """Draw train_log.jsonl into loss.png: every step's loss, faint, and its running mean."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (out_dir / "train_log.jsonl").read_text().splitlines()]
    if not log:
        return
    at, loss = [entry["step"] for entry in log], [entry["loss"] for entry in log]
    smooth = loss[:1]
    for value in loss[1:]:
        smooth.append(0.98 * smooth[-1] + 0.02 * value)
    figure, ax = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    ax.plot(at, loss, color="tab:blue", alpha=0.25, linewidth=0.7, label="one batch")
    ax.plot(at, smooth, color="tab:blue", label="running mean")
    ax.set(xlabel="step", ylabel="loss (nats per output token)", title=out_dir.name, ylim=(0, None))
    ax.legend(frameon=False)
    figure.savefig(out_dir / "loss.tmp.png", dpi=120)
    plt.close(figure)
    os.replace(out_dir / "loss.tmp.png", out_dir / "loss.png")


# ---- The command ----

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a model to compress prompts into gist tokens, and evaluate it.")
    a = parser.add_argument_group("the method").add_argument
    a("--n_gist", type=int, default=1, metavar="N", help="gist tokens after the prompt (%(default)s)")
    a("--condition", choices=(*gist_mask.CONDITIONS, "tfidf"), default="gist",
      help="what the input sees of the prompt: the gist, everything, nothing, or its N words of highest TF-IDF instead (gist)")
    a("--arch", choices=("llama", "t5"), default="llama", help="decoder or encoder-decoder (llama); --init_from decides it by itself")

    a = (source := parser.add_argument_group("what to train on, and where to keep it")).add_argument
    a("--data", default="builtin", metavar="DIR", help="a directory in the Alpaca+ layout, or 'builtin' (builtin)")
    a("--n_shots", type=int, default=0, metavar="K", help="builtin: show K worked examples in every prompt (%(default)s)")
    a("--per_step", action="store_true", help="builtin: of an instruction of two steps, make two prompts with a gist each")
    a("--pretrain_gist", metavar="TEXT",
      help="learn to compress running text instead, a file or a directory of *.txt, or 'builtin'; then go on with --init_from")
    a("--init_from", metavar="DIR", help="start from this checkpoint (random weights)")
    a("--base", metavar="DIR", help="the original LLaMA, if --init_from holds differences from it")
    a("--out_dir", metavar="DIR", help="where the run is kept (out/ARCH-CONDITION-N_GIST)")
    a("--max_length", type=int, metavar="N", help="longest example in tokens, t5: longest source; the rest is cut (512; t5: 128)")
    a("--max_target", type=int, default=256, metavar="N", help="t5: longest output in tokens (%(default)s)")
    a = source.add_mutually_exclusive_group().add_argument
    a("--resume", action="store_true", help="go on with the run in --out_dir; give the flags that it was started with")
    a("--overwrite", action="store_true", help="delete the run in --out_dir and start over")

    a = parser.add_argument_group("a model from random weights").add_argument
    a("--d_model", type=int, default=128, metavar="N", help="width (%(default)s)")
    a("--n_layers", type=int, metavar="N", help="layers (4; t5: 3 in the encoder and 3 in the decoder)")
    a("--n_heads", type=int, default=8, metavar="N", help="attention heads (%(default)s)")
    a("--vocab_size", type=int, default=2048, metavar="N", help="largest size of the tokenizer trained on the data (%(default)s)")

    a = parser.add_argument_group("how to train").add_argument
    a("--preset", choices=PRESETS, help="the paper's hyperparameters for the model in --init_from; other flags override them")
    a("--max_steps", type=int, default=3000, metavar="N", help="steps (%(default)s)")
    a("--epochs", type=float, metavar="X", help="passes over the training data, instead of --max_steps")
    a("--batch_size", type=int, default=64, metavar="N", help="examples a step (%(default)s)")
    a("--optimizer", choices=("muon", "adamw"), help="muon learns in fewer steps from random weights (muon; adamw with --init_from)")
    a("--lr", type=float, metavar="X", help="peak learning rate of AdamW (3e-3; 2e-5 with --init_from)")
    a("--muon_lr", type=float, default=0.015, metavar="X", help="peak learning rate of Muon (%(default)s)")
    a("--weight_decay", type=float, default=0.0, metavar="X", help="of AdamW (%(default)s)")
    a("--grad_clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient (%(default)s)")
    a("--warmup", type=float, default=0.03, metavar="X", help="part of the steps in which the learning rate rises (%(default)s)")
    a("--schedule", choices=("linear", "cosine", "constant"), default="linear", help="the learning rate after that (%(default)s)")
    a("--decay", type=float, default=0.5, metavar="X", help="linear: the part of the steps in which it falls to 0 (%(default)s)")
    a("--seed", type=int, default=0, metavar="N", help="of weights, data and order (%(default)s)")
    a("--device", help="cuda, mps or cpu (the first of these that is there)")
    a("--dtype", choices=("float32", "bfloat16"), help="of matrix products (bfloat16 on cuda, else float32)")
    a("--micro_batch", type=int, metavar="N", help="examples in memory at once; the gradients of a batch add up (all of them)")
    a("--checkpoint_activations", action="store_true", help="less memory, a third more time: compute each layer again in the backward pass")
    a("--parallel", choices=("fsdp", "ddp"), default="fsdp",
      help="with torchrun: every process keeps a part of all weights, gradients and moments (fsdp) or a copy of all (ddp) (%(default)s)")
    a("--compile", action="store_true", help="compile the layers with torch.compile: a slow start, then faster steps")
    a("--save_every", type=int, default=500, metavar="N", help="steps between checkpoints (%(default)s)")
    a("--no_eval", action="store_true", help="do not evaluate at the end")
    return parser


def parse_args() -> argparse.Namespace:
    """Read the flags, refuse what makes no sense, and fill in what depends on other flags or on the machine."""
    parser = make_parser()
    args = parser.parse_args()
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])    # what is on the command line still comes before the defaults
        args = parser.parse_args()
    if args.init_from:
        args.arch = "t5" if data.read_config(args.init_from).get("model_type") == "t5" else "llama"
    if args.preset and (not args.init_from or args.arch != PRESETS[args.preset]["arch"]):
        parser.error(f"--preset {args.preset} is for a pretrained {PRESETS[args.preset]['arch']} model, but --init_from "
                     + (f"{args.init_from} holds a {args.arch} model" if args.init_from else "is not given"))
    llama = args.arch == "llama"
    args.out_dir = args.out_dir or f"out/{args.arch}-{args.condition}-{args.n_gist}"
    defaults = dict(max_length=512 if llama else 128, n_layers=4 if llama else 3,
                    optimizer="adamw" if args.init_from else "muon", lr=2e-5 if args.init_from else 3e-3)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.n_gist == 0 and args.condition != "pos_control":
        parser.error(f"--condition {args.condition} needs --n_gist 1 or more; without gist tokens every condition is pos_control")
    if args.pretrain_gist and (args.condition != "gist" or args.n_gist < 1 or args.epochs):
        parser.error("--pretrain_gist needs --condition gist, a gist token, and --max_steps")
    if (args.n_shots or args.per_step) and args.data != "builtin" or args.per_step and args.condition != "gist":
        parser.error("--n_shots and --per_step are for --data builtin, --per_step with --condition gist only")
    for name, least in dict(n_gist=0, n_shots=0, max_steps=0, batch_size=1, max_length=1, max_target=1, d_model=1, n_layers=1, n_heads=1,
                            vocab_size=1, save_every=1).items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more")
    for name in ("lr", "muon_lr", "grad_clip", "decay", "epochs", "micro_batch"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be more than 0")
    if args.d_model % (2 * args.n_heads):
        parser.error("--d_model must be an even multiple of --n_heads")
    args.device = find_device(args.device)
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device += ":" + os.environ["LOCAL_RANK"]
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise data.DataError("--compile needs a C++ compiler on the CPU: install g++, or name yours in the environment variable CXX")
    return args


def find_device(name: str | None = None) -> str:
    """The device to use: `name` if given and there, else cuda, mps or cpu. Raises data.DataError for one that is not there."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name and name.split(":")[0] not in here:
        raise data.DataError(f"--device {name}: not on this machine, which has {', '.join(here)}")
    return name or here[0]


def check_out_dir(args: argparse.Namespace) -> dict | None:
    """Is --out_dir free, or what the flags say it is? Returns the state to resume from, or None."""
    out_dir = Path(args.out_dir)
    if args.resume:
        if (out_dir / "train_state.pt").exists():
            return read_state(out_dir / "train_state.pt")
        if not (out_dir / "train_log.jsonl").exists() or (out_dir / "model.safetensors").exists():
            raise data.DataError(f"{out_dir}: has no train_state.pt, so there is nothing to resume; start without --resume")
        return None                                    # it ended before its first checkpoint: start over
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not args.overwrite:
            raise data.DataError(f"{out_dir} holds another run: go on with it (--resume), start over (--overwrite), or give another --out_dir")
        if not (out_dir / "train_log.jsonl").exists():
            raise data.DataError(f"{out_dir} holds no run of ours, so --overwrite would delete something else; give another --out_dir")
    return None


MAY_CHANGE = ("resume", "overwrite", "out_dir", "no_eval", "save_every", "device", "micro_batch", "checkpoint_activations", "compile",
              "parallel")


def read_state(file: Path) -> dict:
    """What `save` in `run` wrote, its tensors mapped from the file. Raises data.DataError."""
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if {"step", "seconds", "model", "optimizers", "args", "examples"} <= state.keys():
            return state
    except Exception:                # a broken file can raise anything
        pass
    raise data.DataError(f"{file}: cannot be read, so the run cannot be resumed; start over with --overwrite")


def check_same_run(state: dict, args: argparse.Namespace, n_examples: int) -> None:
    """Only the run that was begun can be resumed. Raises data.DataError, naming the flag that differs."""
    now = vars(args)
    for name, value in state["args"].items():
        if name not in MAY_CHANGE and now.get(name) != value:
            raise data.DataError(f"{args.out_dir} was begun with --{name} {value}, not {now.get(name)}: resume it with the same flags, "
                                 "or give another --out_dir")
    if state["examples"] != n_examples:
        raise data.DataError(f"{args.out_dir} was begun with {state['examples']} training examples, and {args.data} now gives {n_examples}; "
                             "restore the data, or give another --out_dir")


@torch.no_grad()
def load_state(state: dict, weights: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Put weights and moments back, or this process's parts of them."""
    for name, weight in weights.items():
        weight.copy_(part_of(state["model"][name], weight))
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {i: {key: part_of(value, params[i]) for key, value in m.items()} for i, m in saved["state"].items()}
        optimizer.load_state_dict(saved | {"state": moments})


def open_out_dir(out_dir: Path, resumed_at: int | None) -> None:
    """An empty directory for a new run; for a resumed one, the log up to the step it is resumed at."""
    log = out_dir / "train_log.jsonl"
    if resumed_at is not None:
        data.write_file(log, b"".join(log.read_bytes().splitlines(keepends=True)[:resumed_at]))
    else:
        if out_dir.exists():
            shutil.rmtree(out_dir)
        out_dir.mkdir(parents=True)
        log.touch()


def make_model(args: argparse.Namespace, records: list[dict]):
    """The model and the tokenizer: from --init_from, or new, the tokenizer trained on the training text."""
    device = "cpu" if dist.is_initialized() else args.device     # whence shard_model takes the parts
    if args.init_from:
        model, tokenizer = data.load_model(args.init_from, base=args.base, device=device)
        if tokenizer is None:
            raise data.DataError(f"{args.init_from}: has no tokenizer file; put the model's tokenizer.model or tokenizer.json there")
        if "gisting" not in data.read_config(args.init_from):
            data.add_gist_token(model, tokenizer)
        return model if dist.is_initialized() else model.float(), tokenizer
    tokenizer = data.train_tokenizer(records, args.vocab_size)
    shape = dict(vocab_size=tokenizer.vocab_size, d_model=args.d_model, n_layers=args.n_layers, n_heads=args.n_heads,
                 head_dim=args.d_model // args.n_heads)
    if args.arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=args.n_heads, d_ff=3 * args.d_model))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=args.n_layers, d_ff=2 * args.d_model, start_id=tokenizer.pad_id))
    model.init_weights(torch.Generator().manual_seed(args.seed))
    return model.to(device), tokenizer


def make_training_set(args: argparse.Namespace, records: list[dict], tokenizer) -> tuple[list[data.Example], int]:
    """What to learn from: instructions, or spans of text to compress; and how many were skipped. Raises data.DataError."""
    if args.pretrain_gist:
        return data.text_examples(args.pretrain_gist, tokenizer, args.n_gist, args.arch, max(1, args.max_steps) * args.batch_size, args.seed), 0
    idf = data.inverse_frequencies(records) if args.condition == "tfidf" else None
    examples, skipped = data.make_examples(records, tokenizer, args.n_gist, args.arch, args.max_length, args.max_target, idf)
    if not examples:
        raise data.DataError(f"{args.data}: all {skipped} training examples lose their output at --max_length {args.max_length}; raise it")
    return examples, skipped


def train_run(args: argparse.Namespace) -> None:
    """All of one run but its evaluation, in this process or with others. Exits with 128 + the signal's number if it was stopped."""
    rank, world = rank_and_world()
    began = time.time()
    state = check_out_dir(args)
    records = data.load_instructions(args.data, args.seed, args.n_shots, args.per_step)["train"]
    model, tokenizer = make_model(args, records)
    examples, skipped = make_training_set(args, records, tokenizer)
    if args.epochs:
        args.max_steps = math.ceil(args.epochs * math.ceil(len(examples) / args.batch_size))
    if state:
        check_same_run(state, args, len(examples))

    lengths = [len(e) for e in examples]
    padding = data.padding_share(lengths, data.batch_order(lengths, args.batch_size, args.seed))
    if rank == 0:
        print(f"{args.out_dir}: {args.condition}, {args.n_gist} gist tokens, {sum(p.numel() for p in model.parameters()):,} parameters on "
              f"{args.device}" + f", {world} processes" * (world > 1))
        print(f"{len(examples):,} training examples of {sum(lengths) / len(lengths):.1f} tokens; {skipped} skipped, their output was cut off; "
              f"{padding:.1%} of a batch is padding", flush=True)

    prepare_layers(model, args)
    if dist.is_initialized():
        shard_model(model, args)
    weights, optimizers, out_dir = dict(model.named_parameters()), make_optimizers(model, args), Path(args.out_dir)
    if state:
        load_state(state, weights, optimizers)
    summed(0)                                          # no process may look for the old run when the first one changes it
    if rank == 0:
        open_out_dir(out_dir, resumed_at=state["step"] if state else None)
    start, before = (state["step"], state["seconds"]) if state else (0, 0.0)

    def save(step: int) -> None:
        seconds = before + time.time() - began
        state = whole({"model": weights, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        if rank == 0:
            data.save_state(out_dir / "train_state.pt", state | {"step": step, "seconds": seconds, "args": vars(args), "examples": len(examples)})
            data.save_model(out_dir, model, tokenizer, {**vars(args), "steps": step, "seconds": round(seconds, 1)}, state["model"])
            draw_loss(out_dir)

    if start >= args.max_steps:                        # nothing to train; what there is can still be evaluated
        save(start)
    if stopped := train(model, examples, tokenizer, args, save, optimizers, start):
        launcher = ["python"] if world == 1 else ["torchrun", "--nproc_per_node", str(world)]
        again = shlex.join(launcher + [a for a in sys.argv if a not in ("--overwrite", "--resume")] + ["--resume"])
        if rank == 0:
            print(f"stopped and saved; go on with: {again}", file=sys.stderr)
        sys.exit(128 + stopped)


def main() -> None:
    args = parse_args()
    with process_group(args):
        train_run(args)
    if not (args.no_eval or args.pretrain_gist) and os.environ.get("RANK", "0") == "0":
        sys.exit(subprocess.call([sys.executable, str(Path(__file__).with_name("eval.py")), "run", args.out_dir, "--device", args.device]))


if __name__ == "__main__":
    data.run(main)
