"""Make the tiny T5 checkpoints of this folder, with the logits and greedy answers that `transformers` gets from them.

    python tests/golden/make_t5.py        # needs transformers; the tests do not

Each folder is what `save_pretrained` writes, and expected.pt: source, valid, target (the decoder's input), logits, answers.
"""

from itertools import count
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

HERE = Path(__file__).parent
SHAPE = dict(
    vocab_size=64,
    d_model=32,
    d_kv=12,
    d_ff=48,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=3,
    decoder_start_token_id=0,
)
VERSIONS = {
    "t5-v1.0": dict(feed_forward_proj="relu"),
    "t5-v1.1": dict(
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=40,
    ),
}


@torch.no_grad()
def make(name: str, seed: int) -> tuple[T5ForConditionalGeneration, dict]:
    """A random checkpoint, and what it should give for four sources of very different lengths."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**SHAPE, **VERSIONS[name])).eval()
    if (
        "tie_word_embeddings" in VERSIONS[name]
    ):  # transformers 5 ties every new model; the head of FLAN-T5 is its own
        model.lm_head.weight = torch.nn.Parameter(
            torch.randn(SHAPE["vocab_size"], SHAPE["d_model"])
        )
    for key, weight in model.named_parameters():
        if weight.ndim == 1:  # norms start as ones, which would hide a norm that is not applied
            weight.uniform_(0.5, 1.5)
        elif "relative_attention_bias" in key:
            weight.normal_()
        elif "block" in key:  # as small as they start, a tied head only repeats the decoder's input
            weight.mul_(2)
    valid = torch.arange(170) < torch.tensor(
        [[170], [90], [12], [1]]
    )  # beyond max_distance, so that every bucket occurs
    source = torch.randint(2, 64, valid.shape).masked_fill(~valid, 0)
    target = torch.cat([torch.zeros(4, 1, dtype=torch.int64), torch.randint(2, 64, (4, 8))], dim=1)
    logits = model(input_ids=source, attention_mask=valid.long(), decoder_input_ids=target).logits
    out = model.generate(
        input_ids=source, attention_mask=valid.long(), max_new_tokens=30, do_sample=False
    )[:, 1:].tolist()
    answers = [row[: row.index(1)] if 1 in row else row for row in out]
    return model, dict(source=source, valid=valid, target=target, logits=logits, answers=answers)


def telling(answers: list[list[int]]) -> bool:
    """Does one row end before the others, and does every row say more than the same few tokens?"""
    return min(map(len, answers)) < max(map(len, answers)) and all(len(set(a)) > 4 for a in answers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in VERSIONS:
        seed, model, expected = next(
            (s, *made) for s in count() if telling((made := make(name, s))[1]["answers"])
        )
        model.save_pretrained(HERE / name)
        torch.save(expected, HERE / name / "expected.pt")
        print(name, "seed", seed, expected["answers"])
