"""What does a gist token look at? Its attention to an instruction, drawn layer by layer.

    python -m tests.exercises.attention out/llama-gist-1 --instruction "Put lamp at the front."

The gist of a trained model has to get the instruction's words from somewhere. A row of the picture
is a gist token in one layer, a column a token of the prompt, and the color the attention weight,
mean over the heads: the softmax that PyTorch's fused attention does not hand out. For "Put lamp at
the front and bread at the end.", one layer of the main job's model reads little but `lamp` and
another little but `bread`, the two words that the answer cannot do without. Takes seconds.
"""

import argparse
import math

import torch
from torch import Tensor

import data
import eval
import gist_mask
from model import Llama
from t5 import T5


@torch.no_grad()
def attention_weights(
    model: Llama | T5, tokens: Tensor, segments: Tensor, condition: str
) -> list[Tensor]:
    """softmax(q k') in every layer that reads the tokens, each (B, H, T, T).

    tokens, segments: (B, T) int64.
    """
    masked = gist_mask.masking(model, segments, condition)
    mask, positions = masked["mask"], masked["positions"]  # (B, 1, T, T) and (B, T)
    x = model.embedding(tokens)  # (B, T, D)
    weights = []
    if isinstance(model, T5):
        bias = model.encoder.bias(positions, tokens.shape[1])  # (B, H, T, T)
        bias = bias.masked_fill(~mask, -math.inf)
        for layer in model.encoder.layers:
            h = layer.attention_norm(x)
            q = layer.attention.wq(h).unflatten(-1, layer.attention.heads)  # (B, T, H, K)
            k, _ = layer.attention.keys_values(h)
            weights.append((scores(q, k) + bias).softmax(dim=-1))
            x = layer(x, bias, None, None, None)
        return weights
    cos, sin = model.angles(positions)
    for layer in model.layers:
        q, k, _ = layer.attention.queries_keys_values(layer.attention_norm(x), cos, sin)
        scaled = scores(q, k) * model.config.head_dim**-0.5
        weights.append(scaled.masked_fill(~mask, -math.inf).softmax(dim=-1))
        x = layer(x, mask, cos, sin, None)
    return weights


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k' of every head, (B, H, T, T). q: (B, T, H, K); k: the same, or with fewer heads."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bqhk,bshk->bhqs", q, k)


def name_of(token: int, tokenizer: data.Tokenizer) -> str:
    """What to write beside a token: its text, if it has one."""
    if token == tokenizer.gist_id:
        return "<G>"
    if token == tokenizer.bos_id:
        return "<s>"
    return tokenizer.decode([token]).strip() or "·"


def draw(run: str, instruction: str, out: str, device: str | None = None) -> None:
    """Draw what the gist tokens look at. out: the picture. Raises data.DataError."""
    model, tokenizer, config = eval.open_run(run, device=device)
    n_gist = config["n_gist"]
    if n_gist == 0:
        raise data.DataError(f"{run}: has no gist tokens; give a run with --n_gist 1 or more")
    e = eval.lay_out(instruction, "", tokenizer, config)
    prompt = eval.prompts_of([e], tokenizer, model.embedding.weight.device)
    rows, labels = [], []
    layers = attention_weights(model, *prompt, config["condition"])  # each (1, H, P, P)
    for layer, weights in enumerate(layers, start=1):
        rows += weights[0, :, -n_gist:].mean(dim=0).tolist()  # over the heads
        labels += [f"layer {layer}, gist {g + 1}" for g in range(n_gist)]
    words = [name_of(token, tokenizer) for token in e.prompt]
    figure, ax = data.new_figure(1 + 0.35 * len(words), 1.6 + 0.3 * len(labels))
    image = ax.imshow(rows, cmap="Reds", vmin=0, aspect="auto")
    ax.set_xticks(range(len(words)), words, rotation=90, parse_math=False)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(instruction, parse_math=False)
    figure.colorbar(image, label="attention, mean over heads")
    data.save_figure(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what gist tokens look at.")
    parser.add_argument("run", help="a gist run of train.py")
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--out", default="attention.png", help="the picture")
    flags = parser.parse_args()
    draw(flags.run, flags.instruction, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
