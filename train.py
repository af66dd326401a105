"""Gist fine-tuning: ordinary instruction tuning, but for the attention mask.

    python train.py --n_gist 1                             # from scratch on the built-in instructions, minutes on a CPU
    python train.py --n_gist 1 --init_from DIR --data DIR  # from a pretrained model, on real instructions

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
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # footgun: on a busy machine, threads that spin while they wait train ten times slower
import torch
from torch import Tensor
from tqdm import tqdm

import data
import gist_mask
from model import IGNORE, Llama, LlamaConfig
from t5 import T5, T5Config


# ---- Loss ----

def batch_loss(model, batch: dict[str, Tensor], gist_id: int, condition: str) -> Tensor:
    """The cross-entropy of a batch (see `data.collate`), in nats, summed over its labels."""
    tokens, valid = batch["tokens"], batch["valid"]
    condition = "pos_control" if condition == "tfidf" else condition      # nothing of the shortened prompt is hidden
    if isinstance(model, T5):
        mask, cross = (make(tokens, gist_id, condition, valid) for make in (gist_mask.encoder_mask, gist_mask.cross_mask))
        return model.loss(tokens, batch["targets"], mask, cross)
    mask, positions = gist_mask.decoder_mask(tokens, gist_id, condition, valid), gist_mask.positions(tokens, gist_id)
    return model.loss(tokens, batch["targets"], mask, positions)


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
                    updates.append(p.grad + group["momentum"] * m)        # Nesterov's look ahead
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(params, list(orthogonalize(torch.stack(updates)).unbind()), alpha=-scale)


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
        return [torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)]
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


def train(model, examples: list[data.Example], tokenizer, args, save: Callable[[int], None], optimizers, start: int = 0) -> None:
    """Train from step `start` to args.max_steps with a bar and a log. save(step) is called every args.save_every steps and at the end.

    Raises data.DataError if the loss is no longer finite; the checkpoint saved last is then still good.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
    model.train()
    began, tokens, smooth = time.perf_counter(), 0, None
    bar = tqdm(total=args.max_steps, initial=start, desc="train", unit="step", mininterval=0.5)
    with open(Path(args.out_dir) / "train_log.jsonl", "a", encoding="utf-8") as log, bar:
        for step, rows in zip(range(start, args.max_steps), steps(examples, args.batch_size, args.seed, start)):
            batch = {k: v.to(args.device) for k, v in data.collate([examples[i] for i in rows], tokenizer.pad_id, args.arch).items()}
            with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = batch_loss(model, batch, tokenizer.gist_id, args.condition) / (batch["targets"] != IGNORE).sum()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            if not (loss.isfinite() and norm.isfinite()):
                raise data.DataError(f"at step {step + 1} the loss is {loss.item()} and the gradient's norm {norm.item()}: stopped; try a smaller "
                                     f"--lr. The last checkpoint in {args.out_dir} is still good")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * lr_factor(step, args)
                optimizer.step()
                optimizer.zero_grad()
            tokens += int(batch["valid"].sum())
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            log.write(json.dumps({"step": step + 1, "loss": loss.item(), "lr": optimizers[0].param_groups[0]["lr"],
                                  "grad_norm": norm.item(), "tokens": int(batch["valid"].sum())}) + "\n")
            bar.set_postfix(loss=f"{smooth:.3f}", tokens_s=f"{tokens / (time.perf_counter() - began):,.0f}", refresh=False)
            bar.update()
            if (step + 1) % args.save_every == 0 or step + 1 == args.max_steps:
                log.flush()
                save(step + 1)


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
    a("--save_every", type=int, default=500, metavar="N", help="steps between checkpoints (%(default)s)")
    a("--no_eval", action="store_true", help="do not evaluate at the end")
    return parser


def parse_args() -> argparse.Namespace:
    """Read the flags, refuse what makes no sense, and fill in what depends on other flags or on the machine."""
    parser = make_parser()
    args = parser.parse_args()
    if args.init_from:
        args.arch = "t5" if data.read_config(args.init_from).get("model_type") == "t5" else "llama"
    llama = args.arch == "llama"
    args.out_dir = args.out_dir or f"out/{args.arch}-{args.condition}-{args.n_gist}"
    defaults = dict(max_length=512 if llama else 128, n_layers=4 if llama else 3,
                    optimizer="adamw" if args.init_from else "muon", lr=2e-5 if args.init_from else 3e-3)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in dict(n_gist=0, max_steps=0, batch_size=1, max_length=1, max_target=1, d_model=1, n_layers=1, n_heads=1,
                            vocab_size=1, save_every=1).items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more")
    for name in ("lr", "muon_lr", "grad_clip", "decay", "epochs"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be more than 0")
    if args.d_model % (2 * args.n_heads):
        parser.error("--d_model must be an even multiple of --n_heads")
    args.device = find_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
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
        if not (out_dir / "train_state.pt").exists():
            raise data.DataError(f"{out_dir}: has no train_state.pt, so there is nothing to resume; start without --resume")
        return torch.load(out_dir / "train_state.pt", map_location=args.device, weights_only=True)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not args.overwrite:
            raise data.DataError(f"{out_dir} holds another run: go on with it (--resume), start over (--overwrite), or give another --out_dir")
        if not (out_dir / "train_log.jsonl").exists():
            raise data.DataError(f"{out_dir} holds no run of ours, so --overwrite would delete something else; give another --out_dir")
    return None


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
    if args.init_from:
        model, tokenizer = data.load_model(args.init_from, base=args.base, device=args.device)
        if tokenizer is None:
            raise data.DataError(f"{args.init_from}: has no tokenizer file; put the model's tokenizer.model or tokenizer.json there")
        if "gisting" not in data.read_config(args.init_from):
            data.add_gist_token(model, tokenizer)
        return model.float(), tokenizer
    tokenizer = data.train_tokenizer(records, args.vocab_size)
    shape = dict(vocab_size=tokenizer.vocab_size, d_model=args.d_model, n_layers=args.n_layers, n_heads=args.n_heads,
                 head_dim=args.d_model // args.n_heads)
    if args.arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=args.n_heads, d_ff=3 * args.d_model))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=args.n_layers, d_ff=2 * args.d_model, start_id=tokenizer.pad_id))
    model.init_weights(torch.Generator().manual_seed(args.seed))
    return model.to(args.device), tokenizer


def main() -> None:
    args = parse_args()
    began = time.time()
    state = check_out_dir(args)
    records = data.load_instructions(args.data, args.seed)["train"]
    model, tokenizer = make_model(args, records)
    idf = data.inverse_frequencies(records) if args.condition == "tfidf" else None
    examples, skipped = data.make_examples(records, tokenizer, args.n_gist, args.arch, args.max_length, args.max_target, idf)
    if not examples:
        raise data.DataError(f"{args.data}: all {skipped} training examples lose their output at --max_length {args.max_length}; raise it")
    if args.epochs:
        args.max_steps = math.ceil(args.epochs * math.ceil(len(examples) / args.batch_size))

    lengths = [len(e) for e in examples]
    padding = data.padding_share(lengths, data.batch_order(lengths, args.batch_size, args.seed))
    print(f"{args.out_dir}: {args.condition}, {args.n_gist} gist tokens, {sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    print(f"{len(examples):,} training examples of {sum(lengths) / len(lengths):.1f} tokens; {skipped} skipped, their output was cut off; "
          f"{padding:.1%} of a batch is padding", flush=True)

    optimizers = make_optimizers(model, args)
    out_dir = Path(args.out_dir)
    open_out_dir(out_dir, resumed_at=state["step"] if state else None)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    before = state["seconds"] if state else 0.0

    def save(step: int) -> None:
        seconds = before + time.time() - began
        data.save_state(out_dir / "train_state.pt", {"step": step, "seconds": seconds, "model": model.state_dict(),
                                                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        data.save_model(out_dir, model, tokenizer, extra={**vars(args), "steps": step, "seconds": round(seconds, 1)})
        draw_loss(out_dir)

    start = state["step"] if state else 0
    if start >= args.max_steps:                        # nothing to train; what there is can still be evaluated
        save(start)
    train(model, examples, tokenizer, args, save, optimizers, start)
    if not args.no_eval:
        sys.exit(subprocess.call([sys.executable, str(Path(__file__).with_name("eval.py")), "run", args.out_dir, "--device", args.device]))


if __name__ == "__main__":
    data.run(main)
