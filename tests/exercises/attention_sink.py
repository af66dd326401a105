"""The attention sink: what a pretrained decoder misses under a gist mask.

    python -m tests.exercises.attention_sink SmolLM2-135M --data my_data     # a minute, no training

A pretrained decoder sends attention that it has no other use for to the first token of a row, an
attention sink (Xiao et al. 2023, arXiv 2309.17453): it sees only itself, so that what it hands on
is always the same. A gist mask hides that token from the input. So does neg_control, but there the
input's own first token sees only itself and takes its place; under the gist mask it sees the gist,
too. `--see_start` of train.py labels the row's first token START, which everybody sees:

    <s> Instruction: ... <G> Input: ... Output: ...
    START    PROMPT     GIST         INPUT            segments; the table is as it was

This program reads examples with a model as it is and prints its loss under each mask. The picture
shows where the attention of the input goes in every layer: to the row's first token, the gist, or
the input's own first token, mean over heads, tokens and examples. Who gets what the hidden token
would have got? Do the same with a model that was trained under these masks, or from random weights.

For SmolLM2-135M before any training and 16 unseen examples of Alpaca+, the loss is 2.05 with the
whole prompt, 2.26 without it, 3.26 under the gist mask, and 2.23 with --see_start. From layer 13 of
30 on, about half of the attention goes to the row's first token under pos_control, and to the
input's first under neg_control. Under the gist mask neither gets any, and a part of it goes to the
gist, which holds nothing yet. With --see_start, the row's first token has all of it again.
"""

import argparse

import torch

import data
import gist_mask
import train
from model import Llama
from tests.exercises.attention import attention_weights

SETTINGS = {  # a condition, and whether everybody sees the first token
    "pos_control": ("pos_control", False),
    "neg_control": ("neg_control", False),
    "gist": ("gist", False),
    "gist --see_start": ("gist", True),
}
PLACES = ("the row's first token", "the gist", "the input's first token")


def attention_of_input(model: Llama, batch: data.Tensors, condition: str) -> list[list[float]]:
    """For every layer, the part of the input's attention that each of PLACES gets, in percent.

    batch: one example. Mean over heads and all tokens after the input's first.
    """
    segments = batch["segments"][0]  # (T,)
    positions = gist_mask.positions(batch["segments"])[0]  # (T,) 0 at the input's first token
    is_first = torch.arange(len(segments), device=segments.device) == 0
    places = torch.stack([is_first, segments == gist_mask.GIST, positions == 0])  # (3, T)
    layers = []
    for weights in attention_weights(model, batch["tokens"], batch["segments"], condition):
        of_input = weights[0].mean(dim=0)[positions > 0].mean(dim=0)  # (T,)
        layers.append((100 * places.float() @ of_input).tolist())
    return layers


@torch.no_grad()
def measure(model: Llama, examples: list[data.Example], condition: str):
    """The loss per label in nats, and what `attention_of_input` says, mean over the examples."""
    loss, n_labels, of_examples = 0.0, 0, []
    for e in examples:
        batch = data.collate([e], pad_id=0)
        batch = {name: x.to(model.embedding.weight.device) for name, x in batch.items()}
        loss += train.batch_loss(model, batch, condition).item()
        n_labels += len(e.output)
        of_examples.append(attention_of_input(model, batch, condition))
    return loss / n_labels, torch.tensor(of_examples).mean(dim=0)  # (L, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a decoder's attention goes under a mask.")
    parser.add_argument("checkpoint", help="a pretrained decoder, or a run of train.py")
    parser.add_argument("--data", default="builtin", help="a directory, or builtin (%(default)s)")
    parser.add_argument("--n_gist", type=data.at_least(1), default=1)
    parser.add_argument("--n_test", type=data.at_least(1), default=16, help="unseen examples")
    parser.add_argument("--out", default="attention_sink.png", help="the picture")
    flags = parser.parse_args()
    config = train.fill_in(train.Config(init_from=flags.checkpoint))
    model, tokenizer = train.make_model(config, [])
    if not isinstance(model, Llama) or tokenizer.bos_id is None:
        raise data.DataError(f"{flags.checkpoint}: no decoder whose rows begin with <s>; give one")
    model.eval().float().to(config.device)
    records = data.load_instructions(flags.data)["unseen"][: flags.n_test]
    if not records:
        raise data.DataError(f"{flags.data}: no unseen instructions; add a validation_unseen file")

    figure, axes = data.new_figure(12, 4, panels=len(PLACES))
    print("                    loss   " + "   ".join(PLACES) + "   (% of attention)")
    for name, (condition, see_start) in SETTINGS.items():
        examples, _ = data.make_examples(records, tokenizer, flags.n_gist, see_start=see_start)
        loss, layers = measure(model, examples, condition)
        columns = layers.mean(dim=0).tolist()
        cells = [f"{value:{len(place)}.1f}" for place, value in zip(PLACES, columns)]
        print(f"{name:18}{loss:6.3f}   {'   '.join(cells)}", flush=True)
        for ax, of_layers in zip(axes, layers.T.tolist()):
            ax.plot(range(1, len(of_layers) + 1), of_layers, "o-", label=name)
    for ax, place in zip(axes, PLACES):
        ax.set(title=f"to {place}", xlabel="layer", ylim=(0, 100))
    axes[0].set_ylabel("attention of the input, %")
    axes[0].legend()
    data.save_figure(figure, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    data.run(main)
