"""The order in which a pass's work may run, recorded from a pass, and the rules it has to keep.

Recorded is not what happened to run first but what *had* to: the order of each lane's own work, and the places where
one lane waits for the other. So a missing wait is found even if the pass came out right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

EMBED_LAYER = -1


class Step(NamedTuple):
    """A piece of a pass: "embed", "attention" or "mlp" of a layer and half, and the reduction that ends it."""

    sublayer: str
    layer: int
    half: int
    channel: int  # of the reduction

    def __str__(self) -> str:
        return f"{self.sublayer} of layer {self.layer}, half {self.half}"


# Told of everything a pass does, as a context around it: "compute" a step, "submit" its reduction to the lane and
# "wait" for it on the caller's lane, "reduce" on the reductions' lane, which may be another thread.
Observer = Callable[[str, Step], AbstractContextManager]


@dataclass
class Record:
    step: Step
    is_reduction: bool
    after: set[int] = field(default_factory=set)  # indices of records that are over before this one begins
    begin_s: float = 0.0  # when it ran, on a CPU; on a GPU, when the host launched it
    end_s: float = 0.0

    def __str__(self) -> str:
        return f"the reduction after {self.step}" if self.is_reduction else str(self.step)


class Schedule:
    """An observer that notes down what waits for what."""

    def __init__(self):
        self.records: list[Record] = []
        self.waited_s = 0.0  # the caller's lane, for reductions: handing over and waiting
        self._waited_for: set[int] = set()
        self._last: dict[bool, int] = {}  # index of a lane's last record, by is_reduction
        self._reductions: dict[Step, int] = {}

    @contextmanager
    def __call__(self, event: str, step: Step) -> Iterator[None]:
        begin_s = perf_counter()
        if event == "compute":
            record = self._add(step, False, self._waited_for)
        elif event == "submit":
            self._reductions[step] = len(self.records)
            self._add(step, True, self._waited_for | ({self._last[False]} if False in self._last else set()))
        elif event == "reduce":
            record = self.records[self._reductions[step]]
        yield
        end_s = perf_counter()
        if event in ("compute", "reduce"):
            record.begin_s, record.end_s = begin_s, end_s
        else:
            self.waited_s += end_s - begin_s
        if event == "wait":
            self._waited_for.add(self._reductions[step])

    def _add(self, step: Step, is_reduction: bool, after: set[int]) -> Record:
        record = Record(step, is_reduction, set(after))
        if is_reduction in self._last:
            record.after.add(self._last[is_reduction])  # a lane does one thing after the other
        self._last[is_reduction] = len(self.records)
        self.records.append(record)
        return record

    def before(self) -> list[set[int]]:
        """For each record the indices of all that are over before it begins."""
        found: list[set[int]] = []
        for record in self.records:  # what a record comes after was recorded before it
            found.append(record.after.union(*(found[index] for index in record.after)))
        return found

    def ended(self) -> set[int]:
        """What is over when the pass ends."""
        before = self.before()
        return self._waited_for.union(*(before[index] for index in self._waited_for))


def steps_of(num_layers: int) -> list[tuple[str, int]]:
    """(sublayer, layer) in the order of a pass."""
    return [("embed", EMBED_LAYER)] + [(name, layer) for layer in range(num_layers) for name in ("attention", "mlp")]


def check_schedule(schedule: Schedule, num_layers: int, num_halves: int) -> list[str]:
    """What is wrong with a recorded pass; empty if nothing is.

    - Every sublayer of every layer and half is computed once and reduced once.
    - A reduction comes after the sublayer that made its partial sums and before the one that reads its rows.
    - A layer's attention over the second half comes after that over the first, whose keys and values it reads.
    - Two reductions on one channel never run at once.
    - When the pass ends, so have all reductions.
    """
    records, before, problems = schedule.records, schedule.before(), []
    found: dict[tuple, int] = {}
    for index, record in enumerate(records):
        key = (*record.step[:3], record.is_reduction)
        if key in found:
            problems.append(f"{record} is there twice")
        found[key] = index
    order = steps_of(num_layers)
    halves, kinds = range(num_halves), (False, True)
    expected = {(*place, half, is_reduction) for place in order for half in halves for is_reduction in kinds}
    problems += [f"missing: {key}" for key in sorted(expected - found.keys())]
    problems += [f"not part of the pass: {key}" for key in sorted(found.keys() - expected)]

    def must_precede(first: tuple, second: tuple) -> None:
        if first in found and second in found and found[first] not in before[found[second]]:
            problems.append(f"{records[found[second]]} does not wait for {records[found[first]]}")

    for half in halves:
        for place, following in zip(order, [*order[1:], None], strict=True):
            must_precede((*place, half, False), (*place, half, True))
            if following is not None:
                must_precede((*place, half, True), (*following, half, False))
            if place[0] == "attention" and half > 0:
                must_precede((*place, half - 1, False), (*place, half, False))

    last_on: dict[int, int] = {}
    for index, record in enumerate(records):
        if record.is_reduction:
            earlier = last_on.get(record.step.channel)
            if earlier is not None and earlier not in before[index]:
                problems.append(f"{record} may run beside {records[earlier]} on channel {record.step.channel}")
            last_on[record.step.channel] = index

    ended = schedule.ended()
    problems += [
        f"the pass ends before {record}"
        for index, record in enumerate(records)
        if record.is_reduction and index not in ended
    ]
    return problems


def overlaps(schedule: Schedule) -> int:
    """How many reductions may run while the other half is computed: what token splitting is for."""
    records, before = schedule.records, schedule.before()
    return sum(
        any(
            not other.is_reduction
            and other.step.half != record.step.half
            and index not in before[at]
            and at not in before[index]
            for at, other in enumerate(records)
        )
        for index, record in enumerate(records)
        if record.is_reduction
    )
