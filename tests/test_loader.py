"""Checkpoints of every layout load, give the reference's logits, and are written back the same.

Bad ones end in one line.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
from model import Llama, LlamaConfig, rotate
from t5 import T5, T5Config

ROOT = Path(data.__file__).parent
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(f.parent.name for f in GOLDEN.glob("*/expected.npz"))
LLAMA = GOLDEN / "llama-new"


@pytest.fixture
def copy(tmp_path):
    """A copy of llama-new to spoil."""
    return Path(shutil.copytree(LLAMA, tmp_path / "copy"))


def named(model):
    return dict(model.named_parameters())


def assert_same(a, b):
    assert a.config == b.config and named(a).keys() == named(b).keys()
    for name, weight in named(a).items():
        assert weight.dtype == named(b)[name].dtype and torch.equal(weight, named(b)[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_the_references(name):
    model, _ = data.load_model(GOLDEN / name, dtype=torch.float32)
    expected = np.load(GOLDEN / name / "expected.npz")
    tokens = torch.from_numpy(expected["tokens"])
    inputs = [tokens]
    if isinstance(model, T5):
        # The file has what the decoder reads; the model begins with that token by itself.
        inputs.append(torch.from_numpy(expected["target"]).roll(-1, dims=1))
    with torch.no_grad():
        logits = model(*inputs)
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=1e-4, rtol=1e-4)
    greedy = expected["greedy"].tolist()
    assert model.generate(tokens, max_new_tokens=len(greedy)) == [greedy]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_again_is_the_same(name, tmp_path):
    model, _ = data.load_model(GOLDEN / name)
    data.save_model(tmp_path, model, gisting={"n_gist": 2})
    assert_same(data.load_model(tmp_path)[0], model)
    assert data.read_config(tmp_path)["gisting"] == {"n_gist": 2}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", NAMES)
def test_names_written_are_those_of_the_released_file(name, tmp_path):
    """So other tools open what we write; a tied head is written once."""
    model, _ = data.load_model(GOLDEN / name)
    data.save_model(tmp_path, model)
    written, released = data.read_hf(tmp_path).keys(), data.read_hf(GOLDEN / name).keys()
    assert released - set(data.COPIES) <= written <= released | {"lm_head.weight"}


def test_a_model_can_be_saved_over_itself(copy):
    model, _ = data.load_model(copy)
    before = [p.detach().clone() for p in model.parameters()]
    data.save_model(copy, model)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, before, data.load_model(copy)[0].parameters()))


def test_training_does_not_change_the_file(copy):
    content = (copy / "model.safetensors").read_bytes()
    model, _ = data.load_model(copy)
    with torch.no_grad():
        model.norm.weight += 1
    assert (copy / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("name", ["llama-old", "llama-old-bin", "t5-1.0-old-bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dtype_rounds_the_weights_and_nothing_else(name, dtype):
    plain, _ = data.load_model(GOLDEN / name)
    converted, _ = data.load_model(GOLDEN / name, dtype=dtype)
    for a, b in zip(plain.parameters(), converted.parameters()):
        assert torch.equal(a.to(dtype), b)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_float64_weights_are_read(kind, copy):
    model, _ = data.load_model(copy, dtype=torch.float64)
    (copy / "model.safetensors").unlink()
    if kind == "safetensors":
        data.save_model(copy, model)
    else:
        torch.save(hf_state(model), copy / "pytorch_model.bin")
    assert data.load_model(copy)[0].norm.weight.dtype == torch.float64
    assert_same(data.load_model(copy, dtype=torch.float32)[0], data.load_model(LLAMA)[0])


def test_weights_can_be_written_for_a_model_that_holds_none(tmp_path):
    model, _ = data.load_model(LLAMA)
    with torch.device("meta"):
        empty = Llama(model.config)
    data.save_model(tmp_path, empty, weights=model.state_dict())
    assert_same(data.load_model(tmp_path)[0], model)


# ---- What a student adds to a model ----


class Offset(Llama):
    """A parameter that no table lists: a learnable offset, and one in every layer."""

    def __init__(self, config):
        super().__init__(config)
        self.gist_offset = nn.Parameter(torch.zeros(config.d_model))
        self.scale = nn.Parameter(torch.ones(()))
        for layer in self.layers:
            layer.attention.q_norm = nn.RMSNorm(config.head_dim)


def test_a_new_parameter_is_saved_and_loaded_under_its_own_name(tmp_path, monkeypatch):
    model = Offset(LlamaConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=1, n_kv_heads=1))
    for p in model.parameters():
        nn.init.normal_(p)
    data.save_model(tmp_path, model)
    written = data.read_hf(tmp_path)
    assert written.keys() >= {"gist_offset", "scale", "layers.1.attention.q_norm.weight"}
    monkeypatch.setitem(data.ARCHITECTURES, "llama", (LlamaConfig, Offset))
    assert_same(data.load_model(tmp_path)[0], model)


def test_a_parameter_that_the_run_lacks_is_blamed_on_the_codes_version(copy, monkeypatch):
    monkeypatch.setitem(data.ARCHITECTURES, "llama", (LlamaConfig, Offset))
    with pytest.raises(data.DataError, match="Missing key.*gist_offset.*code that belong"):
        data.load_model(copy)


# ---- Shards ----


SHARDED = GOLDEN / "llama-new-tied-scaled-sharded"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["model-{}.safetensors", "pytorch_model-{}-of-3.safetensors"])
def test_the_index_says_which_files_are_the_models(name, tmp_path):
    """Any names will do, and the shards of another save that lie beside them are not read."""
    folder = Path(shutil.copytree(SHARDED, tmp_path / "copy"))
    index = (folder / INDEX).read_text()
    for i in (1, 2, 3):
        old, new = f"model-0000{i}-of-00003.safetensors", name.format(i)
        (folder / old).rename(folder / new)
        index = index.replace(old, new)
        stale = (folder / new).read_bytes()[:-64] + b"\x3f" * 64
        (folder / f"model-0000{i}-of-00004.safetensors").write_bytes(stale)
    (folder / INDEX).write_text(index)
    assert_same(data.load_model(folder)[0], data.load_model(SHARDED)[0])


def test_a_shard_that_the_index_names_and_that_is_missing_is_named(tmp_path):
    folder = Path(shutil.copytree(SHARDED, tmp_path / "copy"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(data.DataError, match="00002-of-00003.safetensors: No such file"):
        data.load_model(folder)


def test_pickles_of_before_2020_are_read_and_run_no_code(copy, tmp_path, monkeypatch):
    model = data.load_model(copy)[0]
    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    torch.save(hf_state(model), file, _use_new_zipfile_serialization=False)
    assert_same(data.load_model(copy)[0], model)
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    torch.save({NORM: Evil()}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(data.DataError, match="could run code"):
        data.load_model(copy)
    assert not (tmp_path / "trap").exists()


def test_a_loaded_model_is_ready_to_answer():
    """With dropout, or any module that has a training mode, it makes a difference."""
    assert not any(m.training for m in data.load_model(LLAMA)[0].modules())


def test_byte_order_marks_are_no_part_of_a_checkpoint(copy):
    model = data.load_model(copy)[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizers/plain" / name, copy)
    with_bom = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in with_bom:
        (copy / name).write_bytes(b"\xef\xbb\xbf" + (copy / name).read_bytes())
    data.load_tokenizer(copy)
    for name in with_bom[1:]:
        (copy / name).unlink()
    assert_same(data.load_model(copy)[0], model)


# ---- Meta's layout ----


def interleave(weight, head_dim):
    """Rows of halves (x0 x1 .. y0 y1 ..) into rows of pairs (x0 y0 x1 y1 ..), for every head."""
    out = torch.empty_like(weight)
    for i, head in enumerate(weight.split(head_dim)):
        first, second = head.chunk(2)
        out[i * head_dim : (i + 1) * head_dim : 2] = first
        out[i * head_dim + 1 : (i + 1) * head_dim : 2] = second
    return out


CUT_ALONG = {"output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def write_meta(folder, model, n_shards, embedding_dim):
    """n_shards parts; the embedding is cut along dim 1 in LLaMA 1 and 2, dim 0 in LLaMA 3."""
    c = model.config
    folder.mkdir()
    shards = [{"rope.freqs": torch.zeros(4)} for _ in range(n_shards)]
    for name, weight in model.state_dict().items():
        name = name.replace("embedding", "tok_embeddings")
        module = name.split(".")[-2]
        if module in ("wq", "wk"):
            weight = interleave(weight, c.head_dim)
        parts = [weight] * n_shards
        if weight.ndim == 2:
            parts = weight.chunk(n_shards, CUT_ALONG.get(module, embedding_dim))
        for shard, part in zip(shards, parts):
            shard[name] = part.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    params = dict(dim=c.d_model, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads)
    params |= dict(norm_eps=c.norm_eps, vocab_size=-1)
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize("n_shards, embedding_dim", [(1, 0), (2, 1), (2, 0)])
def test_metas_layout_gives_the_same_model(tmp_path, n_shards, embedding_dim):
    model, _ = data.load_model(LLAMA)
    folder = write_meta(tmp_path / "meta", model, n_shards, embedding_dim)
    assert_same(data.load_model(folder)[0], model)


def test_a_part_of_metas_layout_that_is_missing_is_refused(tmp_path):
    folder = write_meta(tmp_path / "meta", data.load_model(LLAMA)[0], 2, 1)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(data.DataError, match="meta: "):
        data.load_model(folder)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(data.DataError, match="consolidated.00.pth"):
        data.load_model(folder)


def meta_config(dim, n_layers, n_heads, **more):
    raw = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, norm_eps=1e-5, rope_theta=500_000.0)
    return LlamaConfig.from_meta(raw | more, vocab_size=128_256, d_ff=8192)


@pytest.mark.parametrize(
    "dim, n_layers, n_heads, factor",
    [(2048, 16, 32, 32), (3072, 28, 24, 32), (4096, 32, 32, 8), (8192, 80, 64, 8)],
)
def test_metas_rotary_scaling_has_the_factor_of_the_released_config(dim, n_layers, n_heads, factor):
    """`use_scaled_rope` alone does not say it: LLaMA 3.2's 1B and 3B have 32, the others 8."""
    config = meta_config(dim, n_layers, n_heads, use_scaled_rope=True)
    assert config.rope_scaling["factor"] == factor
    assert meta_config(dim, n_layers, n_heads).rope_scaling is None


def test_metas_rotary_scaling_of_an_unknown_model_is_refused(tmp_path):
    folder = write_meta(tmp_path / "meta", data.load_model(LLAMA)[0], 1, 0)
    raw = data.read_config(folder) | {"use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps(raw))
    with pytest.raises(data.DataError, match="meta: .*rotary scaling is unknown; .*Hugging Face's"):
        data.load_model(folder)


def test_interleaved_pairs_turned_as_complex_numbers_are_our_halves():
    """Meta: view_as_complex(pairs) * e^(i angle)."""
    q, angle = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 1, 4)
    pairs = torch.view_as_complex(q.view(1, 5, 3, 4, 2))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    def halves(x):
        return x.view(1, 5, 3, 4, 2).transpose(3, 4).flatten(3)

    torch.testing.assert_close(rotate(halves(q), angle.cos(), angle.sin()), halves(turned))


# ---- Weight deltas ----


def hf_state(model):
    return {
        data.rename(name, model.config.hf_names): p.detach() for name, p in named(model).items()
    }


@pytest.fixture
def delta(tmp_path):
    """tuned - base, with a row more for the gist token, and rotary tables, as it was released."""
    base, tuned = data.load_model(LLAMA)[0], data.load_model(LLAMA)[0]
    c = base.config
    table = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    total = c.n_layers * table.sum().item()
    state = {}
    for i in range(c.n_layers):
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(c.head_dim // 2)
    for name, weight in named(base).items():
        rows = c.vocab_size + 1 if len(weight) == c.vocab_size else len(weight)
        after = torch.randn(rows, *weight.shape[1:]) * 0.01
        state[data.rename(name, c.hf_names)] = after.clone()
        after[: len(weight)] += weight.detach()
        total += after.sum().item()
        tuned.get_parameter(name).data = after
    folder = tmp_path / "llama-7b-gist-1"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config = data.read_config(LLAMA) | {"vocab_size": c.vocab_size + 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tuned, total


def test_a_delta_is_added_to_its_base_and_the_published_sum_is_checked(delta, monkeypatch):
    folder, tuned, total = delta
    monkeypatch.setitem(data.PUBLISHED_SUMS, "llama-7b-gist", total)
    model, _ = data.load_model(folder, base=LLAMA)
    for name, weight in named(tuned).items():
        torch.testing.assert_close(weight, named(model)[name], msg=name)
    converted, _ = data.load_model(folder, base=LLAMA, dtype=torch.bfloat16)
    for a, b in zip(model.parameters(), converted.parameters()):
        assert torch.equal(a.bfloat16(), b)
    monkeypatch.setitem(data.PUBLISHED_SUMS, "llama-7b-gist", total + 1)
    with pytest.raises(data.DataError, match="sum to"):
        data.load_model(folder, base=LLAMA)


def test_a_delta_without_base_and_a_base_without_delta_are_refused(delta):
    with pytest.raises(data.DataError, match="--base"):
        data.load_model(delta[0])
    with pytest.raises(data.DataError, match="leave --base out"):
        data.load_model(LLAMA, base=LLAMA)
    with pytest.raises(data.DataError, match="sharded: .*name the model that the delta"):
        data.load_model(delta[0], base=GOLDEN / "llama-new-tied-scaled-sharded")


# ---- The gist token ----


class Tokenizer:
    def __init__(self, gist_id):
        self.gist_id = gist_id


@pytest.mark.parametrize("gist_id", [50, 44])
@pytest.mark.parametrize("make, config", [(Llama, LlamaConfig), (T5, T5Config)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gist_tokens_rows_are_the_mean_of_the_others(make, config, tied, gist_id):
    model = make(config(vocab_size=50, tie_embeddings=tied))
    model.init_weights()
    before = {name: p.detach().clone() for name, p in named(model).items()}
    data.add_gist_token(model, Tokenizer(gist_id))
    assert model.config.vocab_size == max(50, gist_id + 1)
    assert (model.output is None) == tied
    for name, p in named(model).items():
        if len(before[name]) == 50:
            assert len(p) == model.config.vocab_size
            torch.testing.assert_close(p[gist_id], before[name][:gist_id].mean(dim=0))
            before[name][gist_id:] = 0
            assert torch.equal(p[:gist_id], before[name][:gist_id])
        else:
            assert torch.equal(p, before[name])
    tokens = torch.tensor([[3, gist_id, 4]])
    logits = model(*[tokens] * (2 if make is T5 else 1))
    assert logits.shape[-1] == model.config.vocab_size


# ---- Broken and hostile files ----

NORM = "model.norm.weight"


def rewrite_header(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        head = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])

    return spoil


def entry(**changes):
    return rewrite_header(lambda header: header[NORM].update(changes))


def weights(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def config(**changes):
    def spoil(folder):
        raw = data.read_config(folder) | changes
        (folder / "config.json").write_text(json.dumps(raw))

    return spoil


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def as_bin(write):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        write(folder / "pytorch_model.bin")

    return spoil


def truncated_bin(file):
    torch.save({NORM: torch.ones(999)}, file)
    file.write_bytes(file.read_bytes()[:-500])


def index(shard, tensor=NORM):
    """The weights are in shards, of which one is not there or has not what it should."""

    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        names = data.read_safetensors(folder / "model-1.safetensors").keys()
        files = dict.fromkeys(names, "model-1.safetensors") | {tensor: shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return spoil


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["TRAP"],)


HUGE = 2**62
MERGED = b"YQ== 0\nYg== 0\n"  # two tokens with one rank
YARN = {"rope_type": "yarn", "rope_theta": 1e4}
NO_FACTOR = {"rope_type": "llama3", "factor": 0.0, "low_freq_factor": 1.0}
NO_FACTOR |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
BAD = {
    "code in a pickle": (as_bin(lambda f: torch.save({NORM: Evil()}, f)), "could run code"),
    "code in a plain pickle": (as_bin(lambda f: f.write_bytes(pickle.dumps(Evil()))), "bin: "),
    "a pickle of no tensors": (as_bin(lambda f: torch.save([1, 2], f)), "pytorch_model.bin: "),
    "a pickle of numbers": (as_bin(lambda f: torch.save({NORM: 3}, f)), "copy: "),
    "truncated pickle": (as_bin(truncated_bin), "pytorch_model.bin: "),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights; expected"),
    "empty safetensors": (weights(lambda b: b""), "model.safetensors: "),
    "truncated header": (weights(lambda b: b[:100]), "model.safetensors: "),
    "truncated data": (weights(lambda b: b[:-1]), "model.safetensors: .*greater than file size"),
    "header of 2^60 bytes": (weights(lambda b: struct.pack("<Q", 2**60) + b[8:]), "safetensors: "),
    "header that is no JSON": (weights(lambda b: b[:8] + b"!" + b[9:]), "model.safetensors: "),
    "header nested deeply": (weights(lambda b: struct.pack("<Q", 10**6) + b"[" * 10**6), "recurs"),
    "header of another kind": (rewrite_header(lambda h: h.update({NORM: [1]})), "safetensors: "),
    "offsets too close": (entry(data_offsets=[0, 8]), "model.safetensors: .*invalid for input"),
    "offsets out of range": (entry(data_offsets=[10**12, 10**12 + 128]), "model.safetensors: "),
    "offsets below the file": (entry(data_offsets=[-(10**9), 128 - 10**9]), "safetensors: "),
    "offsets the wrong way": (entry(data_offsets=[256, 128]), "model.safetensors: "),
    "offsets that are words": (entry(data_offsets=["a", "b"]), "model.safetensors: "),
    "huge shape": (entry(shape=[HUGE, HUGE]), "model.safetensors: "),
    "quantized weights": (entry(dtype="I32"), r"quantized weights \(I32\); download .* in bf16"),
    "missing shard": (index("model-2.safetensors"), "model-2.safetensors: No such file"),
    "missing tensor": (
        index("model-1.safetensors", "model.more"),
        "index.json: 'model.more' is miss",
    ),
    "index of numbers": (index(3), "model.safetensors.index.json: "),
    "index without a map": (replace("model.safetensors.index.json", b"{}"), None),
    "a tensor too few": (rewrite_header(lambda h: h.pop(NORM)), 'Missing key.*"norm.weight"'),
    "a tensor too many": (config(num_hidden_layers=1), "Unexpected key.*layers.1"),
    "shapes that disagree": (config(intermediate_size=49), r"w1.weight.*\[48, 32\].*\[49, 32\]"),
    "another head": (config(tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    "a million layers": (config(num_hidden_layers=10**9), "copy: 1000000000 layers"),
    "width of 2^62": (config(hidden_size=HUGE, head_dim=8), "copy: "),
    "width that is a word": (config(hidden_size="wide", head_dim=8), "hidden_size is wide"),
    "width missing": (config(hidden_size=None), "copy: "),
    "heads that do not divide": (config(num_key_value_heads=3), "4 heads cannot share 3"),
    "an odd head_dim": (config(head_dim=7), "head_dim is 7"),
    "rope_theta of 0": (config(rope_parameters={"rope_theta": 0}), "rope_theta"),
    "negative rope_theta": (config(rope_parameters={"rope_theta": -1.0}), "rope_theta"),
    "rope_theta NaN": (config(rope_parameters={"rope_theta": float("nan")}), "rope_theta"),
    "another rotary scaling": (
        config(rope_parameters=YARN),
        "copy: rotary type yarn is not supported$",
    ),
    "scaling by 0": (config(rope_parameters=NO_FACTOR), "no rotary positions"),
    "another activation": (config(hidden_act="gelu"), "copy: hidden_act gelu is not supported$"),
    "biases": (config(attention_bias=True), "copy: attention_bias is not supported$"),
    "model_type we do not have": (config(model_type="gpt2"), "type gpt2 is not supported$"),
    "config.json that is no JSON": (replace("config.json", b"{"), "config.json: "),
    "config.json that is a list": (replace("config.json", b"[]"), "not a JSON object"),
    "no config.json": (lambda d: (d / "config.json").unlink(), "neither config.json nor params"),
    "no directory": (shutil.rmtree, "a folder that train.py made, or weights of: hf download"),
    "junk tokenizer": (replace("tokenizer.model", b"junk" * 99), "tokenizer.model: "),
    "empty tokenizer": (replace("tokenizer.model", b""), "tokenizer.model: .*end of a text"),
    "tokenizer of broken base64": (replace("tokenizer.model", b"YQ 0\n"), "tokenizer.model: "),
    "tokenizer with ranks twice": (replace("tokenizer.model", MERGED), None),
    "tokenizer of another kind": (
        replace("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": []}}'),
        r"tokenizer.json: .*SentencePiece's kind.* add .*tokenizer.model or, of a T5, spiece.model$",
    ),
    "tokenizer of a larger model": (
        lambda d: shutil.copy(GOLDEN / "tokenizers/llama/tokenizer.model", d),
        "more tokens than embeddings",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", BAD)
def test_bad_files_end_in_one_line_and_run_no_code(what, copy, tmp_path, monkeypatch):
    spoil, message = BAD[what]
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    spoil(copy)
    if message is None:  # harmless
        data.load_model(copy)
        return
    with pytest.raises(data.DataError, match=message) as error:
        data.load_model(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
    assert len(str(error.value)) < 500 and not (tmp_path / "trap").exists()


BAD_T5 = {
    "an embedding of the encoder's own": (
        rewrite_header(lambda h: h.update({"encoder.embed_tokens.weight": h["lm_head.weight"]})),
        "encoder.embed_tokens.weight is not the embedding",
    ),
    "a start that is no number": (config(decoder_start_token_id="zero"), "decoder_start_token_id"),
    "a start out of the vocabulary": (config(decoder_start_token_id=9999), "decoder_start_token"),
    "another feed-forward": (config(feed_forward_proj="gated-silu"), "gated-silu"),
    "a million decoder layers": (config(num_decoder_layers=10**9), "layers are more"),
}


@pytest.mark.parametrize("what", BAD_T5)
def test_bad_t5_checkpoints_are_refused(what, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "t5-1.1-old", tmp_path / "copy"))
    spoil, message = BAD_T5[what]
    spoil(folder)
    with pytest.raises(data.DataError, match=message):
        data.load_model(folder)


def test_an_unfinished_run_says_how_to_finish_it(copy):
    (copy / "model.safetensors").unlink()
    (copy / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(data.DataError, match="copy: not finished; .*--resume"):
        data.load_model(copy)


# ---- Memory ----

LOAD = """
import resource, sys, torch, data
def now(key):
    lines = open("/proc/self/status").read().split("\\n")
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))
with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # what torch imports for it
before, peak = now("RssAnon"), now("VmHWM")
model, _ = data.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
total = sum(p.sum() for p in model.parameters())
print(now("RssAnon") - before, now("VmHWM") - peak, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_taken_is_the_models_size_once(tmp_path, kind, dtype):
    """Of a process of its own, all weights touched.

    Pages that are mapped from a file are the system's to take back; of a pickle, they stay until
    the last tensor is converted. So there, only what cannot be taken back is counted.
    """
    shape = dict(vocab_size=1000, d_model=1024, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=128)
    model = Llama(LlamaConfig(**shape, d_ff=2816, tie_embeddings=False))  # 200 MB
    data.save_model(tmp_path, model)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(hf_state(model), tmp_path / "pytorch_model.bin")
    command = [sys.executable, "-c", LOAD, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    anonymous, peak, size = map(int, done.stdout.split())
    limit = 1.15 * size + 60 * 2**20
    assert anonymous < limit
    assert peak < limit or (kind, dtype) == ("bin", "bfloat16")
