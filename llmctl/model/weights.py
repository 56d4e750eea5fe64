"""The tensors of a model folder where they lie: nothing is read before it is asked for.

A tensor is either mapped, a view of the file whose pages the system reads when they are used and drops when
it needs the room, or read into memory of its own. Mapping what is copied afterwards would hold it twice.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmctl.errors import UserError
from llmctl.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
AGAIN = "copy or download it again, or use a checkpoint of the run"


class TensorFile(Protocol):
    """An open file of tensors."""

    def names(self) -> list[str]:
        """What is in it."""

    def mapped(self, name: str) -> Tensor:
        """A view of the file."""

    def read(self, name: str) -> Tensor:
        """The same numbers in memory of their own."""


@dataclass(frozen=True)
class Stored:
    """One tensor in its file, under the name it has there."""

    file: TensorFile
    name: str

    def mapped(self) -> Tensor:
        return self.file.mapped(self.name)

    def read(self) -> Tensor:
        return self.file.read(self.name)


class SafeFile:
    """A safetensors file: 8 bytes with the length of a JSON header, the header, the numbers."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.raw = stack.enter_context(path.open("rb", buffering=0))
        self.file: Any = stack.enter_context(safe_open(path, framework="pt"))  # checks the header
        length = int.from_bytes(self.raw.read(8), "little")
        self.header = json.loads(self.raw.read(length))
        self.begin = 8 + length

    def names(self) -> list[str]:
        return list(self.file.keys())

    def mapped(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def read(self, name: str) -> Tensor:
        like = self.mapped(name)
        tensor = torch.empty(like.shape, dtype=like.dtype)
        room = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        self.raw.seek(self.begin + self.header[name]["data_offsets"][0])
        while room:
            got = self.raw.readinto(room)  # at most 2 GB at once
            if not got:
                raise UserError(f"{self.path}: cut short while it was read", AGAIN)
            room = room[got:]
        return tensor


class PickledFile:
    """What `torch.save` wrote: tensors by name, unpickled without running anything but what makes tensors."""

    def __init__(self, path: Path) -> None:
        # the form before torch 1.6 cannot be mapped
        self.tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        values = self.tensors.values() if isinstance(self.tensors, dict) else (None,)
        if not all(isinstance(value, Tensor) for value in values):
            raise UserError(f"{path}: holds more than tensors by name", "is it a checkpoint of a trainer?")

    def names(self) -> list[str]:
        return list(self.tensors)

    def mapped(self, name: str) -> Tensor:
        tensor: Tensor = self.tensors[name].detach().contiguous()
        return tensor

    def read(self, name: str) -> Tensor:
        return self.mapped(name).clone()


def open_weights(folder: Path, stack: ExitStack, allow_pickle: bool) -> dict[str, Stored]:
    """Every tensor of a model folder by name; the files stay open as long as `stack`.

    Args:
        allow_pickle: read `pytorch_model.bin` where there are no safetensors.

    Raises UserError: no weights, a damaged, missing or unreadable file, pickles that were not allowed or that
    hold other things than tensors.
    """
    paths = _paths(folder, WEIGHTS, INDEX)
    if paths is not None:
        return _contents([_open_safe(path, stack) for path in paths])
    paths = _paths(folder, PICKLED, PICKLED_INDEX)
    if paths is None or not allow_pickle:
        raise UserError(f"{folder}: no {WEIGHTS}", _hint_for_missing(folder))
    return _contents([_open_pickled(path) for path in paths])


def dtype_in(folder: Path) -> torch.dtype:
    """The precision of the first weight of a model folder, as transformers takes for `auto`. Raises as `open_weights`."""
    with ExitStack() as stack:
        tensors = open_weights(folder, stack, allow_pickle=False).values()
        dtypes = (tensor.mapped().dtype for tensor in tensors)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _contents(files: list[Any]) -> dict[str, Stored]:
    return {name: Stored(file, name) for file in files for name in file.names()}


def _paths(folder: Path, single: str, index: str) -> list[Path] | None:
    """The files of the weights: one, or those that an index lists; None if there is neither."""
    if (folder / single).is_file():
        return [folder / single]
    if not (folder / index).is_file():
        return None
    names = read_json(folder / index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / index}: lists no weights", "copy or download the model again")
    paths = [folder / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: missing, though {index} lists it", "copy or download it again")
    return paths


def _open_safe(path: Path, stack: ExitStack) -> SafeFile:
    try:
        return SafeFile(path, stack)
    except PermissionError:
        raise UserError(f"{path}: no permission to read", "ask its owner, or copy the folder") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({error})", AGAIN) from None


def _open_pickled(path: Path) -> PickledFile:
    try:
        return PickledFile(path)
    except PermissionError:
        raise UserError(f"{path}: no permission to read", "ask its owner, or copy the folder") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: damaged, or holds more than tensors, which could run code",
            "get safetensors of this model",
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "it is empty")
        raise UserError(f"{path}: damaged or cut short ({said})", AGAIN) from None


def _hint_for_missing(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "this folder holds an adapter, not a model"
    if (folder / PICKLED).is_file() or (folder / PICKLED_INDEX).is_file():
        return (
            f"{PICKLED} is a pickle, which can run code; if you trust it: llmctl convert MODEL --allow-pickle"
        )
    if any(folder.glob("*.bin")):
        return "only safetensors are read; pickled .bin files can run code"
    if any(folder.glob("checkpoints/step-*")):
        return "the run was not finished; go on with --resume, or name a folder under checkpoints/"
    return "copy or download the model again"
