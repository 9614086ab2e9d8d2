"""Lets a test import sami, and keeps torch to one thread: small matrices are faster that way."""
import os, shutil, signal, sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes a minute, or needs packages that the README does not ask for")


def pytest_collection_finish(session):
    """What takes several processes a minute begins first, and is there when its tests come."""
    wanted = [item.module for item in session.items if item.path.name == "test_parallel.py"]
    look = session.config.option.collectonly
    session.config.parallel = wanted[0].start() if wanted and not look else None


def pytest_sessionfinish(session):
    if getattr(session.config, "parallel", None):
        process, root = session.config.parallel
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        shutil.rmtree(root, ignore_errors=True)
