"""The modes give the same bits on real processes, and split passes keep the rules of the schedule."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenweave_models.common.ranks import run_ranks
from tokenweave_models.tokenweave.batch import KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.model import random_decoder
from tokenweave_models.tokenweave.reduction import EagerAddition, FusedAddition

SIZES = {"hidden": 64, "intermediate": 96, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 258}
DENSE = ModelConfig(**SIZES, qkv_bias=True)
MIXTURE = ModelConfig(**SIZES, num_experts=4, experts_per_token=2, tie_embeddings=True)
CONFIGS = {
    "dense bf16": (DENSE, torch.bfloat16),
    "dense fp32": (DENSE, torch.float32),
    "mixture fp32": (MIXTURE, torch.float32),
}


@pytest.fixture(scope="module")
def work():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))  # spawned ranks take over sys.path
        import weave_work

        yield weave_work


@pytest.fixture(scope="module", params=[2, 4])
def invariant_runs(work, request):
    return run_ranks(work.run_all, request.param, CONFIGS, True, timeout_s=120)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_mode_and_split_gives_the_same_bits(invariant_runs, name):
    """With matrix products and attention whose rows do not depend on each other."""
    first = invariant_runs[0][name]["logits"]["reference"]
    assert np.isfinite(first).all() and first.std() > 0.1
    assert len({row.tobytes() for row in first}) == len(first)  # tokens that differ: a mixed-up row would show
    for rank, run in enumerate(invariant_runs):
        for mode, logits in run[name]["logits"].items():
            assert np.array_equal(logits, first), (rank, mode)


@pytest.mark.parametrize("name", CONFIGS)
def test_split_passes_keep_the_rules_and_overlap(invariant_runs, name):
    for run in invariant_runs:
        assert run[name]["problems"] == []
        # Every reduction may run beside the other half's compute, except the last one.
        num_reductions = 2 * (2 * CONFIGS[name][0].num_layers + 1)
        assert set(run[name]["overlapping"]) == {num_reductions - 1}


@pytest.fixture(scope="module")
def ordinary_runs(work):
    return run_ranks(work.run_all, 2, CONFIGS, False, timeout_s=120)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_ordinary_matrix_products_modes_agree_up_to_rounding(work, ordinary_runs, name):
    config, dtype = CONFIGS[name]
    model = random_decoder(config, seed=7).to(dtype)

    def one_process(model, dtype, reduction):
        cache = KVCache(config, work.NUM_SLOTS, work.MAX_LEN, dtype=dtype)
        with torch.inference_mode():
            executor = Executor(model, cache, reduction(work.MAX_TOKENS, config.hidden, dtype))
            return torch.from_numpy(work.all_passes(executor, 0)).double()

    rounded = one_process(model, dtype, FusedAddition)
    truth = one_process(model.double(), torch.float64, EagerAddition)  # the rounded weights, exactly
    logits = {mode: torch.from_numpy(values).double() for mode, values in ordinary_runs[0][name]["logits"].items()}
    error = {mode: (values - truth).abs().max().item() for mode, values in logits.items()}
    # A sublayer's output is rounded world_size + 1 times, each partial sum and their total, where one process rounds it
    # once; all else is rounded alike.
    ulp = torch.finfo(dtype).eps * truth.abs().max().item()
    one_process_error = (rounded - truth).abs().max().item()
    for mode in error:
        assert error[mode] <= 3 * one_process_error + 4 * ulp, (mode, error[mode], one_process_error, ulp)
    # Where the best token leads the second by more than all errors, nothing may change it.
    best, second = truth.topk(2, dim=-1).values.unbind(-1)
    clear = best - second > 2 * max(error.values())
    assert clear.sum() > clear.numel() // 4
    for values in logits.values():
        assert (values.argmax(-1) == truth.argmax(-1))[clear].all()


def test_ranks_that_disagree_on_the_plan_get_an_error(work):
    plans = {"another split": (10, 11), "one does not split": (10, 0), "another way round": (0, 10)}
    for run in run_ranks(work.disagree, 2, DENSE, plans, timeout_s=120):
        for name in plans:
            error, message = run[name]
            assert error == "RankDisagreement", message
            assert "came with another op, num_tokens, " in message
            assert run[name + ", again"]


def test_ranks_with_other_batches_get_an_error_although_their_sizes_agree(work):
    """The first reduction of a batch of 8 tokens is as large as that of 20 tokens split at 8."""
    for run in run_ranks(work.other_batches, 2, DENSE, timeout_s=120):
        for name, (error, message) in run.items():
            assert error == "RankDisagreement", (name, message)
            assert "max_ctas or tag than" in message


def test_a_rank_that_breaks_off_ends_the_pass_of_all_and_they_stay_in_step(work):
    last = DENSE.num_layers - 1
    places = [
        (10, "plan"),
        (0, "plan"),
        (10, "compute", "embed", -1, 0),
        (10, "compute", "embed", -1, 1),
        (10, "compute", "attention", 0, 0),
        (10, "compute", "mlp", 0, 1),
        (10, "submit", "mlp", 0, 0),
        (10, "wait", "attention", 1, 1),
        (10, "reduce", "attention", 0, 1),
        (0, "compute", "mlp", last, 0),
        (0, "reduce", "embed", -1, 0),
    ]
    first, second = run_ranks(work.one_breaks, 2, DENSE, places, timeout_s=120)
    for place in places:
        error, message, is_right_afterwards = second[place]
        assert error == ("ValueError" if place[1] == "plan" else "Broken"), message
        assert is_right_afterwards, place
        error, message, is_right_afterwards = first[place]
        assert error == "RankDisagreement", (place, error, message)
        assert "rank 1 refused its call" in message
        assert is_right_afterwards, place
