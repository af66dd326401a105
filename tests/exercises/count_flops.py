"""Count the FLOPs of one prompt by hand, beside profile.py's formula and PyTorch's counter.

    python -m tests.exercises.count_flops --p 26 --q 10        # seconds

LLaMA-7B reads p prompt tokens, one gist token and q input tokens, from nothing or from the cached
gist. A matrix with m x n entries costs 2·m·n FLOPs a token; attention costs 4·H·K in every layer
for every pair of a query and a key, even if it is masked. Logits count for every token; norms,
softmax and making the gist do not count. The shape is in `model.PRESETS`.

For p = 26, q = 10 it prints 489.6 GFLOPs without a cache and 132.2 from the gist, three times the
same: the sum of the lines, the formula, and the counter.
"""

import argparse
import profile

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data


def by_hand(config, new: int, keys: int) -> dict[str, int]:
    """FLOPs of a LLaMA, part by part. new: tokens to read; keys: tokens that they see in all."""
    D, V, layers = config.d_model, config.vocab_size, config.n_layers
    H, H_kv, K = config.n_heads, config.n_kv_heads, config.head_dim
    return {
        "wq and wo": layers * new * 2 * (2 * D * H * K),
        "wk and wv": layers * new * 2 * (2 * D * H_kv * K),
        "q k'": layers * new * keys * 2 * H * K,
        "weights times v": layers * new * keys * 2 * H * K,
        "w1, w2, w3": layers * new * 2 * (3 * D * config.d_ff),
        "output": new * 2 * D * V,
    }


@torch.no_grad()
def counted(model, tokens: torch.Tensor, cache=None) -> int:
    """What PyTorch counts in a forward pass; its counter knows the plain attention kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, cache=cache)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the FLOPs of one prompt.")
    parser.add_argument("--preset", default="llama-7b", help="a LLaMA of model.PRESETS")
    parser.add_argument("--p", type=int, default=26, help="prompt tokens")
    parser.add_argument("--q", type=int, default=10, help="input tokens")
    flags = parser.parse_args()
    model = profile.model_of_shape(flags.preset, "meta")  # no weights, only shapes
    with torch.device("meta"):
        gist = model.compress(torch.zeros(1, 1, dtype=torch.int64))
        for name, cache, new in (
            ("without a cache", None, flags.p + 1 + flags.q),
            ("from the gist", gist, flags.q),
        ):
            keys = new + (cache.length if cache else 0)
            parts = by_hand(model.config, new, keys)
            print(f"{name}: {new} new tokens, {keys} keys, in GFLOPs")
            for part, count in parts.items():
                print(f"  {part:18}{count / 1e9:10.3f}")
            tokens = torch.zeros(1, new, dtype=torch.int64)
            formula = profile.flops(model.config, new, keys, n_logits=new)
            for part, count in (
                ("by hand", sum(parts.values())),
                ("profile.py", formula),
                ("PyTorch", counted(model, tokens, cache)),
            ):
                print(f"  {part:18}{count / 1e9:10.3f}")


if __name__ == "__main__":
    data.run(main)
