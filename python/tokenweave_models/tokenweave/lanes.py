"""Where reductions run: on the caller's own lane, or beside it on a second one.

A lane takes work that may begin when everything the caller has done so far is done, and tells when it is over.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

CLOSING_S = 1.0


class Lane(Protocol):
    def max_ctas(self, planned: int) -> int:
        """Blocks that a reduction on this lane may have, where planned ones are those of a GPU's second lane."""

    def submit(self, work: Callable[[], None]) -> Any:
        """Runs work after what the caller has done by now and after earlier work of this lane. Returns a ticket."""

    def wait(self, ticket: Any) -> None:
        """What the caller does from here on sees the work done. Raises what the work raised, if it was known then."""

    def settle(self) -> None:
        """After a failure: what the caller does from here on comes after all work, which has ended or was not begun;
        the lane can be used again."""

    def close(self) -> None:
        """Ends what the lane runs on, after its work. Does not wait long for work that waits for other ranks."""


class SameLane:
    """No second lane: work is done at once."""

    def max_ctas(self, planned: int) -> int:
        return planned

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def wait(self, ticket: None) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass


class StreamLane:
    """A second CUDA stream. The host never waits; tickets are events, so only what needs a result waits for it.

    Of high priority, so that the few blocks of a reduction get their place before the many of a GEMM. Tensors that the
    work uses must stay alive until the caller has waited for its ticket: memory freed earlier may be handed out again
    on the caller's stream. Under capture the second stream joins the graph by its first event and leaves it by the last
    wait.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    def max_ctas(self, planned: int) -> int:
        return planned

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

    def close(self) -> None:
        pass


class _Work:
    def __init__(self, work: Callable[[], None]):
        self.work = work
        self.inference_mode, self.grad_enabled = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.done = threading.Event()
        self.error: BaseException | None = None


class ThreadLane:
    """A thread of this process, for a CPU: it waits for the other ranks while the caller's thread computes."""

    def __init__(self):
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tokenweave-communication", daemon=True)
        self._thread.start()

    def max_ctas(self, planned: int) -> int:
        return 1  # this thread alone: with more, the op would open a second team beside the caller's

    def submit(self, work: Callable[[], None]) -> _Work:
        if not self._thread.is_alive():
            raise RuntimeError("ThreadLane: this lane is closed")
        ticket = _Work(work)
        self._queue.put(ticket)
        return ticket

    def wait(self, ticket: _Work) -> None:
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error

    def settle(self) -> None:
        ticket = self.submit(lambda: None)
        ticket.done.wait()
        self._error = None

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(CLOSING_S)

    def _run(self) -> None:
        while (ticket := self._queue.get()) is not None:
            try:
                if self._error is not None:
                    raise self._error  # after a failure the ranks are out of step: nothing more is started
                with torch.inference_mode(ticket.inference_mode), torch.set_grad_enabled(ticket.grad_enabled):
                    ticket.work()
            except BaseException as error:
                ticket.error = self._error = error
            ticket.done.set()
