"""A model's folder as Hugging Face lays it out: config.json and weights in one or several safetensors files.

Opening it reads headers only: the names, shapes and dtypes of all tensors, so that whatever is wrong with them is known
before any weight is read. A read maps its file and hands out a view of the slice asked for: what is copied from it is
read, and nothing else. (A disk reads whole pages, so a slice along dimension 1 costs more there than its own bytes.)
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tokenweave_models.common.config_keys import ConfigKeys
from tokenweave_models.common.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_NAMED = 3  # of many like problems, the message names so many
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def few_of(names: list[str]) -> str:
    """The first few and how many more: `a, b, c and 7 more`."""
    hidden = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {hidden} more" if hidden > 0 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: has no {path.name}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not even UTF-8
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(found).__name__}")
    return found


def model_folder(folder: str | Path) -> Path:
    """The folder, if it can be one of a model."""
    path = Path(folder)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "no such folder"
        raise UserError(f"{folder}: {what}. Models are read from a local folder and never downloaded")
    if not (path / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so it is not the folder of a Hugging Face model")
    return path


@dataclass(frozen=True)
class StoredTensor:
    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "BF16"


class LocalCheckpoint:
    """The weights in a model's folder. Keeps no file open, so that threads and forked processes may share one.

    Attributes:
        folder: where it is.
        tensors: what the files hold, by name.
        bytes_read: the size of all slices handed out so far.

    Raises:
        UserError: there are no safetensors weights, a file is missing, cut off or not of this format, or the index and
            the files disagree.
    """

    def __init__(self, folder: str | Path):
        try:
            import safetensors
        except ImportError as error:
            raise UserError("safetensors is not installed; run: pip install 'tokenweave-ops[models]'") from error
        self._safetensors = safetensors
        self._mutex = threading.Lock()
        self.folder = model_folder(folder)
        self.bytes_read = 0
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(self._stored_tensors())

    def read(self, name: str, dim: int = 0, begin: int = 0, end: int | None = None) -> Tensor:
        """``tensor[begin:end]`` along ``dim`` of a tensor in ``tensors``, in its own dtype, on the CPU: a view of the
        mapped file, whose pages are read when they are used."""
        stored = self.tensors[name]
        size = stored.shape[dim]
        end = size if end is None else end
        if not 0 <= begin <= end <= size:
            raise ValueError(f"LocalCheckpoint: a slice of {name} must be within 0 to {size}, got {begin} to {end}")
        with self._open(stored.file) as file:
            part = file.get_slice(name)[(*[slice(None)] * dim, slice(begin, end))]
        with self._mutex:
            self.bytes_read += part.numel() * part.element_size()
        return part

    def check(self, expected: Mapping[str, tuple[int, ...]], tolerated: re.Pattern[str]) -> None:
        """Raises UserError unless the files hold the expected tensors, each of its shape and of a dtype in
        ``STORED_DTYPES``, and no others but those whose names match tolerated."""
        stored = self.tensors
        here = {name: stored[name] for name in expected if name in stored}
        problems = {
            "missing": [name for name in expected if name not in stored],
            "superfluous": [name for name in stored if name not in expected and not tolerated.fullmatch(name)],
            "of another shape": [
                f"{name} is {list(tensor.shape)} instead of {list(expected[name])}"
                for name, tensor in here.items()
                if tensor.shape != expected[name]
            ],
            f"of a dtype other than {', '.join(STORED_DTYPES)}": [
                f"{name} is {tensor.dtype}" for name, tensor in here.items() if tensor.dtype not in STORED_DTYPES
            ],
        }
        told = [f"{len(names)} {what}: {few_of(names)}" for what, names in problems.items() if names]
        if told:
            raise UserError(f"{self.folder}: the tensors do not fit its config.json. {'. '.join(told)}")

    def published_dtype(self, embedding: str) -> torch.dtype:
        """What config.json says, or else what the tensor of this name is stored in."""
        path = self.folder / "config.json"
        values = read_json(path)
        for key in ("dtype", "torch_dtype"):  # as transformers 5 and 4 name it
            if (name := values.get(key)) is not None:
                if name not in list(DTYPES):  # a list: the value may be of any kind
                    raise ConfigKeys(path, values).refused(key, name, "one of " + ", ".join(DTYPES))
                return DTYPES[name]
        return STORED_DTYPES[self.tensors[embedding].dtype]

    def _open(self, file: str):
        path = self.folder / file
        try:
            return self._safetensors.safe_open(path, framework="pt", device="cpu")
        except self._safetensors.SafetensorError as error:
            raise UserError(f"{path}: is cut off or not a safetensors file: {error}") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    def _stored_tensors(self) -> dict[str, StoredTensor]:
        index = self._index()
        files = [WEIGHTS] if index is None else sorted(set(index.values()))
        tensors: dict[str, StoredTensor] = {}
        astray = []
        for name in files:
            with self._open(name) as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    entry = file.get_slice(key)
                    stored = StoredTensor(name, tuple(entry.get_shape()), entry.get_dtype())
                    if index is None or index.get(key) == name:
                        tensors[key] = stored
                    else:
                        astray.append(f"{key} in {name}")
        if astray:
            raise UserError(f"{self.folder / INDEX}: does not name what the files hold: {few_of(astray)}")
        if lost := [f"{key} in {name}" for key, name in (index or {}).items() if key not in tensors]:
            raise UserError(f"{self.folder / INDEX}: names what the files do not hold: {few_of(lost)}")
        return tensors

    def _index(self) -> dict[str, str] | None:
        """The file of each tensor, or None if all are in one."""
        if (self.folder / WEIGHTS).is_file():
            return None
        path = self.folder / INDEX
        if not path.is_file():
            others = sorted(file.name for file in self.folder.iterdir() if file.suffix in {".bin", ".pth", ".gguf"})
            found = f"; {few_of(others)} cannot be read, only safetensors" if others else ""
            raise UserError(f"{self.folder}: has neither {WEIGHTS} nor {INDEX}{found}")
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{path}: must have a weight_map from tensors to files")
        if odd := sorted(
            {str(file) for file in index.values() if not isinstance(file, str) or Path(file).name != file}
        ):
            raise UserError(f"{path}: files must be named without a folder, got {few_of(odd)}")
        if missing := [file for file in sorted(set(index.values())) if not (self.folder / file).is_file()]:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(set(index.values()))} weight files are missing: "
                f"{few_of(missing)} (named in {INDEX})"
            )
        return index
