"""What does a gist token look at? Its attention to an instruction, drawn layer by layer.

    python -m tests.exercises.attention out/llama-gist-1 --instruction "Put lamp at the front."

The gist of a trained model has to get the instruction's words from somewhere. A row of the picture
is a gist token in one layer, a column a token of the prompt, and the color the attention weight,
mean over the heads: the softmax that PyTorch's fused attention does not hand out. Takes seconds.
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
    model: Llama | T5, tokens: Tensor, gist_id: int, condition: str
) -> list[Tensor]:
    """softmax(q k') in every layer that reads the prompts, each (B, H, P, P).

    tokens: (B, P) int64, prompts with their gist tokens, without padding.
    """
    mask = eval.mask_of(model)(tokens, gist_id, condition)  # (B, 1, P, P)
    positions = gist_mask.positions(tokens, gist_id)
    x = model.embedding(tokens)  # (B, P, D)
    if isinstance(model, T5):
        layers, scale = model.encoder.layers, 1.0
        bias = model.encoder.bias(positions, tokens.shape[1]).masked_fill(~mask, -math.inf)
        others = (bias, None, None, None)
    else:
        layers, scale = model.layers, model.config.head_dim**-0.5
        bias = torch.where(mask, 0.0, -math.inf)
        others = (mask, *model.angles(positions), None)
    weights = []
    for layer in layers:
        h = layer.attention_norm(x)
        if isinstance(model, T5):
            q = layer.attention.wq(h).unflatten(-1, layer.attention.heads)  # (B, P, H, K)
            k, _ = layer.attention.keys_values(h)
        else:
            q, k, _ = layer.attention.queries_keys_values(h, *others[1:3])
            k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = scale * torch.einsum("bqhk,bshk->bhqs", q, k) + bias
        weights.append(scores.softmax(dim=-1))
        x = layer(x, *others)
    return weights


def draw(run: str, instruction: str, out: str, device: str | None = None) -> None:
    """Draw what the gist tokens look at. out: the picture. Raises data.DataError."""
    model, tokenizer, config = eval.open_run(run, device=device)
    tokens, gist = eval.compress_instruction(instruction, model, tokenizer, config)
    rows, labels = [], []
    layers = attention_weights(model, tokens, tokenizer.gist_id, config["condition"])
    for layer, weights in enumerate(layers, start=1):
        rows += weights[0, :, -gist.length :].mean(dim=0).tolist()  # over the heads
        labels += [f"layer {layer}, gist {g + 1}" for g in range(gist.length)]
    words = [tokenizer.decode([i]).strip() or "·" for i in tokens[0].tolist()]
    words[-gist.length :] = ["<G>"] * gist.length
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
