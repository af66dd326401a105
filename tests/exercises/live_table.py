"""Change one entry of the gist mask's table: what changes, and is a cached gist still exact?

    python -m tests.exercises.live_table        # seconds, on models with random weights

For each of the nine entries, flipped: does an encoder's mask change, does a decoder's; and how far
are the logits of the input, computed from a cache of the gist's columns alone, from those of the
whole row under the mask? Flipping an entry can take three things away:

- input -> prompt: the input sees the prompt, of which the gist's columns are only a part. A cache
  would have to keep every column (`eval.compress_prompts` does): exact, but no longer small.
- prompt -> input, gist -> input: in an encoder, what the gist holds depends on the input, so that
  nothing can be computed before it is there: `eval.compress_prompts` raises an error. (A decoder's
  tokens see no later ones: no change.)
- input -> gist: the cache is exact, but its columns are not seen any more: nothing has to be kept.

The others change what the gist holds, and training would notice; a cached gist stays exact. So what
is printed, with the gist's columns alone: below 1e-5, which is rounding, a cached gist is exact; it
is not for input -> prompt and, in an encoder, for prompt -> input and gist -> input.
"""

import torch

import data
import gist_mask
from gist_mask import GIST, INPUT, PROMPT
from model import Llama, LlamaConfig
from t5 import T5, T5Config

SEGMENTS = torch.tensor([[PROMPT, PROMPT, PROMPT, GIST, GIST, INPUT, INPUT, INPUT]])
TOKENS = torch.tensor([[1, 2, 3, 9, 9, 4, 5, 6]])
TARGET = torch.tensor(
    [[4, 5, 6]]
)  # what the T5 is to write: logits for as many places as the input
N_PROMPT, N_INPUT = 5, 3  # tokens up to the last gist token, and after it
NAMES = gist_mask.NAMES[PROMPT : INPUT + 1]


def flipped(query: int, key: int) -> str:
    """Add a condition to TABLE: gist with one entry flipped. Returns its name."""
    table = [list(row) for row in gist_mask.TABLE["gist"]]
    table[query][key] = 1 - table[query][key]
    name = f"{NAMES[query]} -> {NAMES[key]}"
    gist_mask.TABLE[name] = table
    return name


@torch.no_grad()
def error_of_cached_gist(model: Llama | T5, condition: str) -> float:
    """The largest difference between the logits of the input from the gist alone and those of the
    whole row."""
    masked = gist_mask.masking(model, SEGMENTS, condition, target=TARGET)
    whole = model(TOKENS, **masked)[:, -N_INPUT:]
    # Compress the prompt under its own mask, and keep the gist's columns, whatever the input sees.
    before = gist_mask.masking(model, SEGMENTS[:, :N_PROMPT], condition)
    is_gist = SEGMENTS[0, :N_PROMPT] == GIST
    cache = model.compress(TOKENS[:, :N_PROMPT], before["mask"], before["positions"], is_gist)
    # Go on under what is left of the row's mask.
    columns = SEGMENTS[0] != PROMPT
    masked["mask"] = masked["mask"][:, :, N_PROMPT:, columns]
    masked["positions"] = masked["positions"][:, N_PROMPT:]
    if "cross_mask" in masked:
        masked["cross_mask"] = masked["cross_mask"][..., columns]
    cached = model(TOKENS[:, N_PROMPT:], **masked, cache=cache)
    return (whole - cached).abs().max().item()


def small_models() -> tuple[Llama, T5]:
    shape = dict(vocab_size=10, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=64)
    llama = Llama(LlamaConfig(**shape, n_kv_heads=2))
    t5 = T5(T5Config(**shape, n_decoder_layers=2))
    for model in (llama, t5):
        model.init_weights(torch.Generator().manual_seed(0))
        model.eval()
    return llama, t5


def main() -> None:
    llama, t5 = small_models()
    print("flipped             mask changes:   encoder  decoder    gist is off by:    T5     LLaMA")
    for query in range(3):
        for key in range(3):
            name = flipped(query, key)
            changes = []
            for make_mask in (gist_mask.encoder_mask, gist_mask.decoder_mask):
                same = torch.equal(make_mask(SEGMENTS, name), make_mask(SEGMENTS))
                changes.append("no" if same else "yes")
            errors = [error_of_cached_gist(model, name) for model in (t5, llama)]
            print(
                f"{name:34}{changes[0]:>9}{changes[1]:>9}        {errors[0]:12.1e}{errors[1]:10.1e}"
            )


if __name__ == "__main__":
    data.run(main)
