"""Micro-batches, checkpointed activations and compiled layers train the same."""

import os
import shutil

import pytest
import torch

import data
import train
from model import Llama, LlamaConfig
from t5 import T5, T5Config


@pytest.fixture(scope="module")
def records():
    return data.builtin(40, 4)["train"]


@pytest.fixture(scope="module")
def tokenizer(records):
    return data.train_tokenizer(records, 400)


def small(arch, tokenizer):
    shape = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2}
    shape |= {"n_heads": 2, "head_dim": 16, "d_ff": 64}
    if arch == "llama":
        model = Llama(LlamaConfig(**shape, n_kv_heads=2))
    else:
        model = T5(T5Config(**shape, n_decoder_layers=2))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def loss_and_gradients(arch, records, tokenizer, **changes):
    config = train.fill_in(train.Config(arch=arch, device="cpu", **changes))
    model = small(arch, tokenizer)
    train.prepare(model, config)
    examples, _ = data.make_examples(records[:10], tokenizer, 2, arch)
    loss = train.accumulate_gradients(model, examples, tokenizer, config)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({"micro_batch": 3}, 1e-5),
        ({"checkpoint_activations": True}, 0.0),
        ({"compile": True}, 1e-4),
        ({"compile": True, "checkpoint_activations": True, "micro_batch": 4}, 1e-4),
        ({"dtype": "bfloat16"}, 0.05),
    ],
    ids=str,
)
def test_how_a_batch_is_computed_changes_neither_loss_nor_gradient(
    arch, changes, tolerance, records, tokenizer
):
    if "compile" in changes and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("needs a C++ compiler")
    loss, gradient = loss_and_gradients(arch, records, tokenizer)
    other, others = loss_and_gradients(arch, records, tokenizer, **changes)
    assert abs(other - loss) <= tolerance * loss
    assert (others - gradient).norm() <= tolerance * gradient.norm()
