"""Replays the schedule of a split pass, event by event, with predicted times: who runs when on which lane.

A simulation: nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tokenweave_ops import WeavePass

COMPUTE, COLLECTIVE = "compute", "collective"


@dataclass(frozen=True)
class Task:
    """One piece of work. It starts when its lane is free and ``after`` has ended."""

    lane: str
    label: str
    half: int
    layer: int
    alone_us: float
    beside_us: float  # at the rate it has while the other lane is busy
    after: int | None  # the position of another task, always an earlier one


class Span(NamedTuple):
    """A task and when it ran."""

    task: Task
    begin_us: float
    end_us: float


def weave_tasks(times: WeavePass, num_layers: int) -> list[Task]:
    """The pass as two lanes. Of each half, in every layer: collective and norm, attention, collective and norm, MLP.

    The collective that ends a layer's MLP is that of the next layer's first norm (or of the last norm). The lanes are
    first in, first out, so that attention of half 1 follows that of half 0, whose keys it reads.
    """
    tasks: list[Task] = []
    normed: dict[int, int] = {}  # by half: the collective whose result the next block reads

    def add(lane: str, label: str, half: int, layer: int, alone_us: float, beside_us: float, after: int | None) -> int:
        tasks.append(Task(lane, label, half, layer, alone_us, beside_us, after))
        return len(tasks) - 1

    def collective(half: int, layer: int, us: float, after: int | None) -> None:
        normed[half] = add(COLLECTIVE, "AR + norm", half, layer, us, us, after)

    collective(0, 0, times.first_collective_us, None)
    written: int | None = None  # half 1's block whose partial sums are still to be reduced
    for layer in range(num_layers):
        for label, (first, second) in (("attention", times.attention), ("MLP", times.mlp)):
            collective(1, layer, first.collective_us, written)
            block = add(COMPUTE, label, 0, layer, first.compute_us, first.beside_us, normed[0])
            collective(0, layer, second.collective_us, block)
            written = add(COMPUTE, label, 1, layer, second.compute_us, second.beside_us, normed[1])
    collective(1, num_layers, times.last_collective_us, written)
    return tasks


def replay(tasks: list[Task]) -> list[Span]:
    """Runs the tasks on their lanes; in the order of ``tasks``, when each of them began and ended.

    A task progresses at one rate while the other lane is idle and at another while it is busy, so the clock moves from
    one beginning or end to the next.
    """
    queues = {lane: [i for i, task in enumerate(tasks) if task.lane == lane] for lane in (COMPUTE, COLLECTIVE)}
    running: dict[str, tuple[int, float, float]] = {}  # lane: task, share still to do, begin
    spans: dict[int, Span] = {}
    now_us = 0.0
    while len(spans) < len(tasks):
        for lane, queue in queues.items():
            if lane not in running and queue and (tasks[queue[0]].after is None or tasks[queue[0]].after in spans):
                running[lane] = (queue.pop(0), 1.0, now_us)
        if not running:
            raise ValueError("replay: the tasks wait for each other in a circle")
        full_us = {
            lane: tasks[i].beside_us if len(running) == 2 else tasks[i].alone_us for lane, (i, _, _) in running.items()
        }
        step_us = min(share * full_us[lane] for lane, (_, share, _) in running.items())
        now_us += step_us
        for lane, (i, share, begin_us) in list(running.items()):
            # The one that sets the step ends exactly; so does another that ends with it.
            if share * full_us[lane] <= step_us * (1 + 1e-12):
                spans[i] = Span(tasks[i], begin_us, now_us)
                del running[lane]
            else:
                running[lane] = (i, share - step_us / full_us[lane], begin_us)
    return [spans[i] for i in range(len(tasks))]
