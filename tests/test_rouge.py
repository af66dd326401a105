"""ROUGE by hand against golden numbers of rouge-score 0.1.2 and NLTK (tests/golden/make_rouge.py makes them)."""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from eval import porter_stem, rouge

GOLDEN = Path(__file__).parent / "golden"


def test_stems_are_those_of_nltk():
    golden = json.loads((GOLDEN / "stems.json").read_text(encoding="utf-8"))
    assert {word: porter_stem(word) for word in golden} == golden


def test_scores_are_those_of_rouge_score():
    for prediction, reference, *golden in json.loads(
        (GOLDEN / "rouge.json").read_text(encoding="utf-8")
    ):
        scores = list(rouge(prediction, reference).values())
        assert scores == pytest.approx(golden, rel=0, abs=1e-9), (prediction, reference)


def test_rougeL_finds_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(50):
        a, b = (rng.choices("xyz", k=rng.randint(1, 7)) for _ in range(2))
        subsequences = [
            {c for n in range(8) for c in combinations(words, n)} for words in (a, b)
        ]  # of a, of b
        longest = max(map(len, subsequences[0] & subsequences[1]))
        assert rouge(" ".join(a), " ".join(b))["rougeL"] == pytest.approx(
            2 * longest / (len(a) + len(b))
        )


@pytest.mark.parametrize("empty", ["", " \n", "!?", "日本語"])
def test_a_text_without_words_scores_zero(empty):
    zero = {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert rouge(empty, "a word") == rouge("a word", empty) == rouge(empty, empty) == zero


def test_scores_are_symmetric_and_one_for_the_same_words():
    assert rouge("Relational models!", "related model") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge("the cat sat", "cat the") == rouge("cat the", "the cat sat")
