"""What should a gist token start as, when a pretrained model learns to compress?

    python -m tests.exercises.gist_starts --start first --init_from SmolLM2-135M --see_start \
        --data my_data --batch_size 8 --epochs 1 --lr 2e-4 --out_dir out/first

The gist token is new to the model, so its row of the embedding has to be made up:

    mean      the mean of all rows: the paper, and train.py
    first     the row of <s>, which the model knows as a token to look at when nothing else fits
    TEXT      the row of the text's last token, like ":", which announces that something follows
    prompt    the mean of the prompt's own embeddings, different for every prompt, plus a row that
              is learned and starts as zeros

All but the last are ordinary rows. There, what a gist token is depends on the tokens before it, so
the embedding becomes a function of the whole row of tokens. Guess before you run it: the other
three start with nothing of the prompt. Does it matter, if the first layer can fetch it anyway?

All flags but --start are those of train.py; with --eval_every, the losses of validation are in the
log. Runs of the first three kinds can be opened by eval.py.

With SmolLM2-135M and 6,614 examples of Alpaca+, one pass each, the start is mostly forgotten (three
seeds of the mean end between 1.715 and 1.721 on unseen instructions). Losses of the first, second
and third hundred batches, then on unseen and human instructions:

    mean      2.247  2.011  1.943    1.721  2.736
    first     2.335  2.162  1.970    1.730  2.739
    prompt    2.904  2.017  1.940    1.719  2.738
"""

import argparse
import sys

import torch
from torch import Tensor, nn

import data
import train


class PromptEmbedding(nn.Embedding):
    """An embedding in which a gist token is its own row plus the mean of the tokens before it.

    The mean has a weight that is learned, too. (It also keeps eval.py from opening such a run: it
    would not know what to do with it.)
    """

    def __init__(self, embedding: nn.Embedding, gist_id: int, pad_id: int):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight.data)
        self.gist_id, self.pad_id = gist_id, pad_id
        self.of_mean = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64. Returns (B, T, D)."""
        x = super().forward(tokens)
        is_gist = tokens == self.gist_id  # (B, T)
        is_prompt = (is_gist.cumsum(dim=1) == 0) & (tokens != self.pad_id)  # none so far
        n = is_prompt.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
        mean = (x * is_prompt[..., None]).sum(dim=1) / n  # (B, D)
        return x + is_gist[..., None] * self.of_mean * mean[:, None]


@torch.no_grad()
def start_gist(model: data.Model, tokenizer: data.Tokenizer, start: str) -> None:
    """Let the gist token of a stock model start as one of the kinds above. Raises DataError."""
    weight = model.embedding.weight  # (V, D)
    if start == "prompt":
        weight[tokenizer.gist_id] = 0
        model.embedding = PromptEmbedding(model.embedding, tokenizer.gist_id, tokenizer.pad_id)
    elif start == "first":
        if tokenizer.bos_id is None:
            raise data.DataError("--start first: this model has no <s>; give another")
        weight[tokenizer.gist_id] = weight[tokenizer.bos_id]
    elif start != "mean":
        ids = tokenizer.encode(start)
        if not ids:
            raise data.DataError("--start is empty; give mean, first, prompt or a text")
        weight[tokenizer.gist_id] = weight[ids[-1]]


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print("--start mean, first, prompt or a TEXT. All other flags: train.py's.")
        train.read_flags()
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--start", required=True)
    flags, sys.argv[1:] = parser.parse_known_args()

    def make_model(config, records, tokenizer=None):
        model, tokenizer = train.make_model(config, records, tokenizer)
        start_gist(model, tokenizer, flags.start)
        return model, tokenizer

    def loss(model, batch, condition):
        return train.batch_loss(model, batch, condition)

    loss.__name__ = f"gist starts as {flags.start}"  # so that train.py does not --resume it
    *_, stopped = train.train(train.read_flags(), loss, make_model)
    train.exit_if_stopped(stopped)


if __name__ == "__main__":
    data.run(main)
