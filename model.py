"""A LLaMA-style decoder, whole, in one file.

    x = embed(tokens)
    for every layer:   x = x + attention(norm(x));   x = x + feed_forward(norm(x))
    logits = output(norm(x))

RMSNorm instead of LayerNorm, rotary positions instead of learned ones, SwiGLU instead of ReLU, no biases; keys and values
may have fewer heads than queries (grouped-query attention). Touvron et al. 2023, arXiv 2302.13971; the paper's LLaMA-7B.

Nothing here knows what a gist is for. The model takes a mask and positions, and can keep some columns of its key-value
cache, and that is all that gisting needs:
- positions are explicit and may be negative: a gist stands at 0 and its prompt before it, so a cached gist fits any input;
- a compressed prompt is a `Cache` that kept only the gist's columns; `generate` goes on from it;
- the loss makes logits only where there is a label: none for the prompt, none for padding.

Letters of the shapes: B batch, T sequence, S keys, H heads, D model width, K head width, V vocabulary, L layers.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100          # a target that is no label


@dataclass
class LlamaConfig:
    """The shape of a model. The defaults are the small model that learns the built-in instructions."""
    vocab_size: int = 512
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 8
    head_dim: int = 16
    d_ff: int = 384
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None     # the "llama3" scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    norm_eps: float = 1e-5
    tie_embeddings: bool = True          # the output head is the embedding

    @classmethod
    def from_name(cls, name: str, **changes) -> "LlamaConfig":
        """A preset of PRESETS by its name; `changes` override its fields. Raises KeyError for a name that is not there."""
        return cls(**{**PRESETS[name], **changes})


PRESETS = {
    "llama-tiny": dict(),
    "llama-7b": dict(vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11008, norm_eps=1e-6,
                     tie_embeddings=False),
    "smollm2-135m": dict(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536,
                         rope_theta=100_000.0, tie_embeddings=True),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32. Zhang & Sennrich 2019."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Linear(nn.Linear):
    """x W', without bias.

    Footgun: on a CPU, answering multiplies W by a few rows at a time, for which BLAS can be far from its best. (W x')' takes two
    thirds of the time, for two or three rows a third; a single row goes twice, as matrix times vector is slower than both.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])                                 # (R, n_in)
        n = len(rows)
        if n > 128 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        if n == 1:
            rows = rows.repeat(2, 1)
        return (self.weight @ rows.mT)[:, :n].mT.reshape(*x.shape[:-1], -1)


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Radians per position for every pair of head dimensions: theta^(-2i/K). Returns (K/2,) fp32.

    With `rope_scaling` (LLaMA 3.1, arXiv 2407.21783): wavelengths longer than the original context are stretched by `factor`,
    short ones are kept, those between are blended.
    """
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    freqs = config.rope_theta ** -half                                    # (K/2,)
    if config.rope_scaling is None:
        return freqs
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)     # full turns within the original context
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    keep = keep.clamp(0, 1)                                               # 1 = as it was, 0 = stretched
    return freqs * (keep + (1 - keep) / s["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x[i], x[i + K/2]) by its angle. x: (B, H, T, K); cos, sin: (B, 1, T, K/2) fp32. Su et al. 2021."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Cache:
    """What was read before: keys and values for every layer. A compressed prompt is one that kept only the gist's columns.

    keys, values: (L, B, H_kv, room, K), of which the first `length` columns are filled; valid: (B, length) bool, False on
    padding; positions: (B, length) int64, where the columns stand; hidden: (B, length, D), the last layer's output, or None
    (only an encoder's cache has it). Row b of all of them is one prompt: rows can be picked, `cache[2:5]`, and batches joined, `Cache.cat`.
    """

    def __init__(self, keys: Tensor, values: Tensor, valid: Tensor, positions: Tensor, hidden: Tensor | None = None):
        self.keys, self.values, self.valid, self.positions, self.hidden = keys, values, valid, positions, hidden

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    def next_position(self) -> Tensor:
        """(B, 1) int64: one after the last valid position of every row; 0 for a row that holds nothing."""
        if self.length == 0:
            return torch.zeros(len(self.valid), 1, dtype=torch.int64, device=self.valid.device)
        return self.positions.masked_fill(~self.valid, -1).amax(dim=1, keepdim=True) + 1

    def with_room(self, columns: int) -> "Cache":
        """A copy with room for `columns` more keys and values; the original stays as it is."""
        def grow(x: Tensor) -> Tensor:
            bigger = x.new_empty(*x.shape[:3], self.length + columns, x.shape[4])
            bigger[:, :, :, :self.length] = x[:, :, :, :self.length]
            return bigger
        return Cache(grow(self.keys), grow(self.values), self.valid, self.positions, self.hidden)

    def select(self, columns: Tensor) -> "Cache":
        """Only some columns. columns: (B, n) int64, the indices to keep in every row."""
        pick, index = torch.take_along_dim, columns[None, :, None, :, None]
        return Cache(pick(self.keys, index, 3), pick(self.values, index, 3), pick(self.valid, columns, 1), pick(self.positions, columns, 1),
                     None if self.hidden is None else pick(self.hidden, columns[:, :, None], 1))

    def __getitem__(self, rows: slice | list[int] | Tensor) -> "Cache":
        """Some rows, in any order and as often as wanted."""
        return Cache(self.keys[:, rows], self.values[:, rows], self.valid[rows], self.positions[rows],
                     None if self.hidden is None else self.hidden[rows])

    @staticmethod
    def cat(caches: list["Cache"]) -> "Cache":
        """Join batches of prompts into one. Shorter ones are padded on the right; padding is not valid."""
        length = max(cache.length for cache in caches)

        def join(tensors: list[Tensor], batch_dim: int, column_dim: int) -> Tensor:
            padded = []
            for x, cache in zip(tensors, caches):
                shape = list(x.shape)
                shape[column_dim] = length - cache.length
                padded.append(torch.cat([x.narrow(column_dim, 0, cache.length), x.new_zeros(shape)], dim=column_dim))
            return torch.cat(padded, dim=batch_dim)

        hidden = None if caches[0].hidden is None else join([c.hidden for c in caches], 0, 1)
        return Cache(join([c.keys for c in caches], 1, 3), join([c.values for c in caches], 1, 3),
                     join([c.valid for c in caches], 0, 1), join([c.positions for c in caches], 0, 1), hidden)

    @staticmethod
    def join(caches: list["Cache"]) -> "Cache":
        """Join prompts that were compressed apart, to answer from all of them: the same rows, one cache behind the other."""
        def behind(name: str, dim: int) -> Tensor:
            return torch.cat([getattr(c, name).narrow(dim, 0, c.length) for c in caches], dim=dim)
        return Cache(behind("keys", 3), behind("values", 3), behind("valid", 1), behind("positions", 1),
                     None if caches[0].hidden is None else behind("hidden", 1))

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Cache":
        """On another device, in another dtype."""
        return Cache(self.keys.to(device, dtype), self.values.to(device, dtype), self.valid.to(device), self.positions.to(device),
                     None if self.hidden is None else self.hidden.to(device, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the filled keys, values and hidden states."""
        per_column = self.keys[:, :, :, :1].nbytes + self.values[:, :, :, :1].nbytes
        return per_column * self.length + (0 if self.hidden is None else self.hidden.nbytes)


class Attention(nn.Module):
    """softmax(q k' / sqrt(K)) v, with rotary positions and grouped key-value heads."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        self.wq = Linear(c.d_model, c.n_heads * c.head_dim)
        self.wk = Linear(c.d_model, c.n_kv_heads * c.head_dim)
        self.wv = Linear(c.d_model, c.n_kv_heads * c.head_dim)
        self.wo = Linear(c.n_heads * c.head_dim, c.d_model)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, kv: tuple[Tensor, Tensor, int] | None) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)       # (B, H, T, K)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)    # (B, H_kv, T, K)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)    # (B, H_kv, T, K)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv is not None:                                                # write the new columns, read all of them
            keys, values, start = kv
            keys[:, :, start:start + T] = k
            values[:, :, start:start + T] = v
            k, v = keys[:, :, :start + T], values[:, :, :start + T]       # (B, H_kv, S, K)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                             enable_gqa=self.n_kv_heads != self.n_heads)     # (B, H, T, K)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))             # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Shazeer 2020."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.w1 = Linear(c.d_model, c.d_ff)
        self.w2 = Linear(c.d_ff, c.d_model)
        self.w3 = Linear(c.d_model, c.d_ff)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each behind a norm and beside a residual path."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, kv: tuple[Tensor, Tensor, int] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, cos, sin, kv)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The decoder. `config`: its shape."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch: normal with deviation 1/sqrt(inputs), smaller where a residual path is fed."""
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            std = weight.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            weight.normal_(0.0, std, generator=generator)

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The last layer's output after the final norm: (B, T, D). Arguments as in `forward`."""
        if cache is not None and mask is None:
            mask = causal_mask(cache.valid, torch.ones_like(tokens, dtype=torch.bool))
        if positions is None:
            start = cache.next_position() if cache is not None else 0
            positions = start + torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        angle = positions[:, None, :, None] * rope_frequencies(self.config, tokens.device)     # (B, 1, T, K/2)
        cos, sin = angle.cos(), angle.sin()
        x = self.tok_embeddings(tokens)                                   # (B, T, D)
        for i, layer in enumerate(self.layers):
            kv = None if cache is None else (cache.keys[i], cache.values[i], cache.length)
            x = layer(x, mask, cos, sin, kv)
        return self.norm(x)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of the next token at every place.

        tokens: (B, T) int64. mask: (B, 1, T, S) bool, True = may attend, S = the cache's columns, then the T new ones; None
        is causal. positions: (B, T) int64, may be negative; None counts on from the cache, or from 0. cache: a `Cache` with room
        for T more columns; their keys and values are written into it (`cache.valid` and `.positions` are the caller's to extend).
        """
        return self.output(self.hidden(tokens, mask, positions, cache))

    def loss(self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over the labels. targets: (B, T) int64, the token to predict at every place, or IGNORE.

        Only the places with a label reach the output head: with V = 32,000, logits of a whole batch would be its largest tensor.
        """
        labelled = targets != IGNORE                                      # (B, T)
        logits = self.output(self.hidden(tokens, mask, positions)[labelled])     # (labels, V)
        return F.cross_entropy(logits.float(), targets[labelled], reduction="sum")

    def empty_cache(self, batch: int, room: int) -> Cache:
        """A cache for `room` columns that holds none yet."""
        c, weight = self.config, self.output.weight
        shape = (c.n_layers, batch, c.n_kv_heads, room, c.head_dim)
        nothing = torch.empty(batch, 0, dtype=torch.int64, device=weight.device)
        return Cache(weight.new_empty(shape), weight.new_empty(shape), nothing.bool(), nothing)

    @torch.no_grad()
    def compress(self, tokens: Tensor, gist_id: int, valid: Tensor | None = None, keep: str = "gist", first: int = 0) -> Cache:
        """Read prompts once, and keep what is needed to answer from them.

        tokens: (B, T) int64, prompt and gist tokens, nothing after them; every row has the same number of gist tokens. valid:
        (B, T) bool, False on padding. first: the position of the first gist token, behind other prompts' (`Cache.join`).
        keep="gist" keeps the gist's columns, keep="all" every one (the paper's instruction caching). Returns a `Cache` for
        `generate`; the next position follows the last gist token, whatever the prompt's length.
        """
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        positions, columns = locate_gist(tokens, gist_id, first)
        cache = self.empty_cache(*tokens.shape)
        self.hidden(tokens, causal_mask(cache.valid, valid), positions, cache)
        cache.valid, cache.positions = valid, positions
        return cache.select(columns) if keep == "gist" else cache

    @torch.no_grad()
    def generate(self, tokens: Tensor, valid: Tensor | None = None, mask: Tensor | None = None, positions: Tensor | None = None,
                 cache: Cache | None = None, *, max_new_tokens: int = 256, eos_id: int | None = None, temperature: float = 0.0,
                 top_p: float = 1.0, generator: torch.Generator | None = None) -> list[list[int]]:
        """Continue every row, greedily unless `temperature` > 0. Returns B lists of the new tokens, without `eos_id`.

        tokens: (B, T) int64, T >= 1; valid: (B, T) bool, False on padding, on either side. cache: what was read before (`compress`);
        it is not changed and can be used again. mask: (B, 1, T, S) bool for the tokens given, causal if None; a new token sees
        what the last given token of its row saw, and the new ones. positions: (B, T) int64. A row ends at `eos_id`, all at max_new_tokens.
        """
        B, T = tokens.shape
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        cache = self.empty_cache(B, T + max_new_tokens) if cache is None else cache.with_room(T + max_new_tokens)
        if positions is None:
            positions = cache.next_position() + valid.cumsum(dim=1) - 1   # (B, T) padding does not count
        if mask is None:
            mask = causal_mask(cache.valid, valid)
        last = torch.where(valid, torch.arange(T, device=tokens.device), -1).amax(dim=1)     # (B,) every row's last token
        row = torch.arange(B, device=tokens.device)
        x = self.hidden(tokens, mask, positions, cache)[row, last]        # (B, D)
        sees, position = mask[row, :, last], positions[row, last]         # (B, 1, S), (B,)
        cache.valid = torch.cat([cache.valid, valid], dim=1)
        cache.positions = torch.cat([cache.positions, positions], dim=1)
        answers, done = [[] for _ in range(B)], torch.zeros(B, dtype=torch.bool)
        for step in range(max_new_tokens):
            new = sample(self.output(x), temperature, top_p, generator)   # (B,)
            for i, token in enumerate(new.tolist()):
                done[i] |= token == eos_id
                if not done[i]:
                    answers[i].append(token)
            if done.all() or step == max_new_tokens - 1:
                break
            position = position + 1
            sees = F.pad(sees, (0, 1), value=True)                        # (B, 1, S + 1)
            x = self.hidden(new[:, None], sees[:, :, None], position[:, None], cache)[:, 0]
            cache.valid = F.pad(cache.valid, (0, 1), value=True)
            cache.positions = torch.cat([cache.positions, position[:, None]], dim=1)
        return answers


def locate_gist(tokens: Tensor, gist_id: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Where the gist stands: positions, `first` at every row's first gist token (B, T), and the gist's columns (B, n_gist), int64."""
    is_gist = tokens == gist_id                                           # (B, T)
    n_gist = int(is_gist[0].sum())
    assert (is_gist.sum(dim=1) == n_gist).all(), "every row needs the same number of gist tokens"
    positions = first + torch.arange(tokens.shape[1], device=tokens.device) - is_gist.int().argmax(dim=1, keepdim=True)
    return positions, is_gist.nonzero()[:, 1].view(len(tokens), n_gist)


def causal_mask(cached: Tensor, valid: Tensor) -> Tensor:
    """Every valid token sees the valid ones before it, and itself. cached: (B, S), valid: (B, T) bool. Returns (B, 1, T, S + T) bool."""
    T = valid.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=valid.device)
    new = causal & valid[:, None, :] | itself                             # (B, T, T)
    return torch.cat([cached[:, None, :].expand(-1, T, -1), new], dim=2)[:, None]


def sample(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Choose the next tokens. logits: (B, V). Returns (B,) int64: the likeliest, or, if `temperature` > 0, drawn from the
    likeliest tokens that together have probability `top_p` (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p, token = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)    # (B, V)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)                 # the likeliest always stays
    return token.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
