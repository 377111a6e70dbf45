"""Weights on the disk: a folder with model.safetensors and config.json, as hubs lay models out.

A safetensors file is a header of names, dtypes, shapes and offsets, and numbers behind it: nothing in it is executed.
Large models come in several such files, with an index of which tensor lies in which.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vir_jax.weights.errors import WeightsError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PREPROCESSOR = "preprocessor_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that are read; of all of them float32 is made."""

Tensors = dict[str, np.ndarray]
Json = dict[str, Any]


def read_weights(path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, Json]]:
    """Read tensors, and by name the JSON files beside them.

    Args:
        path: a folder, or a safetensors file, beside which the JSON files lie.

    Returns:
        The tensors by name, float32; the contents of `CONFIG` and `PREPROCESSOR`, where there are such files.

    Raises:
        FileNotFoundError: there is nothing, or no weights in the folder.
        WeightsError: no safetensors files, or damaged ones; the message says what is wrong.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    beside = {name: _read_json(folder / name) for name in (CONFIG, PREPROCESSOR) if (folder / name).is_file()}
    tensors: Tensors = {}
    for file in _files(path):
        for name, tensor in _read_tensors(file).items():
            if name in tensors:
                raise WeightsError(f"{file} holds {name}, which another file of {folder} holds, too")
            tensors[name] = tensor
    if not tensors:
        raise WeightsError(f"{path} holds no tensor")
    return tensors, beside


def write_weights(
    folder: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], beside: Mapping[str, Json]
) -> None:
    """Write a folder that `read_weights` reads.

    Args:
        folder: made where it is absent.
        tensors: by name.
        beside: contents of JSON files, by the files' names.

    Raises:
        FileExistsError: the folder holds weights.
    """
    folder = Path(folder)
    for name in (WEIGHTS, INDEX):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    # The weights come last, so that a folder that has them is whole.
    for name, content in beside.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    temporary = folder / f"{WEIGHTS}.tmp"
    # Readers for PyTorch refuse files that do not say "pt".
    save_file(whole, temporary, metadata={"format": "pt"})
    temporary.chmod(0o666 & folder.stat().st_mode)  # It was made for its owner alone.
    temporary.replace(folder / WEIGHTS)


def _files(path: Path) -> list[Path]:
    """Return the safetensors files that a path stands for."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"{path} is no safetensors file. A pickle (.pt, .pth, .bin, .npz of objects) can run code and is not"
                " read: where you trust it, load it in PyTorch and write `safetensors.torch.save_file(state_dict, ...)`"
            )
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return _indexed(path / INDEX)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    there = sorted(file.name for file in path.iterdir())[:10]
    raise FileNotFoundError(
        f"{path} holds neither {WEIGHTS} nor {INDEX}, and {len(found)} other safetensors files where one was expected;"
        f" there are {', '.join(there) or 'no files'}"
    )


def _indexed(index: Path) -> list[Path]:
    """Return the files that an index names."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index} has no weight_map of tensors to files")
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise WeightsError(f"{index} names files of other folders: {', '.join(outside)}")
    return [index.parent / name for name in files]


def _read_tensors(file: Path) -> Tensors:
    """Read one safetensors file."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            kinds = {name: tensors.get_slice(name).get_dtype() for name in names}
            if others := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in FLOATS]:
                raise WeightsError(f"{file}: {', '.join(others)}; expected one of {', '.join(FLOATS)}")
            return {name: tensors.get_tensor(name).astype(np.float32) for name in names}
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is no safetensors file, or a damaged one ({error}): fetch it again"
        ) from error


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # No JSON, or no text.
        raise WeightsError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}; expected an object")
    return content
