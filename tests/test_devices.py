"""Nothing mixes devices or dtypes: all that a model does runs on `meta`, in the place of a GPU.

Tensors there have shapes, dtypes and no values. So what needs values is replaced (the loop that
writes tokens, the check of a cache's labels) or left out (`keep` and `where`, boolean indices).
"""

import pytest
import torch

import gist_mask
import model
import t5
from gist_mask import masking
from model import LLAMA3_SCALING, Llama, LlamaConfig
from t5 import T5, T5Config

META = torch.device("meta")
B, P, T, T_OUT, V = (
    3,
    6,
    5,
    4,
    31,
)  # rows; tokens of the prompt, after it, of the target; vocabulary
SHAPE = dict(vocab_size=V, d_model=32, n_layers=2, n_heads=4, head_dim=8, d_ff=48)
GROUPED = dict(n_kv_heads=2, rope_scaling=LLAMA3_SCALING, tie_embeddings=False)
MODELS = {
    "llama": (Llama, LlamaConfig(**SHAPE)),
    "llama-grouped": (Llama, LlamaConfig(**SHAPE | GROUPED)),
    "t5-1.0": (T5, T5Config(**SHAPE, gated=False, tie_embeddings=True)),
    "t5-1.1": (T5, T5Config(**SHAPE)),
}


@pytest.fixture(autouse=True)
def without_values(monkeypatch):
    def two_steps(next_logits, tokens, max_new_tokens, eos_id):
        first = next_logits(tokens, 0)
        return first, next_logits(tokens[:, -1:], tokens.shape[1])

    bucketize = torch.bucketize

    def bucketize_on_one_device(x, starts, **options):  # on meta, torch does not look
        assert x.device == starts.device
        return bucketize(x, starts, **options)

    for file in (model, t5):
        monkeypatch.setattr(file, "generate_tokens", two_steps)
    monkeypatch.setattr(gist_mask, "check_cache", lambda *args: None)
    monkeypatch.setattr(torch, "bucketize", bucketize_on_one_device)


def ids(*shape):
    return torch.empty(shape, dtype=torch.int64, device=META)


def check(x, shape, dtype):
    assert (x.device, x.shape, x.dtype) == (META, torch.Size(shape), dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_masks_forward_compress_and_generate_stay_on_one_device(name, dtype, cached, given):
    """cached: after one prompt for all rows. given: with a mask and positions, or the model's own."""
    kind, config = MODELS[name]
    with META:
        some = kind(config).to(dtype)
    target = {"target": ids(B, T_OUT)} if kind is T5 else {}
    cache, C = None, 0
    if cached:
        masked = masking(some, ids(1, P))
        masked.pop("cross_mask", None)
        cache, C = some.compress(ids(1, P), **masked if given else {}), P
        heads = config.n_heads if kind is T5 else config.n_kv_heads
        check(cache.keys, (1, P, config.n_layers, heads, config.head_dim), dtype)
        check(cache.values, cache.keys.shape, dtype)
        if kind is T5:
            check(cache.hidden, (1, P, config.d_model), dtype)
            check(cache.positions, (1, P), torch.int64)
        cache.segments = ids(1, P)

    masked = masking(some, ids(B, T), "gist", cache, **target)
    check(masked["mask"], (B, 1, T, C + T), torch.bool)
    check(masked["positions"], (B, T), torch.int64)
    if kind is T5:
        check(masked["cross_mask"], (B, 1, 1, C + T), torch.bool)
    logits = some(ids(B, T), **masked if given else target, cache=cache)
    check(logits, (B, T_OUT if kind is T5 else T, V), dtype)

    masked = masking(some, ids(B, T), "gist", cache, n_new=2)
    steps = some.generate(ids(B, T), **masked if given else {}, cache=cache, max_new_tokens=2)
    for logits in steps:
        check(logits, (B, V), dtype)
