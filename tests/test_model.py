"""The decoder: attention, positions, loss and generation against slow or independent ways to the same numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from gist_mask import cross_mask, decoder_mask, positions
from model import (
    IGNORE_INDEX,
    LLAMA3_SCALING,
    Cache,
    Linear,
    Llama,
    LlamaConfig,
    RMSNorm,
    rope_frequencies,
    rotate,
)

GIST, PAD, EOS = 30, 0, 1


def make_model(n_kv_heads=2, seed=0, **changes):
    config = LlamaConfig(
        vocab_size=31,
        d_model=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        head_dim=8,
        d_ff=48,
        tie_embeddings=changes.pop("tie_embeddings", False),
        **changes,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def random_rows(seed, low=1, high=8, n=4):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [torch.randint(2, 30, (length,), generator=generator).tolist() for length in lengths]


def padded(rows):
    """Rows as (tokens, attention_mask), padded on the left."""
    T = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (T - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[False] * (T - len(row)) + [True] * len(row) for row in rows])
    return tokens, attention_mask


def compress(model, prompts, keep_all=False):
    """Prompts as the gist mask reads them; of every cache, what the input sees, or everything."""
    tokens, attention_mask = padded(prompts)
    mask = decoder_mask(tokens, GIST, "gist", attention_mask)
    there = positions(F.pad(tokens, (0, 1)), GIST)
    keep = cross_mask(tokens, GIST, "gist", attention_mask)[:, 0, 0].any(dim=0)
    return model.compress(tokens, attention_mask, mask, there, None if keep_all else keep)


def slow_forward(model, row, mask):
    """The equations of the model, one token and one head at a time. row: list of ids; mask: (T, T) bool. Returns (T, V)."""
    c = model.config
    x = model.embedding.weight[row]
    norm = lambda x, n: x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * n.weight

    def turn(v, position):  # each pair (v[i], v[i + K/2]) as a complex number
        angle = position * c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        z = torch.complex(v[: c.head_dim // 2], v[c.head_dim // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([z.real, z.imag])

    for layer in model.layers:
        h, a, f = norm(x, layer.attention_norm), layer.attention, layer.feed_forward
        heads = torch.zeros(len(row), c.n_heads, c.head_dim)
        for head in range(c.n_heads):
            group = head // (c.n_heads // c.n_kv_heads)
            cut, kv_cut = (
                slice(head * c.head_dim, (head + 1) * c.head_dim),
                slice(group * c.head_dim, (group + 1) * c.head_dim),
            )
            for q in range(len(row)):
                keys = [k for k in range(len(row)) if mask[q, k]]
                query = turn(a.wq.weight[cut] @ h[q], q)
                scores = torch.stack(
                    [
                        query @ turn(a.wk.weight[kv_cut] @ h[k], k) / math.sqrt(c.head_dim)
                        for k in keys
                    ]
                )
                heads[q, head] = scores.softmax(0) @ torch.stack(
                    [a.wv.weight[kv_cut] @ h[k] for k in keys]
                )
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
    tokens = torch.tensor([row])
    for mask in (torch.ones(len(row), len(row)).tril().bool(), decoder_mask(tokens, GIST)[0, 0]):
        torch.testing.assert_close(
            model(tokens, mask[None, None])[0], slow_forward(model, row, mask), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(
        model(tokens), model(tokens, torch.ones(1, 1, len(row), len(row)).tril().bool())
    )


@torch.no_grad()
def test_logits_do_not_depend_on_where_positions_begin():
    model, tokens = make_model(), torch.tensor(random_rows(1, 9, 10, 3))
    there = torch.arange(9).expand(3, -1)
    for shift in (-700, -5, 40):
        torch.testing.assert_close(
            model(tokens, positions=there + shift), model(tokens), atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("condition", ["neg_control", "gist"])
def test_the_input_does_not_depend_on_the_prompt_but_through_the_gist(condition):
    """neg_control: not at all. gist: not if the gist's columns of the cache are held fixed."""
    model, n_gist = make_model(), 2
    for seed in range(5):
        prompt, other, given = (random_rows(seed * 3 + i, 5, 6, 1)[0] for i in range(3))
        one, two = (torch.tensor([p + [GIST] * n_gist + given]) for p in (prompt, other))
        mask, there = decoder_mask(one, GIST, condition), positions(one, GIST)
        if condition == "neg_control":
            a, b = (model(tokens, mask, there)[:, -5:] for tokens in (one, two))
        else:
            gist = compress(model, [prompt + [GIST] * n_gist])
            sees = decoder_mask(torch.tensor([[GIST] * n_gist + given]), GIST)[:, :, -5:]
            a = model(one, mask, there)[:, -5:]
            b = model(
                two[:, -5:], sees, there[:, -5:], gist
            )  # nothing but the first prompt's gist is left of it
            assert not torch.allclose(
                model(two, mask, there)[:, -5:], a, atol=1e-4
            )  # the gist did matter
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_cached_generation_gives_the_tokens_of_uncached(seed):
    """Ragged rows against the argmax of a whole forward pass a token, one row at a time."""
    model, rows = make_model(seed=seed), random_rows(seed)
    answers = model.generate(*padded(rows), max_new_tokens=12, eos_id=EOS)
    for row, answer in zip(rows, answers):
        expected = []
        while len(expected) < 12:
            new = int(model(torch.tensor([row + expected]))[0, -1].argmax())
            if new == EOS:
                break
            expected.append(new)
        assert answer == expected


def test_rows_padded_on_the_right_are_refused():
    with pytest.raises(AssertionError, match="left"):
        make_model().generate(torch.tensor([[5, PAD]]), torch.tensor([[True, False]]))


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 2, 5, 10])
@pytest.mark.parametrize("keep_all", [False, True])
def test_answers_from_a_compressed_prompt_are_those_of_the_whole_sequence(n_gist, keep_all):
    """Prompts and inputs of different lengths. keep_all is the uncached pos_control."""
    condition = "pos_control" if keep_all else "gist"
    for seed in range(4):
        model, inputs = make_model(seed=seed), random_rows(seed + 50)
        prompts = [row + [GIST] * n_gist for row in random_rows(seed)]
        cache = compress(model, prompts, keep_all)
        assert cache.length == (max(map(len, prompts)) if keep_all else n_gist)
        before = cache.keys.clone()
        answers = model.generate(*padded(inputs), cache=cache, max_new_tokens=10, eos_id=EOS)
        assert torch.equal(cache.keys, before)  # it can be used again
        tokens, attention_mask = padded([p + i for p, i in zip(prompts, inputs)])
        mask = decoder_mask(
            F.pad(tokens, (0, 10)), GIST, condition, F.pad(attention_mask, (0, 10), value=True)
        )
        there = positions(F.pad(tokens, (0, 10)), GIST)
        assert (
            model.generate(tokens, attention_mask, mask, there, max_new_tokens=10, eos_id=EOS)
            == answers
        )


@torch.no_grad()
def test_rows_that_end_in_a_gist_token_are_answered_as_the_mask_says():
    """No input: new tokens see the gist, not the prompt, in one pass as from the cache."""
    model = make_model(seed=3)
    prompts = [row + [GIST] for row in random_rows(3)]
    tokens, attention_mask = padded(prompts)
    mask = decoder_mask(
        F.pad(tokens, (0, 6)), GIST, "gist", F.pad(attention_mask, (0, 6), value=True)
    )
    answers = model.generate(tokens, attention_mask, mask, max_new_tokens=6)
    for row, answer in zip(prompts, answers):
        for n in range(6):
            whole = torch.tensor([row + answer[:n]])
            mask = decoder_mask(torch.tensor([row + [PAD] * n]), GIST)
            assert int(model(whole, mask)[0, -1].argmax()) == answer[n]


@torch.no_grad()
def test_generation_stops_when_all_rows_have_ended(monkeypatch):
    model, calls = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k))
    next_tokens = iter([[5, 6], [EOS, 7], [8, EOS], [9, 9]])
    one_hot = lambda *a: F.one_hot(torch.tensor(next(next_tokens)), 31)
    monkeypatch.setattr(model, "logits", one_hot)
    assert model.generate(torch.tensor([[3], [4]]), max_new_tokens=50, eos_id=EOS) == [[5], [6, 7]]
    assert len(calls) == 3
    assert make_model().generate(torch.tensor([[3]]), max_new_tokens=0) == [[]]
    assert make_model().generate(torch.zeros(0, 2, dtype=torch.int64)) == []


def test_gradients_reach_a_cache():
    model = make_model()
    cache = compress(model, [[5, 6, GIST]])
    cache.keys.requires_grad_()
    model(torch.tensor([[7, 8]]), cache=cache).sum().backward()
    assert cache.keys.grad.abs().sum(dim=(0, 1, 3, 4)).gt(0).all()  # in every layer


def test_label_logits_are_those_of_the_labels_and_no_others(monkeypatch):
    model, seen = make_model(), []
    tokens = torch.tensor(random_rows(3, 9, 10, 4))
    targets = torch.where(
        torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3,
        tokens,
        IGNORE_INDEX,
    )
    with torch.no_grad():
        logits = model(tokens)
    expected = [logits[b, t] for b in range(4) for t in range(9) if targets[b, t] != IGNORE_INDEX]
    model.output.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    logits, labels = model.label_logits(tokens, targets)
    torch.testing.assert_close(logits, torch.stack(expected))
    assert labels.tolist() == [t for t in targets.flatten().tolist() if t != IGNORE_INDEX]
    assert seen == [(int((targets != IGNORE_INDEX).sum()), 31)]


def test_llama3_scaling_stretches_long_waves_and_keeps_short_ones():
    """Against the published rule, wave by wave (Llama 3.1: factor 8, 1 to 4 turns within 8192 positions)."""
    s = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain = LlamaConfig(head_dim=128, rope_theta=500_000.0)
    scaled = LlamaConfig(head_dim=128, rope_theta=500_000.0, rope_scaling=s)
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
    meta = dict(dim=32, n_layers=1, n_heads=2, norm_eps=1e-6, rope_theta=500_000.0)
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


@torch.no_grad()
@pytest.mark.parametrize("keep_all", [False, True])
def test_caches_are_the_same_together_or_one_at_a_time_joined_picked_and_mixed(keep_all):
    model, prompts = make_model(), [row + [GIST, GIST] for row in random_rows(7, 1, 9, 5)]
    given, given_mask = padded(random_rows(8, 1, 6, 5))

    def answers(cache, rows=slice(None)):
        return model.generate(given[rows], given_mask[rows], cache=cache, max_new_tokens=8)

    together = compress(model, prompts, keep_all)
    alone = [compress(model, [row], keep_all) for row in prompts]
    joined = Cache.cat(alone)
    assert answers(together) == answers(joined)
    assert torch.equal(together.next_position, joined.next_position)
    order = [3, 0, 0, 4, 2]
    mixed = Cache.cat([alone[i] for i in order])
    assert answers(together[order]) == answers(mixed) == answers(joined[torch.tensor(order)])
    assert answers(together[1:3], slice(1, 3)) == answers(together)[1:3]
    assert (
        together[[2]].nbytes == 2 * 3 * 2 * 8 * 4 * together.length
    )  # keys and values, layers, heads, width, fp32


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


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_is_the_plain_product_for_any_number_of_rows(rows, dtype):
    layer, x = Linear(24, 7).to(dtype), torch.randn(1, rows, 24).to(dtype)
    with torch.no_grad():
        expected, tolerance = (
            x.double() @ layer.weight.double().mT,
            {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype],
        )
        for given in (x, x.transpose(0, 1), x[0]):
            assert torch.allclose(
                layer(given).double(),
                expected.view(*given.shape[:-1], 7),
                atol=tolerance,
                rtol=tolerance,
            )
    layer(x).sum().backward()
    assert layer.weight.grad is not None
