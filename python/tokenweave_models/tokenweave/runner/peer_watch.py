"""Ends this process soon after another rank of its host has ended, whatever this one waits in: a kernel, NCCL, gloo.

A thread looks at the peers' pidfds, which the system makes readable when a process ends. It also hears signals: those
that Python handles itself wait until the main thread is back from the C++ in which it may wait for a rank that is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

# Time for the main thread to leave by itself, which it does unless it waits in C++.
LEAVING_GRACE_S = 1.0


def host_identity() -> tuple[str, int]:
    """Equal for processes that can see each other: same boot of the same machine, same namespace of process ids."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return boot, os.stat("/proc/self/ns/pid").st_ino


class PeerWatch:
    """Watches the other ranks of this host from now until :meth:`stop`.

    Args:
        rank: this process.
        peers: process ids by rank, of this host.

    Made by the main thread. If a peer ends, prints a sentence that names it and ends this process with exit status 1.
    SIGINT ends it with 130 if the main thread does not, SIGTERM with 143, quietly.
    """

    def __init__(self, rank: int, peers: Mapping[int, int]):
        self.rank = rank
        self._peers: dict[int, tuple[int, int]] = {}  # descriptor -> (rank, process)
        self._said = threading.Lock()
        for peer, process in peers.items():
            with contextlib.suppress(OSError):  # a sandbox may not have it; torchrun ends the others then
                self._peers[os.pidfd_open(process)] = peer, process
        self._signals, signals_in = socket.socketpair()
        self._stop_out, self._stop_in = socket.socketpair()
        signals_in.setblocking(False)
        self._signals_in = signals_in
        self._old_wakeup = signal.set_wakeup_fd(signals_in.fileno(), warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
        self._thread = threading.Thread(target=self._run, name="tokenweave-peer-watch", daemon=True)
        self._thread.start()

    def lost(self, wait_s: float = 0.0) -> str | None:
        """A sentence about the first peer that has ended, after waiting for one; None if all are there."""
        poll = select.poll()
        for descriptor in self._peers:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(wait_s * 1e3) if self._peers else ():
            return self._sentence(descriptor)
        return None

    def say(self, sentence: str | None) -> bool:
        """Prints why this process ends, if not None. Only the first call does: what follows comes of the same."""
        is_news = self._said.acquire(blocking=False)
        if is_news and sentence is not None:
            print(sentence, file=sys.stderr, flush=True)
        return is_news

    def stop(self) -> None:
        """From now on peers may end."""
        if self._thread is None:
            return
        self._stop_in.send(b"x")
        self._thread.join()
        self._thread = None
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_handler)
        for descriptor in self._peers:
            os.close(descriptor)
        self._peers = {}
        for end in (self._signals, self._signals_in, self._stop_in, self._stop_out):
            end.close()

    def _sentence(self, descriptor: int) -> str:
        peer, process = self._peers[descriptor]
        return f"PeerLost: rank {peer} (process {process}) has ended"

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in (self._signals.fileno(), self._stop_out.fileno(), *self._peers):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._stop_out.fileno() in ready:
                return
            if self._signals.fileno() in ready:  # before peers: the signal may have reached them too
                self._on_signals(self._signals.recv(64))
            elif ready:
                if not self.say(f"tokenweave: rank {self.rank}: {self._sentence(min(ready))}"):
                    time.sleep(LEAVING_GRACE_S)
                os._exit(1)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            os._exit(128 + signal.SIGTERM)
        if signal.SIGINT in numbers:
            self._said.acquire(blocking=False)  # peers that end now were interrupted too
            poll = select.poll()
            poll.register(self._stop_out, select.POLLIN)
            if not poll.poll(LEAVING_GRACE_S * 1e3):
                os._exit(128 + signal.SIGINT)
