"""T5: against `transformers` (tests/golden), brute force, and itself: batch against row, cached against
uncached."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import gist_mask
from eval import compress_prompts
from gist_mask import masking
from model import IGNORE_INDEX, Cache
from t5 import PRESETS, T5, T5Config, relative_buckets

GOLDEN = Path(__file__).parent / "golden"
GIST, EOS = 50, 1
TINY = dict(vocab_size=51, d_model=32, n_layers=3, n_decoder_layers=2, n_heads=4, head_dim=8)
TINY |= dict(d_ff=48, n_buckets=8, max_distance=12)


def tiny(seed=0, **changes):
    """A random model whose answers depend on all that it reads: attention is sharp, and the biases are large."""
    model = T5(T5Config(**TINY | changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    for name, weight in model.named_parameters():
        weight.data.mul_(4 if "bias" in name or "wq" in name else 1)
    return model.eval()


def random_rows(rng, n, low, high):
    lengths = torch.randint(low, high + 1, (n,), generator=rng).tolist()
    return [torch.randint(2, GIST, (length,), generator=rng).tolist() for length in lengths]


def batch(rows, side="left"):
    """Rows of different lengths: tokens and segments."""
    labels = [gist_mask.segments(torch.tensor([row]), GIST)[0].tolist() for row in rows]
    return data.pad(rows, side=side), data.pad(labels, side=side)


def random_tokens(*shape):
    return torch.randint(2, GIST, shape, generator=torch.Generator().manual_seed(0))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---- Relative positions ----


def bucket_by_definition(relative, bidirectional, n_buckets, max_distance):
    """Raffel et al. 2020, in whole numbers: one bucket a distance up to half of them, then
    logarithmically wider ones up to max_distance."""
    n = n_buckets // 2 if bidirectional else n_buckets
    ahead = n if bidirectional and relative > 0 else 0
    distance = abs(relative) if bidirectional else max(0, -relative)
    E = n // 2
    if distance < E:
        return ahead + distance
    # the largest k < n - E with (n - E) log(distance / E) / log(max_distance / E) >= k
    far = [k for k in range(n - E) if distance ** (n - E) * E**k >= max_distance**k * E ** (n - E)]
    return ahead + E + max(far)


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


@torch.no_grad()
@pytest.mark.parametrize("version", ["t5-v1.0", "t5-v1.1"])
def test_logits_and_greedy_answers_equal_those_of_transformers(version):
    model, _ = data.load_model(GOLDEN / version)
    want = torch.load(GOLDEN / version / "expected.pt", weights_only=True)
    target = F.pad(want["target"][:, 1:], (0, 1), value=IGNORE_INDEX)  # without the start token
    masked = masking(model, want["valid"] * gist_mask.INPUT)
    same(model(want["source"], target, **masked), want["logits"])
    answers = model.generate(want["source"], **masked, max_new_tokens=30, eos_id=EOS)
    assert answers == want["answers"]


# ---- Batches, places, decoding ----


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_a_padded_batch_gives_the_logits_and_answers_of_its_rows(side, condition):
    rng = torch.Generator().manual_seed(0)
    model, prompts, inputs = tiny(), random_rows(rng, 4, 1, 20), random_rows(rng, 4, 1, 12)
    rows = [prompt + [GIST] * n + input for n, (prompt, input) in enumerate(zip(prompts, inputs))]
    target = torch.randint(2, GIST, (4, 6), generator=rng)
    source, segments = batch(rows, side)
    masked = masking(model, segments, condition)
    alone, answers = [], []
    for row, wanted in zip(rows, target):
        tokens, labels = batch([row])
        mask = gist_mask.encoder_mask(labels, condition)
        kwargs = dict(mask=mask, cross_mask=gist_mask.cross_mask(labels, condition))
        alone.append(model(tokens, wanted[None], **kwargs))
        answers += model.generate(tokens, **kwargs, max_new_tokens=12, eos_id=EOS)
    same(model(source, target, **masked), torch.cat(alone))
    assert model.generate(source, **masked, max_new_tokens=12, eos_id=EOS) == answers


@torch.no_grad()
def test_logits_do_not_depend_on_where_positions_begin_nor_on_later_targets():
    model, source = tiny(), random_tokens(3, 9)
    target = random_tokens(3, 6)
    logits = model(source, target)
    same(model(source, target, positions=torch.arange(9)[None] - 700), logits)
    for t in range(6):  # a place's own label is a later one, too: it is what is to be predicted
        changed = target.index_fill(1, torch.arange(t, 6), 7)
        same(model(source, changed)[:, : t + 1], logits[:, : t + 1])


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
def test_where_gives_the_logits_of_those_places_and_of_no_others(tie, monkeypatch):
    model, source = tiny(tie_embeddings=tie), random_tokens(4, 9)
    target = random_tokens(4, 7)
    where = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    logits = model(source, target)
    expected = [logits[b, t] for b in range(4) for t in range(7) if where[b, t]]
    head, seen = model.logits, []
    monkeypatch.setattr(model, "logits", lambda x: seen.append(x.shape) or head(x))
    same(model(source, target, where=where), torch.stack(expected))
    assert seen == [(len(expected), 32)]


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
def test_cached_decoding_equals_uncached(tie):
    model = tiny(tie_embeddings=tie, gated=not tie)
    source, segments = batch(random_rows(torch.Generator().manual_seed(1), 4, 1, 20))
    masked = masking(model, segments)
    answers = torch.zeros(4, 0, dtype=torch.int64)
    for _ in range(15):
        logits = model(source, F.pad(answers, (0, 1)), **masked)
        answers = torch.cat([answers, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert model.generate(source, **masked, max_new_tokens=15) == answers.tolist()


def test_a_row_ends_at_eos_and_the_others_go_on():
    model = tiny(3)
    source, segments = batch(random_rows(torch.Generator().manual_seed(3), 6, 1, 20))
    masked = masking(model, segments)
    free = model.generate(source, **masked, max_new_tokens=10)
    eos = free[0][4]
    cut = model.generate(source, **masked, max_new_tokens=10, eos_id=eos)
    assert cut == [row[: row.index(eos)] if eos in row else row for row in free]


def test_every_weight_gets_a_gradient_in_fp32_and_bf16():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype)
        source, target = random_tokens(2, 4, 30)
        loss = F.cross_entropy(model(source, target).flatten(0, 1), target.flatten())
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_a_small_model_learns_to_reverse():
    shape = dict(vocab_size=12, d_model=32, n_layers=1, n_decoder_layers=1, n_heads=2, head_dim=16)
    model = T5(T5Config(**shape, d_ff=64))
    rng = torch.Generator().manual_seed(0)
    model.init_weights(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        source = torch.randint(2, 12, (32, 3), generator=rng)
        target = source.flip(1)
        loss = F.cross_entropy(model(source, target).flatten(0, 1), target.flatten())
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


def whole_and_cached(model, whole, inputs, cache, target, condition="gist", sides=("left", "left")):
    """Logits and answers of whole rows, and of their inputs from a cache."""
    results = []
    for rows, side, some in ((whole, sides[0], None), (inputs, sides[1], cache)):
        source, segments = batch(rows, side)
        masked = masking(model, segments, condition, some)
        logits = model(source, target, **masked, cache=some)
        answers = model.generate(source, **masked, cache=some, max_new_tokens=12, eos_id=EOS)
        results.append((logits, answers))
    return results


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_cached_gist_gives_the_same_logits_and_answers_as_the_gist_mask(n_gist, seed):
    model = tiny(seed, max_distance=20)
    prompts, inputs, whole, rng = gist_batch(seed, n_gist, B=1 if seed == 2 else 4)
    B = len(prompts)
    target = torch.randint(2, GIST, (B, 7), generator=rng)
    cache = compress_prompts(model, *batch(prompts))
    before = cache.change(torch.clone)
    sides = [("left", "right"), ("right", "left"), ("left", "left")][seed]
    (full, expected), (cached, answers) = whole_and_cached(
        model, whole, inputs, cache, target, sides=sides
    )
    same(cached, full)
    assert answers == expected
    assert all(torch.equal(a, b) for a, b in zip(vars(before).values(), vars(cache).values()))
    assert cache.keys.shape == (B, n_gist, 3, 4, 8) and cache.hidden.shape == (B, n_gist, 32)


@torch.no_grad()
def test_a_cached_gist_fits_any_input():
    """One row, at positions before 0, for inputs of all lengths; the same as many rows."""
    model = tiny(max_distance=20)
    prompts, inputs, _, rng = gist_batch(0, 2)
    cache = compress_prompts(model, *batch(prompts[:1]))
    assert cache.positions.tolist() == [[-2, -1]]
    target = torch.randint(2, GIST, (4, 7), generator=rng)
    whole = [prompts[0] + input for input in inputs]
    for some in (cache, Cache.cat([cache] * 4)):
        (full, expected), (cached, answers) = whole_and_cached(model, whole, inputs, some, target)
        same(cached, full)
        assert answers == expected


def test_a_cache_of_another_number_of_rows_is_refused_with_what_to_do():
    model, source = tiny(), torch.tensor([[5], [6], [7]])
    cache = model.compress(torch.tensor([[5, 6], [7, 8]]))
    with pytest.raises(ValueError, match="2 prompts .* 3 inputs: give one prompt for all"):
        model(source, source, cache=cache)
    with pytest.raises(ValueError, match="2 prompts .* 3 inputs: give one prompt for all"):
        model.generate(source, cache=cache)


@torch.no_grad()
def test_a_source_that_ends_in_a_gist_token_is_answered_from_the_gist_alone():
    """Then no input keeps the decoder from the prompt but the mask."""
    model, prompts = tiny(), [[5, 6, 7, GIST, GIST], [8, 9, GIST, GIST]]
    source, segments = batch(prompts)
    answers = model.generate(source, **masking(model, segments), max_new_tokens=8)
    cache = compress_prompts(model, source, segments)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    masked = masking(model, nothing, cache=cache)
    assert answers == model.generate(nothing, **masked, cache=cache, max_new_tokens=8)
    everything = masking(model, segments, "pos_control")
    assert answers != model.generate(source, **everything, max_new_tokens=8)


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 5])
def test_whole_prompts_are_cached_where_only_the_prompt_does_not_see_the_input(n_gist, monkeypatch):
    one_way = [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    monkeypatch.setitem(gist_mask.TABLE, "one way", one_way)
    model = tiny(max_distance=20)
    prompts, inputs, whole, rng = gist_batch(0, n_gist)
    target = torch.randint(2, GIST, (4, 7), generator=rng)
    cache = compress_prompts(model, *batch(prompts), "one way")
    assert cache.length == max(map(len, prompts))
    (full, expected), (cached, answers) = whole_and_cached(
        model, whole, inputs, cache, target, "one way"
    )
    same(cached, full)
    assert answers == expected


@torch.no_grad()
def test_a_prompt_ends_at_minus_1_and_what_follows_its_cache_begins_at_0():
    """Without a mask, everything: a row's first six tokens do not see the others."""
    model, source = tiny(), random_tokens(2, 9)
    target = random_tokens(2, 5)
    cache = model.compress(source[:, :6])
    assert cache.positions.tolist() == [list(range(-6, 0))] * 2
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[:6, 6:] = False
    same(model(source[:, 6:], target, cache=cache), model(source, target, mask[None, None]))


@torch.no_grad()
def test_the_gist_does_not_depend_on_what_follows():
    """Its cached hidden states are those of every row that begins with its prompt."""
    model, prompt = tiny(), [5, 6, 7, 8, GIST, GIST]

    def gist_in(row, condition="gist"):
        source, segments = batch([row])
        mask, there = gist_mask.encoder_mask(segments, condition), gist_mask.positions(segments)
        return model.encoder(model.embedding(source), there, mask)[:, 4:6]

    cache = compress_prompts(model, *batch([prompt]))
    for rest in ([EOS], [9, 10, 11, EOS]):
        same(gist_in(prompt + rest), cache.hidden)
        assert not torch.allclose(gist_in(prompt + rest, "pos_control"), cache.hidden, atol=1e-2)


@torch.no_grad()
def test_the_cross_mask_hides_the_prompt_from_the_decoder():
    """Under neg_control the encoder's mask keeps the prompt from the input, but not from the decoder."""
    model, target = tiny(), random_tokens(2, 5)
    source, segments = batch([[*prompt, GIST, 5, 6, EOS] for prompt in ([7, 8], [9, 10])])
    masked = masking(model, segments, "neg_control")
    hidden = model(source, target[:1].expand(2, -1), **masked)
    same(hidden[0], hidden[1])
    del masked["cross_mask"]
    seen = model(source, target[:1].expand(2, -1), **masked)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


@torch.no_grad()
def test_prompts_compressed_one_at_a_time_and_joined_equal_those_compressed_together():
    model = tiny()
    prompts, _, _, _ = gist_batch(1, 2)
    together = compress_prompts(model, *batch(prompts))
    joined = Cache.cat([compress_prompts(model, *batch([prompt])) for prompt in prompts])
    for name, value in vars(together).items():
        torch.testing.assert_close(getattr(joined, name), value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gists_of_different_numbers_of_tokens_are_joined_picked_and_used_in_one_batch():
    model = tiny(max_distance=20)
    prompts, inputs, _, rng = gist_batch(2, 0)
    prompts = [prompt + [GIST] * n for prompt, n in zip(prompts, (3, 1, 2, 5))]
    caches = [compress_prompts(model, *batch([prompt])) for prompt in prompts]
    order = [2, 0, 3, 2]
    joined = Cache.cat(caches)[order]
    assert joined.length == 5 and (joined.segments != gist_mask.PADDING).sum(1).tolist() == [
        2,
        3,
        5,
        2,
    ]
    target = torch.randint(2, GIST, (4, 7), generator=rng)
    whole = [prompts[i] + input for i, input in zip(order, inputs)]
    (full, expected), (cached, answers) = whole_and_cached(model, whole, inputs, joined, target)
    same(cached, full)
    assert answers == expected


def test_gradients_reach_a_cache():
    model = tiny()
    cache = model.compress(torch.tensor([[5, 6, GIST]]))
    for x in (cache.keys, cache.values, cache.hidden):
        x.requires_grad_()
    model(torch.tensor([[7, 8], [9, 5]]), torch.tensor([[5], [6]]), cache=cache).sum().backward()
    for x in (cache.keys, cache.values):
        assert x.grad.abs().sum(dim=(0, 1, 3, 4)).gt(0).all()  # in every layer
    assert cache.hidden.grad.any()


def test_a_decoder_that_may_see_nothing_gives_finite_logits():
    model, source = tiny(), torch.tensor([[5, 6, 7]])
    nothing = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    logits = model(source, torch.tensor([[8, 9]]), cross_mask=nothing)
    F.cross_entropy(logits[0], torch.tensor([8, 9])).backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_bf16_gist_is_close_to_the_fp32_one():
    model = tiny(seed=5)
    prompts, inputs, _, rng = gist_batch(5, 2)
    source, segments = batch(inputs)
    target = torch.randint(2, GIST, (4, 7), generator=rng)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        cache = compress_prompts(model, *batch(prompts))
        masked = masking(model, segments, cache=cache)
        logits.append(model(source, target, **masked, cache=cache))
        assert logits[-1].dtype == cache.keys.dtype == cache.hidden.dtype == dtype
    want, got = (x.float().flatten() for x in logits)
    assert F.cosine_similarity(got, want, dim=0) > 0.99


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
