"""Gists in files: compress a prompt today, answer from it tomorrow, without the prompt.

    python -m tests.exercises.gist_library out/llama-gist-1 lamp.gist --instruction "Put lamp first"
    python -m tests.exercises.gist_library out/llama-gist-1 lamp.gist --input "fox cup sun"

Seconds each. A gist fits only the weights that made it, so the file says which these were: a gist
of another model is refused, where it would give nonsense without a word. How large is the file for
one gist of the main job's model, and how large would it be for LLaMA-7B?
"""

import argparse
import hashlib
import io
from pathlib import Path

import torch

import data
import eval
from model import Cache


def model_id(model: data.Model) -> str:
    """A hash of a model's shape and each 997th weight, the same in every dtype and place."""
    some = [weight.flatten()[::997].bfloat16().tolist() for weight in model.parameters()]
    return hashlib.sha256(repr((model.config, some)).encode()).hexdigest()


def save_gist(file: data.AnyPath, gist: Cache, model: data.Model, instruction: str) -> None:
    content = {"gist": vars(gist), "instruction": instruction, "model": model_id(model)}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data.write_file(Path(file), buffer.getvalue())


def load_gist(file: data.AnyPath, model: data.Model) -> tuple[Cache, str]:
    """A gist of this very model, and its instruction. Raises data.DataError."""
    weight = model.embedding.weight

    def to_model(x):
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    with data.one_line_errors(file, "make it again with --instruction"):
        content = data.unpickle(file)
        if content["model"] != model_id(model):
            raise ValueError("a gist of another model")
        return Cache(**content["gist"]).change(to_model), content["instruction"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep a gist in a file, answer from it.")
    parser.add_argument("run", help="a gist run of train.py")
    parser.add_argument("file", help="of one gist")
    parser.add_argument("--instruction", help="compress it into the file")
    parser.add_argument("--input", nargs="+", default=[], help="answer these from the file")
    flags = parser.parse_args()
    model, tokenizer, config = eval.open_run(flags.run)
    if flags.instruction is not None:
        e = eval.lay_out(flags.instruction, "", tokenizer, config)
        gist = eval.compress_instruction(model, tokenizer, e, config)
        save_gist(flags.file, gist, model, flags.instruction)
        print(f"wrote {flags.file}")
    gist, instruction = load_gist(flags.file, model)
    print(f"{gist.nbytes:,} bytes: {instruction}")
    examples = [eval.lay_out(instruction, text, tokenizer, config) for text in flags.input]
    if examples:
        answers = eval.answer(model, tokenizer, examples, config["condition"], 64, gist)
        for text, reply in zip(flags.input, answers):
            print(f"{text} -> {reply}")


if __name__ == "__main__":
    data.run(main)
