"""The attention sink: what a pretrained model misses under a gist mask, and how to restore it.

    python -m tests.exercises.attention_sink --n_gist 1 --init_from SmolLM2-135M --data my_data \\
        --epochs 1 --batch_size 8 --lr 2e-4 --out_dir out/sink

A pretrained decoder sends attention that it has no other use for to the first token of a row, an
attention sink (Xiao et al. 2023, arXiv 2309.17453). A gist mask hides that token from the input. So
does neg_control, but there the input's own first token takes its place; here part of the attention
goes to a gist that holds nothing yet. So let the input see the first token, by calling it input:

    <s> Instruction: ... <G> Input: ... Output: ...
     2        0           1            2              segments; the table is as it was

Every mask asks `gist_mask.segments`, so this one change covers training, caching and answering. The
cache of a prompt has one more column, which depends on nothing but its position. By the same table,
prompt and gist no longer see the first token; the first word of the prompt becomes their sink.

All flags are those of train.py, but for two: --max_new_tokens, the longest answer of the
evaluation, and --teacher, a run of pos_control to learn from as in `distillation`. A model trained
this way must be used this way, and nothing in its folder says so: eval.py would use the usual
masks. To evaluate a finished run again, give --resume to this program.

Results (SmolLM2-135M, one epoch of 1,700 Alpaca+ examples, one seed; half an hour on one busy core,
evaluation included): the loss on unseen instructions is 1.898, against 2.079 with the usual masks,
1.955 under neg_control and 1.737 under pos_control. Two epochs with that pos_control as --teacher
give 1.854. With 1,600 steps, the gist covers 62% of the way between the controls in ROUGE-L.
assets/results.md has more.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import data
import eval
import gist_mask
import train
from tests.exercises import distillation


@contextmanager
def first_token_is_input(bos_id: int) -> Iterator[None]:
    """While this is open, masks treat every `bos_id`, which begins a row, as part of the input."""
    plain = gist_mask.segments

    def segments(tokens, gist_id):
        return plain(tokens, gist_id).masked_fill(tokens == bos_id, gist_mask.INPUT)

    gist_mask.segments = segments
    try:
        yield
    finally:
        gist_mask.segments = plain


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--max_new_tokens", type=data.at_least(1))
    parser.add_argument("--teacher")
    flags, sys.argv[1:] = parser.parse_known_args()
    config = train.read_flags()
    config.out_dir = config.out_dir or f"out/sink-{config.condition}-{config.n_gist}"
    config = train.fill_in(config)
    if not config.init_from or config.arch == "t5":
        raise data.DataError("only a pretrained decoder has a sink: name one with --init_from")
    tokenizer = data.load_tokenizer(Path(config.init_from))
    if tokenizer is None and config.base:
        tokenizer = data.load_tokenizer(Path(config.base))
    if tokenizer is None or tokenizer.bos_id is None:
        raise data.DataError(f"{config.init_from}: no tokenizer that begins a row; add the model's")
    loss = train.batch_loss
    if flags.teacher:
        loss = distillation.from_teacher(flags.teacher, config)
    with first_token_is_input(tokenizer.bos_id):
        stopped = train.train(config, loss)
        if os.environ.get("RANK", "0") != "0":  # only the first process has more to do
            return
        if not stopped and not config.no_eval:
            options = {"device": config.device, "dtype": config.dtype}
            eval.run([config.out_dir], max_new_tokens=flags.max_new_tokens, **options)
    if stopped:
        print("stopped and saved; go on with the same command and --resume", file=sys.stderr)
        sys.exit(128 + stopped)


if __name__ == "__main__":
    data.run(main)
