"""The one place that knows shared libraries: defines op schemas, loads the compiled backends, says why one is missing.

A family module calls :func:`define_op` for each op while it is imported; the package then calls :func:`load_libraries`.
Every op exists in two namespaces: ``tokenweave`` (CPU and CUDA kernels) and ``tokenweave_simt`` (the CUDA kernels'
source, emulated on CPU tensors; test builds only).
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 11)
NAMESPACES = ("tokenweave", "tokenweave_simt")
LIBRARY_DIRECTORY = Path(os.environ.get("TOKENWEAVE_LIBRARY_DIR") or Path(__file__).parent / "lib")
BUILD_COMMAND = "pip install --no-build-isolation ."

# backend -> (namespace, dispatch key) its library registers under.
BACKENDS = {"cpu": ("tokenweave", "CPU"), "cuda": ("tokenweave", "CUDA"), "simt": ("tokenweave_simt", "CPU")}

_status: dict[str, str] = {}
_schemas: dict[str, str] = {}
_libraries = {namespace: torch.library.Library(namespace, "DEF") for namespace in NAMESPACES}
_explanations: dict[str, torch.library.Library] = {}


class StaleLibraryError(ImportError):
    """A compiled library does not fit the Python sources beside it."""


def _check_torch_version(version: str) -> None:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < MINIMUM_TORCH:
        raise ImportError(f"tokenweave_ops needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, but torch is {version}.")


_check_torch_version(torch.__version__)


_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def _check_devices(name: str, fake: Callable) -> Callable:
    """The fake kernel with the one check it needs: a meta tensor among real ones would bring the dispatcher here, and
    the caller would get uninitialised memory for a result."""

    def checked(*arguments):
        tensors = [(i, tensor) for i, tensor in enumerate(arguments) if isinstance(tensor, torch.Tensor)]
        first, reference = tensors[0]
        for i, tensor in tensors[1:]:
            if tensor.device != reference.device:
                schema = getattr(torch.ops.tokenweave, name).default._schema
                names = [argument.name for argument in schema.arguments]
                dtype = _DTYPE_NAMES.get(tensor.dtype, tensor.dtype)
                raise RuntimeError(
                    f"{name}: {names[i]} must be on the device of {names[first]}, {reference.device}, "
                    f"got {tensor.device} (dtype {dtype}, device {tensor.device})"
                )
        return fake(*arguments)

    return checked


def define_op(schema: str, fake: Callable, setup_context: Callable | None = None, backward: Callable | None = None):
    """Defines an op in both namespaces: its schema, its fake (shape-only) kernel and, for training ops, its gradient.

    ``backward`` takes the namespace's op collection first, so that the emulated forward gets the emulated backward:
    ``backward(ops, ctx, *gradients)``.
    """
    name = schema[: schema.index("(")]
    _schemas[name] = schema
    for namespace, library in _libraries.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _check_devices(name, fake), lib=library)
        if backward is not None:
            ops = getattr(torch.ops, namespace)
            torch.library.register_autograd(
                f"{namespace}::{name}",
                lambda ctx, *gradients, _ops=ops: backward(_ops, ctx, *gradients),
                setup_context=setup_context,
                lib=library,
            )


def library_path(backend: str) -> Path:
    return LIBRARY_DIRECTORY / f"libtokenweave_{backend}.so"


def build_info() -> dict:
    """What the build recorded about itself; empty when nothing was built."""
    path = LIBRARY_DIRECTORY / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def compare_schemas(compiled: str, backend: str) -> None:
    """Raises unless the library's schema text (one per line) is exactly what this package defines.

    The dispatcher cannot notice a disagreement: it would hand the kernel arguments of other types, and crash.
    """
    built = {line[: line.index("(")]: line for line in compiled.splitlines()}
    for name in sorted(built.keys() | _schemas.keys()):
        if built.get(name) != _schemas.get(name):
            raise StaleLibraryError(
                f"{library_path(backend).name} is stale, rebuild it ({BUILD_COMMAND}): it has "
                f"`{built.get(name, f'no {name}')}`, the package has `{_schemas.get(name, f'no {name}')}`."
            )


def _load(backend: str) -> None:
    """Loads one backend's library and registers its kernels; raises ImportError with a sentence if it cannot."""
    path = library_path(backend)
    if not path.exists():
        reason = build_info().get("no_cuda_reason") if backend == "cuda" else None
        raise ImportError(
            f"{path.name} has not been built{f' ({reason})' if reason else ''}; "
            f"run `{BUILD_COMMAND}` in the source tree."
        )
    if backend == "cuda" and torch.version.cuda is None:
        raise ImportError(f"{path.name} needs a CUDA build of torch, but torch {torch.__version__} is CPU-only.")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path.name} cannot be loaded, rebuild it ({BUILD_COMMAND}): {error}") from error
    if not hasattr(library, "tokenweave_schemas"):
        raise StaleLibraryError(f"{path.name} is stale, rebuild it ({BUILD_COMMAND}): it does not say what it holds.")
    library.tokenweave_schemas.restype = ctypes.c_char_p
    compare_schemas(library.tokenweave_schemas().decode(), backend)
    library.tokenweave_register()


def _explain_missing(backend: str, reason: str) -> None:
    """Gives every op of a missing backend an implementation that raises the reason it is missing."""
    namespace, key = BACKENDS[backend]
    library = _explanations[backend] = torch.library.Library(namespace, "IMPL")
    for name in _schemas:

        def explain(*_args, _name=name, **_kwargs):
            raise RuntimeError(f"{_name}: no {backend} kernels: {reason}")

        library.impl(name, explain, key)


def load_library(backend: str) -> str:
    """Loads a backend once. Returns "loaded" or the sentence that says why it is not."""
    if backend not in _status:
        try:
            _load(backend)
            _status[backend] = "loaded"
        except ImportError as error:
            _status[backend] = str(error)
            _explain_missing(backend, str(error))
    return _status[backend]


def load_libraries() -> None:
    """Loads what a user needs. A missing backend is no error until one of its ops is called."""
    load_library("cpu")
    load_library("cuda")


def status() -> dict[str, str]:
    """Backend -> "loaded" or why not, for the backends asked for so far."""
    return dict(_status)


class InterruptPoll:
    """What a waiting kernel calls now and then so that signal handlers can run, Ctrl-C above all.

    ``address`` is a C function that returns nonzero once a handler has raised; :meth:`take` gives what it raised. A
    generator is polled, not a function: the interpreter runs handlers while it enters a frame, which for a function is
    before any `try` of it.
    """

    def __init__(self):
        self._raised: list[BaseException] = []
        poll = self._polls()
        next(poll)
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32)(poll.__next__)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value

    def _polls(self) -> Iterator[int]:
        result = 0
        while True:
            try:
                while True:  # inside the try: handlers run at a loop's jump back as well
                    yield result
                    result = 0
            except GeneratorExit:
                raise
            except BaseException as error:
                self._raised.append(error)
                result = 1

    def take(self) -> BaseException | None:
        return self._raised.pop() if self._raised else None


# Not an op for users: the floor that the cost of a call is measured against (bench, case "overhead").
define_op(
    "noop(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_bias) -> ()",
    fake=lambda x, residual, weight, eps, weight_bias: None,
)
