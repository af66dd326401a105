"""How much of a prompt does the gist keep, in the loss of the reference outputs?

    python eval.py run out/gist out/pos_control out/neg_control
    python -m tests.exercises.loss_share out/{gist,pos_control,neg_control} --split human

The interval of a share in ROUGE-L is wide, as one wrong word changes an answer. Here the models of
evaluated runs read a split's examples once more, for the loss of the reference outputs. Printed are
the means, in nats per output token, and the gist's share of the way from neg_control to pos_control
with its 95% interval, as `learning_curve` has it for scores. SmolLM2-135M on 300 unseen examples of
Alpaca+ (assets/results.md): 68.0% (63.5 to 73.2), and 64.5% (50.9 to 80.0) in ROUGE-L. Minutes.
"""

import argparse

import numpy as np
import torch
from tqdm import tqdm

import data
import eval
import train
from tests.exercises import learning_curve


@torch.no_grad()
def output_losses(run: str, split: str) -> np.ndarray:
    """The loss of every example's output, (N,), whose mean is that of a token. Raises DataError."""
    model, tokenizer, gisting = eval.open_run(run)
    records = data.load_instructions(gisting["data"], gisting["seed"])[split]
    options = train.layout_options(gisting, split)
    examples, _ = data.make_examples(records, tokenizer, **options)
    if not examples:
        raise data.DataError(f"{run}: its data have no {split} examples; give another --split")
    losses = []
    for e in tqdm(examples, run, leave=False):
        batch = data.collate([e], tokenizer.pad_id)
        batch = {name: x.to(model.embedding.weight.device) for name, x in batch.items()}
        losses.append(train.batch_loss(model, batch, gisting["condition"]).item())
    tokens_per_example = sum(len(e.output) for e in examples) / len(examples)
    return np.array(losses) / tokens_per_example


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of the prompt that a gist keeps.")
    parser.add_argument("runs", nargs=3, help="an evaluated run of each condition")
    parser.add_argument("--split", default="unseen", choices=data.SPLITS)
    flags = parser.parse_args()
    (files,) = learning_curve.read_runs(flags.runs, flags.split).values()  # of all conditions
    losses = [output_losses(str(files[name].parent), flags.split) for name in learning_curve.NAMES]
    for name, of_examples in zip(learning_curve.NAMES, losses):
        print(f"{name:11} {of_examples.mean():.3f}")
    kept = learning_curve.share(*losses)
    low, high = learning_curve.interval(*losses)
    print(f"{'share':11} {100 * kept:.1f}% ({100 * low:.1f} to {100 * high:.1f})")


if __name__ == "__main__":
    data.run(main)
