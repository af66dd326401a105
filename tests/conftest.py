"""The project's files lie one folder up; tests import them as a script beside them would."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other
