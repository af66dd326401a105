"""The masks against slow loops, written from the rule in words and from random tables."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gist_mask
from gist_mask import GIST, INPUT, PADDING, PROMPT, START, TABLE

ROOT = Path(__file__).parent.parent


def ragged_rows(n_gist, seed, prompt_only=False):
    """Segments of random rows, with padding on either side or both: (4, T) int64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    rows = []
    for _ in range(4):
        prompt, after = draw(1, 6), 0 if prompt_only else draw(1, 6)
        rows.append([START] * draw(0, 2) + [PROMPT] * prompt + [GIST] * n_gist + [INPUT] * after)
    T = max(map(len, rows)) + 2
    segments = torch.full((4, T), PADDING)
    for i, row in enumerate(rows):
        left = draw(0, T - len(row) + 1)
        segments[i, left : left + len(row)] = torch.tensor(row)
    return segments


def sees_by_the_rule_in_words(query, key, condition):
    """Neither prompt nor gist sees the input; the input sees what the condition says."""
    if key in (PADDING, START):
        return key == START
    if query in (PADDING, START):
        return False
    if condition == "pos_control":
        return True
    if query in (PROMPT, GIST):
        return key in (PROMPT, GIST)
    return key == INPUT or (key == GIST and condition == "gist")


def slow_mask(segments, sees, causal):
    """Pair by pair. sees(query, key): of two labels."""
    B, T = segments.shape
    mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for q in range(T):
            for k in range(T):
                allowed = sees(row[q], row[k]) and (k <= q or not causal)
                mask[b, 0, q, k] = allowed or q == k
    return mask


@pytest.mark.parametrize("n_gist", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("condition", TABLE)
@pytest.mark.parametrize("prompt_only", [False, True])
def test_masks_are_those_of_the_rule_in_words(n_gist, condition, prompt_only):
    sees = lambda query, key: sees_by_the_rule_in_words(query, key, condition)
    for seed in range(10):
        segments = ragged_rows(n_gist, seed, prompt_only)
        encoder = gist_mask.encoder_mask(segments, condition)
        decoder = gist_mask.decoder_mask(segments, condition)
        assert torch.equal(encoder, slow_mask(segments, sees, causal=False))
        assert torch.equal(decoder, slow_mask(segments, sees, causal=True))
        assert encoder.any(dim=-1).all() and decoder.any(dim=-1).all()  # no softmax over nothing
        # Cross-attention sees what an input token after the last column would see.
        longer = F.pad(segments, (0, 1), value=INPUT)
        last = slow_mask(longer, sees, causal=False)[:, :, -1:, :-1]
        assert torch.equal(gist_mask.cross_mask(segments, condition), last)


@pytest.mark.parametrize("seed", range(30))
def test_a_new_table_is_a_new_mask_entry_by_entry(seed, monkeypatch):
    """Random tables, random labels of all five kinds in any order; the last table is all zeros."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randint(2, (3, 3), generator=generator).tolist()
    if seed == 29:
        entries = [[0, 0, 0]] * 3
    monkeypatch.setitem(TABLE, "new", entries)
    segments = torch.randint(5, (3, 9), generator=generator)

    def sees(query, key):
        if key in (PADDING, START):
            return key == START
        return query not in (PADDING, START) and entries[query - 1][key - 1] == 1

    assert torch.equal(gist_mask.encoder_mask(segments, "new"), slow_mask(segments, sees, False))
    assert torch.equal(gist_mask.decoder_mask(segments, "new"), slow_mask(segments, sees, True))


def test_every_entry_of_every_table_is_live(monkeypatch):
    segments = torch.tensor([[PROMPT, PROMPT, GIST, GIST, INPUT, INPUT]])
    for condition in TABLE.copy():
        before = gist_mask.encoder_mask(segments, condition)
        for entry in range(9):
            table = [row[:] for row in TABLE[condition]]
            table[entry // 3][entry % 3] ^= 1
            monkeypatch.setitem(TABLE, "changed", table)
            assert not torch.equal(gist_mask.encoder_mask(segments, "changed"), before)


def test_a_condition_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="gist, pos_control, neg_control"):
        gist_mask.decoder_mask(torch.tensor([[INPUT]]), "gits")


def test_positions_count_from_the_first_input_token():
    P, G, In = PROMPT, GIST, INPUT
    segments = torch.tensor(
        [
            [START, P, G, G, In, In, In],
            [0, P, P, G, In, G, In],  # the gist once more, after the input
            [0, 0, 0, In, In, 0, 0],
            [0, 0, START, P, P, P, G],  # a prompt that is going to be cached
            [In, In, In, In, In, In, In],
        ]
    )
    assert gist_mask.positions(segments).tolist() == [
        [-4, -3, -2, -1, 0, 1, 2],
        [-4, -3, -2, -1, 0, 1, 2],
        [-3, -2, -1, 0, 1, 2, 3],
        [-7, -6, -5, -4, -3, -2, -1],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_rows_made_by_hand_are_labeled_by_their_gist_tokens():
    rows = torch.tensor(
        [[3, 4, 9, 9, 5, 6], [9, 5, 9, 6, 7, 8], [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 9]]
    )
    assert gist_mask.segments(rows, gist_id=9).tolist() == [
        [PROMPT, PROMPT, GIST, GIST, INPUT, INPUT],
        [GIST, PROMPT, GIST, INPUT, INPUT, INPUT],
        [INPUT] * 6,
        [PROMPT] * 5 + [GIST],
    ]


def test_the_command_prints_the_masks():
    command = [sys.executable, ROOT / "gist_mask.py", "--n_gist", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and all(condition in done.stdout for condition in TABLE)
    gist = done.stdout.split("\n\n")[0].splitlines()
    assert gist[1].split() == "Translate to French <G> <G> The cheese Output: Le fromage".split()
    assert gist[7].split() == "The . . . x x x . . . .".split()


def test_the_file_needs_nothing_of_ours(tmp_path):
    """It can be copied alone into another project."""
    (tmp_path / "gist_mask.py").write_bytes((ROOT / "gist_mask.py").read_bytes())
    done = subprocess.run([sys.executable, "gist_mask.py"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
