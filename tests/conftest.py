"""The ``backend`` fixture: every numerics and contract test runs on cpu, simt (emulated CUDA source) and cuda."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import ModuleType

import hypothesis
import pytest
import torch

from tokenweave_ops import _library, testing

BACKENDS = ("cpu", "simt", "cuda")

# No test depends on how fast a machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config):
    config.addinivalue_line("markers", "no_launch: the test checks what happens before any kernel runs")


def pytest_addoption(parser):
    parser.addoption(
        "--backend", choices=BACKENDS, action="append", help="run only these backends; a missing one then fails"
    )


@dataclass(frozen=True)
class Backend:
    """Where a test runs: its tensors' device, its op namespace, and the sizes it can afford."""

    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def ops(self):
        """The raw ops (torch.ops.tokenweave or the emulated ones)."""
        return torch.ops.tokenweave_simt if self.name == "simt" else torch.ops.tokenweave

    def use(self, family: ModuleType):
        """Context in which the family's public functions run on this backend."""
        return testing.emulated(family) if self.name == "simt" else contextlib.nullcontext()

    def tensor(self, *shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        """Normal random values, the same on every backend."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(self.device)


def _skip_unless_available(config, name: str) -> None:
    chosen = config.getoption("--backend")
    if chosen and name not in chosen:
        pytest.skip("not among the backends asked for with --backend")
    reason = testing.cuda_unavailable_reason() if name == "cuda" else _library.load_library(name)
    if reason in (None, "loaded"):
        return
    if chosen:
        pytest.fail(f"backend {name} was asked for: {reason}")
    pytest.skip(reason)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    _skip_unless_available(request.config, request.param)
    if request.param != "simt":
        yield Backend(request.param)
        return
    # The proof that an emulated test ran emulated: threads were switched.
    simt = testing.host().simt
    before = simt.counters()["switches"]
    yield Backend("simt")
    if request.node.get_closest_marker("no_launch") is None:
        assert simt.counters()["switches"] > before, "this simt test never entered the emulator"


@pytest.fixture
def host() -> ModuleType:
    """The `_host` module with the launch plans; a plain install does not have it."""
    if not _library.build_info().get("test_build", True):
        pytest.skip("launch plans are shown to Python by test builds only")
    return testing.host()


@pytest.fixture
def cuda(request) -> Backend:
    """For what only a GPU has: streams, devices, graphs."""
    _skip_unless_available(request.config, "cuda")
    return Backend("cuda")


@pytest.fixture
def simt(request) -> Backend:
    """For what only the emulator has: schedules."""
    _skip_unless_available(request.config, "simt")
    return Backend("simt")
