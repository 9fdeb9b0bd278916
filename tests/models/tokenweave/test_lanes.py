"""A lane runs work in order, hands on what it raises, and can be used again after a failure."""

import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from tokenweave_models.tokenweave import lanes
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


def test_settle_waits_for_running_work():
    lane, go, done = ThreadLane(), threading.Event(), []
    lane.submit(lambda: (go.wait(30), done.append("work")))
    threading.Timer(0.05, go.set).start()
    lane.settle()
    assert done == ["work"]
    lane.close()


def test_work_that_wants_to_end_the_process_ends_its_wait_only():
    lane = ThreadLane()
    with pytest.raises(SystemExit):
        lane.wait(lane.submit(lambda: sys.exit(3)))
    lane.settle()
    lane.wait(lane.submit(lambda: None))
    lane.close()


def test_a_closed_lane_takes_no_work_even_if_it_is_still_busy(monkeypatch):
    monkeypatch.setattr(lanes, "CLOSING_S", 0.01)
    lane, go = ThreadLane(), threading.Event()
    ticket = lane.submit(go.wait)
    lane.close()  # does not wait for it
    for call in (lambda: lane.submit(lambda: None), lane.settle):
        with pytest.raises(RuntimeError, match="ThreadLane: this lane is closed"):
            call()
    go.set()
    lane.wait(ticket)


def test_a_lane_that_nobody_closed_ends_with_its_last_reference():
    lane = ThreadLane()
    thread = lane._thread
    assert thread.daemon  # a process that ends does not wait for it
    del lane
    thread.join(30)
    assert not thread.is_alive()


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
        # Split on the lane, whole on the caller's.
        assert {ident != threading.get_ident() for ident in calls[:10]} == {new_lane is ThreadLane}
        assert set(calls[10:]) == {threading.get_ident()}
    if new_lane is ThreadLane:
        with pytest.raises(RuntimeError, match="ThreadLane: this lane is closed"):
            executor.forward(batch, plan)


@pytest.mark.parametrize("new_lane", [SameLane, ThreadLane])
def test_a_pass_after_an_interrupt_waits_for_what_is_left_of_it(new_lane):
    """Ctrl-C in the middle of a pass whose reductions are slow; then the caller goes on."""
    config = ModelConfig(hidden=32, intermediate=48, num_layers=2, num_heads=4, num_kv_heads=2)

    class Slow(FusedAddition):
        def reduce(self, *arguments, **options):
            time.sleep(0.01)
            super().reduce(*arguments, **options)

    @contextmanager
    def interrupt(event, step):
        if (event, *step[:3]) == ("compute", "mlp", 0, 0):
            raise KeyboardInterrupt
        yield

    cache = KVCache(config, 1, 12, dtype=torch.float32)
    plan = SplitPlan(12, "split", 5, 4, 2, 16, launch="eager", predicted_us={})
    batch = Batch.of(torch.arange(12), [12], [12], [0])
    with Executor(
        random_decoder(config, seed=0), cache, Slow(12, config.hidden, torch.float32), lane=new_lane()
    ) as executor:
        expected = executor.forward(batch, plan).clone()
        for next_plan in (plan, None):
            with pytest.raises(KeyboardInterrupt):
                executor.forward(batch, plan, interrupt)
            torch.testing.assert_close(executor.forward(batch, next_plan), expected)


def test_passes_in_and_out_of_inference_mode():
    config = ModelConfig(hidden=32, intermediate=48, num_layers=1, num_heads=4, num_kv_heads=2)
    batch = Batch.of(torch.arange(12), [12], [12], [0])
    with torch.inference_mode():
        cache = KVCache(config, 1, 12, dtype=torch.float32)
        executor = Executor(random_decoder(config, seed=0), cache, FusedAddition(12, config.hidden, torch.float32))
        expected = executor.forward(batch).clone()
    with torch.no_grad():
        assert torch.equal(executor.forward(batch), expected)
    assert torch.equal(executor.forward(batch), expected)
