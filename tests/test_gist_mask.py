"""The masks against a slow loop written from the rule in words."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gist_mask
from gist_mask import (
    TABLE,
    cross_mask,
    decoder_mask,
    encoder_mask,
    positions,
    prompt_sees_input,
    segments,
)

GIST, PAD = 9, 0


def ragged_batch(n_gist, seed, prompt_only=False):
    """Random rows with padding on either side or both: (tokens, valid)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    rows = []
    for _ in range(4):
        prompt, after = draw(1, 6), 0 if prompt_only else draw(1, 6)
        words = torch.randint(1, 9, (prompt + after,), generator=generator).tolist()
        rows.append(
            words[:prompt] + [GIST] * (n_gist if draw(0, 5) else 0) + words[prompt:]
        )  # one row in five has no gist
    T = max(map(len, rows)) + 2
    tokens, valid = torch.full((4, T), PAD), torch.zeros(4, T, dtype=torch.bool)
    for i, row in enumerate(rows):
        left = draw(0, T - len(row) + 1)
        tokens[i, left : left + len(row)] = torch.tensor(row)
        valid[i, left : left + len(row)] = True
    return tokens, valid


def may_attend(row, valid, q, k, condition, decoder):
    """The rule in words. Prompt: before the first gist token; input: after the last one. No gist token, no gist rule."""
    if q == k:  # everyone sees itself, padding too
        return True
    if not valid[k] or (decoder and k > q):
        return False
    where = [i for i, token in enumerate(row) if token == GIST]
    if not where or condition == "pos_control":
        return True
    query_is_input, key_is_input = q > where[-1], k > where[-1]
    if not query_is_input:
        return not key_is_input  # neither prompt nor gist sees what follows
    if condition == "gist":
        return k >= where[0]  # the input sees gist and input
    return key_is_input  # neg_control: the input sees only the input


@pytest.mark.parametrize("n_gist", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("condition", TABLE)
@pytest.mark.parametrize("prompt_only", [False, True])
def test_masks_are_those_of_the_rule_in_words(n_gist, condition, prompt_only):
    for seed in range(10):
        tokens, valid = ragged_batch(n_gist, seed, prompt_only)
        B, T = tokens.shape
        rows = tokens.tolist()
        for make, decoder in ((decoder_mask, True), (encoder_mask, False)):
            mask = make(tokens, GIST, condition, valid)
            assert mask.shape == (B, 1, T, T) and mask.dtype == torch.bool
            expected = [
                [
                    [may_attend(rows[b], valid[b], q, k, condition, decoder) for k in range(T)]
                    for q in range(T)
                ]
                for b in range(B)
            ]
            assert torch.equal(mask[:, 0], torch.tensor(expected))
            assert mask.any(dim=-1).all()  # no softmax over nothing
        # Cross-attention sees what a token after the last column would see: an input token, in every row.
        longer = torch.cat([tokens, torch.ones(B, 1, dtype=torch.int64)], dim=1)
        seen = encoder_mask(
            longer, GIST, condition, torch.cat([valid, torch.ones(B, 1, dtype=torch.bool)], dim=1)
        )[:, :, -1:, :-1]
        assert torch.equal(cross_mask(tokens, GIST, condition, valid), seen)


@pytest.mark.parametrize("seed", range(20))
def test_a_new_table_is_a_new_mask_entry_by_entry(seed, monkeypatch):
    """Random 3x3 tables, ragged rows: every pair is its table's entry, and every token sees itself."""
    entries = torch.randint(2, (3, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    monkeypatch.setitem(gist_mask.TABLE, "new", entries)
    tokens, valid = ragged_batch(2, seed)
    segment = segments(tokens, GIST).tolist()
    B, T = tokens.shape
    for make, decoder in ((decoder_mask, True), (encoder_mask, False)):
        mask = make(tokens, GIST, "new", valid)
        for b in range(B):
            no_gist = GIST not in tokens[b].tolist()
            for q in range(T):
                for k in range(T):
                    sees = no_gist or entries[segment[b][q]][segment[b][k]] == 1
                    sees = sees and bool(valid[b, k]) and not (decoder and k > q)
                    assert mask[b, 0, q, k] == (sees or q == k)
    assert prompt_sees_input("new") == (entries[0][2] == 1 or entries[1][2] == 1)


def test_every_entry_of_every_table_is_live():
    tokens = torch.tensor([[3, 4, GIST, GIST, 5, 6]])
    for condition in TABLE:
        before = encoder_mask(tokens, GIST, condition)
        for entry in range(9):
            table = [row[:] for row in gist_mask.TABLE[condition]]
            table[entry // 3][entry % 3] ^= 1
            gist_mask.TABLE["changed"] = table
            assert not torch.equal(encoder_mask(tokens, GIST, "changed"), before)
            del gist_mask.TABLE["changed"]


def test_a_condition_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="gist, pos_control, neg_control"):
        decoder_mask(torch.tensor([[1]]), GIST, "gits")


@pytest.mark.parametrize("n_gist", [0, 1, 2, 5, 10])
def test_without_padding_valid_changes_nothing(n_gist):
    tokens = torch.tensor([[3, 4] + [GIST] * n_gist + [5, 6, 7]])
    for make in (decoder_mask, encoder_mask, cross_mask):
        assert torch.equal(
            make(tokens, GIST),
            make(tokens, GIST, attention_mask=torch.ones_like(tokens, dtype=torch.bool)),
        )


def test_segments_and_positions_of_an_example():
    tokens = torch.tensor([[3, 4, GIST, GIST, 5, 6], [3, GIST, GIST, 5, 6, 7], [3, 4, 5, 6, 7, 8]])
    assert segments(tokens, GIST).tolist() == [[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2], [2] * 6]
    assert positions(tokens, GIST).tolist() == [
        [-2, -1, 0, 1, 2, 3],
        [-1, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


def test_the_command_prints_the_masks():
    script = Path(__file__).parent.parent / "gist_mask.py"
    command = [sys.executable, script, "--n_gist", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and all(condition in done.stdout for condition in TABLE)
    gist = done.stdout.split("\n\n")[0].splitlines()
    assert gist[1].split() == "Translate to French <G> <G> The cheese Output: Le fromage".split()
    assert gist[7].split() == "The . . . x x x . . . .".split()
