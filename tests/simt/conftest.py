"""The emulator's own tests. Every test here must have run threads in the emulator, unless it is marked ``no_launch``.

A fault that changes a result must show in half of ``FIND_SEEDS`` schedules at least, so that a weakened emulator fails
too; the correct twin must pass ``TWIN_SEEDS`` schedules.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from tokenweave_ops import testing

FIND_SEEDS = 20
TWIN_SEEDS = 200


@pytest.fixture(scope="session")
def kernels():
    """The compiled test kernels, by the file they stand in: ``kernels.barriers``, ``kernels.signals``, ..."""
    return testing.host()


@pytest.fixture(scope="session")
def simt(kernels):
    return kernels.simt


@pytest.fixture(autouse=True)
def ran_emulated(request, simt):
    """Default options before each test; after it, the proof that threads were switched."""
    simt.set_options()
    before = simt.counters()["switches"]
    yield
    simt.discard_group()
    if request.node.get_closest_marker("no_launch") is None:
        assert simt.counters()["switches"] > before, "this test never entered the emulator"


@pytest.fixture
def peer_memory(simt):
    """``with peer_memory(array, ...)``: the arrays are memory that several ranks write."""

    @contextlib.contextmanager
    def register(*arrays: np.ndarray):
        with contextlib.ExitStack() as stack:
            for array in arrays:
                simt.register_peer_memory(array.ctypes.data, array.nbytes)
                stack.callback(simt.unregister_peer_memory, array.ctypes.data)
            yield

    return register


@pytest.fixture
def group(simt):
    """``with group(): ...`` queues launches (``simt.set_rank`` says for whom) and runs them together at its end."""

    @contextlib.contextmanager
    def queue():
        simt.begin_group()
        try:
            yield
        except BaseException:
            simt.discard_group()
            raise
        simt.run_group()

    return queue


@pytest.fixture
def seeds(simt):
    """Runs a check, which returns whether the result was right, under many schedules."""

    def failures(check, count: int, **options) -> int:
        wrong = 0
        for seed in range(count):
            simt.set_options(seed=seed, **options)
            wrong += not check()
        return wrong

    def found(check, **options) -> None:
        wrong = failures(check, FIND_SEEDS, **options)
        assert wrong >= FIND_SEEDS // 2, f"only {wrong} of {FIND_SEEDS} schedules gave a wrong result"

    def never(check, count: int = TWIN_SEEDS, **options) -> None:
        wrong = failures(check, count, **options)
        assert wrong == 0, f"the correct twin gave {wrong} wrong results in {count} schedules"

    return SimpleNamespace(found=found, never=never)
