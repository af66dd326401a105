"""T5, whole, in one file: an encoder that reads the source and a decoder that writes the target.

    x = embed(source)
    for every encoder layer:   x = x + attention(norm(x));   x = x + feed_forward(norm(x))
    y = embed(start, target)
    for every decoder layer:   y = y + attention(norm(y));   y = y + attention(norm(y), norm(x));   y = y + feed_forward(norm(y))
    logits = output(norm(y))

A token does not know where it stands. Instead, attention adds a learned bias for the distance between query and key, one
for every head and every bucket of distances; all layers of a stack share the table. Attention is not scaled by 1/sqrt(K).
Raffel et al. 2020, arXiv 1910.10683. Two versions are in use: 1.0 (ReLU; the head is the embedding, and the logits are
scaled) and 1.1, which FLAN-T5 continues (gated GELU; a head of its own). The paper's encoder-decoder is FLAN-T5-XXL.

Nothing here knows what a gist is for, as in model.py. What is special to an encoder-decoder:
- gisting masks the encoder (the input does not see the prompt) and the cross-attention (the decoder does not, either);
- a compressed prompt is a cache of the *encoder*, and the hidden states that the decoder's cross-attention would have read;
- no prompt token may see the input, or nothing of the prompt could be computed before the input is there.

Letters of the shapes: B batch, T sequence, S keys, H heads, D model width, K head width, V vocabulary, L layers.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, Cache, Linear, RMSNorm, locate_gist, sample

KeysValues = tuple[Tensor, Tensor]       # two of (B, H, S, K)


@dataclass
class T5Config:
    """The shape of a model. The defaults are the small model that learns the built-in instructions."""
    vocab_size: int = 1200
    d_model: int = 128
    n_layers: int = 3              # of the encoder
    n_decoder_layers: int = 3
    n_heads: int = 8
    head_dim: int = 16             # T5's d_kv; n_heads * head_dim need not be d_model
    d_ff: int = 256
    n_buckets: int = 32
    max_distance: int = 128        # from here on, all distances are one bucket
    gated: bool = True             # the feed-forward: tanh-GELU with a gate (1.1, FLAN), or ReLU (1.0)
    tie_embeddings: bool = False   # the output head is the embedding, and logits are scaled by d_model^-0.5 (1.0)
    norm_eps: float = 1e-6
    start_id: int = 0              # the decoder's first input; T5 uses its padding token

    @classmethod
    def from_name(cls, name: str, **changes) -> "T5Config":
        """A preset of PRESETS by its name; `changes` override its fields. Raises KeyError for a name that is not there."""
        return cls(**{**PRESETS[name], **changes})


V1_0 = dict(vocab_size=32128, gated=False, tie_embeddings=True)
V1_1 = dict(vocab_size=32128, gated=True, tie_embeddings=False)
PRESETS = {
    "t5-tiny": dict(),
    "t5-small": dict(V1_0, d_model=512, n_layers=6, n_decoder_layers=6, n_heads=8, head_dim=64, d_ff=2048),
    "t5-base": dict(V1_0, d_model=768, n_layers=12, n_decoder_layers=12, n_heads=12, head_dim=64, d_ff=3072),
    "t5-large": dict(V1_0, d_model=1024, n_layers=24, n_decoder_layers=24, n_heads=16, head_dim=64, d_ff=4096),
    "t5-3b": dict(V1_0, d_model=1024, n_layers=24, n_decoder_layers=24, n_heads=32, head_dim=128, d_ff=16384),
    "t5-11b": dict(V1_0, d_model=1024, n_layers=24, n_decoder_layers=24, n_heads=128, head_dim=128, d_ff=65536),
    "flan-t5-small": dict(V1_1, d_model=512, n_layers=8, n_decoder_layers=8, n_heads=6, head_dim=64, d_ff=1024),
    "flan-t5-base": dict(V1_1, d_model=768, n_layers=12, n_decoder_layers=12, n_heads=12, head_dim=64, d_ff=2048),
    "flan-t5-large": dict(V1_1, d_model=1024, n_layers=24, n_decoder_layers=24, n_heads=16, head_dim=64, d_ff=2816),
    "flan-t5-xl": dict(V1_1, d_model=2048, n_layers=24, n_decoder_layers=24, n_heads=32, head_dim=64, d_ff=5120),
    "flan-t5-xxl": dict(V1_1, d_model=4096, n_layers=24, n_decoder_layers=24, n_heads=64, head_dim=64, d_ff=10240),
}


def relative_buckets(relative_position: Tensor, bidirectional: bool, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of every distance: fine for near keys, coarse for far ones. Raffel et al. 2020, section 2.1.

        bucket(d) = d                                                                   d < E, with E = N / 2
                    min(N - 1, E + floor((N - E) log(d / E) / log(max_distance / E)))   otherwise

    relative_position: int64 of any shape, the key's position minus the query's. In a decoder N = n_buckets, d = how far the key
    lies back, and keys ahead count as 0. An encoder (bidirectional) has N = n_buckets / 2 for keys behind or at the query, and as
    many for keys ahead. Returns int64 in [0, n_buckets).
    """
    n = n_buckets // 2 if bidirectional else n_buckets
    exact = n // 2
    # Bucket i begins at starts[i - 1]. As whole numbers they are the same on every device; logarithms at the edges may not be.
    starts = [*range(1, exact)]
    starts += [math.ceil(exact * (max_distance / exact) ** (i / (n - exact)) - 1e-9) for i in range(n - exact)]
    distance = relative_position.abs() if bidirectional else (-relative_position).clamp(min=0)
    bucket = torch.bucketize(distance, torch.tensor(starts, device=distance.device), right=True)
    return bucket + n * (relative_position > 0) if bidirectional else bucket


class Attention(nn.Module):
    """softmax(q k' + bias) v. Keys and values are computed apart, as those of a cross-attention are computed only once."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.heads = (c.n_heads, c.head_dim)
        self.wq = Linear(c.d_model, c.n_heads * c.head_dim)
        self.wk = Linear(c.d_model, c.n_heads * c.head_dim)
        self.wv = Linear(c.d_model, c.n_heads * c.head_dim)
        self.wo = Linear(c.n_heads * c.head_dim, c.d_model)

    def keys_values(self, x: Tensor) -> KeysValues:
        k = self.wk(x).unflatten(-1, self.heads).transpose(1, 2)          # (B, H, S, K)
        v = self.wv(x).unflatten(-1, self.heads).transpose(1, 2)          # (B, H, S, K)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q = self.wq(x).unflatten(-1, self.heads).transpose(1, 2)          # (B, H, T, K)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)     # (B, H, T, K)
        return self.wo(out.transpose(1, 2).flatten(2))                    # (B, T, D)


class FeedForward(nn.Module):
    """w2(relu(w1 x)), or gated: w2(gelu(w1 x) * w3 x). Shazeer 2020."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.w1 = Linear(c.d_model, c.d_ff)
        self.w2 = Linear(c.d_ff, c.d_model)
        self.w3 = Linear(c.d_model, c.d_ff) if c.gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.w3 is None:
            return self.w2(F.relu(self.w1(x)))
        return self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))


class Block(nn.Module):
    """One layer: attention, in a decoder cross-attention, and feed-forward, each behind a norm and beside a residual path."""

    def __init__(self, c: T5Config, decoder: bool):
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        if decoder:
            self.cross_norm = RMSNorm(c.d_model, c.norm_eps)
            self.cross_attention = Attention(c)
        self.ffn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, bias: Tensor, past: KeysValues | None, memory: KeysValues | None, cross: Tensor | None) -> Tensor:
        h = self.attention_norm(x)
        k, v = self.attention.keys_values(h)                              # (B, H, T, K)
        if past is not None:                                              # write the new columns, read all of them
            T, S = bias.shape[-2:]
            past[0][:, :, S - T:S] = k
            past[1][:, :, S - T:S] = v
            k, v = past[0][:, :, :S], past[1][:, :, :S]                   # (B, H, S, K)
        x = x + self.attention(h, k, v, bias)
        if memory is not None:
            x = x + self.cross_attention(self.cross_norm(x), *memory, cross)
        return x + self.feed_forward(self.ffn_norm(x))


class Stack(nn.Module):
    """An encoder or a decoder: the layers, the table of biases that they share, and a last norm."""

    def __init__(self, c: T5Config, n_layers: int, decoder: bool):
        super().__init__()
        self.decoder, self.n_buckets, self.max_distance = decoder, c.n_buckets, c.max_distance
        self.relative_bias = nn.Embedding(c.n_buckets, c.n_heads)
        self.layers = nn.ModuleList(Block(c, decoder) for _ in range(n_layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)

    def bias(self, positions: Tensor, T: int) -> Tensor:
        """What attention adds for the distance of every pair. positions: (B, S), the last T are the queries'. Returns (B, H, T, S)."""
        distance = positions[:, None, :] - positions[:, -T:, None]        # (B, T, S)
        buckets = relative_buckets(distance, not self.decoder, self.n_buckets, self.max_distance)
        return self.relative_bias(buckets).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, past: KeysValues | None = None,
                memory: list[KeysValues] | None = None, cross: Tensor | None = None) -> Tensor:
        """The last layer's output after the final norm: (B, T, D).

        x: (B, T, D), embedded tokens. positions: (B or 1, S) int64 of all keys: the S - T columns of `past` that are filled, then the
        T new ones. mask: bool, True = may attend, broadcast to (B, 1, T, S); None = all of it. past: keys and values of earlier tokens
        (L, B, H, room, K), into which the new ones are written. memory: for each decoder layer, keys and values of the encoder's
        output; cross: (B, 1, 1, S) bool, which of them the decoder may see.
        """
        bias = self.bias(positions, x.shape[1])                           # (B or 1, H, T, S)
        if mask is not None:
            bias = bias.masked_fill(~mask, -math.inf)
        for i, layer in enumerate(self.layers):
            x = layer(x, bias, past and (past[0][i], past[1][i]), memory and memory[i], cross)
        return self.norm(x)


class T5(nn.Module):
    """The encoder-decoder. `config`: its shape."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.n_layers, decoder=False)
        self.decoder = Stack(config, config.n_decoder_layers, decoder=True)
        self.output = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch, T5's own: normal with deviation 1/sqrt(inputs), embeddings 1.

        Queries start smaller by sqrt(K), which stands in for the scaling of attention.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            std = self.config.d_model ** -0.5 if "relative_bias" in name else weight.shape[1] ** -0.5
            if weight is self.embedding.weight:
                std = 1.0
            elif name.endswith("wq.weight"):
                std *= self.config.head_dim ** -0.5
            weight.normal_(0.0, std, generator=generator)

    def read(self, source: Tensor, mask: Tensor | None = None, cross: Tensor | None = None, valid: Tensor | None = None,
             positions: Tensor | None = None, cache: Cache | None = None) -> tuple[list[KeysValues], Tensor]:
        """All that comes before the decoder. Arguments as in `forward`.

        Returns its memory, keys and values (B, H, S, K) of the source (behind those of the cache) for every decoder layer, and which
        of them it may see, (B, 1, 1, S) bool.
        """
        valid = torch.ones_like(source, dtype=torch.bool) if valid is None else valid
        past = None
        if cache is None:
            positions = torch.arange(source.shape[1], device=source.device)[None] if positions is None else positions
        else:
            positions = cache.next_position() + valid.cumsum(dim=1) - 1 if positions is None else positions
            positions = torch.cat([cache.positions, positions], dim=1)    # (B, S)
            valid = torch.cat([cache.valid, valid], dim=1)                # (B, S)
            room = cache.with_room(source.shape[1])
            past = room.keys, room.values
        all_valid = valid[:, None, None]                                  # (B, 1, 1, S)
        hidden = self.encoder(self.embedding(source), positions, all_valid if mask is None else mask, past)     # (B, T, D)
        if cache is not None:
            hidden = torch.cat([cache.hidden, hidden], dim=1)             # (B, S, D)
        return [layer.cross_attention.keys_values(hidden) for layer in self.decoder.layers], all_valid if cross is None else cross

    def logits(self, x: Tensor) -> Tensor:
        """x: (..., D), the decoder's output. Returns (..., V)."""
        return self.output(x * self.config.d_model ** -0.5 if self.config.tie_embeddings else x)

    def hidden(self, source: Tensor, target: Tensor, *args, **kwargs) -> Tensor:
        """The decoder's output, (B, T, D). Arguments as in `forward`."""
        memory, cross = self.read(source, *args, **kwargs)
        T = target.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=target.device).tril()
        return self.decoder(self.embedding(target), torch.arange(T, device=target.device)[None], causal, None, memory, cross)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor | None = None, cross: Tensor | None = None,
                valid: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of the next token at every place of the target.

        source: (B, S) int64. target: (B, T) int64, the decoder's input, `config.start_id` first. mask: (B, 1, S, S) bool, which key a
        source token may attend to; cross: (B, 1, 1, S) bool, which source tokens the decoder sees; None = all that are valid. valid: (B, S)
        bool, False on padding; None = all. positions: (B, S) int64, may be negative; None counts on from the cache, or from 0. cache:
        what was read before (`compress`), it is not changed; source follows it, and mask (B, 1, T, S) and cross then have the cache's columns first.
        """
        return self.logits(self.hidden(source, target, mask, cross, valid, positions, cache))

    def loss(self, source: Tensor, targets: Tensor, mask: Tensor | None = None, cross: Tensor | None = None,
             positions: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over the labels. targets: (B, T) int64, the tokens to predict, then IGNORE. The rest as in `forward`."""
        labelled = targets != IGNORE                                      # (B, T)
        target = F.pad(targets[:, :-1], (1, 0), value=self.config.start_id)     # the decoder reads one token behind what it predicts
        x = self.hidden(source, target.clamp(min=0), mask, cross, positions=positions)     # (B, T, D)
        return F.cross_entropy(self.logits(x[labelled]).float(), targets[labelled], reduction="sum")

    def room(self, n_layers: int, batch: int, columns: int) -> KeysValues:
        """Where to write keys and values: two of (L, B, H, columns, K), not filled."""
        shape = (n_layers, batch, self.config.n_heads, columns, self.config.head_dim)
        return self.output.weight.new_empty(shape), self.output.weight.new_empty(shape)

    @torch.no_grad()
    def compress(self, source: Tensor, gist_id: int, valid: Tensor | None = None, keep: str = "gist", first: int = 0) -> Cache:
        """Read prompts once, and keep what is needed to answer from them.

        source: (B, T) int64, prompt and gist tokens, nothing after them; every row has the same number of gist tokens. valid:
        (B, T) bool, False on padding. first: the position of the first gist token, behind other prompts' (`Cache.join`).
        keep="gist" keeps the gist's columns, and answers are those of the gist mask. keep="all" keeps every column: what follows, and
        the decoder, see the whole prompt, which does not see what follows. That is not `pos_control`, under which the encoder's
        prompt depends on the input, so that no cache of it could be exact.
        """
        valid = torch.ones_like(source, dtype=torch.bool) if valid is None else valid
        positions, columns = locate_gist(source, gist_id, first)
        past = self.room(self.config.n_layers, *source.shape)
        hidden = self.encoder(self.embedding(source), positions, valid[:, None, None], past)
        cache = Cache(*past, valid, positions, hidden)
        return cache.select(columns) if keep == "gist" else cache

    @torch.no_grad()
    def generate(self, source: Tensor, valid: Tensor | None = None, mask: Tensor | None = None, cross: Tensor | None = None,
                 positions: Tensor | None = None, cache: Cache | None = None, *, max_new_tokens: int = 256,
                 eos_id: int | None = None, temperature: float = 0.0, top_p: float = 1.0,
                 generator: torch.Generator | None = None) -> list[list[int]]:
        """Answer every row, greedily unless `temperature` > 0. Returns B lists of the new tokens, without `eos_id`.

        source: (B, T) int64, T >= 1, padded on either side; it and the rest as in `forward`. A row ends at `eos_id`, all at max_new_tokens.
        """
        memory, cross = self.read(source, mask, cross, valid, positions, cache)
        past = self.room(self.config.n_decoder_layers, len(source), max_new_tokens)
        new = torch.full((len(source),), self.config.start_id, device=source.device)
        answers, done = [[] for _ in source], torch.zeros(len(source), dtype=torch.bool)
        for step in range(max_new_tokens):
            so_far = torch.arange(step + 1, device=source.device)[None]   # (1, S)
            x = self.decoder(self.embedding(new[:, None]), so_far, None, past, memory, cross)[:, 0]     # (B, D)
            new = sample(self.logits(x), temperature, top_p, generator)   # (B,)
            for i, token in enumerate(new.tolist()):
                done[i] |= token == eos_id
                if not done[i]:
                    answers[i].append(token)
            if done.all():
                break
        return answers
