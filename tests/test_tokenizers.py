"""Tokenizers give the ids and the text of the reference implementations, on strings that are hard for them."""
import json
from pathlib import Path

import pytest

import data

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
NAMES = ["llama", "t5", "plain", "digits", "llama3", "tiktoken"]


@pytest.fixture(params=NAMES)
def golden(request):
    folder = GOLDEN / request.param
    return data.load_tokenizer(folder), json.loads((folder / "expected.json").read_text())


def test_ids_are_the_reference_tokenizers(golden):
    tokenizer, expected = golden
    for text, ids in expected["ids"]:
        assert tokenizer.encode(text) == ids, repr(text)


def test_text_is_the_reference_tokenizers_also_of_bytes_that_are_no_text(golden):
    tokenizer, expected = golden
    for text, ids in expected["texts"]:
        ours = tokenizer.decode(ids)
        assert (ours.strip() if "spiece.model" in tokenizer.files else ours) == text       # the reference strips what T5 says
