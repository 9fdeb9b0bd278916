"""Where reductions run: on the caller's own lane, or beside it on a second one.

A lane takes work that may begin when everything the caller has done so far is done, and tells when it is over.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

CLOSING_S = 1.0


class Lane(Protocol):
    def max_ctas(self, planned: int) -> int:
        """Blocks that a reduction on this lane may have, where planned ones are those of a GPU's second lane."""

    def submit(self, work: Callable[[], None]) -> Any:
        """Runs work after what the caller has done by now and after earlier work of this lane. Returns a ticket. After
        work that has failed nothing is begun until settle()."""

    def wait(self, ticket: Any) -> None:
        """What the caller does from here on sees the work done. Raises what the work raised, if it was known then."""

    def settle(self) -> None:
        """What the caller does from here on comes after all work, which is over or was not begun. The lane can be used
        again."""

    def close(self) -> None:
        """Ends what the lane runs on, after its work. Does not wait long for work that waits for other ranks."""


class SameLane:
    """No second lane: work is done at once."""

    def max_ctas(self, planned: int) -> int:
        return planned

    def submit(self, work: Callable[[], None]) -> Any:
        work()

    def wait(self, ticket: Any) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass


class StreamLane(SameLane):
    """A second CUDA stream. The host never waits; tickets are events, so only what needs a result waits for it.

    Of high priority, so that the few blocks of a reduction get their place before the many of a GEMM. Tensors that the
    work uses must stay alive until the caller has waited for its ticket: memory freed earlier may be handed out again
    on the caller's stream. Under capture the second stream joins the graph by its first event and leaves it by the last
    wait.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    def submit(self, work: Callable[[], None]) -> torch.cuda.Event:
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            work()
        done.record(self._stream)
        return done

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Work:
    def __init__(self, work: Callable[[], None]):
        self.work = work
        self.inference_mode, self.grad_enabled = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.done = threading.Event()
        self.error: BaseException | None = None


class _Closed(RuntimeError):
    def __init__(self):
        super().__init__("ThreadLane: this lane is closed")


class _Settle:
    """In the queue: everything before it is over; what comes after it may begin."""

    def __init__(self):
        self.done = threading.Event()


class ThreadLane:
    """A thread of this process, for a CPU: it waits for the other ranks while the caller's thread computes."""

    def __init__(self):
        self._queue: queue.SimpleQueue[_Work | _Settle | None] = queue.SimpleQueue()
        self._is_closed = False
        # Daemon: a rank that ends does not wait for ranks that may never come. The thread does not hold the lane, so
        # that one which nobody closed ends with its last reference.
        self._thread = threading.Thread(
            target=_run_queue, args=(self._queue,), name="tokenweave-communication", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._queue.put, None)

    def max_ctas(self, planned: int) -> int:
        return 1  # this thread alone: with more, the op would open a second team beside the caller's

    def submit(self, work: Callable[[], None]) -> _Work:
        if self._is_closed:
            raise _Closed
        ticket = _Work(work)
        self._queue.put(ticket)
        return ticket

    def wait(self, ticket: _Work) -> None:
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error

    def settle(self) -> None:
        if self._is_closed:
            raise _Closed
        mark = _Settle()
        self._queue.put(mark)
        mark.done.wait()

    def close(self) -> None:
        self._is_closed = True
        self._queue.put(None)
        self._thread.join(CLOSING_S)


def _run_queue(work: queue.SimpleQueue[_Work | _Settle | None]) -> None:
    error: BaseException | None = None
    while (item := work.get()) is not None:
        if isinstance(item, _Settle):
            error = None
        elif error is not None:  # after a failure the ranks are out of step: nothing more is begun
            item.error = error
        else:
            try:
                with torch.inference_mode(item.inference_mode), torch.set_grad_enabled(item.grad_enabled):
                    item.work()
            except BaseException as raised:
                item.error = error = raised
        item.done.set()
        del item  # the lane does not keep what the caller has let go
