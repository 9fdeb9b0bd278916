"""What a row claims: rotation against the caches, correctness before speed, the limit, and the schema."""

import copy
import itertools
import math

import pytest
import torch

from bench import harness, limits, machines


def test_rotation_exceeds_four_caches(machine, make_case):
    case = make_case(rows=64)  # 2 x 16 KiB per set, cache 64 KiB
    sets, cold = machines.rotation_sets(case.buffers, case.limit, machine)
    assert cold and sets * 2 * 64 * 64 * 4 > 4 * machine.cache_bytes
    assert (sets - 1) * 2 * 64 * 64 * 4 <= 4 * machine.cache_bytes


def test_rotation_counts_only_what_our_op_touches(machine, make_case):
    case = make_case(rows=64)
    plain, _ = machines.rotation_sets(case.buffers, case.limit, machine)
    case.buffers["only_a_baseline"] = machines.Buffer((64, 64), torch.float32)
    assert machines.rotation_sets(case.buffers, case.limit, machine) == (plain, True)


def test_small_calls_and_little_memory_are_not_called_cold(machine, make_case):
    assert machines.rotation_sets(make_case(rows=1, hidden=8).buffers, make_case().limit, machine) == (1, False)
    machine.memory_cap = 64 << 10
    sets, cold = machines.rotation_sets(make_case(rows=64).buffers, make_case().limit, machine)
    assert (sets, cold) == (2, False)


def test_sets_have_separate_memory_and_share_scratch(machine, make_case):
    case = make_case(rows=8)
    case.buffers["scratch"] = machines.Buffer((3,), torch.float32, rotates=False)
    sets = machines.allocate(case.buffers, 3, machine)
    tensors = [one[name] for one in sets for name in ("x", "out")]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 6
    assert len({one["scratch"].data_ptr() for one in sets}) == 1


def test_a_cold_row_and_its_ratios(machine, make_case, monkeypatch):
    monkeypatch.setattr(harness, "MIN_LIMIT_BYTES", 1)
    case = make_case()
    # The fake clock does not see the real copy, so the limit gets a price too: 5 us for the same bytes.
    clock = machine.clock
    monkeypatch.setattr(limits, "stream_call", lambda kind, tensors: (lambda: clock.advance(5e-6), case.bytes))
    (row,) = harness.run_case(case, machine, budget_s=1e-3)
    assert row["ok"] and row["cache"] == "cold"
    assert (row["us"], row["us_p20"], row["us_p80"]) == pytest.approx((10, 10, 10))
    assert row["baselines"] == pytest.approx({"eager": 25})
    assert row["pct_of_limit"] == pytest.approx(50)
    assert row["limit"]["kind"] == "copy" and row["limit"]["gb_per_s"] == pytest.approx(case.bytes / 5e-6 / 1e9)
    assert row["flags"] == []


def test_small_rows_state_no_share_of_the_limit(machine, make_case):
    cold, hot = harness.run_case(make_case(rows=8), machine, budget_s=1e-3)
    assert (cold["cache"], hot["cache"]) == ("cold", "hot")
    assert cold["limit"] is hot["limit"] is cold["pct_of_limit"] is hot["pct_of_limit"] is None


def test_a_limit_of_arithmetic_is_stated_hot_and_cold(machine, make_case, monkeypatch):
    """Ours does 1,000 operations in 10 us; the matmul, 4,000 in 20 us: half its rate."""
    clock = machine.clock
    monkeypatch.setattr(limits, "matmul_call", lambda kind, dtype: (lambda: clock.advance(20e-6), 4000))
    case = make_case(rows=1, flops=1000, limit=machines.Limit("matmul", ("x",)))
    rows = harness.run_case(case, machine, budget_s=1e-3)
    assert {row["cache"] for row in rows} == {"cold", "hot"}
    for row in rows:
        assert row["pct_of_limit"] == pytest.approx(50)
        assert row["limit"]["kind"] == "matmul" and row["limit"]["gflop_per_s"] == pytest.approx(0.2)


def test_counts_are_carried_and_checked(machine, make_case, doc):
    (row,) = harness.run_case(make_case(rows=64, counts={"point": 64}), machine, budget_s=1e-3)
    assert row["counts"] == {"point": 64}
    harness.validate(doc(row))
    for bad in ({"point": 0}, {"point": 1.5}, [64]):
        with pytest.raises(ValueError, match="names and positive whole numbers"):
            harness.validate(doc(row | {"counts": bad}))


def test_what_a_call_returns_may_be_formed_before_it_is_compared(machine, make_case):
    case = make_case()
    returned = lambda buffers: lambda: (buffers["x"], "and more")  # noqa: E731
    case.contestants[1] = harness.Contestant(
        "eager", "returns a pair", returned, {"y": harness.RETURNED}, result=lambda pair: 2 * pair[0]
    )
    (row,) = harness.run_case(case, machine, budget_s=1e-3)
    assert "eager" in row["baselines"] and not row["flags"]


def test_a_wrong_kernel_prints_no_speed(machine, make_case, doc):
    (row,) = harness.run_case(make_case(wrong=["ours"]), machine, budget_s=1e-3)
    assert row["ok"] is False and row["max_err"] > 0.1
    assert row["us"] is row["us_p20"] is row["us_p80"] is row["pct_of_limit"] is None
    harness.validate(doc(row))


def test_a_wrong_baseline_is_not_a_baseline(machine, make_case, doc):
    (row,) = harness.run_case(make_case(wrong=["eager"]), machine, budget_s=1e-3)
    assert row["ok"] and row["baselines"] == {"eager": None} and row["flags"] == ["baseline_wrong:eager"]
    harness.validate(doc(row))


def test_a_contestant_that_cannot_run_is_skipped_with_its_reason(machine, make_case, doc):
    (row,) = harness.run_case(make_case(raises=["eager"]), machine, budget_s=1e-3)
    assert row["ok"] and row["baselines"] == {} and row["skipped"] == {"eager": "RuntimeError: eager does not run here"}
    (row,) = harness.run_case(make_case(raises=["ours"]), machine, budget_s=1e-3)
    assert not row["ok"] and row["us"] is None and "ours" in row["skipped"]
    harness.validate(doc(row))


def test_an_output_that_was_not_written_is_wrong(machine, make_case):
    case = make_case()
    case.contestants[0] = harness.Contestant("ours", "does nothing", lambda buffers: lambda: None, {"y": "out"})
    (row,) = harness.run_case(case, machine, budget_s=1e-3)
    assert row["ok"] is False and row["max_err"] is None


def test_large_cases_are_checked_on_rows_including_the_last(machine, make_case, monkeypatch):
    monkeypatch.setattr(harness, "CHECKED_ELEMENTS", 64 * 64)
    case = make_case(rows=1000)
    asked = []
    case.reference = lambda inputs: asked.append(inputs["x"].shape) or {"y": inputs["x"] * 2}

    def spoil_last_row(buffers):
        def call():
            torch.mul(buffers["x"], 2, out=buffers["out"])
            buffers["out"][-1, -1] += 1

        return call

    case.contestants[0] = harness.Contestant("ours", "last row wrong", spoil_last_row, {"y": "out"})
    (row,) = harness.run_case(case, machine, budget_s=1e-3)
    assert row["ok"] is False and asked == [(64, 64)]


def test_a_returned_tensor_can_be_the_result(machine, make_case):
    case = make_case()
    case.contestants[1] = harness.Contestant(
        "eager", "returns", lambda buffers: lambda: buffers["x"] * 2, {"y": harness.RETURNED}
    )
    (row,) = harness.run_case(case, machine, budget_s=1e-3)
    assert "eager" in row["baselines"] and not row["flags"]


def test_values_that_run_away_are_flagged(machine, make_case):
    case = make_case()

    def grow(buffers):
        state = {"calls": 0}

        def call():
            state["calls"] += 1
            torch.mul(buffers["x"], 2.0 if state["calls"] < 2 else math.inf, out=buffers["out"])
            machine.clock.advance(1e-3)

        return call

    case.contestants = [harness.Contestant("ours", "grows", grow, {"y": "out"})]
    (row,) = harness.run_case(case, machine, budget_s=1.0)
    assert "not_finite_after_timing" in row["flags"]


def test_throttling_during_a_row_is_flagged(machine, make_case):
    class Monitor:
        def __init__(self):
            self.answers = [[], [], ["software power cap"]]  # by round; then nothing again

        def throttle_reasons(self):
            return self.answers.pop(0) if self.answers else []

    (row,) = harness.run_case(make_case(), machine, budget_s=1e-3, monitor=Monitor())
    assert row["flags"] == ["throttled: software power cap"]


@pytest.mark.parametrize("got,expected,error", [
    ([1.0, 2.0], [1.0, 2.0], 0.0), ([10.0], [8.0], 0.25), ([0.1], [0.3], 0.2), ([math.nan], [1.0], math.inf),
    ([math.inf], [math.inf], 0.0), ([1.0], [math.inf], math.inf), ([], [], 0.0),
])  # fmt: skip
def test_max_error(got, expected, error):
    assert harness.max_error(torch.tensor(got), torch.tensor(expected)) == pytest.approx(error)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype,count", [(torch.bfloat16, 64), (torch.bfloat16, 7), (torch.float32, 5), (torch.int8, 3)]
)
def test_limit_kernels_move_the_bytes_they_say_and_keep_values(dtype, count):
    x, out = torch.arange(count).to(dtype), torch.zeros(count).to(dtype)
    before = x.clone()
    call, moved = limits.stream_call("rmw", [x, out])
    call()
    assert moved == 2 * (x.nbytes + out.nbytes) and torch.equal(x, before)
    call, moved = limits.stream_call("copy", [x, out])
    call()
    assert moved == x.nbytes + out.nbytes and torch.equal(out, before)
    call, moved = limits.stream_call("read", [x])
    call()
    assert moved == x.nbytes and torch.equal(x, before)


def test_limit_kernels_refuse_nonsense():
    with pytest.raises(ValueError, match="as many destinations"):
        limits.stream_call("copy", [torch.zeros(4)])
    with pytest.raises(ValueError, match="unknown limit 'write'"):
        limits.stream_call("write", [torch.zeros(4)])


def test_matmul_rate_counts_two_operations_per_product():
    call, flops = limits.matmul_call("cpu", torch.float32, 8)
    assert flops == 1024 and call().shape == (8, 8)


def test_machine_limits_are_measured_beyond_the_caches():
    machine = machines.CpuMachine(cache_bytes=1 << 20, memory_cap=32 << 20)
    found = harness.measure_machine(machine)
    assert found["buffer_bytes"] > 4 * machine.cache_bytes
    assert all(value > 0 for value in found.values()) and {"copy_gb_per_s", "matmul_bf16_tflop_per_s"} < set(found)


# --- schema -----------------------------------------------------------------------------------------------------------


def test_a_good_document_passes(doc, row, wrong):
    harness.validate(doc(row(), row(cache="hot", pct_of_limit=None, limit=None), row(**wrong)))


@pytest.mark.parametrize("changes,message", [
    ({"us": None}, "bad times"),
    ({"us": 0.0, "us_p20": 0.0}, "bad times"),
    ({"us_p20": 11.0}, "bad times"),
    ({"us": "10"}, "us: is '10', expected int or float or NoneType"),
    ({"us": math.nan}, "is nan"),
    ({"bytes": 1.5}, "bytes: is 1.5"),
    ({"ok": 1}, "ok: is 1"),
    ({"cache": "warm"}, "expected cold or hot"),
    ({"max_err": None}, "states its error"),
    ({"ok": False}, "the result is wrong, yet it states us, us_p20, us_p80, pct_of_limit"),
    ({"limit": None}, "a share needs the limit"),
    ({"baselines": {"eager": -1.0}}, "baselines.eager"),
    ({"baselines": {"peer": 5.0}}, "peer: has no formulation"),
    ({"colour": "red"}, "fields differ: .'colour'."),
])  # fmt: skip
def test_bad_rows_are_rejected(doc, row, changes, message):
    with pytest.raises(ValueError, match=r"rows\[1\].*" + message):
        harness.validate(doc(row(), row(**changes)))


def test_missing_fields_and_other_versions_are_rejected(doc, row):
    short = row()
    del short["max_err"]
    with pytest.raises(ValueError, match="fields differ: .'max_err'."):
        harness.validate(doc(short))
    with pytest.raises(ValueError, match="schema must be 1"):
        harness.validate(doc() | {"schema": 2})
    without = copy.deepcopy(doc())
    del without["env"]["torch"]
    with pytest.raises(ValueError, match="env: missing torch"):
        harness.validate(without)
    with pytest.raises(ValueError, match="must name its gpu"):
        harness.validate(doc(device="cuda"))
