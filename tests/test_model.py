"""The decoder: attention, positions, loss and generation against slow or independent ways to the same numbers."""
import math

import pytest
import torch
import torch.nn.functional as F

from gist_mask import decoder_mask, positions
from model import IGNORE, Cache, Linear, Llama, LlamaConfig, RMSNorm, rope_frequencies, rotate, sample

GIST, PAD, EOS = 30, 0, 1


def make_model(n_kv_heads=2, seed=0, **changes):
    config = LlamaConfig(vocab_size=31, d_model=32, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, head_dim=8, d_ff=48,
                         tie_embeddings=changes.pop("tie_embeddings", False), **changes)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def random_rows(seed, low=1, high=8, n=4):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [torch.randint(2, 30, (length,), generator=generator).tolist() for length in lengths]


def padded(rows, sides):
    """Rows as (tokens, valid), padded on the left where `sides` is odd, else on the right."""
    T = max(map(len, rows))
    tokens, valid = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = (T - len(row)) * ((sides >> i) & 1)
        tokens[i, start:start + len(row)] = torch.tensor(row)
        valid[i, start:start + len(row)] = True
    return tokens, valid


def slow_forward(model, row, mask):
    """The equations of the model, one token and one head at a time. row: list of ids; mask: (T, T) bool. Returns (T, V)."""
    c = model.config
    x = model.tok_embeddings.weight[row]
    norm = lambda x, n: x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * n.weight

    def turn(v, position):                                   # each pair (v[i], v[i + K/2]) as a complex number
        angle = position * c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        z = torch.complex(v[: c.head_dim // 2], v[c.head_dim // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    for layer in model.layers:
        h, a, f = norm(x, layer.attention_norm), layer.attention, layer.feed_forward
        heads = torch.zeros(len(row), c.n_heads, c.head_dim)
        for head in range(c.n_heads):
            group = head // (c.n_heads // c.n_kv_heads)
            cut, kv_cut = slice(head * c.head_dim, (head + 1) * c.head_dim), slice(group * c.head_dim, (group + 1) * c.head_dim)
            for q in range(len(row)):
                keys = [k for k in range(len(row)) if mask[q, k]]
                query = turn(a.wq.weight[cut] @ h[q], q)
                scores = torch.stack([query @ turn(a.wk.weight[kv_cut] @ h[k], k) / math.sqrt(c.head_dim) for k in keys])
                heads[q, head] = scores.softmax(0) @ torch.stack([a.wv.weight[kv_cut] @ h[k] for k in keys])
        x = x + heads.flatten(1) @ a.wo.weight.T
        h = norm(x, layer.ffn_norm)
        x = x + (F.silu(h @ f.w1.weight.T) * (h @ f.w3.weight.T)) @ f.w2.weight.T
    return norm(x, model.norm) @ model.output.weight.T


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_are_those_of_the_equations(n_kv_heads, tie):
    model = make_model(n_kv_heads, tie_embeddings=tie)
    row = random_rows(n_kv_heads, 6, 9, 1)[0] + [GIST, 5, 6]
    tokens = torch.tensor([row])
    for mask in (torch.ones(len(row), len(row)).tril().bool(), decoder_mask(tokens, GIST)[0, 0]):
        torch.testing.assert_close(model(tokens, mask[None, None])[0], slow_forward(model, row, mask), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(tokens), model(tokens, torch.ones(1, 1, len(row), len(row)).tril().bool()))


@torch.no_grad()
def test_logits_do_not_depend_on_where_positions_begin():
    model, tokens = make_model(), torch.tensor(random_rows(1, 9, 10, 3))
    there = torch.arange(9).expand(3, -1)
    for shift in (-700, -5, 40):
        torch.testing.assert_close(model(tokens, positions=there + shift), model(tokens), atol=1e-4, rtol=1e-4)


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
            gist = model.compress(one[:, :-5], GIST).with_room(5)
            sees = decoder_mask(torch.tensor([[GIST] * n_gist + given]), GIST)[:, :, -5:]
            a = model(one, mask, there)[:, -5:]
            b = model(two[:, -5:], sees, there[:, -5:], gist)         # nothing but the first prompt's gist is left of it
            assert not torch.allclose(model(two, mask, there)[:, -5:], a, atol=1e-4)     # the gist did matter
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_cached_generation_gives_the_tokens_of_uncached(seed):
    """Ragged rows, padded on either side, against the argmax of a whole forward pass a token, one row at a time."""
    model, rows = make_model(seed=seed), random_rows(seed)
    tokens, valid = padded(rows, sides=seed * 5)
    answers = model.generate(tokens, valid, max_new_tokens=12, eos_id=EOS)
    for row, answer in zip(rows, answers):
        expected = []
        while len(expected) < 12 and (new := int(model(torch.tensor([row + expected]))[0, -1].argmax())) != EOS:
            expected.append(new)
        assert answer == expected


@torch.no_grad()
@pytest.mark.parametrize("n_gist", [1, 2, 5, 10])
@pytest.mark.parametrize("keep", ["gist", "all"])
def test_answers_from_a_compressed_prompt_are_those_of_the_whole_sequence(n_gist, keep):
    """Prompts and inputs of different lengths; keep="all" is the uncached pos_control."""
    condition = "gist" if keep == "gist" else "pos_control"
    for seed in range(4):
        model, prompts, inputs = make_model(seed=seed), random_rows(seed), random_rows(seed + 50)
        tokens, valid = padded([p + [GIST] * n_gist for p in prompts], sides=seed)
        cache = model.compress(tokens, GIST, valid, keep=keep)
        assert cache.length == (n_gist if keep == "gist" else tokens.shape[1])
        before = cache.keys.clone()
        tokens, valid = padded(inputs, sides=seed * 3)
        answers = model.generate(tokens, valid, cache=cache, max_new_tokens=10, eos_id=EOS)
        assert torch.equal(cache.keys, before)                            # it can be used again
        tokens, valid = padded([p + [GIST] * n_gist + i for p, i in zip(prompts, inputs)], sides=seed * 7)
        mask, there = decoder_mask(tokens, GIST, condition, valid), positions(tokens, GIST)
        assert model.generate(tokens, valid, mask, there, max_new_tokens=10, eos_id=EOS) == answers


@torch.no_grad()
def test_generation_stops_when_all_rows_have_ended(monkeypatch):
    model, calls = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k))
    ends_with = iter([[5, 6], [EOS, 7], [8, EOS], [9, 9]])
    monkeypatch.setattr("model.sample", lambda *a: torch.tensor(next(ends_with)))
    assert model.generate(torch.tensor([[3], [4]]), max_new_tokens=50, eos_id=EOS) == [[5], [6, 7]]
    assert len(calls) == 3
    assert make_model().generate(torch.tensor([[3]]), max_new_tokens=0) == [[]]


def test_loss_is_the_mean_of_the_slow_one_and_makes_logits_for_labels_only(monkeypatch):
    model, seen = make_model(), []
    tokens = torch.tensor(random_rows(3, 9, 10, 4))
    targets = torch.where(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3, tokens, IGNORE)
    with torch.no_grad():
        p = model(tokens).log_softmax(-1)
    expected = -sum(p[b, t, targets[b, t]] for b in range(4) for t in range(9) if targets[b, t] != IGNORE)
    model.output.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model.loss(tokens, targets), expected)
    assert seen == [(int((targets != IGNORE).sum()), 31)]


def test_llama3_scaling_stretches_long_waves_and_keeps_short_ones():
    """Against the published rule, wave by wave (Llama 3.1: factor 8, 1 to 4 turns within 8192 positions)."""
    s = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
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


def test_nucleus_sampling_draws_what_its_definition_allows():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    share = lambda **k: sample(logits, generator=generator, **k).bincount(minlength=4) / 4000
    torch.testing.assert_close(share(temperature=1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    torch.testing.assert_close(share(temperature=1.0, top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    assert share(temperature=1.0, top_p=0.01).tolist() == share().tolist() == [1, 0, 0, 0]


def test_the_papers_model_has_its_number_of_parameters():
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_name("llama-7b"))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616


def test_rms_norm_and_rotation_keep_the_dtype():
    x = torch.randn(1, 2, 3, 8).bfloat16()
    assert RMSNorm(8, 1e-5).bfloat16()(x).dtype == torch.bfloat16
    assert rotate(x, torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)).equal(x)


@torch.no_grad()
@pytest.mark.parametrize("keep", ["gist", "all"])
def test_caches_are_the_same_together_or_one_at_a_time_joined_picked_and_mixed(keep):
    model, prompts = make_model(), [row + [GIST, GIST] for row in random_rows(7, 1, 9, 5)]
    tokens, valid = padded(prompts, sides=0b10110)
    together = model.compress(tokens, GIST, valid, keep)
    alone = [model.compress(torch.tensor([row]), GIST, keep=keep) for row in prompts]
    given, given_valid = padded(random_rows(8, 1, 6, 5), sides=0b01)
    answers = lambda cache, rows=slice(None): model.generate(given[rows], given_valid[rows], cache=cache, max_new_tokens=8)
    joined = Cache.cat(alone)
    assert answers(together) == answers(joined)
    assert torch.equal(together.next_position(), joined.next_position())
    order = [3, 0, 0, 4, 2]
    mixed = Cache.cat([alone[i] for i in order])
    assert answers(together[order]) == answers(mixed) == answers(joined[torch.tensor(order)])
    assert answers(together[1:3], slice(1, 3)) == answers(together)[1:3]
    assert together[[2]].nbytes == 2 * 3 * 2 * 8 * 4 * together.length            # keys and values, layers, heads, width, fp32
    assert together.to(dtype=torch.bfloat16).nbytes == together.nbytes // 2


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_is_the_plain_product_for_any_number_of_rows(rows, dtype):
    layer, x = Linear(24, 7).to(dtype), torch.randn(1, rows, 24).to(dtype)
    with torch.no_grad():
        expected, tolerance = x.double() @ layer.weight.double().mT, {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        for given in (x, x.transpose(0, 1), x[0]):
            assert torch.allclose(layer(given).double(), expected.view(*given.shape[:-1], 7), atol=tolerance, rtol=tolerance)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
