"""A LLaMA-style decoder, whole, in one file.

    x = embed(tokens)
    for every layer:   x = x + attention(norm(x));   x = x + feed_forward(norm(x))
    logits = output(norm(x))

RMSNorm instead of LayerNorm, rotary positions instead of learned ones, SwiGLU instead of ReLU, no
biases; keys and values may have fewer heads than queries (grouped-query attention). Touvron et al.
2023, arXiv 2302.13971; the paper's LLaMA-7B.

Nothing here knows what a gist is for. The model takes a mask and positions, and can keep some
columns of its key-value cache, and that is all that gisting needs:
- a mask says who may attend to whom, padding included; without one, attention is causal;
- positions are explicit and may be negative: an input begins at 0 and its prompt stands before it,
  so a cached gist fits any input;
- a compressed prompt is a `Cache` that kept only the gist's columns; `generate` goes on from it;
- logits are made only where they are asked for (`where`): in training, where there is a label.

Letters of the shapes: B batch, T sequence, C columns of a cache, S keys (C + T), H heads, D model
width, K head width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORE_INDEX = -100  # a target that is no label
Linear = partial(nn.Linear, bias=False)  # x W'


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, with rms(x) in fp32. Zhang & Sennrich 2019."""

    def forward(self, x):
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return normed.type_as(x) * self.weight


def rope_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position for every pair of head dimensions: theta^(-2i/K). Returns (K/2,) fp32.

    With `rope_scaling` (LLaMA 3.1, arXiv 2407.21783), wavelengths longer than the original context
    are stretched by `factor`, short ones are kept, and those between are blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    freqs = config.rope_theta ** -(exponents / config.head_dim)  # (K/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 = as it was, 0 = stretched
    return freqs * (kept + (1 - kept) / scaling["factor"])


def rotate(x, cos, sin):
    """Turn every pair (x[i], x[i + K/2]) by its angle. Su et al. 2021.

    x: (B, T, H, K); cos, sin: (B, T, 1, K/2) fp32.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """softmax(q k' / sqrt(K)) v, with rotary positions and grouped key-value heads."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.wq = Linear(c.d_model, width)
        self.wk = Linear(c.d_model, kv_width)
        self.wv = Linear(c.d_model, kv_width)
        self.wo = Linear(width, c.d_model)

    def queries_keys_values(self, x, cos, sin):
        """x: (B, T, D). Returns (B, T, H, K), and two of (B, T, H_kv, K)."""
        projected = (self.wq(x), self.wk(x), self.wv(x))
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, mask, cos, sin, past):
        """x: (B, T, D); mask: (B or 1, 1, T, S) bool; cos, sin: as in `rotate`. Returns (B, T, D).

        past: keys and values of this layer with room for the new ones (`append`), or None.
        """
        # Every token asks with its query; the keys are where it can look, the values what it finds.
        q, k, v = self.queries_keys_values(x, cos, sin)
        # What was read before is in the cache, and the new keys and values go there, too. The mask
        # is as wide as all keys so far, the new ones last.
        if past is not None:
            k, v = append(past, k, v, end=mask.shape[-1])  # (B, S, H_kv, K)
        # Query heads that share a head of keys and values act as more queries of that head.
        group = q.shape[2] // k.shape[2]
        q = q.unflatten(2, (-1, group)).permute(0, 2, 1, 3, 4)  # (B, H_kv, T, group, K)
        q = q.flatten(2, 3)  # (B, H_kv, T * group, K)
        mask = mask.repeat_interleave(group, dim=2)  # (B or 1, 1, T * group, S)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, H_kv, S, K)
        # Score all pairs, hide those that the mask forbids, and average the values by what is left.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # Put the heads side by side, and mix them.
        out = out.unflatten(2, (-1, group)).transpose(1, 2)  # (B, T, H_kv, group, K)
        return self.wo(out.flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Shazeer 2020."""

    def __init__(self, c):
        super().__init__()
        self.w1 = Linear(c.d_model, c.d_ff)
        self.w2 = Linear(c.d_ff, c.d_model)
        self.w3 = Linear(c.d_model, c.d_ff)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each after a norm and added to the residual path."""

    def __init__(self, c):
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x, mask, cos, sin, past):
        """Arguments and result: those of `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), mask, cos, sin, past)
        return x + self.feed_forward(self.ffn_norm(x))


def make_embedding(n, dim):
    """A table that is not filled: PyTorch would do so, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(n, dim), freeze=False)


class Llama(nn.Module):
    """The decoder. `config`: its shape."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = make_embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        # None: the embedding is the output head.
        self.output = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights to train from scratch: normal with std 1/sqrt(inputs).

        The matrices that add to the residual path start smaller. Attention starts with what it has
        to learn in any case, to find tokens like the query's (wq starts as half of wk) and to copy
        them (wo undoes wv): mimetic initialization, Trockman and Kolter 2023, arXiv 2305.09828; not
        where query heads share key-value heads.
        """
        residual = 0.3 / math.sqrt(2 * self.config.n_layers)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:  # norms stay at 1
                continue
            std = weight.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std *= residual
            weight.normal_(0.0, std, generator=generator)
        if self.config.n_heads == self.config.n_kv_heads:
            for layer in self.layers:
                attention = layer.attention
                attention.wq.weight.copy_(0.5 * attention.wk.weight)
                attention.wo.weight.copy_(residual * attention.wv.weight.T)

    def angles(self, positions):
        """cos and sin of the rotary angles, two of (B, T, 1, K/2). positions: (B, T) int64."""
        frequencies = rope_frequencies(self.config, positions.device)  # (K/2,)
        angle = positions[:, :, None, None] * frequencies
        return angle.cos(), angle.sin()

    def hidden(self, tokens, mask, positions, past=None):
        """The last layer's output after the final norm, (B, T, D).

        tokens, mask, positions: as in `forward`. past: for every layer, keys and values with room
        for the new tokens' (`Cache.with_room`), which are written into them.
        """
        cos, sin = self.angles(positions)  # the same for all layers
        x = self.embedding(tokens)  # (B, T, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, cos, sin, None if past is None else past[i])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., D). Returns (..., V)."""
        if self.output is None:
            return F.linear(hidden, self.embedding.weight)
        return self.output(hidden)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token: (B, T, V), or (N, V) for the N places that `where` names.

        tokens: (B, T) int64. mask: (B, 1, T, C + T) bool, True = may attend, the C columns of the
        cache first; None is causal and hides no padding. positions: (B, T) int64, may be negative;
        None counts from 0. cache: what was read before (`compress`), which is not changed; its rows
        are B, or one for all. where: (B, T) bool; other places do not reach the output head. With
        V = 32,000, the logits of a whole batch would be its largest tensor.
        """
        B, T = tokens.shape
        C, past = 0, None
        if cache is not None:
            C, past = cache.length, cache.expand(B).with_room(T)
        mask, positions = causal_unless_given(mask, positions, T, C, tokens.device)
        hidden = self.hidden(tokens, mask, positions, past)  # (B, T, D)
        if where is not None:
            hidden = hidden[where]  # (N, D)
        return self.logits(hidden)

    def empty_cache(self, batch):
        c = self.config
        return Cache.empty(batch, (c.n_layers, c.n_kv_heads, c.head_dim), self.embedding.weight)

    @torch.no_grad()
    def compress(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Cache:
        """Read prompts once, and keep some columns to go on from.

        tokens: (B, T) int64. mask: (B, 1, T, T) bool; None is causal. positions: (B, T) int64; None
        ends at -1, as the input begins at 0. keep: (T,) bool, the columns to keep, the same for
        all rows; None keeps all, which is the paper's instruction caching.
        """
        B, T = tokens.shape
        if positions is None:
            positions = torch.arange(-T, 0, device=tokens.device)[None]  # (1, T)
        mask, positions = causal_unless_given(mask, positions, T, 0, tokens.device)
        # Read the prompt with its gist tokens; every layer leaves its keys and values in `past`.
        past = self.empty_cache(B).with_room(T)
        self.hidden(tokens, mask, positions, past)
        # Keep some columns, the gist's. The others are dropped, which is where the saving is.
        return Cache.from_layers(past).select(keep)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        *,
        max_new_tokens: int = 256,
        eos_id: int | None = None,
    ) -> list[list[int]]:
        """Continue every row greedily. Returns B lists of the new tokens, without `eos_id`.

        tokens: (B, T) int64, T >= 1; padding stands on the left, and only a mask hides it. cache:
        what was read before (`compress`); it is not changed. mask: (B, 1, T + N, C + T + N) bool
        and positions: (B, T + N) int64, with N = max_new_tokens, are for the given tokens and those
        to come; None is causal, and counts from 0. A row ends at `eos_id`, all of them after N
        tokens.
        """
        B, T = tokens.shape
        columns = T + max_new_tokens
        cache = self.empty_cache(B) if cache is None else cache.expand(B)
        C, past = cache.length, cache.with_room(columns)
        mask, positions = causal_unless_given(mask, positions, columns, C, tokens.device)

        def next_logits(new: Tensor, start: int) -> Tensor:
            # The new tokens are start to end of the row: these queries of the mask. The keys are
            # the cache's C columns and the row up to end.
            end = start + new.shape[1]
            seen = mask[:, :, start:end, : C + end]
            hidden = self.hidden(new, seen, positions[:, start:end], past)
            return self.logits(hidden[:, -1])  # only the last token's say what comes next

        return generate_tokens(next_logits, tokens, max_new_tokens, eos_id)


def causal_unless_given(mask, positions, T, C, device):
    """The mask and positions of T tokens after C columns of a cache, with a default for each.

    A causal mask lets every token see the C columns, itself and no later token: (1, 1, T, C + T).
    Positions count from 0, after a cache, too, as a prompt's positions are negative: (1, T).
    """
    if mask is None:
        mask = torch.ones(T, C + T, dtype=torch.bool, device=device).tril(diagonal=C)[None, None]
    if positions is None:
        positions = torch.arange(T, device=device)[None]
    return mask, positions


# ---- The cache ----


@dataclass
class Cache:
    """What was read before: keys and values of every layer. Row b is one prompt.

    keys, values: (B, C, L, H_kv, K). segments: (B, C) int64, what the columns are (gist_mask.py),
    from which follows who may see them; `eval.compress_prompts` adds them. Only an encoder's cache
    needs positions, (B, C) int64, and hidden, (B, C, D), its output.
    """

    keys: Tensor
    values: Tensor
    segments: Tensor | None = None
    positions: Tensor | None = None
    hidden: Tensor | None = None

    @staticmethod
    def empty(batch: int, shape: tuple[int, int, int], like: Tensor) -> Cache:
        """No columns yet. shape: L, H_kv and K. Device and dtype are those of `like`."""
        nothing = like.new_empty(batch, 0, *shape)
        return Cache(nothing, nothing)

    @staticmethod
    def from_layers(past, **others):
        """past: keys and values of every layer, each (B, C, H_kv, K). others: the other fields."""
        keys, values = (torch.stack(layers, dim=2) for layers in zip(*past))
        return Cache(keys, values, **others)

    @property
    def length(self) -> int:
        """C, the number of columns."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and hidden states."""
        tensors = (self.keys, self.values, self.hidden)
        return sum(x.nbytes for x in tensors if x is not None)

    def change(self, function) -> Cache:
        """A cache with the function's result in the place of every tensor."""
        return Cache(*[None if x is None else function(x) for x in vars(self).values()])

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Cache:
        """Some rows, in any order and as often as wanted."""
        return self.change(lambda x: x[rows])

    def select(self, keep: Tensor | None) -> Cache:
        """Only some columns. keep: (C,) bool; None keeps all."""
        return self if keep is None else self.change(lambda x: x[:, keep])

    def expand(self, batch: int) -> Cache:
        """A row for each of so many inputs: its own rows, or its only one for all, not copied."""
        rows = len(self.keys)
        if rows not in (1, batch):
            raise ValueError(
                f"a cache of {rows} prompts cannot answer {batch} inputs: give one prompt for all "
                "of them, or one for each"
            )
        return self.change(lambda x: x.expand(batch, *x.shape[1:]))

    @staticmethod
    def cat(caches: list[Cache]) -> Cache:
        """Join batches of prompts into one. Shorter ones get PADDING after their columns.

        Raises ValueError if they differ in length and have no segments, which hide the padding.
        """
        if len({cache.length for cache in caches}) > 1 and any(c.segments is None for c in caches):
            raise ValueError("caches of different lengths need segments, as compress_prompts makes")
        joined = []
        for parts in zip(*[vars(cache).values() for cache in caches]):
            if parts[0] is None:
                joined.append(None)
                continue
            rows = [row for part in parts for row in part]  # (C, ...), C as in its own cache
            joined.append(pad_sequence(rows, batch_first=True))
        return Cache(*joined)

    def with_room(self, columns):
        """For every layer, copies of keys and values (B, C + columns, H_kv, K)."""
        room = (0, 0, 0, 0, 0, columns)  # nothing around K and H, zeros after C
        layers = zip(self.keys.unbind(2), self.values.unbind(2))
        return [(F.pad(k, room), F.pad(v, room)) for k, v in layers]


def append(past, k, v, end):
    """Write a layer's new keys and values (B, T, H_kv, K) before column `end`, and return all."""
    keys, values = past
    start = end - k.shape[1]
    keys[:, start:end] = k
    values[:, start:end] = v
    return keys[:, :end], values[:, :end]


# ---- Answering ----


def generate_tokens(next_logits, tokens, max_new_tokens, eos_id):
    """The loop that answers, until every row has met `eos_id`. Returns B lists of new tokens.

    next_logits(new (B, T), start) -> (B, V): what follows new tokens, which come after `start`
    earlier ones. It is called with all of `tokens` (prefill), then with one new token of every row
    (decode).
    """
    answers = [[] for _ in tokens]
    unfinished = range(len(tokens))  # rows
    start = 0
    for _ in range(max_new_tokens):
        if not unfinished:
            break
        # Read what is new: at first the whole input, then the token that was just written.
        logits = next_logits(tokens, start)  # (B, V)
        start += tokens.shape[1]
        # Write the most probable token. To sample one at a temperature instead:
        # (logits / temperature).softmax(dim=-1).multinomial(1)
        tokens = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        # A row that has met the end goes on with the others, but nothing of it is kept.
        ids = tokens[:, 0].tolist()
        unfinished = [row for row in unfinished if ids[row] != eos_id]
        for row in unfinished:
            answers[row].append(ids[row])
    return answers


# ---- The shape of a model, and how others write it down ----


class Unsupported(ValueError):
    """A checkpoint that is whole, but of a kind that we do not have."""


# Our names -> Hugging Face's, of a configuration's numbers and of the tensors (N: the layer).
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
HF_NAMES = {
    "embedding": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.wq": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.wk": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.wv": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.wo": "model.layers.N.self_attn.o_proj",
    "layers.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.w1": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.w2": "model.layers.N.mlp.down_proj",
    "layers.N.feed_forward.w3": "model.layers.N.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}

# fmt: off
LLAMA3_SCALING = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192)
# Meta's params.json does not say the factor. By width and number of layers, those of LLaMA 3.2 1B
# and 3B, 3.1 8B (and 3), 70B and 405B in their config.json; see also llama-models, issue 241.
LLAMA3_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0,
                  (4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0}
PRESETS = {
    "llama-tiny": dict(),
    "llama-7b": dict(vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
                     head_dim=128, d_ff=11008, norm_eps=1e-6, tie_embeddings=False),
}
# fmt: on


@dataclass
class LlamaConfig:
    """The shape of a model; ValueError if there can be no such model.

    The defaults are the small model that learns the built-in instructions.
    """

    vocab_size: int = 512
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 32
    d_ff: int = 384
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # LLaMA 3.1's: see LLAMA3_SCALING
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the embedding is the output head

    hf_names = HF_NAMES
    meta_names = {"embedding": "tok_embeddings"}  # the other names are Meta's

    def __post_init__(self):
        check_numbers(self, HF_CONFIG)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions turn pairs")
        frequencies = rope_frequencies(self, torch.device("cpu"))
        if not frequencies.log().isfinite().all():  # they have to be positive and finite
            raise ValueError(f"there are no rotary positions with rope_scaling {self.rope_scaling}")

    @classmethod
    def from_name(cls, name: str) -> LlamaConfig:
        """A preset of PRESETS. KeyError if it is not there."""
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, raw: dict) -> LlamaConfig:
        """From a config.json, whose older kinds have `rope_scaling`, newer `rope_parameters`.

        Raises Unsupported, or what a broken one can: ValueError, KeyError, TypeError.
        """
        raw = {key: value for key, value in raw.items() if value is not None}
        for group in ("rope_scaling", "rope_parameters"):
            raw |= raw.get(group, {})
        heads = raw["num_attention_heads"]
        defaults = {
            "num_key_value_heads": heads,
            "rope_theta": 10_000.0,
            "rope_type": raw.get("type", "default"),
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }
        raw = defaults | raw
        if "head_dim" not in raw:
            raw["head_dim"] = raw["hidden_size"] // heads
        kind, activation = raw["rope_type"], raw["hidden_act"]
        if kind not in ("default", "llama3"):
            raise Unsupported(f"rotary type {kind} is not supported")
        if activation != "silu":
            raise Unsupported(f"hidden_act {activation} is not supported")
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                raise Unsupported(f"{key} is not supported")
        return cls(
            **{ours: raw[theirs] for ours, theirs in HF_CONFIG.items()},
            rope_scaling={key: raw[key] for key in LLAMA3_SCALING} if kind == "llama3" else None,
            tie_embeddings=raw.get("tie_word_embeddings") is True,
        )

    def to_hf(self) -> dict:
        """The config.json, which older and newer versions of `transformers` read."""
        return {theirs: getattr(self, ours) for ours, theirs in HF_CONFIG.items()} | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_embeddings,
        }

    @classmethod
    def from_meta(cls, raw: dict, vocab_size: int, d_ff: int) -> LlamaConfig:
        """From Meta's params.json, which leaves two widths to the tensors. Raises as `from_hf`.

        Its other numbers have our names.
        """
        in_hf = {theirs: raw.get(ours) for ours, theirs in HF_CONFIG.items()}
        in_hf |= {
            "vocab_size": vocab_size,
            "hidden_size": raw["dim"],
            "intermediate_size": d_ff,
        }
        if raw.get("use_scaled_rope"):
            shape = raw["dim"], raw["n_layers"]
            if shape not in LLAMA3_FACTORS:
                advice = "download the model in Hugging Face's layout"
                raise Unsupported(f"the factor of its rotary scaling is unknown; {advice}")
            in_hf["rope_scaling"] = LLAMA3_SCALING | {"factor": LLAMA3_FACTORS[shape]}
        return cls.from_hf(in_hf)


def check_numbers(config, names):
    """Raises ValueError, with the other name, for a number that is not positive, or not whole
    where the default is."""
    for ours, theirs in names.items():
        value = getattr(config, ours)
        default = getattr(type(config), ours)
        if type(value) not in (int, type(default)) or not 0 < value < math.inf:
            raise ValueError(f"{theirs} is {value}, expected a number like {default}")
