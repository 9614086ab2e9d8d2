"""Lets a test import sami, and keeps torch to one thread: small matrices are faster that way."""
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes a minute, or needs packages that the README does not ask for")
