"""Zarr arrays (version 2 and 3) and OME-Zarr images, strip by strip, through tensorstore."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from vir_jax.data.errors import CorruptImageError
from vir_jax.data.image_file import ImageFile, as_corrupt
from vir_jax.data.pixels import ROWS, Colour, Strip, Warn, array_samples, rgb_strips

ARRAYS = {".zarray": "zarr", "zarr.json": "zarr3"}
"""A file in an array's folder -> tensorstore's driver. In version 3 groups have it, too."""


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a Zarr array or group."""
    return any((path / name).is_file() for name in (*ARRAYS, ".zgroup"))


def open_zarr(path: Path, background: Colour, warn: Warn) -> ImageFile:
    """Open an array [y, x] or [y, x, channels], or the largest image of an OME-Zarr group, of uint8 or uint16.

    An OME-Zarr's axes are as it says, of which those besides y, x and c have a length of 1.

    Raises:
      CorruptImageError: no such array.
    """
    with as_corrupt():
        folder, axes = _array_of(path)
        name = next(name for name in ARRAYS if (folder / name).is_file())
        spec = {"driver": ARRAYS[name], "kvstore": {"driver": "file", "path": str(folder)}}
        array = tensorstore.open(spec, read=True, open=True).result()
        axes = axes or "yxc"[: array.ndim]
        array = _rows_first(array, axes)
        height, width, channels = array.shape
        samples = array_samples(array.dtype.numpy_dtype, channels)
        chunk = array.chunk_layout.read_chunk.shape or (0,)
        rows = max(chunk[0] or 0, ROWS)

    def stored() -> Iterator[np.ndarray]:
        with as_corrupt():
            for y in range(0, height, rows):
                yield np.ascontiguousarray(array[y : min(y + rows, height)].read().result())

    def strips() -> Iterator[Strip]:
        return rgb_strips(stored(), samples, background, warn)

    return ImageFile(height, width, strips, rows_at_once=rows)


def _array_of(path: Path) -> tuple[Path, str]:
    """Return the folder of the array, and the names of its axes, "" where they are not told."""
    group: dict[str, Any] = {}
    if (path / "zarr.json").is_file():
        group = _json(path / "zarr.json")
    if (path / ".zarray").is_file() or group.get("node_type") == "array":
        return path, ""
    attributes = group.get("attributes") or _json(path / ".zattrs")
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        raise CorruptImageError("a Zarr group that is no OME-Zarr image; name the array in it")
    named: Sequence[Any] = scales[0].get("axes", ("t", "c", "z", "y", "x"))
    axes = "".join(axis if isinstance(axis, str) else axis["name"] for axis in named)
    return path / scales[0]["datasets"][0]["path"], axes


def _rows_first(array: tensorstore.TensorStore, axes: str) -> tensorstore.TensorStore:
    """Return [y, x, c] of an array with these axes."""
    alone = [i for i, axis in enumerate(axes) if axis not in "yxc"]
    if len(axes) != array.ndim or not {"y", "x"} <= set(axes) or any(array.shape[i] != 1 for i in alone):
        raise CorruptImageError(
            f"an array of shape {array.shape} with the axes {axes!r}; expected [y, x] or [y, x, channels], and of "
            "others a length of 1"
        )
    for i in reversed(alone):
        array = array[(slice(None),) * i + (0,)]
    kept = [axis for axis in axes if axis in "yxc"]
    if "c" not in kept:
        array, kept = array[..., tensorstore.newaxis], [*kept, "c"]
    return array.transpose([kept.index(axis) for axis in "yxc"])


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
