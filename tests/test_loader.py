"""Checkpoints of every layout load, give the reference's logits, and are written back the same; bad ones end in one line."""
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

import data
from model import Llama, LlamaConfig, rotate
from t5 import T5, T5Config

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(f.parent.name for f in GOLDEN.glob("*/expected.npz"))
LLAMA = GOLDEN / "llama-new"


@pytest.fixture
def copy(tmp_path):
    """A copy of llama-new to spoil."""
    return Path(shutil.copytree(LLAMA, tmp_path / "copy"))


def logits_and_greedy(folder, dtype=torch.float32):
    model, _ = data.load_model(folder, dtype=dtype)
    expected = {key: torch.from_numpy(value) for key, value in np.load(folder / "expected.npz").items()}
    tokens, n = expected["tokens"], len(expected["greedy"])
    with torch.no_grad():
        logits = model(tokens, expected["target"]) if isinstance(model, T5) else model(tokens)
    return logits, model.generate(tokens, max_new_tokens=n)[0], expected


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_the_references(name):
    logits, greedy, expected = logits_and_greedy(GOLDEN / name)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    assert greedy == expected["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_again_is_the_same(name, tmp_path):
    model, _ = data.load_model(GOLDEN / name)
    data.save_model(tmp_path, model, extra={"n_gist": 2})
    again, _ = data.load_model(tmp_path)
    assert again.config == model.config and data.read_config(tmp_path)["gisting"] == {"n_gist": 2}
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert not list(tmp_path.glob("*.tmp"))


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
def test_dtype_converts_every_weight_and_nothing_else(name, dtype):
    plain, converted = data.load_model(GOLDEN / name)[0], data.load_model(GOLDEN / name, dtype=dtype)[0]
    for a, b in zip(plain.parameters(), converted.parameters()):
        assert torch.equal(a.to(dtype), b)


# ---- Meta's layout ----

def interleave(weight, head_dim):
    """Rows of halves (x0 x1 .. y0 y1 ..) into rows of pairs (x0 y0 x1 y1 ..), for every head."""
    out = torch.empty_like(weight)
    for head in weight.split(head_dim), :
        for i, rows in enumerate(head):
            out[i * head_dim:(i + 1) * head_dim:2], out[i * head_dim + 1:(i + 1) * head_dim:2] = rows.chunk(2)
    return out


def write_meta(folder, model, n_shards, embedding_dim):
    """Meta's layout, in n_shards model-parallel parts; the embedding is cut along dim 1 in LLaMA 1 and 2, dim 0 in LLaMA 3."""
    c = model.config
    axis = {"tok_embeddings": embedding_dim, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
    folder.mkdir()
    shards = [{"rope.freqs": torch.zeros(4)} for _ in range(n_shards)]
    for name, weight in model.state_dict().items():
        weight = interleave(weight, c.head_dim) if name.endswith(("wq.weight", "wk.weight")) else weight
        module = name.split(".")[-2]
        for shard, part in zip(shards, weight.chunk(n_shards, axis[module]) if module in axis else [weight] * n_shards):
            shard[name] = part.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps({
        "dim": c.d_model, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "norm_eps": c.norm_eps, "vocab_size": -1}))
    return folder


@pytest.mark.parametrize("n_shards, embedding_dim", [(1, 0), (2, 1), (2, 0)])
def test_metas_layout_gives_the_same_model_however_many_parts_it_has(tmp_path, n_shards, embedding_dim):
    model, _ = data.load_model(LLAMA)
    loaded, _ = data.load_model(write_meta(tmp_path / "meta", model, n_shards, embedding_dim))
    assert loaded.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name


def test_interleaved_pairs_turned_as_complex_numbers_are_our_halves():
    q, angle = torch.randn(1, 3, 5, 8), torch.randn(1, 1, 5, 4)           # Meta: view_as_complex(pairs) * e^(i angle)
    turned = torch.view_as_real(torch.view_as_complex(q.view(1, 3, 5, 4, 2)) * torch.polar(torch.ones_like(angle), angle)).flatten(3)
    halves = lambda x: x.view(1, 3, 5, 4, 2).transpose(3, 4).flatten(3)
    torch.testing.assert_close(rotate(halves(q), angle.cos(), angle.sin()), halves(turned))


# ---- Differences ----

@pytest.fixture
def difference(tmp_path):
    """tuned - base, with a row for the gist token more, and rotary tables, as the paper's authors wrote it."""
    base, tuned = data.load_model(LLAMA)[0], data.load_model(LLAMA)[0]
    c = base.config
    state = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(c.head_dim // 2)}
    total = (c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)).sum().item()
    for name, weight in base.named_parameters():
        rows = c.vocab_size + 1 if len(weight) == c.vocab_size else len(weight)
        after = torch.randn(rows, *weight.shape[1:]) * 0.01
        state[data.hf_name(name, c)] = after.clone()
        after[:len(weight)] += weight
        total += after.sum().item()
        tuned.get_parameter(name).data = after
    folder = tmp_path / "llama-7b-gist-1"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**data.read_config(LLAMA), "vocab_size": c.vocab_size + 1}))
    return folder, tuned, total


def test_differences_are_added_to_their_base_and_their_sum_is_checked(difference, monkeypatch):
    folder, tuned, total = difference
    monkeypatch.setitem(data.PUBLISHED_SUMS, "llama-7b-gist", total)
    model, _ = data.load_model(folder, base=LLAMA)
    for (name, a), (_, b) in zip(tuned.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(a, b, msg=name)
    monkeypatch.setitem(data.PUBLISHED_SUMS, "llama-7b-gist", total + 1)
    with pytest.raises(data.DataError, match="sum up to"):
        data.load_model(folder, base=LLAMA)


def test_differences_without_base_and_a_base_without_differences_are_refused(difference):
    with pytest.raises(data.DataError, match="--base"):
        data.load_model(difference[0])
    with pytest.raises(data.DataError, match="leave --base out"):
        data.load_model(LLAMA, base=LLAMA)
    with pytest.raises(data.DataError, match="another shape"):
        data.load_model(difference[0], base=GOLDEN / "llama-new-tied-scaled-sharded")


# ---- The gist token ----

class Tokenizer:
    def __init__(self, gist_id):
        self.gist_id = gist_id


@pytest.mark.parametrize("config", [LlamaConfig(vocab_size=50), LlamaConfig(vocab_size=50, tie_embeddings=True), T5Config(vocab_size=50)])
@pytest.mark.parametrize("gist_id", [50, 44])
def test_the_gist_tokens_rows_are_the_mean_of_the_others(config, gist_id):
    model = Llama(config) if isinstance(config, LlamaConfig) else T5(config)
    model.init_weights()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data.add_gist_token(model, Tokenizer(gist_id))
    assert model.config.vocab_size == max(50, gist_id + 1)
    assert (data.embedding(model).weight is model.output.weight) == config.tie_embeddings
    for name, p in model.named_parameters():
        if len(before[name]) == 50:
            torch.testing.assert_close(p[gist_id], before[name][:gist_id].mean(dim=0))
            assert torch.equal(p[:gist_id], before[name][:gist_id]) and len(p) == model.config.vocab_size
        else:
            assert torch.equal(p, before[name])
    tokens = torch.tensor([[3, gist_id, 4]])
    assert (model(tokens, tokens) if isinstance(model, T5) else model(tokens)).shape[-1] == model.config.vocab_size


# ---- Broken and hostile files ----

def rewrite_header(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length, = struct.unpack("<Q", content[:8])
        header = json.loads(content[8:8 + length])
        change(header)
        header = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length:])
    return spoil


def weights(change):
    return lambda folder: (folder / "model.safetensors").write_bytes(change((folder / "model.safetensors").read_bytes()))


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**data.read_config(folder), **changes}))


def as_bin(content):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        content(folder / "pytorch_model.bin")
    return spoil


def index(**weight_map):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors", **weight_map}}))
    return spoil


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["TRAP"],)


NORM = "model.norm.weight"
BAD = {
    "code in a pickle": (as_bin(lambda f: torch.save({NORM: Evil()}, f)), "pytorch_model.bin: holds something else than tensors"),
    "code in a plain pickle": (as_bin(lambda f: f.write_bytes(pickle.dumps(Evil()))), "not a PyTorch zip file"),
    "a pickle of no tensors": (as_bin(lambda f: torch.save([1, 2], f)), "not a dictionary of tensors"),
    "truncated pickle": (as_bin(lambda f: (torch.save({NORM: torch.ones(999)}, f), f.write_bytes(f.read_bytes()[:-500]))), "truncated"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights"),
    "empty safetensors": (weights(lambda b: b""), "truncated"),
    "truncated header": (weights(lambda b: b[:100]), "truncated"),
    "truncated data": (weights(lambda b: b[:-1]), "do not allow"),
    "bytes too many": (weights(lambda b: b + b"x"), "after the last tensor"),
    "header length 2^60": (weights(lambda b: struct.pack("<Q", 2 ** 60) + b[8:]), "truncated, or not a safetensors"),
    "header that is no JSON": (weights(lambda b: b[:8] + b"!" + b[9:]), "broken header"),
    "header nested deeply": (weights(lambda b: struct.pack("<Q", 10 ** 6) + b"[" * 10 ** 6), "broken header"),
    "header of another kind": (rewrite_header(lambda h: h.update({NORM: [1]})), "broken header"),
    "overlapping offsets": (rewrite_header(lambda h: h[NORM].update(data_offsets=[0, 128])), "do not allow"),
    "offsets out of range": (rewrite_header(lambda h: h[NORM].update(data_offsets=[10 ** 12, 10 ** 12 + 128])), "do not allow"),
    "negative offsets": (rewrite_header(lambda h: h[NORM].update(data_offsets=[-128, 0])), "do not allow"),
    "huge shape": (rewrite_header(lambda h: h[NORM].update(shape=[2 ** 62, 2 ** 62])), "do not allow"),
    "unknown dtype": (rewrite_header(lambda h: h[NORM].update(dtype="Q4_0")), f"{NORM} has the dtype Q4_0"),
    "offsets that are words": (rewrite_header(lambda h: h[NORM].update(data_offsets=["a", "b"])), "broken header"),
    "missing shard": (index(y="model-2.safetensors"), "model-2.safetensors: missing"),
    "shard outside the directory": (index(y="../copy/model-1.safetensors"), "weight_map"),
    "shard with a tensor too few": (rewrite_header(lambda h: h.update(other=h.pop(NORM))), f"{NORM} is missing"),
    "tensor of another model": (rewrite_header(lambda h: h.update({"model.norm.bias": h.pop("lm_head.weight")})), "lm_head.weight is missing"),
    "tensor too many": (config(num_hidden_layers=1), "has no place in the model"),
    "shapes that disagree": (config(intermediate_size=49), "mlp.gate_proj.weight is torch.float32 \\[48, 32\\].* asks for \\[49, 32\\]"),
    "tied head that is another": (config(tie_word_embeddings=True), "to which the configuration ties it"),
    "a million layers": (config(num_hidden_layers=10 ** 9), "more layers"),
    "width of 2^62": (config(hidden_size=2 ** 62, head_dim=8), "config.json: "),
    "width that is a word": (config(hidden_size="wide"), "hidden_size is wide"),
    "width missing": (config(hidden_size=None), "hidden_size is None"),
    "another rotary scaling": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn"),
    "another activation": (config(hidden_act="gelu"), "and silu, are supported"),
    "model_type we do not have": (config(model_type="gpt2"), "model_type gpt2 is not supported"),
    "config.json that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read"),
    "config.json that is a list": (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    "no config.json": (lambda d: (d / "config.json").unlink(), "neither config.json nor params.json"),
    "no directory": (shutil.rmtree, "hf download"),
    "tokenizer.model that is neither kind": (lambda d: (d / "tokenizer.model").write_bytes(b"junk" * 99), "tokenizer.model: not a tokenizer"),
    "tokenizer.model that is empty": (lambda d: (d / "tokenizer.model").write_bytes(b""), "tokenizer.model: not a tokenizer"),
    "tokenizer.model with ranks twice": (lambda d: (d / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 0\n"), "tokenizer.model: not a tokenizer"),
    "tokenizer.json of another kind": (lambda d: (d / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}'), "its kind is Unigram"),
    "tokenizer of a larger model": (lambda d: shutil.copy(GOLDEN / "tokenizers/llama/tokenizer.model", d), "tokens, but the model only"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_end_in_one_line_and_run_no_code(what, copy, tmp_path, monkeypatch):
    spoil, message = BAD[what]
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    spoil(copy)
    with pytest.raises(data.DataError, match=message) as error:
        data.load_model(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": {"type": "Metaspace"}}, {"pre_tokenizer": None}, {"normalizer": {"type": "NFC"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"model": {"type": "BPE", "vocab": [], "merges": []}}, {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, {"model": 3},
])
def test_a_tokenizer_json_that_cannot_be_honoured_is_refused(tmp_path, change):
    folder = Path(shutil.copytree(GOLDEN / "tokenizers" / "plain", tmp_path / "plain"))
    spec = data.read_json(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(data.DataError, match="tokenizer.json"):
        data.load_tokenizer(folder)


def test_a_tokenizer_is_saved_as_it_was_read(tmp_path):
    for name in ("llama", "t5", "plain", "tiktoken"):
        tokenizer = data.load_tokenizer(GOLDEN / "tokenizers" / name)
        data.save_model(tmp_path / name, Llama(LlamaConfig(vocab_size=tokenizer.vocab_size)), tokenizer)
        again = data.load_model(tmp_path / name)[1]
        assert again.files == tokenizer.files and again.gist_id == tokenizer.gist_id and again.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_taken_is_the_models_size_once(tmp_path, kind, dtype):
    """Peak resident memory of a process of its own, all weights touched."""
    with data.EmptyModel():
        model = Llama(LlamaConfig(vocab_size=1000, d_model=1024, n_heads=8, n_kv_heads=8, head_dim=128, d_ff=2816, n_layers=4,
                                  tie_embeddings=False))                  # 200 MB
    model.init_weights()
    data.save_model(tmp_path, model)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save({data.hf_name(name, model.config): p for name, p in model.named_parameters()}, tmp_path / "pytorch_model.bin")
    script = ("import resource, sys, torch, data\n"
              "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
              "before = peak()\n"
              "model, _ = data.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))\n"
              "total = sum(p.sum() for p in model.parameters())\n"
              "print(peak() - before, sum(p.nbytes for p in model.parameters()))")
    out = subprocess.run([sys.executable, "-c", script, tmp_path, dtype], capture_output=True, text=True, cwd=Path(data.__file__).parent)
    assert out.returncode == 0, out.stderr
    taken, size = map(int, out.stdout.split())
    assert taken < 1.15 * size + 60 * 2 ** 20
