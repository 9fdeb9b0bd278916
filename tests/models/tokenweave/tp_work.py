"""What test_tensor_parallel.py runs on spawned ranks. A module of its own, since ranks import it by name."""

import torch
from tokenweave_models.tokenweave.demo_ranks import run_modes


def all_dtypes(group, report, config, seed, tokens, dtypes):
    return {name: run_modes(group, report, config, seed, getattr(torch, name), tokens, 1) for name in dtypes}
