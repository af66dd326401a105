"""Estimate what training takes on every GPU: will it fit, and how long does it compute?

    python -m tests.exercises.memory --preset llama-7b --gpus 4 --micro_batch 4        # seconds

Weights, gradients and AdamW's two moments are exact: 16 bytes a parameter, spread over the GPUs
(FSDP). A GPU that takes several micro-batches for a step keeps whole gradients until the last one:
4 more bytes a parameter, not spread. For the backward pass, a layer keeps about 36·d_model + 8·d_ff
bytes per token in bf16 (T5, for its biases and its cross-attention: 72·d_model); or, with
--checkpoint_activations, its fp32 input, and all of that for one layer at a time. Not counted:
logits, and the whole weights of the layers at work. Where do 36 and 8 come from? Count the tensors
that a layer's backward needs; `torch.autograd.graph.saved_tensors_hooks` shows them.

A training step takes three times the FLOPs of reading its examples, as a backward pass takes
twice as many as a forward pass. Examples of Alpaca+ have 42 tokens to read and 29 to write, on
average (of 1,700). An A100 can do 312e12 a second; 40% of that is usual.

LLaMA-7B in micro-batches of 4 on 4 GPUs: 25.1 GiB of states, 25.1 of whole gradients, 14.4 of
activations, or 1.4 of them with --checkpoint_activations; 0.6 hours of arithmetic.
"""

import argparse
import profile

import data
import train


def estimate(config, n_parameters: int, gpus: int, tokens: int) -> tuple[float, float, float]:
    """Bytes of states, of activations, and of checkpointed ones. tokens: per micro-batch."""
    is_t5 = profile.is_t5(config)
    n_layers = config.n_layers + (config.n_decoder_layers if is_t5 else 0)
    width = 72 if is_t5 else 36
    layer = tokens * (width * config.d_model + 8 * config.d_ff)
    checkpointed = n_layers * tokens * 4 * config.d_model + layer
    return 16 * n_parameters / gpus, n_layers * layer, checkpointed


def hours_of_arithmetic(config, steps: int, batch_size: int, gpus: int) -> float:
    """The least time that the paper's training can take."""
    read, written = 42, 29
    row = read if profile.is_t5(config) else read + written
    flops = 3 * profile.flops(config, row, row, written) * steps * batch_size
    return flops / (gpus * 0.4 * 312e12) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimate what training takes on every GPU.")
    parser.add_argument("--preset", default="llama-7b", help="of model.PRESETS or t5.PRESETS")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--micro_batch", type=int, default=8, help="examples at once on a GPU")
    parser.add_argument("--length", type=int, default=512, help="T5: of source, and of output")
    flags = parser.parse_args()
    model = profile.model_of_shape(flags.preset, "meta")  # no weights, only shapes
    n_parameters = sum(p.numel() for p in model.parameters())
    tokens = flags.micro_batch * flags.length
    states, activations, checkpointed = estimate(model.config, n_parameters, flags.gpus, tokens)
    print(f"{states / 2**30:8.1f} GiB of weights, gradients and optimizer state")
    if flags.gpus > 1:
        whole = 4 * n_parameters / 2**30
        print(f"{whole:8.1f} GiB of whole gradients, if a step has several micro-batches")
    print(f"{activations / 2**30:8.1f} GiB of activations")
    print(f"{checkpointed / 2**30:8.1f} GiB of them with --checkpoint_activations")
    if flags.preset in train.HYPERPARAMETERS:
        paper = train.HYPERPARAMETERS[flags.preset]
        hours = hours_of_arithmetic(
            model.config, paper["max_steps"], paper["batch_size"], flags.gpus
        )
        print(f"{hours:8.1f} hours of arithmetic for the paper's training")


if __name__ == "__main__":
    data.run(main)
