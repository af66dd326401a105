"""Distillation: learn what a model that sees the whole prompt would say.

    python train.py --condition pos_control --out_dir out/teacher
    python -m tests.exercises.distillation --teacher out/teacher --out_dir out/distilled
    python eval.py run out/distilled

At each place of the output, a label names one token. A teacher says how probable each token is, so
there is more to learn from an example. Here the teacher is a run of `pos_control`, and the model
that sees only the gist learns its probabilities instead of the labels:

    loss = - sum over output tokens, sum over the vocabulary, p(teacher) log p(model)

This is prompt compression as distillation: say the same, from less. All flags but --teacher are
those of train.py. To go on with a run that was stopped, give --resume to this program.

Results of the full runs (means of three seeds, ten minutes of one core each): exact match on seen,
unseen and human instructions is 88.9, 87.7 and 61.6, against 90.5, 89.7 and 67.0 with the labels.
It does not help here, perhaps because an answer has one right wording, and the label says it.
SmolLM2-135M on 1,700 Alpaca+ examples, 300 steps of 8: the loss on unseen and human instructions is
2.033 and 3.019, against 2.100 and 3.113 with the labels, which it learns by heart in the second
pass. With --see_start (`attention_sink` shows why), two passes give 1.854 and 2.755, and 1,600
steps the best answers that were found. With 6,614 examples, one pass gives 1.730 and 2.727, and
1.721 and 2.736 with the labels: see assets/results.md.
"""

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval
import gist_mask
import train

SAME = ("arch", "n_gist")  # what both have to read alike, beside the tokens


def distillation_loss(
    model, batch: dict[str, Tensor], condition: str, teacher, its_condition: str
) -> Tensor:
    """Cross-entropy to the teacher's probabilities, in nats, summed over the labels."""

    def logits(of, under):
        masked = gist_mask.masking(of, batch["segments"], under, target=batch["targets"])
        return train.label_logits(of, batch, masked)[0]  # (N, V)

    with torch.no_grad():
        wanted = logits(teacher, its_condition).softmax(dim=-1)
    return F.cross_entropy(logits(model, condition), wanted, reduction="sum")


def from_teacher(run: str, config: train.Config) -> partial:
    """The loss function of a run that learns from another. Raises DataError if they differ."""
    teacher, its_tokenizer, its_config = eval.open_run(run, device=config.device)
    for name in SAME:
        if its_config[name] != getattr(config, name):
            raise data.DataError(f"{run}: another --{name}; give the teacher's")
    # The probabilities are of the teacher's tokens, so the model has to have the same.
    _, tokenizer = train.make_model(
        config, data.load_instructions(config.data, config.seed)["train"]
    )
    if tokenizer.files != its_tokenizer.files:
        raise data.DataError(
            f"{run}: another tokenizer; give the teacher's --init_from, or its --data, --seed and "
            "--vocab_size"
        )
    loss = partial(distillation_loss, teacher=teacher, its_condition=its_config["condition"])
    loss.__name__ = f"distillation from {run}"  # so that train.py does not --resume with the labels
    return loss


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(
            "--teacher RUN: a run of train.py to learn from. All other flags are those of train.py:"
        )
        train.read_flags()
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--teacher", required=True)
    flags, sys.argv[1:] = parser.parse_known_args()
    config = train.fill_in(train.read_flags())
    *_, stopped = train.train(config, from_teacher(flags.teacher, config))
    train.exit_if_stopped(stopped)


if __name__ == "__main__":
    data.run(main)
