"""T5: against `transformers` (tests/golden), brute force, and itself: batch against row, cached against uncached."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gist_mask
from model import IGNORE_INDEX, Cache
from t5 import PRESETS, T5, T5Config, relative_buckets

GOLDEN = Path(__file__).parent / "golden"
GIST, EOS = 50, 1
TINY = dict(
    vocab_size=51,
    d_model=32,
    n_layers=3,
    n_decoder_layers=2,
    n_heads=4,
    head_dim=8,
    d_ff=48,
    n_buckets=8,
    max_distance=12,
)


def tiny(seed=0, **changes):
    """A random model whose answers depend on all that it reads: attention is sharp, and the biases are large."""
    model = T5(T5Config(**{**TINY, **changes}))
    model.init_weights(torch.Generator().manual_seed(seed))
    for name, weight in model.named_parameters():
        weight.data.mul_(4 if "bias" in name or "wq" in name else 1)
    return model.eval()


def random_rows(rng, n, low, high):
    return [
        torch.randint(2, GIST, (k,), generator=rng).tolist()
        for k in torch.randint(low, high + 1, (n,), generator=rng)
    ]


def pad(rows, sides=None):
    """Rows as one tensor, and which of it is valid. sides: how many padding tokens of every row stand left of it, as a fraction."""
    T = max(map(len, rows))
    tokens, valid = (
        torch.zeros(len(rows), T, dtype=torch.int64),
        torch.zeros(len(rows), T, dtype=torch.bool),
    )
    for i, row in enumerate(rows):
        left = round((T - len(row)) * (sides[i] if sides else 0))
        tokens[i, left : left + len(row)], valid[i, left : left + len(row)] = (
            torch.tensor(row, dtype=torch.int64),
            True,
        )
    return tokens, valid


# ---- Relative positions ----


def bucket_by_definition(relative, bidirectional, n_buckets, max_distance):
    """Raffel et al. 2020: one bucket a distance up to half of them, then logarithmically wider ones up to max_distance. In whole numbers."""
    n = n_buckets // 2 if bidirectional else n_buckets
    ahead = n if bidirectional and relative > 0 else 0
    distance = abs(relative) if bidirectional else max(0, -relative)
    E = n // 2
    if distance < E:
        return ahead + distance
    k = 0  # the largest k with (n - E) log(distance / E) / log(max_distance / E) >= k, at most n - E - 1
    while k + 1 < n - E and distance ** (n - E) * E ** (k + 1) >= max_distance ** (k + 1) * E ** (
        n - E
    ):
        k += 1
    return ahead + E + k


@pytest.mark.parametrize(
    "n_buckets, max_distance", [(32, 128), (32, 256), (8, 12), (12, 40), (16, 33), (64, 1000)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_definition(n_buckets, max_distance, bidirectional):
    relative = range(-3 * max_distance, 3 * max_distance)
    ours = relative_buckets(torch.tensor(relative), bidirectional, n_buckets, max_distance)
    assert ours.tolist() == [
        bucket_by_definition(r, bidirectional, n_buckets, max_distance) for r in relative
    ]


@pytest.mark.parametrize(
    "shape, parameters",
    [  # as published with the weights: t5-small, flan-t5-small, flan-t5-xxl
        ({"n_layers": 6, "d_ff": 2048, "n_heads": 8, "gated": False}, 60_506_624),
        ({"n_layers": 8, "d_ff": 1024, "n_heads": 6}, 76_961_152),
        (PRESETS["flan-t5-xxl"], 11_135_332_352),
    ],
)
def test_shapes_have_the_published_number_of_parameters(shape, parameters):
    shape = {"vocab_size": 32128, "d_model": 512, "head_dim": 64} | shape
    shape["n_decoder_layers"] = shape["n_layers"]
    config = T5Config(**shape, tie_embeddings=not shape.get("gated", True))
    with torch.device("meta"):
        assert sum(p.numel() for p in T5(config).parameters()) == parameters


def test_tiny_preset_has_about_a_million_parameters():
    assert (
        1_000_000 < sum(p.numel() for p in T5(T5Config(vocab_size=1200)).parameters()) < 1_500_000
    )
    assert "t5-tiny" in PRESETS


# ---- Against transformers ----

NAMES = [
    ("encoder.block", "encoder.layers"),
    ("decoder.block", "decoder.layers"),
    ("layer.0.SelfAttention", "attention"),
    ("layer.1.EncDecAttention", "cross_attention"),
    ("layer.0.layer_norm", "attention_norm"),
    ("final_layer_norm", "norm"),
    ("layers.0.attention.relative_attention_bias", "relative_bias"),
    ("shared", "embedding"),
    ("lm_head", "output"),
    (".q.", ".wq."),
    (".k.", ".wk."),
    (".v.", ".wv."),
    (".o.", ".wo."),
    ("DenseReluDense.wi_0", "feed_forward.w1"),
    ("DenseReluDense.wi_1", "feed_forward.w3"),
    ("DenseReluDense.wi.", "feed_forward.w1."),
    ("DenseReluDense.wo", "feed_forward.w2"),
]


def load_golden(folder):
    c = json.loads((folder / "config.json").read_text())
    config = T5Config(
        c["vocab_size"],
        c["d_model"],
        c["num_layers"],
        c["num_decoder_layers"],
        c["num_heads"],
        c["d_kv"],
        c["d_ff"],
        c["relative_attention_num_buckets"],
        c["relative_attention_max_distance"],
        gated=c["is_gated_act"],
        tie_embeddings=c["scale_decoder_outputs"],
        norm_eps=c["layer_norm_epsilon"],
        start_id=c["decoder_start_token_id"],
    )
    raw = bytearray((folder / "model.safetensors").read_bytes())
    size = int.from_bytes(raw[:8], "little")
    weights = {}
    for name, info in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            for old, new in NAMES:
                name = name.replace(old, new)
            # in an encoder layer 1 is the feed-forward, in a decoder layer 2 is, and layer 1 the cross-attention
            name = name.replace(
                "layer.1.layer_norm", "cross_norm" if name.startswith("decoder") else "ffn_norm"
            )
            name = (
                name.replace("layer.2.layer_norm", "ffn_norm")
                .replace("layer.1.", "")
                .replace("layer.2.", "")
            )
            start, end = info["data_offsets"]
            weights[name] = torch.frombuffer(
                raw[8 + size + start : 8 + size + end], dtype=torch.float32
            ).view(info["shape"])
    if config.tie_embeddings:
        weights.pop("output.weight", None)
    model = T5(config)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("version", ["t5-v1.0", "t5-v1.1"])
def test_logits_and_greedy_answers_equal_those_of_transformers(version):
    model = load_golden(GOLDEN / version)
    want = torch.load(GOLDEN / version / "expected.pt", weights_only=True)
    with torch.no_grad():
        logits = model(want["source"], want["target"], attention_mask=want["valid"])
    torch.testing.assert_close(logits, want["logits"], atol=1e-4, rtol=1e-4)
    assert (
        model.generate(want["source"], want["valid"], max_new_tokens=30, eos_id=EOS)
        == want["answers"]
    )


# ---- Batches, the loss, decoding ----


@pytest.mark.parametrize("seed", range(4))
def test_a_ragged_batch_padded_on_either_side_equals_its_rows(seed):
    rng = torch.Generator().manual_seed(seed)
    model = tiny(seed)
    rows = random_rows(rng, 5, 1, 30)
    source, valid = pad(rows, torch.rand(5, generator=rng).tolist())
    target = torch.randint(2, GIST, (5, 6), generator=rng)
    with torch.no_grad():
        alone = torch.cat(
            [model(torch.tensor([row]), target[i : i + 1]) for i, row in enumerate(rows)]
        )
        torch.testing.assert_close(
            model(source, target, attention_mask=valid), alone, atol=1e-4, rtol=1e-4
        )
    answers = model.generate(source, valid, max_new_tokens=12, eos_id=EOS)
    assert answers == [
        model.generate(torch.tensor([row]), max_new_tokens=12, eos_id=EOS)[0] for row in rows
    ]


@pytest.mark.parametrize("tie", [True, False])
def test_cached_decoding_equals_uncached(tie):
    model = tiny(tie_embeddings=tie, gated=not tie)
    source, valid = pad(random_rows(torch.Generator().manual_seed(1), 4, 1, 20))
    target = torch.zeros(4, 1, dtype=torch.int64)
    for _ in range(15):
        new = model(source, target, attention_mask=valid)[:, -1].argmax(dim=-1)
        target = torch.cat([target, new[:, None]], dim=1)
    assert model.generate(source, valid, max_new_tokens=15) == target[:, 1:].tolist()


def test_a_row_ends_at_eos_and_the_others_go_on():
    model = tiny(3)
    source, valid = pad(random_rows(torch.Generator().manual_seed(3), 6, 1, 20))
    free = model.generate(source, valid, max_new_tokens=10)
    eos = free[0][4]
    cut = model.generate(source, valid, max_new_tokens=10, eos_id=eos)
    assert cut == [row[: row.index(eos)] if eos in row else row for row in free]


def test_label_logits_are_those_of_the_shifted_target():
    rng = torch.Generator().manual_seed(0)
    model = tiny()
    source, valid = pad([row + [GIST] + row for row in random_rows(rng, 4, 2, 9)])
    labels, labelled = pad([row + [EOS] for row in random_rows(rng, 4, 1, 7)])
    mask, cross = (
        gist_mask.encoder_mask(source, GIST, attention_mask=valid),
        gist_mask.cross_mask(source, GIST, attention_mask=valid),
    )
    with torch.no_grad():
        ours, of = model.label_logits(
            source,
            labels.masked_fill(~labelled, IGNORE_INDEX),
            mask,
            cross,
            gist_mask.positions(source, GIST),
        )
        logits = model(
            source,
            torch.cat([torch.zeros(4, 1, dtype=torch.int64), labels[:, :-1]], dim=1),
            mask,
            cross,
        )
    wanted = [logits[i, t] for i, t in labelled.nonzero().tolist()]
    torch.testing.assert_close(ours, torch.stack(wanted))
    assert of.tolist() == labels[labelled].tolist()


def test_every_weight_gets_a_gradient_in_fp32_and_bf16():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype)
        source, targets = torch.randint(2, GIST, (2, 4, 30))
        loss = F.cross_entropy(*model.label_logits(source, targets))
        loss.backward()
        assert loss.isfinite() and all(
            p.grad.isfinite().all() and p.grad.any() for p in model.parameters()
        )


def test_a_small_model_learns_to_reverse():
    model = T5(
        T5Config(
            vocab_size=12,
            d_model=32,
            n_layers=1,
            n_decoder_layers=1,
            n_heads=2,
            head_dim=16,
            d_ff=64,
        )
    )
    rng = torch.Generator().manual_seed(0)
    model.init_weights(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        source = torch.randint(2, 12, (32, 3), generator=rng)
        loss = F.cross_entropy(*model.label_logits(source, source.flip(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4  # ln 10 = 2.3 at chance


# ---- Gists ----


def gist_batch(seed, n_gist, B=4):
    """Prompts with gist tokens, inputs that end in </s> (the first is nothing else), and whole rows."""
    rng = torch.Generator().manual_seed(seed)
    prompts = [row + [GIST] * n_gist for row in random_rows(rng, B, 1, 25)]
    inputs = [[EOS]] + [row + [EOS] for row in random_rows(rng, B - 1, 0, 12)]
    return prompts, inputs, [p + i for p, i in zip(prompts, inputs)], rng


def masks(source, valid):
    return dict(
        mask=gist_mask.encoder_mask(source, GIST, attention_mask=valid),
        cross_mask=gist_mask.cross_mask(source, GIST, attention_mask=valid),
    )


def compress(model, prompts, keep_all=False):
    """The gist's columns of prompts, or everything."""
    tokens, attention_mask = pad(prompts, [1] * len(prompts))
    mask = gist_mask.encoder_mask(tokens, GIST, "gist", attention_mask)
    keep = gist_mask.cross_mask(tokens, GIST, "gist", attention_mask)[:, 0, 0].any(dim=0)
    there = gist_mask.positions(F.pad(tokens, (0, 1)), GIST)
    return model.compress(tokens, attention_mask, mask, there, None if keep_all else keep)


@pytest.mark.parametrize("n_gist", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_cached_gist_gives_the_same_logits_and_answers_as_the_gist_mask(n_gist, seed):
    model = tiny(seed, max_distance=20)
    prompts, inputs, whole, rng = gist_batch(seed, n_gist, B=1 if seed == 2 else 4)
    B = len(prompts)
    source, valid = pad(whole, torch.rand(B, generator=rng).tolist())
    target = torch.randint(2, GIST, (B, 7), generator=rng)
    cache = compress(model, prompts)
    new, new_valid = pad(inputs, torch.rand(B, generator=rng).tolist())
    with torch.no_grad():
        full = model(
            source, target, **masks(source, valid), positions=gist_mask.positions(source, GIST)
        )
        cached = model(new, target, attention_mask=new_valid, cache=cache)
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    before = [x.clone() for x in vars(cache).values()]
    answers = model.generate(new, new_valid, cache=cache, max_new_tokens=12, eos_id=EOS)
    assert answers == model.generate(source, **masks(source, valid), max_new_tokens=12, eos_id=EOS)
    assert all(torch.equal(a, b) for a, b in zip(before, vars(cache).values()))
    assert (
        cache.keys.shape == (B, n_gist, 3, 4, 8)
        and cache.positions.tolist() == [list(range(n_gist))] * B
    )


def test_a_source_that_ends_in_a_gist_token_is_answered_from_the_gist_alone():
    """Then no input keeps the decoder from the prompt but the mask."""
    model, prompts = tiny(), [[5, 6, 7, GIST], [8, 9, GIST]]
    source, valid = pad(prompts, [1, 1])
    answers = model.generate(source, **masks(source, valid), max_new_tokens=8)
    cache = compress(model, prompts)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert answers == model.generate(nothing, cache=cache, max_new_tokens=8)
    assert answers != model.generate(source, valid, max_new_tokens=8)


@pytest.mark.parametrize("n_gist", [1, 5])
def test_whole_prompts_cached_equal_a_mask_under_which_only_the_prompt_does_not_see_the_input(
    n_gist,
):
    model = tiny(max_distance=20)
    prompts, inputs, whole, rng = gist_batch(0, n_gist)
    source, valid = pad(whole)
    target = torch.randint(2, GIST, (4, 7), generator=rng)
    is_input = gist_mask.segments(source, GIST) == gist_mask.INPUT
    mask = valid[:, None, None, :] & (is_input[:, None, :, None] | ~is_input[:, None, None, :])
    mask = mask | torch.eye(source.shape[1], dtype=torch.bool)
    cache = compress(model, prompts, keep_all=True)
    new, new_valid = pad(inputs)
    with torch.no_grad():
        full = model(source, target, mask, attention_mask=valid)
        cached = model(new, target, attention_mask=new_valid, cache=cache)
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)


def test_the_gist_does_not_depend_on_what_follows():
    model = tiny()
    prompt = [5, 6, 7, 8, GIST, GIST]
    read = {}
    for rest in ([EOS], [9, 10, 11, EOS]):
        source = torch.tensor([prompt + rest])
        with torch.no_grad():
            there = torch.ones_like(source, dtype=torch.bool)
            memory, _ = model.encode(
                source, there, **masks(source, None), positions=None, cache=None
            )
        read[len(rest)] = torch.stack([kv[:, 4:6] for layer in memory for kv in layer])
    torch.testing.assert_close(read[1], read[4])


def test_prompts_compressed_one_at_a_time_and_joined_equal_those_compressed_together():
    model = tiny()
    prompts, _, _, _ = gist_batch(1, 2)
    together = compress(model, prompts)
    joined = Cache.cat([compress(model, [prompt]) for prompt in prompts])
    for name, value in vars(together).items():
        torch.testing.assert_close(getattr(joined, name), value, atol=1e-5, rtol=1e-5)


def test_a_decoder_that_may_see_nothing_gives_finite_logits():
    model, source = tiny(), torch.tensor([[5, 6, 7]])
    nothing = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    targets = torch.tensor([[8, 9]])
    loss = F.cross_entropy(*model.label_logits(source, targets, None, nothing))
    loss.backward()
    assert loss.isfinite() and all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )


def test_a_bf16_gist_is_close_to_the_fp32_one():
    model = tiny(seed=5)
    prompts, inputs, _, rng = gist_batch(5, 2)
    new, valid = pad(inputs)
    target = torch.randint(2, GIST, (4, 7), generator=rng)
    with torch.no_grad():
        want = model(new, target, attention_mask=valid, cache=compress(model, prompts))
        model = model.bfloat16()
        got = model(new, target, attention_mask=valid, cache=compress(model, prompts))
    assert (
        got.dtype == torch.bfloat16
        and F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.99
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(start_id="0"),
        dict(start_id=51),
        dict(n_heads=0),
        dict(norm_eps=float("nan")),
        dict(n_buckets=2),
        dict(max_distance=8),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(changes):
    with pytest.raises(ValueError):
        T5Config(**TINY | changes)
