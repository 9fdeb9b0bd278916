"""A lane runs work in order, hands on what it raises, and can be used again after a failure."""

import threading

import pytest
import torch
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.lanes import SameLane, ThreadLane
from tokenweave_models.tokenweave.model import random_decoder
from tokenweave_models.tokenweave.reduction import FusedAddition

from tokenweave_ops import SplitPlan


@pytest.fixture(params=[SameLane, ThreadLane])
def lane(request):
    lane = request.param()
    yield lane
    lane.close()


def test_work_runs_in_order(lane):
    done = []
    tickets = [lane.submit(lambda i=i: done.append(i)) for i in range(100)]
    lane.wait(tickets[-1])
    assert done == list(range(100))


def test_the_thread_lane_runs_beside_its_caller():
    """Both sides wait for each other, which would hang on one lane."""
    lane, from_caller, from_work = ThreadLane(), threading.Event(), threading.Event()
    ticket = lane.submit(lambda: (from_work.set(), from_caller.wait(30)))
    assert from_work.wait(30)
    from_caller.set()
    lane.wait(ticket)
    lane.close()


def test_modes_of_torch_go_along(lane):
    seen = []
    with torch.inference_mode():
        lane.wait(lane.submit(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))))
    with torch.no_grad():
        lane.wait(lane.submit(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))))
    lane.wait(lane.submit(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))))
    assert seen == [(True, False), (False, False), (False, True)]


def test_after_a_failure_nothing_is_begun_until_it_is_settled():
    lane, begun = ThreadLane(), []

    def fail():
        raise LookupError("no such row")

    first = lane.submit(fail)
    second = lane.submit(lambda: begun.append("second"))
    for ticket in (first, second):
        with pytest.raises(LookupError, match="no such row"):
            lane.wait(ticket)
    lane.settle()
    lane.wait(lane.submit(lambda: begun.append("third")))
    assert begun == ["third"]
    lane.close()


def test_a_closed_lane_takes_no_work():
    lane = ThreadLane()
    lane.close()
    with pytest.raises(RuntimeError, match="ThreadLane: this lane is closed"):
        lane.submit(lambda: None)


@pytest.mark.parametrize("new_lane", [SameLane, ThreadLane])
@pytest.mark.parametrize("fails_at", [0, 3, 9])
def test_an_executor_raises_what_its_reduction_raises_and_runs_again(new_lane, fails_at):
    config = ModelConfig(hidden=32, intermediate=48, num_layers=2, num_heads=4, num_kv_heads=2)
    calls = []

    class Failing(FusedAddition):
        def reduce(self, *arguments, **options):
            calls.append(threading.get_ident())
            if len(calls) == fails_at + 1:
                raise LookupError("a peer is gone")
            super().reduce(*arguments, **options)

    cache = KVCache(config, 1, 12, dtype=torch.float32)
    with Executor(
        random_decoder(config, seed=0), cache, Failing(12, config.hidden, torch.float32), lane=new_lane()
    ) as executor:
        batch = Batch.of(torch.arange(12), [12], [12], [0])
        plan = SplitPlan(12, "split", 5, 4, 2, 16, launch="eager", predicted_us={})
        with pytest.raises(LookupError, match="a peer is gone"):
            executor.forward(batch, plan)
        assert len(calls) == fails_at + 1  # nothing was begun after it
        calls.clear()
        fails_at = 1000
        rows = executor.forward(batch, plan).clone()
        torch.testing.assert_close(rows, executor.forward(batch))
        assert {ident != threading.get_ident() for ident in calls[:10]} == {new_lane is ThreadLane}
