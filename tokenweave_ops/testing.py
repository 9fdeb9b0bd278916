"""What tests and tools share: the backends at hand, the emulated ops, and comparison with a float64 reference.

Needs a test build (``TOKENWEAVE_TEST_BUILD=1``) for everything emulated; a plain install has the cpu and cuda parts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from tokenweave_ops import _library, _workspace


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


class LocalRanks:
    """Ranks of a group that all live in this process, with a :class:`Workspace` and a launch each, as between GPUs.

    ``device="simt"``: in the emulator, over memory whose stores may be late and whose loads may be stale;
    ``transport="multimem"`` adds a multicast address that only multimem instructions may touch. ``device="cuda"``: on
    one GPU, each rank on a stream of its own. Use as a context manager.
    """

    def __init__(
        self, world_size: int, max_tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16, *,
        device: str = "simt", transport: str = "peer", num_channels: int = 2, timeout_s: float = 1.0,
    ):  # fmt: skip
        self._is_simt = device == "simt"
        self._simt = host().simt if self._is_simt else None
        self._registered: list[int] = []
        self._registered_multicast: list[int] = []
        self._transport = transport
        ops = torch.ops.tokenweave_simt if self._is_simt else torch.ops.tokenweave
        if self._is_simt:
            load_simt()
        self.workspaces: list[_workspace.Workspace] = []
        for rank in range(world_size):
            workspace = _workspace.Workspace.__new__(_workspace.Workspace)
            workspace._set_sizes(
                max_tokens, hidden, dtype, "cpu" if self._is_simt else device, True, num_channels, timeout_s
            )
            workspace._prepare(rank, world_size, False, ops)
            workspace._agreement = workspace._interrupt = None
            workspace._liveness = [-1] * world_size
            workspace.transport = transport
            self.workspaces.append(workspace)
        first = self.workspaces[0]
        buffers = self._share(first._buffer_bytes + num_channels * first._staging_bytes)
        for workspace in self.workspaces:
            workspace._memory = buffers
        self.reset()
        self._streams = [] if self._is_simt else [torch.cuda.Stream() for _ in self.workspaces]

    def _share(self, num_bytes: int) -> _workspace._LocalMemory:
        world_size = len(self.workspaces)
        memory = _workspace._LocalMemory(world_size, num_bytes, self.workspaces[0].device)
        if self._is_simt:
            self._simt.register_peer_memory(memory.addresses[0], world_size * num_bytes)
            self._registered.append(memory.addresses[0])
        if self._transport == "multimem":
            # Nothing is mapped there: an access that is not a multimem instruction must not get through.
            memory.multicast_address = (1 << 46) + (len(self._registered) << 36)
            self._simt.register_multicast(memory.multicast_address, num_bytes, memory.addresses)
            self._registered_multicast.append(memory.multicast_address)
        return memory

    def reset(self) -> None:
        """New pads and records for all ranks: what Workspace.reset() does, without a process group to agree through."""
        pads = self._share(self.workspaces[0]._pad_bytes)
        for workspace in self.workspaces:
            workspace._pads = pads
            workspace._open()

    def run(self, call: Callable[[int, _workspace.Workspace], object], ranks: Iterable[int] | None = None) -> list:
        """call(rank, workspace) for each rank; the launches it makes run side by side. Returns when they have ended."""
        ranks = range(len(self.workspaces)) if ranks is None else ranks
        if not self._is_simt:
            return self._run_on_streams(call, ranks)
        self._simt.begin_group()
        try:
            results = []
            for rank in ranks:
                self._simt.set_rank(rank)
                results.append(call(rank, self.workspaces[rank]))
        except BaseException:
            self._simt.discard_group()
            raise
        self._simt.run_group()
        return results

    def _run_on_streams(self, call, ranks) -> list:
        torch.cuda.synchronize()
        results = []
        for rank in ranks:
            with torch.cuda.stream(self._streams[rank]):
                results.append(call(rank, self.workspaces[rank]))
        torch.cuda.synchronize()
        return results

    def close(self) -> None:
        for workspace in self.workspaces:
            workspace.close()
        for address in self._registered:
            self._simt.unregister_peer_memory(address)
        for address in self._registered_multicast:
            self._simt.unregister_multicast(address)
        self._registered, self._registered_multicast = [], []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()


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
