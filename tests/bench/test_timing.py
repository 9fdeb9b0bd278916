"""Statistics, interleaving, rotation and CUDA-graph timing, all on a clock that tests move by hand."""

import pytest

from bench import timing


def test_summary_of_known_samples():
    seconds = [value * 1e-6 for value in (5, 1, 4, 2, 3, 6, 11, 7, 8, 10, 9)]  # 1..11, shuffled
    summary = timing.summarise(seconds)
    assert (summary.us, summary.us_p20, summary.us_p80) == pytest.approx((6, 3, 9))


def test_summary_interpolates_and_ignores_one_outlier():
    assert timing.summarise([1e-6, 2e-6]).us == pytest.approx(1.5)
    assert timing.summarise([1e-6] * 9 + [1.0]).us_p80 == pytest.approx(1)


def test_summary_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        timing.summarise([])


def test_ratios_are_paired_by_round():
    # The machine slows down fourfold half way; unpaired medians would give another ratio.
    ours, limit = [2, 2, 2, 8, 8], [1, 1, 1, 4, 4]
    assert timing.median_ratio(limit, ours) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        timing.median_ratio([1, 2], [1])


def test_rotation_visits_every_set_in_order():
    rotation = timing.Rotation(3)
    assert [rotation.next() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_interleaving_runs_everyone_once_a_round_and_moves_the_order_on(clock):
    ran = []

    def sampler(name):
        def sample():
            ran.append(name)
            clock.advance(1.0)
            return 1.0

        return sample

    samples = timing.interleave({n: sampler(n) for n in "abc"}, budget_s=0, min_rounds=4, clock=clock)
    assert "".join(ran) == "abcbcacababc"
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_interleaving_stops_at_the_budget_and_at_most_rounds(clock):
    def sample():
        clock.advance(1.0)
        return 1.0

    assert len(timing.interleave({"a": sample}, budget_s=20, min_rounds=3, clock=clock)["a"]) == 20
    assert len(timing.interleave({"a": sample}, budget_s=1e9, max_rounds=5, clock=clock)["a"]) == 5


def test_host_sampler_measures_exactly_and_shares_the_rotation(clock):
    visited = []

    def call(name, index, cost):
        def run():
            visited.append((name, index))
            clock.advance(cost)

        return run

    rotation = timing.Rotation(4)
    slow = timing.HostSampler([call("slow", i, 3e-3) for i in range(4)], rotation, clock)
    fast = timing.HostSampler([call("fast", i, 1e-3) for i in range(4)], rotation, clock)
    samples = timing.interleave({"slow": slow, "fast": fast}, budget_s=0, min_rounds=2, clock=clock)
    assert samples["slow"] == pytest.approx([3e-3] * 2) and samples["fast"] == pytest.approx([1e-3] * 2)
    assert visited == [("slow", 0), ("fast", 1), ("fast", 2), ("slow", 3)]


@pytest.mark.parametrize("cost,sets,inner", [(3e-6, 1, 67), (3e-6, 40, 10), (1e-3, 40, 1), (1e-9, 1, 10_000)])
def test_short_calls_share_a_sample(clock, cost, sets, inner):
    sampler = timing.HostSampler([lambda: clock.advance(cost)] * sets, timing.Rotation(sets), clock)
    sampler.warm_up()
    assert sampler.inner == inner
    assert sampler() == pytest.approx(cost)


@pytest.mark.parametrize("call_s,sets,calls", [(3e-6, 1, 667), (1e-9, 1, 4096), (1e-3, 5, 5), (1.1e-5, 64, 192)])
def test_a_graph_holds_whole_rotations(call_s, sets, calls):
    assert timing.graph_calls(call_s, sets) == calls
    assert calls % sets == 0


class FakeDriver:
    """Events read the fake clock; a replay runs the captured calls, and everything is written to a log."""

    def __init__(self, clock, fails=False):
        self.clock, self.fails, self.log = clock, fails, []

    def run(self, calls):
        self.log.append("warm up")
        for call in calls:
            call()

    def capture(self, calls):
        self.log.append("capture")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay():
            self.log.append("replay")
            for call in calls:
                call()

        return replay

    def event(driver):
        class Event:
            def record(self):
                driver.log.append("record")
                self.at = driver.clock()

            def synchronize(self):
                driver.log.append("wait")

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()

    def synchronize(self):
        self.log.append("synchronize")


def test_cuda_sampler_times_one_replay_behind_another(clock):
    visited, driver = [], FakeDriver(clock)

    def call(index):
        def run():
            visited.append(index)
            clock.advance(1.1e-4)

        return run

    sampler = timing.CudaSampler([call(i) for i in range(5)], driver)
    sampler.warm_up()
    assert driver.log[0] == "warm up" and driver.log.index("warm up") < driver.log.index("capture")
    assert sampler.captured == 20  # 2 ms of 0.11 ms calls
    driver.log.clear()
    visited.clear()
    assert sampler() == pytest.approx(1.1e-4)
    assert driver.log == ["replay", "record", "replay", "record", "wait"]
    assert visited == [0, 1, 2, 3, 4] * 8
    assert sampler.note is None


def test_cuda_sampler_says_when_capture_failed(clock):
    driver = FakeDriver(clock, fails=True)
    sampler = timing.CudaSampler([lambda: clock.advance(1e-4)], driver)
    sampler.warm_up()
    assert sampler() == pytest.approx(1e-4)
    assert "without a CUDA graph" in sampler.note and "stream is capturing" in sampler.note
    assert "more" not in sampler.note and "replay" not in driver.log
