"""T5, whole, in one file: an encoder that reads the source and a decoder that writes the target.

    x = embed(source)
    for every encoder layer:   x = x + attention(norm(x));   x = x + feed_forward(norm(x))
    y = embed(start, target)
    for every decoder layer:   y = y + attention(norm(y));   y = y + attention(norm(y), norm(x));
                               y = y + feed_forward(norm(y))
    logits = output(norm(y))

A token does not know where it stands. Instead, attention adds a learned bias for the distance
between query and key, one for every head and every bucket of distances; all layers of a stack share
the table. Attention is not scaled by 1/sqrt(K). Raffel et al. 2020, arXiv 1910.10683. Two versions
are in use: 1.0 (ReLU; the head is the embedding, and the logits are scaled) and 1.1, which FLAN-T5
continues (gated GELU; a head of its own). The paper's encoder-decoder is FLAN-T5-XXL.

There is no dropout. T5's own training, and the paper's, drops a tenth of all activations.

Nothing here knows what a gist is for, as in model.py. What is special to an encoder-decoder:
- gisting masks the encoder (the input does not see the prompt) and the cross-attention (nor does
  the decoder);
- a compressed prompt is a cache of the *encoder*, and the hidden states that the decoder's
  cross-attention would have read;
- no prompt token may see the input, or nothing of the prompt could be computed before the input is
  there.

Letters of the shapes: B batch, T sequence, C columns of a cache, S keys (C + T), H heads, D model
width, K head width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    Cache,
    Linear,
    RMSNorm,
    Unsupported,
    append,
    check_numbers,
    generate_tokens,
    make_embedding,
)


def relative_buckets(relative_position, bidirectional, n_buckets, max_distance):
    """The bucket of every distance: fine for near keys, coarse for far ones. Raffel et al., 2.1.

        bucket(d) = d                                                                     d < E
                    min(N - 1, E + floor((N - E) log(d / E) / log(max_distance / E)))     d >= E

    relative_position: int64 of any shape, the key's position minus the query's. In a decoder N =
    n_buckets, E = N / 2, d = how far the key lies back, and later keys count as 0. An encoder
    (bidirectional) has N = n_buckets / 2 for keys before or at the query, and as many for keys
    after it. Returns int64 in [0, n_buckets).
    """
    n = n_buckets // 2 if bidirectional else n_buckets
    exact = n // 2
    # Bucket i begins at starts[i - 1]. Whole numbers are the same on every device; logarithms at
    # the edges may not be.
    starts = list(range(1, exact))
    for i in range(n - exact):
        starts.append(math.ceil(exact * (max_distance / exact) ** (i / (n - exact)) - 1e-9))
    starts = torch.tensor(starts, device=relative_position.device)
    bucket = torch.bucketize(relative_position.abs(), starts, right=True)
    of_later_keys = bucket + n if bidirectional else torch.zeros_like(bucket)
    return torch.where(relative_position > 0, of_later_keys, bucket)


class Attention(nn.Module):
    """softmax(q k' + bias) v. A cross-attention computes keys and values once for all tokens."""

    def __init__(self, c):
        super().__init__()
        self.heads = (c.n_heads, c.head_dim)
        width = c.n_heads * c.head_dim
        self.wq = Linear(c.d_model, width)
        self.wk = Linear(c.d_model, width)
        self.wv = Linear(c.d_model, width)
        self.wo = Linear(width, c.d_model)

    def keys_values(self, x):
        """x: (B, S, D). Returns two of (B, S, H, K)."""
        return self.wk(x).unflatten(-1, self.heads), self.wv(x).unflatten(-1, self.heads)

    def forward(self, x, k, v, bias):
        """x: (B, T, D); k, v: (B, S, H, K). Returns (B, T, D).

        bias: (B or 1, H or 1, T or 1, S), or the same of bool as a mask.
        """
        q = self.wq(x).unflatten(-1, self.heads)  # (B, T, H, K)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T or S, K)
        # Score all pairs, add the bias (-inf hides a key), and average the values by what is left.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        # Put the heads side by side, and mix them.
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """w2(relu(w1 x)), or gated: w2(gelu(w1 x) * w3 x). Shazeer 2020."""

    def __init__(self, c):
        super().__init__()
        self.w1 = Linear(c.d_model, c.d_ff)
        self.w2 = Linear(c.d_ff, c.d_model)
        self.w3 = Linear(c.d_model, c.d_ff) if c.gated else None

    def forward(self, x):
        if self.w3 is None:
            return self.w2(F.relu(self.w1(x)))
        return self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))


class Block(nn.Module):
    """One layer: attention, in a decoder cross-attention, and feed-forward.

    Each comes after a norm and is added to the residual path.
    """

    def __init__(self, c, decoder):
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        if decoder:
            self.cross_norm = RMSNorm(c.d_model, c.norm_eps)
            self.cross_attention = Attention(c)
        self.ffn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x, bias, past, memory, cross_mask):
        """Arguments as in `Stack.forward`, of one layer."""
        # Look at the tokens of the same text ...
        h = self.attention_norm(x)
        k, v = self.attention.keys_values(h)  # (B, T, H, K)
        if past is not None:  # ... those before it, too
            k, v = append(past, k, v, end=bias.shape[-1])  # (B, S, H, K)
        x = x + self.attention(h, k, v, bias)
        # ... in a decoder, then at the source, as far as the cross-attention's mask allows.
        if memory is not None:
            x = x + self.cross_attention(self.cross_norm(x), *memory, cross_mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Stack(nn.Module):
    """An encoder or a decoder: the layers, the table of biases that they share, and a last norm."""

    def __init__(self, c, n_layers, decoder):
        super().__init__()
        self.decoder = decoder
        self.buckets = (c.n_buckets, c.max_distance)
        self.relative_bias = make_embedding(c.n_buckets, c.n_heads)
        self.layers = nn.ModuleList(Block(c, decoder) for _ in range(n_layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)

    def bias(self, positions, T):
        """What attention adds for the distance of every query and key, (B, H, T, S).

        positions: (B, S) int64 of the keys; the last T are those of the queries.
        """
        queries = positions[:, positions.shape[1] - T :]  # (B, T), and T may be 0
        distance = positions[:, None, :] - queries[:, :, None]  # (B, T, S)
        buckets = relative_buckets(distance, not self.decoder, *self.buckets)
        return self.relative_bias(buckets).permute(0, 3, 1, 2)

    def forward(self, x, positions, mask, past=None, memory=None, cross_mask=None):
        """The last layer's output after the final norm, (B, T, D).

        x: (B, T, D), embedded tokens. positions: (B or 1, S) int64 of all keys, the T new ones
        last. mask: bool, True = may attend, broadcast to (B, 1, T, S); None hides nothing. past:
        for every layer, keys and values with room for those of the new tokens, which are written
        into them. memory: for every decoder layer, keys and values of the encoder's output;
        cross_mask: (B, 1, 1, S) bool, which of the source's S keys the decoder may see.
        """
        bias = self.bias(positions, x.shape[1])  # (B or 1, H, T, S)
        if mask is not None:
            bias = bias.masked_fill(~mask, -math.inf)
        nothing = [None] * len(self.layers)
        for layer, kept, source in zip(self.layers, past or nothing, memory or nothing):
            x = layer(x, bias, kept, source, cross_mask)
        return self.norm(x)


class T5(nn.Module):
    """The encoder-decoder. `config`: its shape."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = make_embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.n_layers, decoder=False)
        self.decoder = Stack(config, config.n_decoder_layers, decoder=True)
        # None: the embedding is the output head.
        self.output = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights to train from scratch, T5's own: normal with std 1/sqrt(inputs).

        Embeddings have std 1. As in model.py, attention starts by finding tokens like the query's
        (queries equal keys, but are smaller by sqrt(K), in place of scaled attention) and copies
        them, here every head its own part of the vector. A token is most like itself, so the bias
        of distance 0 starts as far below 0 as that score is above it.
        """
        for name, weight in self.named_parameters():
            if weight.ndim < 2:  # norms stay at 1
                continue
            std = weight.shape[1] ** -0.5
            if name == "embedding.weight":
                std = 1.0
            elif "relative_bias" in name:
                std = self.config.d_model**-0.5
            elif name.endswith("w2.weight"):
                std *= 0.3
            weight.normal_(0.0, std, generator=generator)
        for module in self.modules():
            if isinstance(module, Attention):
                module.wq.weight.copy_(module.wk.weight * self.config.head_dim**-0.5)
                nn.init.eye_(module.wv.weight)
                nn.init.eye_(module.wo.weight)
            elif isinstance(module, Stack):
                module.relative_bias.weight[0] -= self.config.head_dim**0.5  # of distance 0

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., D), the decoder's output. Returns (..., V)."""
        if self.output is None:
            return F.linear(hidden * self.config.d_model**-0.5, self.embedding.weight)
        return self.output(hidden)

    def encode(self, source, mask, positions, cache):
        """What the decoder reads: keys and values (B, C + T, H, K) for each of its layers.

        Arguments as in `forward`. The C columns of the cache come first.
        """
        past = None
        if positions is None:
            positions = torch.arange(source.shape[1], device=source.device)[None]
        if cache is not None:
            past = cache.with_room(source.shape[1])
            positions = positions.expand(len(source), -1)
            positions = torch.cat([cache.positions, positions], dim=1)  # (B, C + T)
        hidden = self.encoder(self.embedding(source), positions, mask, past)  # (B, T, D)
        if cache is not None:
            hidden = torch.cat([cache.hidden, hidden], dim=1)  # (B, C + T, D)
        return [layer.cross_attention.keys_values(hidden) for layer in self.decoder.layers]

    def hidden(self, target, memory, cross_mask, past=None, start=0):
        """The decoder's output, (B, T, D), for a target (B, T) after `start` tokens in `past`."""
        positions = torch.arange(start + target.shape[1], device=target.device)  # (S,)
        causal = positions <= positions[start:, None]  # (T, S)
        x = self.embedding(target)
        return self.decoder(x, positions[None], causal, past, memory, cross_mask)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cross_mask: Tensor | None = None,
        cache: Cache | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """Logits of the target's tokens: (B, T_out, V), or (N, V) for the N places of `where`.

        source: (B, T) int64. target: (B, T_out) int64, the tokens to predict, then IGNORE_INDEX or
        padding. mask: bool, broadcast to (B, 1, T, C + T), True = a source token may attend, the C
        columns of the cache first. positions: (B, T) int64, may be negative; None counts from 0.
        cross_mask: (B, 1, 1, C + T) bool, what the decoder sees of the source. None, for either
        mask, is everything, padding too. cache: what the encoder has read before (`compress`),
        which is not changed; its rows are B, or one for all. where: (B, T_out) bool; other places
        do not reach the output head.
        """
        if cache is not None:
            cache = cache.expand(len(source))
        memory = self.encode(source, mask, positions, cache)
        # The decoder reads what it has to predict, one place later. IGNORE_INDEX, which comes after
        # all labels, becomes token 0.
        shifted = F.pad(target[:, :-1], (1, 0), value=self.config.start_id).clamp(min=0)
        hidden = self.hidden(shifted, memory, cross_mask)  # (B, T_out, D)
        if where is not None:
            hidden = hidden[where]  # (N, D)
        return self.logits(hidden)

    def empty_cache(self, batch, n_layers):
        c = self.config
        return Cache.empty(batch, (n_layers, c.n_heads, c.head_dim), self.embedding.weight)

    @torch.no_grad()
    def compress(
        self,
        source: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Cache:
        """Read prompts once, and keep some columns of the encoder to go on from.

        As `Llama.compress`; mask: (B, 1, T, T) bool, None = everything. The cache is exact if no
        token of the prompt would have seen what follows.
        """
        B, T = source.shape
        if positions is None:
            positions = torch.arange(-T, 0, device=source.device)[None]  # (1, T)
        # Read the prompt with its gist tokens; every layer leaves its keys and values in `past`.
        past = self.empty_cache(B, self.config.n_layers).with_room(T)
        hidden = self.encoder(self.embedding(source), positions, mask, past)
        cache = Cache.from_layers(past, positions=positions.expand(B, -1), hidden=hidden)
        # Keep the gist's columns, and what the decoder would see of them.
        return cache.select(keep)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cross_mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        max_new_tokens: int = 256,
        eos_id: int | None = None,
    ) -> list[list[int]]:
        """Answer every row greedily. Returns B lists of the new tokens, without `eos_id`.

        Arguments as in `forward`; padding may stand on either side. A row ends at `eos_id`, all of
        them after max_new_tokens.
        """
        B = len(source)
        if cache is not None:
            cache = cache.expand(B)
        memory = self.encode(source, mask, positions, cache)  # once, whatever is then written
        past = self.empty_cache(B, self.config.n_decoder_layers).with_room(max_new_tokens)

        def next_logits(new: Tensor, start: int) -> Tensor:
            hidden = self.hidden(new, memory, cross_mask, past, start)
            return self.logits(hidden[:, -1])

        first = source.new_full((B, 1), self.config.start_id)
        return generate_tokens(next_logits, first, max_new_tokens, eos_id)


# ---- The shape of a model, and how others write it down ----

# Our names -> Hugging Face's, of a configuration's numbers.
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_layers": "num_layers",
    "n_decoder_layers": "num_decoder_layers",
    "n_heads": "num_heads",
    "head_dim": "d_kv",
    "d_ff": "d_ff",
    "n_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
}
# fmt: off
PRESETS = {
    "t5-tiny": dict(),
    "flan-t5-base": dict(vocab_size=32128, d_model=768, n_layers=12, n_decoder_layers=12,
                         n_heads=12, head_dim=64, d_ff=2048),
    "flan-t5-xxl": dict(vocab_size=32128, d_model=4096, n_layers=24, n_decoder_layers=24,
                        n_heads=64, head_dim=64, d_ff=10240),
}
# fmt: on


@dataclass
class T5Config:
    """The shape of a model; ValueError if there can be no such model.

    The defaults are the small model that learns the built-in instructions.
    """

    vocab_size: int = 1200
    d_model: int = 128
    n_layers: int = 3  # of the encoder
    n_decoder_layers: int = 3
    n_heads: int = 4
    head_dim: int = 32  # T5's d_kv; n_heads * head_dim need not be d_model
    d_ff: int = 256
    n_buckets: int = 32
    max_distance: int = 128  # from here on, all distances are one bucket
    gated: bool = True  # the feed-forward: tanh-GELU with a gate (1.1, FLAN), or ReLU (1.0)
    tie_embeddings: bool = False  # 1.0: the embedding is the output head
    norm_eps: float = 1e-6
    start_id: int = 0  # the decoder's first input; T5 uses its padding token

    def __post_init__(self):
        check_numbers(self, HF_CONFIG)
        if self.start_id not in range(self.vocab_size):
            raise ValueError(f"decoder_start_token_id is {self.start_id}, expected a token's id")
        if not 4 <= self.n_buckets < self.max_distance:
            raise ValueError(f"{self.n_buckets} buckets cannot hold {self.max_distance} distances")

    @property
    def hf_names(self):
        """Our names -> Hugging Face's, of the tensors. N: the layer."""
        names = {"embedding": "shared", "output": "lm_head"}
        for stack, ffn in (("encoder", 1), ("decoder", 2)):  # ffn: which part of a layer it is
            ours, theirs = f"{stack}.layers.N", f"{stack}.block.N.layer"
            first = f"{stack}.block.0.layer.0.SelfAttention"
            w1 = "wi_0" if self.gated else "wi"
            names |= {
                f"{stack}.relative_bias": f"{first}.relative_attention_bias",
                f"{stack}.norm": f"{stack}.final_layer_norm",
                f"{ours}.attention_norm": f"{theirs}.0.layer_norm",
                f"{ours}.cross_norm": f"{theirs}.1.layer_norm",
                f"{ours}.ffn_norm": f"{theirs}.{ffn}.layer_norm",
                f"{ours}.feed_forward.w1": f"{theirs}.{ffn}.DenseReluDense.{w1}",
                f"{ours}.feed_forward.w2": f"{theirs}.{ffn}.DenseReluDense.wo",
                f"{ours}.feed_forward.w3": f"{theirs}.{ffn}.DenseReluDense.wi_1",
            }
            for x in "qkvo":
                names[f"{ours}.attention.w{x}"] = f"{theirs}.0.SelfAttention.{x}"
                names[f"{ours}.cross_attention.w{x}"] = f"{theirs}.1.EncDecAttention.{x}"
        return names

    @classmethod
    def from_name(cls, name: str) -> T5Config:
        """A preset of PRESETS. KeyError if it is not there."""
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, raw: dict) -> T5Config:
        """From a config.json; newer ones call `scale_decoder_outputs` what tied the embeddings.

        Raises Unsupported, or what a broken one can: ValueError, KeyError, TypeError.
        """
        defaults = {
            "num_decoder_layers": raw["num_layers"],
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-6,
            "decoder_start_token_id": 0,
            "scale_decoder_outputs": raw.get("tie_word_embeddings"),
        }
        raw = defaults | {key: value for key, value in raw.items() if value is not None}
        kind = raw["feed_forward_proj"]
        if kind not in ("relu", "gated-gelu"):
            raise Unsupported(f"feed_forward_proj {kind} is not supported")
        return cls(
            **{ours: raw[theirs] for ours, theirs in HF_CONFIG.items()},
            gated=kind == "gated-gelu",
            tie_embeddings=raw["scale_decoder_outputs"] is not False,
            start_id=raw["decoder_start_token_id"],
        )

    def to_hf(self) -> dict:
        """The config.json, which older and newer versions of `transformers` read."""
        return {theirs: getattr(self, ours) for ours, theirs in HF_CONFIG.items()} | {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "is_encoder_decoder": True,
            "feed_forward_proj": "gated-gelu" if self.gated else "relu",
            "tie_word_embeddings": self.tie_embeddings,
            "decoder_start_token_id": self.start_id,
        }
