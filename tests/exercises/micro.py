"""Gisting in one file: a small transformer learns to squeeze its instructions into one token.

    python -m tests.exercises.micro        # a minute on one core

A row is an instruction (the prompt), a gist token G, and an input with its output. This prompt says
to put a and b at the ends of the list; others say front, back or middle:

    column   0    1 2   3   4 5 6 7 8   9 ...     14
    row      ends a b   G   p c f d =   a p c f d b
             prompt     gist  input       output

Usually a model looks back at the prompt while it writes the output. Gisting (Mu et al. 2023) hides
the prompt from all that follows G and trains as usual: the model must put what the prompt says into
G's keys and values. Then a prompt is run once, G's are kept, and any list is answered from them.

Of 1,000 rows whose prompts training never saw, 99.5% come out right with gist; with pos_control,
where nothing is hidden, 100.0%; with neg_control, where prompt and gist are hidden, 0.3%.

Shapes: B batch, T new tokens, S keys, H heads, D width, K head width, V vocabulary.
"""

import random

import torch
from torch import nn

LETTERS = list("abcdefghijklmnop")
PLACES = {"front": (0, 1), "back": (4, 5), "ends": (0, 5), "middle": (2, 3)}  # where a, b go
VOCABULARY = [*LETTERS, *PLACES, "G", "="]
GIST, INPUT, OUTPUT, END = 3, 4, 9, 15  # the columns where the parts begin; END: a row's length
# How many columns, from the left, the input may not see.
HIDDEN = {"neg_control": INPUT, "pos_control": 0, "gist": GIST}
D, D_FF, H = 64, 256, 4  # widths of model and feed-forward, number of heads


def make_rows(instructions, n, rng):
    """n random rows, each with one of the instructions. Returns their tokens, (n, END) int64."""
    rows = []
    for _ in range(n):
        kind, x, y = rng.choice(instructions)  # ends, a, b
        items = rng.choices(LETTERS, k=4)  # p c f d
        output = items.copy()
        for place, letter in zip(PLACES[kind], (x, y)):
            output.insert(place, letter)  # first a at 0: a p c f d, then b at 5: a p c f d b
        words = [kind, x, y, "G", *items, "=", *output]
        rows.append([VOCABULARY.index(word) for word in words])
    return torch.tensor(rows)


def gist_mask(condition):
    """Who may attend to whom: (END, END) bool, a row for each query, a column for each key."""
    mask = torch.ones(END, END, dtype=torch.bool).tril()  # no token sees a later one
    mask[INPUT:, : HIDDEN[condition]] = False  # gist: what follows G does not see ends a b
    return mask


class Layer(nn.Module):  # attention, then feed-forward, each after a norm, beside a residual path
    def __init__(self):
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3 * D))
        self.out = nn.Linear(D, D)
        self.ff = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D_FF), nn.GELU(), nn.Linear(D_FF, D))

    def forward(self, x, mask, past):
        """x: (B, T, D); mask: (T, S) bool; past: this layer's cached columns, or None."""
        q, kv = self.qkv(x).split([D, 2 * D], dim=2)  # (B, T, D), (B, T, 2D)
        if past is not None:  # the cached columns stand before the new ones, in every row
            kv = torch.cat([past.expand(len(x), -1, -1), kv], dim=1)  # (B, S, 2D)
        k, v = kv.chunk(2, dim=2)  # (B, S, D) each
        q, k, v = [part.unflatten(2, (H, -1)).transpose(1, 2) for part in (q, k, v)]  # heads apart
        heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, K)
        x = x + self.out(heads.transpose(1, 2).flatten(2))  # (B, T, D)
        return x + self.ff(x), kv


class Transformer(nn.Module):  # knows nothing of gists: it takes a mask and positions
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(0.1 * torch.randn(len(VOCABULARY), D))
        self.position = nn.Parameter(0.1 * torch.randn(END, D))
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, len(VOCABULARY)))

    def forward(self, tokens, positions, mask, cache=None):
        """tokens: (B, T); positions: (T,). Returns logits (B, T, V), and what a cache may keep."""
        x = self.token[tokens] + self.position[positions]  # (B, T, D) what stands where
        columns = []  # each layer's keys and values, (B, S, 2D)
        for layer, past in zip(self.layers, cache or [None] * len(self.layers)):
            x, kv = layer(x, mask, past)
            columns.append(kv)
        return self.head(x), columns


def train(condition, rows, steps):
    """Learn to write the outputs of rows (N, END). But for the mask, this is ordinary training."""
    torch.manual_seed(0)  # the same first weights and the same batches for every condition
    model, mask = Transformer(), gist_mask(condition)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (128,))]  # (B, END)
        logits, _ = model(batch[:, :-1], torch.arange(END - 1), mask[:-1, :-1])  # (B, 14, V)
        # Each token predicts the next one, but only the output counts: a after =, p after a, ...
        loss = nn.functional.cross_entropy(logits[:, OUTPUT - 1 :].mT, batch[:, OUTPUT:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)  # from here on it is only used


def compress(model, prompts):
    """Run ends a b G, and keep G's keys and values: all that an input sees. prompts: (B, INPUT)."""
    _, columns = model(prompts, torch.arange(INPUT), gist_mask("gist")[:INPUT, :INPUT])
    return [kv[:, GIST:] for kv in columns]  # (B, 1, 2D) of each layer


def answer(model, tokens, condition, gist=None):
    """Write the outputs, (B, 6), of rows up to =, (B, 9); with a gist, of inputs alone, (B, 5)."""
    first_query = OUTPUT - tokens.shape[1]  # column of the first token: 0; of an input 4, that of p
    first_key = 0 if gist is None else GIST  # with a gist: queries p c f d =, keys G p c f d =
    for end in range(OUTPUT, END):  # the column to write
        mask = gist_mask(condition)[first_query:end, first_key:end]  # (T, S) of the whole mask
        logits, _ = model(tokens, torch.arange(first_query, end), mask, gist)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=2)], dim=1)  # add the likeliest
    return tokens[:, OUTPUT - first_query :]


def main(steps=800):
    torch.set_num_threads(1)  # for so small a model, more would only wait for each other
    rng = random.Random(0)
    instructions = [(kind, x, y) for kind in PLACES for x in LETTERS for y in LETTERS]  # 1,024
    rng.shuffle(instructions)
    rows = make_rows(instructions[100:], 50_000, rng)
    tests = make_rows(instructions[:100], 1_000, rng)  # training has none of these instructions
    models = {condition: train(condition, rows, steps) for condition in HIDDEN}
    for condition, model in models.items():
        answers = answer(model, tests[:, :OUTPUT], condition)
        right = (answers == tests[:, OUTPUT:]).all(dim=1)  # (1000,) the whole output
        print(f"{condition:11}  {right.float().mean():6.1%} right")
    # Compress one prompt, once, and answer 1,000 inputs from its gist.
    model, prompt, inputs = models["gist"], tests[:1, :INPUT], tests[:, INPUT:OUTPUT]
    outputs = answer(model, inputs, "gist", compress(model, prompt))
    whole = torch.cat([prompt.expand(1_000, -1), inputs], dim=1)  # the same without a cache
    print("the cached gist changes no answer:", torch.equal(outputs, answer(model, whole, "gist")))
    print("one of them:", *[VOCABULARY[token] for token in [*whole[0], *outputs[0]]])


if __name__ == "__main__":
    main()
