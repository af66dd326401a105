"""What the gist looks at, the words that TF-IDF keeps, and pictures of results."""
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation

ROOT = Path(__file__).parent.parent
SMALL = ["--d_model", "16", "--n_layers", "2", "--n_heads", "2", "--batch_size", "4", "--vocab_size", "400", "--device", "cpu", "--max_steps", "2"]


def command(script, *args):
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs of both architectures on built-in records, evaluated as if on the whole built-in data."""
    folder = tmp_path_factory.mktemp("runs")
    records = data.builtin(60, 6)
    for name in ("train", "validation_unseen", "validation_human"):
        (folder / f"a_{name}.json").write_text(json.dumps(records[name.split("_")[-1]][:60]))
    for arch, condition, n_gist in (("llama", "gist", 1), ("llama", "gist", 2), ("llama", "pos_control", 1), ("llama", "tfidf", 2), ("t5", "gist", 2), ("t5", "tfidf", 1)):
        done = command("train.py", *SMALL, "--data", folder, "--arch", arch, "--condition", condition, "--n_gist", n_gist,
                       "--out_dir", folder / f"{arch}-{condition}-{n_gist}")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("seed", range(4))
def test_recorded_attention_times_the_values_is_what_attention_returns(seed):
    g = torch.Generator().manual_seed(seed)
    B, H, T, S, K = (int(torch.randint(1, 6, (), generator=g)) for _ in range(5))
    q, k, v = (torch.randn(B, heads, n, K, generator=g) for heads, n in ((2 * H, T), (H, S), (H, S)))
    mask = torch.rand(B, 1, T, S, generator=g) < 0.7
    mask[..., 0] = True
    bias = torch.randn(B, 2 * H, T, S, generator=g).masked_fill(~mask, -math.inf)
    for kwargs in (dict(attn_mask=mask), dict(attn_mask=bias, scale=1.0)):
        with evaluation.RecordAttention() as record:
            out = F.scaled_dot_product_attention(q, k, v, **kwargs, enable_gqa=True)
        weights = record.weights[0]
        assert torch.allclose(weights @ v.repeat_interleave(2, dim=1), out, atol=1e-6)
        assert not weights.masked_select(~mask).any()


@pytest.mark.parametrize("seed", range(5))
def test_keywords_are_those_of_highest_tf_idf(seed):
    rng = random.Random(seed)
    records = [{"instruction": " ".join(rng.choices("abcdefgh", [8, 7, 6, 5, 4, 3, 2, 1], k=rng.randint(1, 9)))} for _ in range(30)]
    documents = {r["instruction"] for r in records}
    idf = data.inverse_frequencies(records)
    for text in documents:
        words = text.split()
        score = {w: words.count(w) * math.log(len(documents) / sum(w in d.split() for d in documents)) for w in words}
        n = rng.randint(1, 3)
        kept = data.keywords(text.upper() + "!", idf, n).split()
        assert len(kept) == min(n, len(score)) and kept == sorted(kept, key=words.index)
        assert all(score[a] >= score[b] - 1e-12 for a in kept for b in score.keys() - set(kept))


def test_a_word_that_no_training_instruction_has_is_the_most_informative():
    idf = data.inverse_frequencies([{"instruction": "write the list"}, {"instruction": "write a poem"}, {"instruction": "sort the list"}])
    assert data.keywords("Write the zebra", idf, 1) == "zebra"
    assert data.keywords("", idf, 1) == "" and data.keywords("write", {}, 2) == "write"


@pytest.mark.parametrize("run", ["llama-tfidf-2", "t5-tfidf-1"])
def test_the_tfidf_model_reads_only_the_keywords_and_the_outputs_show_the_whole_question(runs, run):
    config = data.read_config(runs / run)["gisting"]
    _, tokenizer = data.load_model(runs / run)
    splits = data.load_instructions(str(runs))
    idf = data.inverse_frequencies(splits["train"])
    examples, _ = data.make_examples(splits["unseen"], tokenizer, config["n_gist"], config["arch"], idf=idf)
    for e in examples:
        assert tokenizer.gist_id not in e.prompt
        words = tokenizer.decode(e.prompt).removeprefix("Instruction: ").split()
        assert len(words) == config["n_gist"] and set(words) <= set(data.words_of(e.record["instruction"]))
    rows = evaluation.read_outputs(runs / run / "outputs-unseen.csv")
    assert [r["x"] for r in rows] == [evaluation.as_text(r) for r in splits["unseen"]]


@pytest.mark.parametrize("run, n", [("llama-gist-2", 2), ("t5-gist-2", 2), ("llama-gist-1", 1)])
def test_attention_is_drawn_for_both_architectures(runs, run, n, tmp_path):
    done = command("eval.py", "attention", runs / run, "--instruction", "Put lamp at the end.", "--out", tmp_path / "a.png", "--words", 3)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and [f.name for f in tmp_path.iterdir()] == ["a.png"]
    assert sum("gist" in line and line.count("0.") + line.count("1.") >= 3 for line in done.stdout.splitlines()) == n


def test_results_are_drawn(runs, tmp_path):
    paths = [runs / name for name in ("llama-gist-1", "llama-gist-2", "llama-pos_control-1", "t5-gist-2")]
    for kind in ("bars", "n_gist"):
        done = command("eval.py", "plot", *paths, "--kind", kind, "--out", tmp_path / f"{kind}.png")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    groups = {"families": {"double": 1.0, "next": 0.5}, "n_words": {"0": 1.0}}
    metrics = json.loads((paths[0] / "metrics.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics | {"unseen": metrics["unseen"] | groups}))
    (tmp_path / "j.json").write_text(json.dumps({"names": {"a": "x", "b": "y"}, "results": [{"choice": "a"}, {"choice": "tie"}]}))
    for kind, result in (("families", "run"), ("winrates", "j.json")):
        done = command("eval.py", "plot", tmp_path / result, "--kind", kind, "--out", tmp_path / f"{kind}.png")
        assert done.returncode == 0 and (tmp_path / f"{kind}.png").exists(), done.stderr


@pytest.mark.parametrize("args, complaint", [
    (["plot", "nowhere"], "eval.py run nowhere"),
    (["plot", "nowhere.json", "--kind", "winrates"], "nowhere.json"),
    (["plot", "{runs}/llama-gist-1", "--kind", "families"], "built-in"),
    (["plot", "{runs}/llama-gist-1", "--out", "/nowhere/a.png"], "cannot write"),
    (["plot", "{runs}/llama-gist-1", "--out", "a.txt.zzz"], "cannot write"),
    (["attention", "{runs}/llama-gist-1", "--instruction", " "], "empty"),
    (["attention", "{runs}/llama-tfidf-2", "--instruction", "x"], "cannot compress"),
    (["attention", "nowhere", "--instruction", "x"], "no such directory"),
])
def test_a_mistake_ends_in_one_line(runs, args, complaint):
    done = command("eval.py", *(a.format(runs=runs) for a in args))
    assert done.returncode == 2 and complaint in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_exact_match_by_group():
    examples = [data.Example([], [], [], {"source": s, "output": o}) for s, o in (("a", "x"), ("b", "x"), ("a", "y"))]
    assert evaluation.by_group(examples, ["x", "x", "x"], "source") == {"a": 0.5, "b": 1.0}
