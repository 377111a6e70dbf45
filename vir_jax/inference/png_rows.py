"""PNG files written row by row, so that none of an image need be held."""

import math
import os
import struct
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8

_MAGIC = b"\x89PNG\r\n\x1a\n"
_RGB, _PALETTE = 2, 3  # What a PNG calls them.


class PngRows:
    """A PNG of a width and height known beforehand, 8 bits, RGB or with a palette.

        with PngRows("mask.png", width=4096, height=100_000, palette=palette()) as png:
            for rows in masks:  # uint8 [any number, 4096]
                png.write(rows)

    The file appears when all rows are there; of what breaks off nothing is left. Memory is that of the rows given.

    Args:
        path: of the file; an older one is replaced.
        width: pixels.
        height: pixels.
        palette: colours that numbers stand for; None: pixels are RGB.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        palette: UInt8[np.ndarray, "colours 3"] | None = None,
    ) -> None:
        self._path, self._height, self._written = Path(path), height, 0
        self._shape = (width, 3) if palette is None else (width,)
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._compressor = zlib.compressobj()
        self._file = self._temporary.open("wb")
        self._file.write(_MAGIC)
        kind = _RGB if palette is None else _PALETTE
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
        if palette is not None:
            self._chunk(b"PLTE", palette.tobytes())

    def __enter__(self) -> "PngRows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._written == self._height:
            self._chunk(b"IDAT", self._compressor.flush())
            self._chunk(b"IEND", b"")
            self._file.close()
            self._temporary.replace(self._path)
            return
        self._file.close()
        self._temporary.unlink(missing_ok=True)
        if error is None:
            raise ValueError(f"{self._path}: {self._written} rows were written; expected {self._height}")

    def write(self, rows: UInt8[np.ndarray, "n width *colours"]) -> None:
        """Write the next rows.

        Raises:
            ValueError: rows of another shape, or more than the image has.
        """
        if rows.shape[1:] != self._shape or self._written + len(rows) > self._height:
            raise ValueError(
                f"rows of shape {rows.shape} after {self._written} of {self._height}; expected [n, "
                f"{', '.join(map(str, self._shape))}], n at most {self._height - self._written}"
            )
        self._written += len(rows)
        # A row begins with the number of its filter: 0, none.
        lines = np.pad(rows.reshape(len(rows), math.prod(self._shape)), ((0, 0), (1, 0)))
        self._chunk(b"IDAT", self._compressor.compress(lines.tobytes()))

    def _chunk(self, name: bytes, content: bytes) -> None:
        if content or name == b"IEND":
            checksum = zlib.crc32(content, zlib.crc32(name))
            self._file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum))
