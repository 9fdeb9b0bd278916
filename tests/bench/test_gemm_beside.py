"""A GEMM beside a collective: lanes, windows and rates on an invented timeline and on threads; wrong results."""

import time

import pytest
import torch

from bench import gemm_beside


def test_hidden_share_is_one_beside_and_zero_in_turn():
    # During a GEMM that takes 1 ms alone, collectives of 100 us each.
    assert gemm_beside.hidden_share(1e-3, 1e-3, 10_000, 1e-4) == pytest.approx(1)  # ten, and no longer
    assert gemm_beside.hidden_share(1e-3, 2e-3, 5_000, 1e-4) == pytest.approx(0)  # ten, and as much longer
    assert gemm_beside.hidden_share(1e-3, 1.5e-3, 20_000 / 3, 1e-4) == pytest.approx(0.5)


class Timeline:
    """Stands for torch.cuda: lanes whose work takes known times, without contention."""

    def __init__(self):
        self.lanes, self.current = [], None


class FakeLane:
    def __init__(self, timeline):
        self.timeline, self.now = timeline, 0.0
        timeline.lanes.append(self)

    def run(self, calls):
        for call in calls:
            with self.on():
                call()

    def capture(self, calls):
        return lambda calls=list(calls): [call() for call in calls]

    def on(self):
        lane = self

        class On:
            def __enter__(self):
                lane.timeline.current = lane

            def __exit__(self, *_):
                lane.timeline.current = None

        return On()

    def wait(self, event):
        self.now = max(self.now, event.at)

    def event(self):
        return FakeEvent(self.timeline)

    def synchronize(self):
        self.now = max(lane.now for lane in self.timeline.lanes)


class FakeEvent:
    def __init__(self, timeline):
        self.timeline, self.at = timeline, None

    def record(self):
        self.at = self.timeline.current.now

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3


def stream_lanes(window_s=1e-2):
    timeline = Timeline()
    lanes = gemm_beside.StreamLanes(FakeLane(timeline), FakeLane(timeline), window_s)

    def takes(seconds):
        def call():
            timeline.current.now += seconds()

        return call

    return lanes, takes


def test_streams_time_the_gemm_and_count_the_collectives_that_ran_meanwhile():
    lanes, takes = stream_lanes()
    gemm = lanes.prepare([takes(lambda: 3e-4)] * 2, False)
    collective = lanes.prepare([takes(lambda: 1.3e-4)] * 3, True)
    assert gemm.calls * 3e-4 >= 2e-3 and len(collective.run) == 3
    assert lanes.alone(gemm) == pytest.approx(3e-4) and lanes.alone(collective) == pytest.approx(1.3e-4)
    window = lanes.beside(gemm, collective)
    assert window.gemm_s == pytest.approx(3e-4) and window.collectives_per_s == pytest.approx(1 / 1.3e-4)


def test_the_gemms_wait_for_the_first_collective_and_only_those_beside_them_count():
    lanes, takes = stream_lanes()
    gemm, collective = lanes.prepare([takes(lambda: 1e-3)], False), lanes.prepare([takes(lambda: 1e-3)], True)
    busy = lanes.side.now = lanes.main.now + 1.0  # with something else

    def fast_while_the_gemms_run():
        is_first = lanes.side.now < busy + 1.5e-3
        return 1e-3 if is_first or lanes.side.now < lanes.main.now else 9e-3

    collective.run = [takes(fast_while_the_gemms_run)]
    assert lanes.beside(gemm, collective).collectives_per_s == pytest.approx(1e3)


def test_a_window_that_the_collectives_do_not_cover_is_taken_again():
    lanes, takes = stream_lanes()
    slow = [1.0]
    gemm = lanes.prepare([takes(lambda: 1e-3 * slow[0])], False)
    collective = lanes.prepare([takes(lambda: 1e-3)], True)
    slow[0] = 4.0  # beside a collective
    assert lanes.beside(gemm, collective).gemm_s == pytest.approx(4e-3) and lanes.margin > 4
    slow[0] = 1e6
    with pytest.raises(RuntimeError, match="collectives ended before the GEMMs"):
        lanes.beside(gemm, collective)


def test_a_long_collective_widens_the_window():
    lanes, takes = stream_lanes()
    gemm, collective = lanes.prepare([takes(lambda: 1e-3)], False), lanes.prepare([takes(lambda: 9e-3)], True)
    assert lanes.beside(gemm, collective).collectives_per_s == pytest.approx(1 / 9e-3)


def test_what_the_thread_raises_is_raised():
    lanes = gemm_beside.ThreadLanes(time.perf_counter, window_s=1e-3)
    gemm = lanes.prepare([lambda: None], False)
    with pytest.raises(ValueError, match="no such lane"):
        lanes.beside(gemm, gemm_beside.Work([lambda: (_ for _ in ()).throw(ValueError("no such lane"))], True))


def test_a_wrong_gemm_states_no_slowdown(machine):
    lanes = gemm_beside.ThreadLanes(time.perf_counter, window_s=1e-4)
    works = {1: lanes.prepare([lambda: None], True)}

    def beside(gemm):
        return gemm_beside.measure_beside(
            "qkv", (24, 16), 128, torch.float32, works, 1000, machine, lanes, 0.0, gemm=gemm
        )  # fmt: skip

    def wrong(x, weight, out):
        torch.mm(x, weight, out=out)
        out[-1] = 0

    row = beside(wrong)
    assert not row["ok"] and row["us"] is None and row["beside"] == []
    assert beside(torch.mm)["ok"] and [entry["max_ctas"] for entry in beside(torch.mm)["beside"]] == [1]


def test_the_collective_is_checked(machine, monkeypatch):
    collective = gemm_beside.Collective(machine, 63, 64, torch.float32)
    assert collective.error(1) < 1e-5
    whole = gemm_beside.tokenweave_ops.allreduce_rmsnorm_

    def other_residual(x, residual, weight, workspace, eps, max_ctas):
        whole(x, residual, weight, workspace, eps, max_ctas=max_ctas)
        residual[1, -1, -1] += 1

    monkeypatch.setattr(gemm_beside.tokenweave_ops, "allreduce_rmsnorm_", other_residual)
    assert collective.error(1) > 0.1

    def last_row_missing(x, residual, weight, workspace, eps, max_ctas):
        whole(x[:, :-1], residual[:, :-1], weight, workspace, eps, max_ctas=max_ctas)

    monkeypatch.setattr(gemm_beside.tokenweave_ops, "allreduce_rmsnorm_", last_row_missing)
    assert collective.error(1) > 0.1
    found, works = gemm_beside.measure_collective(collective, gemm_beside.ThreadLanes(machine.clock), 0.0)
    assert works == {} and found["alone"][0]["ok"] is False and found["alone"][0]["us"] is None
    collective.close()
