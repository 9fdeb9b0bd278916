"""check_schedule finds every way to break a pass's order, whatever order the pass happened to run in."""

import itertools

import pytest
import torch
from tokenweave_models.tokenweave import schedule as schedule_module
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.lanes import SameLane, ThreadLane
from tokenweave_models.tokenweave.model import random_decoder
from tokenweave_models.tokenweave.reduction import FusedAddition
from tokenweave_models.tokenweave.schedule import Schedule, Step, check_schedule, overlaps, steps_of

from tokenweave_ops import SplitPlan

CONFIG = ModelConfig(hidden=32, intermediate=48, num_layers=3, num_heads=4, num_kv_heads=2)
NUM_REDUCTIONS = 2 * (2 * CONFIG.num_layers + 1)


def observed_pass(events) -> Schedule:
    schedule = Schedule()
    for event, step in events:
        with schedule(event, step):
            pass
    return schedule


def weave(num_layers: int = CONFIG.num_layers, num_halves: int = 2) -> list:
    """What an executor should do: each half waits for its own last reduction, then computes, then hands over."""
    events, last = [], {}
    for name, layer in steps_of(num_layers):
        for half in range(num_halves):
            step = Step(name, layer, half, channel=half)
            if half in last:
                events.append(("wait", last[half]))
            events += [("compute", step), ("submit", step)]
            last[half] = step
    return events + [("wait", last[half]) for half in range(num_halves)]


def problems(events, num_layers: int = CONFIG.num_layers) -> list[str]:
    return check_schedule(observed_pass(events), num_layers, 2)


def test_a_good_pass_has_no_problem_and_overlaps_all_but_the_last_reduction():
    assert problems(weave()) == []
    assert overlaps(observed_pass(weave())) == NUM_REDUCTIONS - 1


def test_the_time_that_reductions_hold_the_caller_adds_up(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(schedule_module, "perf_counter", lambda: next(ticks))  # a context lasts for one tick
    assert observed_pass(weave()).waited_s == sum(event != "compute" for event, _ in weave())


def test_every_missing_wait_is_found():
    events = weave()
    needless = len(events) - 2  # the lane reduces in order, so the last wait of the pass covers the one before it
    for index, (event, step) in enumerate(events):
        if event == "wait" and index != needless:
            found = problems(events[:index] + events[index + 1 :])
            assert any(f"the reduction after {step}" in problem for problem in found), (step, found)


def test_waiting_for_more_than_needed_is_allowed_and_overlaps_less():
    """A full join of both lanes around every pair, as the published code does, is legal."""
    events, joined = weave(), []
    for event, step in events:
        if event == "wait" and step.half == 0 and step.sublayer != "embed":
            joined.append(("wait", step._replace(half=1, channel=1)))
        joined.append((event, step))
    assert problems(joined) == []
    assert overlaps(observed_pass(joined)) < NUM_REDUCTIONS - 1


def at(events, event, *place):
    return next(i for i, (kind, step) in enumerate(events) if kind == event and step[:3] == place)


def test_a_reduction_before_its_sublayer():
    events = weave()
    i, j = at(events, "compute", "mlp", 1, 0), at(events, "submit", "mlp", 1, 0)
    events[i], events[j] = events[j], events[i]
    assert any("the reduction after mlp of layer 1, half 0 does not wait for mlp" in text for text in problems(events))


def test_the_second_half_before_the_first():
    events = weave()
    begin = at(events, "compute", "attention", 1, 0) - 1
    first, second = events[begin : begin + 3], events[begin + 3 : begin + 6]
    events[begin : begin + 6] = second + first
    assert problems(events) == ["attention of layer 1, half 1 does not wait for attention of layer 1, half 0"]


def test_two_reductions_on_one_channel():
    """Allowed on one lane, which does one thing after the other."""
    events = [(event, step._replace(channel=0)) for event, step in weave()]
    assert problems(events) == []
    schedule = observed_pass(events)
    for record in schedule.records:  # as if each reduction had a lane of its own
        if record.is_reduction:
            record.after = {index for index in record.after if not schedule.records[index].is_reduction}
    found = check_schedule(schedule, CONFIG.num_layers, 2)
    assert any("may run beside the reduction after embed of layer -1, half 0 on channel 0" in text for text in found)


def test_what_is_missing_and_what_is_too_much():
    events = weave()
    i = at(events, "compute", "mlp", 2, 1)
    assert problems(events[:i] + events[i + 1 :]) == ["missing: ('mlp', 2, 1, False)"]
    assert problems([*events[: i + 1], events[i], *events[i + 1 :]]) == ["mlp of layer 2, half 1 is there twice"]
    assert any(text.startswith("not part of the pass: ('attention', 2") for text in problems(weave(), 2))


@pytest.mark.parametrize("lane", [SameLane, ThreadLane])
def test_the_executors_passes(lane):
    model, tokens = random_decoder(CONFIG, seed=0), torch.arange(12)
    plan = SplitPlan(12, "split", 5, 4, 2, 16, launch="eager", predicted_us={})
    cache = KVCache(CONFIG, 2, 12, dtype=torch.float32)
    with Executor(model, cache, FusedAddition(12, CONFIG.hidden, torch.float32), lane=lane()) as executor:
        batch = Batch.of(tokens, [7, 5], [7, 5], [0, 1])
        schedule = Schedule()
        executor.forward(batch, plan, schedule)
        assert check_schedule(schedule, CONFIG.num_layers, 2) == []
        assert overlaps(schedule) == NUM_REDUCTIONS - 1
        whole = Schedule()
        executor.forward(batch, None, whole)
        assert check_schedule(whole, CONFIG.num_layers, 1) == []
        assert overlaps(whole) == 0
    for record in schedule.records:
        assert 0 < record.begin_s <= record.end_s
    assert 0 < schedule.waited_s < schedule.records[-1].end_s - schedule.records[0].begin_s


def test_an_executor_that_forgets_to_wait_is_found():
    """The real executor with one wait left out: its result may well be right, its schedule is not."""
    model, tokens = random_decoder(CONFIG, seed=0), torch.arange(12)
    plan = SplitPlan(12, "split", 5, 4, 2, 16, launch="eager", predicted_us={})

    class Forgetful(Schedule):
        def __call__(self, event, step):
            if event == "wait" and step[:3] == ("attention", 1, 1):
                event = "forgotten"
            return super().__call__(event, step)

    with Executor(
        model,
        KVCache(CONFIG, 1, 12, dtype=torch.float32),
        FusedAddition(12, CONFIG.hidden, torch.float32),
        lane=ThreadLane(),
    ) as executor:
        schedule = Forgetful()
        executor.forward(Batch.of(tokens, [12], [12], [0]), plan, schedule)
    found = check_schedule(schedule, CONFIG.num_layers, 2)
    assert found[0] == "mlp of layer 1, half 1 does not wait for the reduction after attention of layer 1, half 1"


# What each reduction's blocks are limited to: spec of the plan's attention_ctas, mlp_ctas and exposed_ctas.
def test_blocks_are_those_that_the_compute_beside_spares():
    model, tokens = random_decoder(CONFIG, seed=0), torch.arange(12)
    plan = SplitPlan(12, "split", 5, attention_ctas=4, mlp_ctas=2, exposed_ctas=16, launch="eager", predicted_us={})
    seen = []

    class Spy(FusedAddition):
        def reduce(self, x, residual, weight, eps, *, channel, max_ctas, tag):
            seen.append((channel, max_ctas))
            super().reduce(x, residual, weight, eps, channel=channel, max_ctas=max_ctas, tag=tag)

    cache = KVCache(CONFIG, 1, 12, dtype=torch.float32)
    executor = Executor(model, cache, Spy(12, CONFIG.hidden, torch.float32), lane=SameLane())
    batch = Batch.of(tokens, [12], [12], [0])
    executor.forward(batch, plan)
    layer = [(0, 4), (1, 2), (0, 2), (1, 4)]  # attention of both halves, MLP of both halves
    last = [(0, 4), (1, 2), (0, 2), (1, 16)]
    assert seen == [(0, 16), (1, 4)] + layer * (CONFIG.num_layers - 1) + last
    seen.clear()
    executor.forward(batch)
    assert seen == [(0, 0)] * (2 * CONFIG.num_layers + 1)
    seen.clear()
    executor.forward(batch, SplitPlan(12, "fuse", 0, 0, 0, exposed_ctas=32, launch="eager", predicted_us={}))
    assert seen == [(0, 32)] * (2 * CONFIG.num_layers + 1)
    seen.clear()
    with Executor(model, cache, executor.reduction, lane=ThreadLane()) as beside:
        beside.forward(batch, plan)
    assert {max_ctas for _, max_ctas in seen} == {1}  # on a CPU: no team of threads beside the caller's


@pytest.mark.parametrize(
    "plan, lane, message",
    [
        (SplitPlan(11, "fuse", 0, 0, 0, 0, "eager", {}), None, "made for the batch of 12 tokens, got 11"),
        (SplitPlan(12, "split", 5, 0, 0, 0, "eager", {}), None, r"needs a second lane, got none \(split at 5\)"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, lane, message):
    cache = KVCache(CONFIG, 1, 12, dtype=torch.float32)
    executor = Executor(
        random_decoder(CONFIG, seed=0), cache, FusedAddition(12, CONFIG.hidden, torch.float32), lane=lane
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        executor.forward(Batch.of(torch.arange(12), [12], [12], [0]), plan)
    assert not cache.keys.any()  # nothing was written
