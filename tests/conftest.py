"""The project's files lie one folder up; tests import them as a script beside them would."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set in the Alpaca+ layout, without a seen split."""
    import data

    folder = tmp_path_factory.mktemp("data")
    records = data.builtin(60, 6)
    (folder / "a_train.json").write_text("\n".join(json.dumps(r) for r in records["train"]))
    (folder / "a_validation_unseen.json").write_text(json.dumps(records["unseen"]))
    (folder / "a_validation_human.json").write_text(json.dumps(records["human"][:3]))
    return folder
