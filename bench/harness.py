"""The benchmark harness: what a family describes (Case), what is measured for it, and the one JSON schema of results.

A family file holds `cases(device, quick) -> list[Case]`, and for ops between processes
`rank_cases(device, quick) -> list[ranks.RankCase]`. A case names its buffers, its contestants (ours first), a
float64 reference, the bytes that must move and the limit they resemble. The harness allocates, checks every contestant
against the reference, and only then times them, interleaved, on buffers that rotate through more memory than the caches
hold.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import limits, timing
from bench.machines import COLD_FACTOR, Buffer, Limit, Tensors, allocate, rotation_sets

SCHEMA = 1
MIN_LIMIT_BYTES = 4 << 20  # a call that moves less is bound by latency and dispatch: no share of a limit is stated
RETURNED = "<returned>"  # an output that is the call's return value: for functions that take no output buffer
CHECKED_ELEMENTS = 2 << 20  # rows are sampled evenly above this, first and last included
DTYPE_NAME = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Contestant:
    """`bind(buffers)` returns the call to time, with nothing left to look up. `outputs` maps the results of the
    reference that it computes to the buffers that hold them after the call, or to RETURNED; a yardstick computes
    nothing and has none. `undo(buffers)` returns a call that takes back what repeated calls would do to the values.
    `result` forms, untimed, what is compared from the call's return value."""

    name: str
    formulation: str
    bind: Callable[[Tensors], timing.Call]
    outputs: dict[str, str] = field(default_factory=dict)
    yardstick: bool = False
    undo: Callable[[Tensors], timing.Call] | None = None
    result: Callable[[object], torch.Tensor] = lambda returned: returned


@dataclass
class Case:
    family: str
    op: str
    case: str  # a readable shape such as 4096x8192
    dtype: torch.dtype
    buffers: dict[str, Buffer]
    contestants: list[Contestant]  # ours is the first
    reference: Callable[[Tensors], Tensors]  # inputs in float64 -> results
    tolerance: float  # largest max_error of a correct result
    bytes: int  # that must move per call
    flops: int
    limit: Limit
    skipped: dict[str, str] = field(default_factory=dict)  # baselines that cannot run here, and why
    independent_rows: bool = True  # the reference may be computed on a sample of rows
    close: Callable[[], object] = lambda: None  # gives back what the case's buffers were placed in
    counts: dict[str, int] = field(default_factory=dict)  # of things a call does, where rows are not what counts


def load_family(path: Path):
    spec = importlib.util.spec_from_file_location(f"bench_family_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill_values(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random signs, magnitudes 0.5 to 1.5: nothing a shortcut could exploit, no denormals."""
    magnitude = torch.rand(tensor.shape, generator=generator, device=tensor.device) + 0.5
    sign = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device) * 2 - 1
    tensor.copy_(magnitude * sign)


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |got - expected| / max(1, |expected|); infinite if one is not finite where the other is."""
    got, expected = got.double(), expected.double()
    error = (got - expected).abs() / expected.abs().clamp(min=1)
    error = error.masked_fill(got == expected, 0)  # equal infinities
    return torch.nan_to_num(error, nan=math.inf).max().item() if error.numel() else 0.0


def make_inputs(case: Case, device: torch.device) -> Tensors:
    generator = torch.Generator(device).manual_seed(20)
    inputs = {}
    for name, buffer in case.buffers.items():
        if buffer.fill is not None:
            inputs[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            buffer.fill(inputs[name], generator)
    return inputs


# --- correctness ------------------------------------------------------------------------------------------------------


def _row_sample(case: Case, device: torch.device) -> torch.Tensor | None:
    rows = {buffer.shape[buffer.row_dim] for buffer in case.buffers.values() if buffer.rotates}
    elements = max(math.prod(buffer.shape) for buffer in case.buffers.values() if buffer.rotates)
    if not case.independent_rows or len(rows) != 1 or elements <= CHECKED_ELEMENTS:
        return None
    count = rows.pop()
    kept = max(2, CHECKED_ELEMENTS * count // elements)
    return torch.linspace(0, count - 1, kept, dtype=torch.float64, device=device).round().long()


class Checker:
    """Runs each contestant once on the case's inputs, outputs poisoned with NaN, and compares with the reference."""

    def __init__(self, case: Case, inputs: Tensors, machine):
        self.case, self.inputs, self.machine = case, inputs, machine
        self.sample = _row_sample(case, next(iter(inputs.values())).device)
        self.expected = case.reference({name: self._take(tensor, name).double() for name, tensor in inputs.items()})

    def _take(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sampled rows of a buffer, or of a returned tensor."""
        buffer = self.case.buffers.get(name)
        if self.sample is None or (buffer and not buffer.rotates):
            return tensor
        return tensor.index_select(buffer.row_dim if buffer else 0, self.sample)

    def error(self, contestant: Contestant, buffers: Tensors) -> float:
        for name, tensor in buffers.items():
            tensor.copy_(self.inputs[name]) if name in self.inputs else tensor.fill_(math.nan)
        holders = buffers | {RETURNED: contestant.result(contestant.bind(buffers)())}
        self.machine.synchronize()
        return max(
            max_error(self._take(holders[holder], holder), self.expected[result])
            for result, holder in contestant.outputs.items()
        )


# --- one case ---------------------------------------------------------------------------------------------------------


def run_case(case: Case, machine, budget_s: float, monitor=None) -> list[dict]:
    """The rows of one case: cold if its buffers can exceed the caches, hot if one set is small."""
    try:
        return _run_case(case, machine, budget_s, monitor)
    finally:
        case.close()


def _run_case(case: Case, machine, budget_s: float, monitor) -> list[dict]:
    sets, is_cold = rotation_sets(case.buffers, case.limit, machine)
    buffers = allocate(case.buffers, sets, machine)
    inputs = make_inputs(case, next(iter(buffers[0].values())).device)
    checker, skipped = Checker(case, inputs, machine), dict(case.skipped)
    errors: dict[str, float] = {}
    for contestant in case.contestants:
        if contestant.yardstick:
            continue
        error, problem = math.inf, None
        try:
            error = checker.error(contestant, buffers[0])
        except Exception as raised:  # a contestant that cannot run here must not take the others with it
            problem = timing.first_line(raised)
        error, problem = machine.agree(error, problem)
        if problem is None:
            errors[contestant.name] = error
        else:
            skipped[contestant.name] = problem
    for one in buffers:
        for name, values in inputs.items():
            one[name].copy_(values)

    ours = case.contestants[0].name
    correct = [c for c in case.contestants if c.yardstick or errors.get(c.name, math.inf) <= case.tolerance]
    wrong = [c.name for c in case.contestants[1:] if c not in correct and c.name not in skipped]
    error = errors.get(ours, math.inf)
    row = {
        "family": case.family, "op": case.op, "case": case.case, "dtype": DTYPE_NAME[case.dtype],
        "backend": machine.kind, "cache": "cold" if is_cold else "hot", "us": None, "us_p20": None, "us_p80": None,
        "bytes": case.bytes, "flops": case.flops, "pct_of_limit": None, "limit": None,
        "baselines": dict.fromkeys(wrong), "formulations": {c.name: c.formulation for c in case.contestants},
        "skipped": skipped, "max_err": error if math.isfinite(error) else None, "ok": error <= case.tolerance,
        "flags": [*(f"baseline_wrong:{name}" for name in wrong), *["partly_cached"] * (sets > 1 and not is_cold)],
    } | ({"counts": case.counts} if case.counts else {})  # fmt: skip
    if not row["ok"]:
        return [row]
    modes = {"cold": buffers} if is_cold else {}
    set_bytes = sum(buffer.bytes for buffer in case.buffers.values() if buffer.rotates)
    if not is_cold or set_bytes <= machine.cache_bytes // 16:
        modes["hot"] = buffers if not is_cold and sets > 1 else buffers[:1]
    return [_measured(row, case, machine, correct, chosen, cache, budget_s, monitor) for cache, chosen in modes.items()]


def _measured(row, case, machine, contestants, buffers, cache, budget_s, monitor) -> dict:
    # Repeated in-place calls must keep values sane without timed work: a family file says why its op's values do not
    # drift away, and the check at the end catches it if they do.
    rotation = timing.Rotation(len(buffers))
    samplers = {}
    for c in contestants:
        undo = [c.undo(one) for one in buffers] if c.undo else None
        samplers[c.name] = machine.sampler([c.bind(one) for one in buffers], rotation, undo)
    by_compute = case.limit.kind == "matmul"  # then caches change nothing
    moves_enough = cache == "cold" and case.bytes >= MIN_LIMIT_BYTES and case.limit.kind != "none"
    states_limit = by_compute or moves_enough
    if states_limit:
        kind, calls, limit_work = machine.limit_calls(case.limit, buffers)  # bytes, or flops
        samplers["limit"] = machine.sampler(calls, rotation if len(calls) == len(buffers) else timing.Rotation(1))
    throttle: set[str] = set()
    watch = (lambda: throttle.update(monitor.throttle_reasons())) if monitor else None  # while the device is still warm
    for sampler in samplers.values():
        sampler.warm_up()
    samples = timing.interleave(samplers, budget_s, clock=machine.clock, after_round=watch)

    ours = contestants[0]
    summary = timing.summarise(samples[ours.name])
    flags = [*row["flags"], *(f"throttled: {reason}" for reason in sorted(throttle))]
    flags += [f"{name} {s.note}" for name, s in samplers.items() if getattr(s, "note", None)]
    if summary.us_p80 > 1.5 * summary.us_p20:
        flags.append("noisy")
    if not all(torch.isfinite(buffers[0][name]).all().item() for name in set(ours.outputs.values()) - {RETURNED}):
        flags.append("not_finite_after_timing")
    baselines = {c.name: timing.summarise(samples[c.name]).us for c in contestants[1:]}
    row = row | {
        "cache": cache, "us": summary.us, "us_p20": summary.us_p20, "us_p80": summary.us_p80,
        "baselines": row["baselines"] | baselines, "flags": flags,
    }  # fmt: skip
    if states_limit:
        rate = limit_work / timing.summarise(samples["limit"]).us / 1e3
        unit = "gflop_per_s" if by_compute else "gb_per_s"
        row["limit"] = {"kind": kind, unit: rate, "formulation": limits.FORMULATION[kind]}
        # Paired by round, so that drift of the machine cancels.
        work = case.flops if by_compute else case.bytes
        share = timing.median_ratio(samples["limit"], samples[ours.name]) * work / limit_work
        row["pct_of_limit"] = 100 * share
    return row


# --- the machine's limits, once per run -------------------------------------------------------------------------------


def measure_machine(machine) -> dict:
    """Copy, read-modify-write and read bandwidth on buffers beyond the caches (GB/s) and the matmul rate (TFLOP/s)."""
    size = min(COLD_FACTOR[machine.kind] * machine.cache_bytes + (1 << 20), machine.memory_cap // 2) // 512 * 512
    pair = [tensor.fill_(1) for tensor in machine.empty([Buffer((size,), torch.uint8)] * 2)]  # faults the pages in
    found = {"buffer_bytes": size}
    for kind, tensors in {"copy": pair, "rmw": pair[:1], "read": pair[:1]}.items():
        call, moved = limits.stream_call(kind, tensors)
        found[f"{kind}_gb_per_s"] = moved / _median_us(machine, call) / 1e3
    for dtype in (torch.bfloat16, torch.float32):
        call, flops = limits.matmul_call(machine.kind, dtype)
        found[f"matmul_{DTYPE_NAME[dtype]}_tflop_per_s"] = flops / _median_us(machine, call) / 1e6
    return found


def _median_us(machine, call: timing.Call) -> float:
    sampler = machine.sampler([call], timing.Rotation(1))
    sampler.warm_up()
    return timing.summarise(timing.interleave({"": sampler}, 0.0, min_rounds=5, clock=machine.clock)[""]).us


# --- the schema -------------------------------------------------------------------------------------------------------

_NUMBER = (int, float)
ROW_FIELDS: dict[str, tuple] = {
    "family": (str,), "op": (str,), "case": (str,), "dtype": (str,), "backend": (str,), "cache": (str,),
    "us": (*_NUMBER, type(None)), "us_p20": (*_NUMBER, type(None)), "us_p80": (*_NUMBER, type(None)),
    "bytes": (int,), "flops": (int,), "pct_of_limit": (*_NUMBER, type(None)), "limit": (dict, type(None)),
    "baselines": (dict,), "formulations": (dict,), "skipped": (dict,), "max_err": (*_NUMBER, type(None)),
    "ok": (bool,), "flags": (list,),
}  # fmt: skip
ENV_FIELDS = ("git", "device", "cpu", "cores", "threads", "caches", "torch", "date")


def document(env: dict, machine_limits: dict, rows: Iterable[dict]) -> dict:
    return {"schema": SCHEMA, "env": env, "machine": machine_limits, "rows": list(rows)}


def validate(doc: dict) -> None:
    """Raises ValueError with a sentence that says where the document departs from the schema."""

    def require(condition: bool, where: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{where}: {what}")

    require(isinstance(doc, dict) and doc.get("schema") == SCHEMA, "document", f"schema must be {SCHEMA}")
    require(
        set(doc) == {"schema", "env", "machine", "rows"}, "document", f"unexpected or missing keys in {sorted(doc)}"
    )
    missing = [name for name in ENV_FIELDS if name not in doc["env"]]
    require(not missing, "env", f"missing {', '.join(missing)}")
    require(doc["env"]["device"] == "cpu" or "gpu" in doc["env"], "env", "a cuda result must name its gpu")
    for index, row in enumerate(doc["rows"]):
        where = f"rows[{index}]"
        counts = row.get("counts", {})  # only where a family states some
        require(set(row) - {"counts"} == set(ROW_FIELDS), where, f"fields differ: {sorted(set(row) ^ set(ROW_FIELDS))}")
        good = isinstance(counts, dict) and all(isinstance(n, int) and n > 0 for n in counts.values())
        require(good, f"{where}.counts", f"is {counts!r}, expected names and positive whole numbers")
        for name, types in ROW_FIELDS.items():
            value = row[name]
            fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
            require(fits, f"{where}.{name}", f"is {value!r}, expected {' or '.join(t.__name__ for t in types)}")
            if isinstance(value, float):
                require(math.isfinite(value), f"{where}.{name}", f"is {value}")
        require(row["cache"] in ("cold", "hot"), f"{where}.cache", f"is {row['cache']!r}, expected cold or hot")
        if row["ok"]:
            times = (row["us_p20"], row["us"], row["us_p80"])
            require(None not in times and 0 < times[0] <= times[1] <= times[2], where, f"bad times {times}")
            require(row["max_err"] is not None, f"{where}.max_err", "a correct row states its error")
        else:
            stated = [n for n in ("us", "us_p20", "us_p80", "pct_of_limit") if row[n] is not None]
            require(not stated, where, f"the result is wrong, yet it states {', '.join(stated)}")
        require((row["pct_of_limit"] is None) == (row["limit"] is None), where, "a share needs the limit it is of")
        for name, value in row["baselines"].items():
            right = value is None or (isinstance(value, _NUMBER) and math.isfinite(value) and value > 0)
            require(right, f"{where}.baselines.{name}", f"is {value!r}")
            require(name in row["formulations"], f"{where}.baselines.{name}", "has no formulation")
