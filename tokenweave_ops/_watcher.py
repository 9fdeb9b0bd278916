"""A thread that looks after a workspace whose calls fail without anybody being told: :meth:`Workspace.watch`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class Watcher(threading.Thread):
    """Calls ``on_error(error)`` once ``workspace.check()`` raises, looking every interval_s; ends then, at
    :meth:`stop`, or with the workspace, which it does not keep."""

    def __init__(self, workspace, on_error: Callable[[RuntimeError], None], interval_s: float):
        super().__init__(name=f"tokenweave-watch-{workspace.id}", daemon=True)
        self._workspace, self._on_error, self._interval_s = weakref.ref(workspace), on_error, interval_s
        self._stopped = threading.Event()
        self.start()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            workspace = self._workspace()
            if workspace is None:
                return
            try:
                workspace.check()
            except RuntimeError as error:
                if not self._stopped.is_set():
                    self._on_error(error)
                return
            del workspace
