"""Puts this folder on the path, so that the tests can import sinr_oracle; runs them on one thread but where they ask
for more."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    """The reference is many small operations of torch, whose threads on a busy machine mostly wait for one another."""
    saved = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(saved)
