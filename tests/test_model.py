"""The decoder: attention, positions, caches and generation against slow or independent ways to the
same numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

import data
import gist_mask
from eval import compress_prompts
from gist_mask import decoder_mask, masking
from model import (
    LLAMA3_SCALING,
    Cache,
    Llama,
    LlamaConfig,
    RMSNorm,
    rope_frequencies,
    rotate,
)

GIST, EOS, VOCAB = 30, 1, 31


def make_model(n_kv_heads=2, seed=0, **changes):
    shape = dict(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, head_dim=8, d_ff=48)
    shape |= dict(n_kv_heads=n_kv_heads, tie_embeddings=False)
    model = Llama(LlamaConfig(**shape | changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def random_rows(seed, low=1, high=8, n=4):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [torch.randint(2, GIST, (length,), generator=generator).tolist() for length in lengths]


def batch(rows, side="left"):
    """Rows of different lengths: tokens and segments."""
    labels = [gist_mask.segments(torch.tensor([row]), GIST)[0].tolist() for row in rows]
    return data.pad(rows, side=side), data.pad(labels, side=side)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---- The equations ----


def slow_forward(model, row, mask):
    """The equations of the model, one token and one head at a time. mask: (T, T) bool. Returns (T, V)."""
    c = model.config
    x = model.embedding.weight[row]
    norm = lambda x, n: x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * n.weight

    def turn(v, position):  # each pair (v[i], v[i + K/2]) as a complex number
        angle = position * c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        z = torch.complex(*v.chunk(2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    for layer in model.layers:
        h, a, f = norm(x, layer.attention_norm), layer.attention, layer.feed_forward
        heads = torch.zeros(len(row), c.n_heads, c.head_dim)
        for head in range(c.n_heads):
            wq = a.wq.weight.split(c.head_dim)[head]
            group = head // (c.n_heads // c.n_kv_heads)
            wk, wv = a.wk.weight.split(c.head_dim)[group], a.wv.weight.split(c.head_dim)[group]
            for q in range(len(row)):
                keys = [k for k in range(len(row)) if mask[q, k]]
                query = turn(wq @ h[q], q)
                scores = [query @ turn(wk @ h[k], k) / math.sqrt(c.head_dim) for k in keys]
                values = torch.stack([wv @ h[k] for k in keys])
                heads[q, head] = torch.stack(scores).softmax(0) @ values
        x = x + heads.flatten(1) @ a.wo.weight.T
        h = norm(x, layer.ffn_norm)
        x = x + (F.silu(h @ f.w1.weight.T) * (h @ f.w3.weight.T)) @ f.w2.weight.T
    head = model.embedding if model.output is None else model.output
    return norm(x, model.norm) @ head.weight.T


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_are_those_of_the_equations(n_kv_heads, tie):
    model = make_model(n_kv_heads, tie_embeddings=tie)
    row = random_rows(n_kv_heads, 6, 9, 1)[0] + [GIST, 5, 6]
    tokens, segments = batch([row])
    causal = torch.ones(len(row), len(row), dtype=torch.bool).tril()
    same(model(tokens)[0], slow_forward(model, row, causal))
    mask = decoder_mask(segments)
    same(model(tokens, mask)[0], slow_forward(model, row, mask[0, 0]))


@torch.no_grad()
def test_logits_do_not_depend_on_where_positions_begin():
    model, tokens = make_model(), torch.tensor(random_rows(1, 9, 10, 3))
    for shift in (-700, -5, 40):
        same(model(tokens, positions=torch.arange(9).expand(3, -1) + shift), model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_a_padded_batch_gives_the_logits_of_its_rows(side, condition):
    model, prompts, inputs = make_model(), random_rows(1), random_rows(2)
    rows = [prompt + [GIST] * n + input for n, (prompt, input) in enumerate(zip(prompts, inputs))]
    tokens, segments = batch(rows, side)
    together = model(tokens, **masking(model, segments, condition))
    for b, row in enumerate(rows):
        alone, labels = batch([row])
        alone = model(alone, decoder_mask(labels, condition))[0]
        same(together[b][segments[b] != gist_mask.PADDING], alone)


@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
def test_where_gives_the_logits_of_those_places_and_of_no_others(tie, monkeypatch):
    model, tokens = make_model(tie_embeddings=tie), torch.tensor(random_rows(3, 9, 10, 4))
    where = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    logits = model(tokens)
    expected = [logits[b, t] for b in range(4) for t in range(9) if where[b, t]]
    head, seen = model.logits, []
    monkeypatch.setattr(model, "logits", lambda x: seen.append(x.shape) or head(x))
    same(model(tokens, where=where), torch.stack(expected))
    assert seen == [(len(expected), 32)]
    assert model(tokens, where=torch.zeros_like(where)).shape == (0, VOCAB)


# ---- Prompts, gists and caches ----


@torch.no_grad()
def test_under_neg_control_the_input_does_not_depend_on_the_prompt():
    model, (one, two, input) = make_model(), random_rows(0, 5, 6, 3)
    tokens, segments = batch([row + [GIST, GIST] + input for row in (one, two)])
    logits = model(tokens, **masking(model, segments, "neg_control"))[:, -5:]
    same(logits[0], logits[1])


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 3])
def test_the_input_depends_on_the_prompt_but_through_the_gist_alone(n_gist):
    """With the gist's columns alone, its logits are those of the whole row; other prompts give others."""
    model, (one, two, input) = make_model(), random_rows(0, 5, 6, 3)
    tokens, segments = batch([row + [GIST] * n_gist + input for row in (one, two)])
    whole = model(tokens, **masking(model, segments))[:, -5:]
    cache = compress_prompts(model, tokens[:, :-5], segments[:, :-5])
    assert cache.length == n_gist
    masked = masking(model, segments[:, -5:], cache=cache)
    same(model(tokens[:, -5:], **masked, cache=cache), whole)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)


@torch.no_grad()
def test_a_prompt_ends_at_minus_1_and_what_follows_its_cache_begins_at_0():
    model, tokens = make_model(), torch.tensor(random_rows(4, 9, 10, 2))
    cache = model.compress(tokens[:, :6])
    same(model(tokens[:, 6:], cache=cache), model(tokens)[:, 6:])
    explicit = model.compress(tokens[:, :6], positions=torch.arange(-6, 0)[None])
    assert torch.equal(cache.keys, explicit.keys)
    elsewhere = model.compress(tokens[:, :6], positions=torch.arange(6)[None])
    assert not torch.allclose(cache.keys, elsewhere.keys, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_cached_generation_gives_the_tokens_of_uncached(seed):
    """Ragged rows against the argmax of a whole forward pass a token, one row at a time."""
    model, rows = make_model(seed=seed), random_rows(seed)
    tokens, segments = batch(rows)
    masked = masking(model, segments, n_new=12)
    answers = model.generate(tokens, **masked, max_new_tokens=12, eos_id=EOS)
    for row, answer in zip(rows, answers):
        expected = []
        while len(expected) < 12:
            new = int(model(torch.tensor([row + expected]))[0, -1].argmax())
            if new == EOS:
                break
            expected.append(new)
        assert answer == expected


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 2, 5, 10])
@pytest.mark.parametrize("condition", gist_mask.TABLE)
def test_answers_from_a_compressed_prompt_are_those_of_the_whole_sequence(n_gist, condition):
    for seed in range(4):
        model, inputs = make_model(seed=seed), random_rows(seed + 50)
        prompts = [row + [GIST] * n_gist for row in random_rows(seed)]
        tokens, segments = batch([p + i for p, i in zip(prompts, inputs)])
        masked = masking(model, segments, condition, n_new=10)
        whole = model.generate(tokens, **masked, max_new_tokens=10, eos_id=EOS)
        cache = compress_prompts(model, *batch(prompts), condition)
        columns = {"gist": n_gist, "pos_control": max(map(len, prompts)), "neg_control": 0}
        assert cache.length == columns[condition]
        before = cache.change(torch.clone)
        tokens, segments = batch(inputs)
        masked = masking(model, segments, condition, cache, n_new=10)
        answers = model.generate(tokens, **masked, cache=cache, max_new_tokens=10, eos_id=EOS)
        assert answers == whole
        assert torch.equal(cache.keys, before.keys) and torch.equal(cache.values, before.values)


@torch.no_grad()
def test_rows_that_end_in_a_gist_token_are_answered_as_the_mask_says():
    """No input: new tokens see the gist, not the prompt."""
    model, prompts = make_model(seed=3), [row + [GIST] for row in random_rows(3)]
    tokens, segments = batch(prompts)
    masked = masking(model, segments, n_new=6)
    for row, answer in zip(prompts, model.generate(tokens, **masked, max_new_tokens=6)):
        for n in range(6):
            labels = torch.tensor([[gist_mask.PROMPT] * (len(row) - 1) + [gist_mask.GIST]])
            mask = decoder_mask(F.pad(labels, (0, n), value=gist_mask.INPUT))
            logits = model(torch.tensor([row + answer[:n]]), mask)
            assert int(logits[0, -1].argmax()) == answer[n]


@torch.no_grad()
def test_generation_stops_when_all_rows_have_ended(monkeypatch):
    model, calls = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k))
    next_tokens = iter([[5, 6], [EOS, 7], [8, EOS], [9, 9]])
    one_hot = lambda *a: F.one_hot(torch.tensor(next(next_tokens)), VOCAB)
    monkeypatch.setattr(model, "logits", one_hot)
    assert model.generate(torch.tensor([[3], [4]]), max_new_tokens=50, eos_id=EOS) == [[5], [6, 7]]
    assert len(calls) == 3
    assert make_model().generate(torch.tensor([[3]]), max_new_tokens=0) == [[]]
    assert make_model().generate(torch.zeros(0, 2, dtype=torch.int64)) == []


def test_gradients_reach_a_cache():
    """Of one row, from a batch: into the keys and values of every layer."""
    model = make_model()
    cache = model.compress(torch.tensor([[5, 6, GIST]]))
    cache.keys.requires_grad_()
    cache.values.requires_grad_()
    model(torch.tensor([[7, 8], [9, 5]]), cache=cache).sum().backward()
    for x in (cache.keys, cache.values):
        assert x.grad.abs().sum(dim=(0, 1, 3, 4)).gt(0).all()


@torch.no_grad()
@pytest.mark.parametrize("condition", ["gist", "pos_control"])
def test_caches_are_the_same_together_or_one_at_a_time_joined_picked_and_mixed(condition):
    model, prompts = make_model(), [row + [GIST, GIST] for row in random_rows(7, 1, 9, 5)]
    tokens, segments = batch(random_rows(8, 1, 6, 5))

    def answers(cache, rows=slice(None)):
        masked = masking(model, segments[rows], condition, cache, n_new=8)
        return model.generate(tokens[rows], **masked, cache=cache, max_new_tokens=8)

    together = compress_prompts(model, *batch(prompts), condition)
    alone = [compress_prompts(model, *batch([row]), condition) for row in prompts]
    joined = Cache.cat(alone)
    assert answers(together) == answers(joined)
    order = [3, 0, 0, 4, 2]
    mixed = Cache.cat([alone[i] for i in order])
    assert answers(together[order]) == answers(mixed) == answers(joined[torch.tensor(order)])
    assert answers(together[1:3], slice(1, 3)) == answers(together)[1:3]
    # keys and values, layers, heads, width, fp32
    assert together[[2]].nbytes == 2 * 3 * 2 * 8 * 4 * together.length


@torch.no_grad()
def test_a_cache_of_one_row_answers_a_batch_without_copies():
    model, (prompt,) = make_model(), random_rows(1, 5, 6, 1)
    cache = compress_prompts(model, *batch([prompt + [GIST]]), "pos_control")
    tokens, segments = batch(random_rows(2))
    one, copies = (
        model(tokens, **masking(model, segments, "pos_control", some), cache=some)
        for some in (cache, Cache.cat([cache] * 4))
    )
    same(one, copies)
    for own, expanded in zip(vars(cache).values(), vars(cache.expand(4)).values()):
        assert own is None or (len(expanded) == 4 and expanded.data_ptr() == own.data_ptr())
        assert own is None or expanded.stride(0) == 0


def test_a_cache_of_another_number_of_rows_is_refused_with_what_to_do():
    model, tokens = make_model(), torch.tensor([[5], [6], [7]])
    cache = model.compress(torch.tensor([[5, 6], [7, 8]]))
    for use in (model, model.generate):
        with pytest.raises(ValueError, match="2 prompts .* 3 inputs: give one prompt for all"):
            use(tokens, cache=cache)


@torch.no_grad()
def test_selected_columns_are_those_that_a_mask_leaves():
    model, tokens = make_model(), torch.tensor(random_rows(5, 9, 10, 2))
    keep = torch.tensor([True, False, True, True, False, True])
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[6:, :6] &= keep
    cache = model.compress(tokens[:, :6], keep=keep)
    assert cache.length == 4
    same(model(tokens[:, 6:], cache=cache), model(tokens, mask[None, None])[:, 6:])
    assert torch.equal(model.compress(tokens[:, :6]).select(keep).keys, cache.keys)


@torch.no_grad()
def test_caches_of_different_lengths_are_joined_if_segments_hide_the_padding():
    model = make_model()
    short, long = (model.compress(torch.tensor([row])) for row in ([5, 6], [5, 6, 7]))
    assert torch.equal(Cache.cat([long, long]).keys, torch.cat([long.keys, long.keys]))
    with pytest.raises(ValueError, match="different lengths need segments"):
        Cache.cat([short, long])
    for cache in (short, long):
        cache.segments = torch.full((1, cache.length), gist_mask.PROMPT)
    joined = Cache.cat([short, long])
    assert joined.segments.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert torch.equal(joined[:1].select(torch.tensor([True, True, False])).keys, short.keys)


# ---- Small parts, and shapes ----


def test_llama3_scaling_stretches_long_waves_and_keeps_short_ones():
    """Against the published rule, wave by wave (Llama 3.1: factor 8, 1 to 4 turns within 8192 positions)."""
    plain = LlamaConfig(head_dim=128, rope_theta=500_000.0)
    scaled = LlamaConfig(head_dim=128, rope_theta=500_000.0, rope_scaling=LLAMA3_SCALING)
    for before, after in zip(rope_frequencies(plain).tolist(), rope_frequencies(scaled).tolist()):
        wave = 2 * math.pi / before
        if wave < 8192 / 4:
            expected = before
        elif wave > 8192 / 1:
            expected = before / 8
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            expected = (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(expected, rel=1e-5)


def test_rotary_scaling_is_read_from_every_layout():
    old = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    old |= dict(intermediate_size=8, rope_theta=500_000.0)
    numbers = {key: LLAMA3_SCALING[key] for key in LLAMA3_SCALING if key != "rope_type"}
    meta = dict(dim=4096, n_layers=32, n_heads=256, norm_eps=1e-6, rope_theta=500_000.0)
    configs = [
        LlamaConfig.from_hf(old | {"rope_scaling": numbers | {"rope_type": "llama3"}}),
        LlamaConfig.from_hf(old | {"rope_scaling": numbers | {"type": "llama3"}}),
        LlamaConfig.from_hf(old | {"rope_parameters": numbers | {"rope_type": "llama3"}}),
        LlamaConfig.from_meta(meta | {"use_scaled_rope": True}, vocab_size=9, d_ff=8),
    ]
    plain = rope_frequencies(LlamaConfig.from_hf(old))
    for config in configs:
        frequencies = rope_frequencies(config)
        assert torch.equal(frequencies, rope_frequencies(configs[0]))
        assert not torch.equal(frequencies, plain)


def test_the_papers_model_has_its_number_of_parameters():
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_name("llama-7b"))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616


def test_rms_norm_and_rotation_keep_the_dtype():
    x = torch.randn(1, 2, 3, 8).bfloat16()
    assert RMSNorm(8, 1e-5).bfloat16()(x).dtype == torch.bfloat16
    assert rotate(x, torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)).equal(x)


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_kv_heads=3),
        dict(head_dim=7),
        dict(rope_theta=0.0),
        dict(rope_theta=-1.0),
        dict(rope_theta=math.nan),
        dict(d_model=0),
        dict(n_layers=2.0),
        dict(norm_eps=math.inf),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(changes):
    with pytest.raises(ValueError):
        LlamaConfig(**changes)
