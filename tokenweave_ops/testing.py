"""What tests and tools share: the backends at hand, the emulated ops, and comparison with a float64 reference.

Needs a test build (``TOKENWEAVE_TEST_BUILD=1``) for everything emulated; a plain install has the cpu and cuda parts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from tokenweave_ops import _library


def host() -> ModuleType:
    """The ``_host`` module of a test build: launch plans, and ``host().simt``, the emulator's controls."""
    name = "tokenweave_ops._host"
    if name not in sys.modules:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        path = _library.LIBRARY_DIRECTORY / f"_host{suffix}"
        if not path.exists():
            raise ImportError(f"{path.name} has not been built; TOKENWEAVE_TEST_BUILD=1 {_library.BUILD_COMMAND}")
        loader = importlib.machinery.ExtensionFileLoader("_host", str(path))
        spec = importlib.util.spec_from_file_location("_host", path, loader=loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def load_simt() -> str:
    """Loads the emulated ops into namespace ``tokenweave_simt``; "loaded" or why not."""
    return _library.load_library("simt")


def cuda_unavailable_reason() -> str | None:
    """None if a GPU is there and the CUDA kernels load, else the sentence that says what is missing."""
    state = _library.load_library("cuda")
    if state != "loaded":
        return state
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def backends() -> list[str]:
    """The backends whose kernels can run here and now."""
    found = [name for name in ("cpu", "simt") if _library.load_library(name) == "loaded"]
    return found if cuda_unavailable_reason() else [*found, "cuda"]


def family(name: str) -> ModuleType:
    """The module of a family. `from tokenweave_ops import allreduce_rmsnorm` gives the function of that name."""
    return importlib.import_module(f"tokenweave_ops.{name}")


@contextlib.contextmanager
def emulated(family: ModuleType) -> Iterator[None]:
    """Lets a family's public functions call the emulated kernels while the context lasts."""
    state = load_simt()
    if state != "loaded":
        raise ImportError(state)
    real = {name: value for name, value in vars(family).items() if isinstance(value, torch._ops.OpOverload)}
    for name, overload in real.items():
        packet = getattr(torch.ops.tokenweave_simt, overload._schema.name.split("::")[1])
        setattr(family, name, packet.default)
    try:
        yield
    finally:
        for name, overload in real.items():
            setattr(family, name, overload)


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The distance between neighbouring values of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    if not magnitude > info.tiny:
        return info.smallest_normal * info.eps
    return 2.0 ** torch.tensor(magnitude, dtype=torch.float64).log2().floor().item() * info.eps


def assert_close(actual: Tensor, exact: Tensor, eager: Tensor, *, ulps: float = 2.0, what: str = "result") -> None:
    """Asserts that a kernel is as good as torch: its error is at most twice torch's own, plus a few ulp.

    Args:
        actual: the kernel's result.
        exact: the float64 reference.
        eager: the same maths done by torch in the kernel's own dtype; its error against ``exact`` sets the scale.
        ulps: allowance in units of the last place of the largest exact value.
        what: names the tensor in the message.

    NaN and infinity must stand at the same places in ``actual`` and ``exact`` (rounded to the dtype).
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    actual, eager, dtype = actual.detach().cpu(), eager.detach().cpu(), actual.dtype
    rounded = exact.to(dtype)
    assert torch.equal(actual.isnan(), rounded.isnan()), f"{what}: NaN stands at other places than in the reference"
    infinite = rounded.isinf()
    assert torch.equal(actual[infinite], rounded[infinite]), f"{what}: infinities differ from the reference"
    finite = rounded.isfinite()
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    eager_error = (eager.double() - exact)[finite & eager.isfinite()].abs().nan_to_num().max().item()
    largest = exact[finite].abs().max().item()
    limit = 2.0 * eager_error + ulps * ulp(dtype, largest)
    if error <= limit:
        return
    where = (actual.double() - exact).abs().where(finite, -1.0).argmax().item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), actual.shape))
    raise AssertionError(
        f"{what}: error {error:.3e} exceeds {limit:.3e} (torch's own error is {eager_error:.3e}) at {index}: "
        f"got {actual[index].item()!r}, exact {exact[index].item()!r}"
    )
