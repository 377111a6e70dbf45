"""Images that arrive over time: rows of pixels in, a prediction at any moment."""

import json
import os
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from vir_jax.inference.recurrent import (
    CHUNK_SIZE,
    Normalization,
    StreamState,
    check_pixels,
    colours_of,
    initial_state,
    read_dense_rows,
    read_out,
    read_rows,
    rows_at_once,
)
from vir_jax.models import VisionModel
from vir_jax.models.model import StreamModel
from vir_jax.models.readout import DENSE


class ImageStream:
    """One image that arrives row by row, or several of the same width side by side.

        stream = ImageStream(model, width=4096, height=100_000, normalization=(mean, std))
        for rows in scanner:  # uint8 [any number, 4096, 3]
            stream.push(rows)
            print(stream.predict())

    Of a model that gives logits to each pixel `push` returns those of the rows that are known by then:

        for rows in scanner:
            mask = stream.push(rows).argmax(-1)  # [1, 0 or more, 4096]

    With `readout="dense_patch"` they are whole rows of patches; with "dense_linear", whose logits are interpolated
    between a row of patches and the one below, half a patch fewer, until the image ends.

    Pixels are collected until a row of patches is whole; the model then reads it, and of rows that are pushed together
    as many at once as make a chunk: by one function for a row and one for a chunk, each compiled once for a width and a
    batch, whatever the height and however the rows arrive. In 2-D a row alone costs nearly as much memory traffic as a
    chunk of them, so that a scanner's rows are better pushed some 8 patches high. Memory is the state of `StreamState`,
    which is updated in place, the pixels of a row of patches or of a chunk, and its activations.

    Args:
        model: a ViR, 1-D or 2-D, that reads the image once.
        width: pixels, divisible by the patch.
        height: pixels of the whole image, divisible by the patch; a model with sine-cosine position embeddings does
            without, and its images have no end.
        batch: images that arrive together.
        chunk_size: patches read at a time, as for `stream`; of a row of more patches in 1-D, a part.
        normalization: (mean, std) of the colours in [0, 1]: the pixels are uint8, RGB for a grey model, too. None: they
            are floating point, normalised already.

    Raises:
        ValueError: for a model that cannot be computed so, sides that the patch does not divide, or no height where
            position embeddings are learned.
    """

    def __init__(
        self,
        model: VisionModel,
        *,
        width: int,
        height: int | None = None,
        batch: int = 1,
        chunk_size: int = CHUNK_SIZE,
        normalization: Normalization | None = None,
    ) -> None:
        apart = model.apart()
        self._patch = model.patch
        for name, pixels in (("width", width), ("height", height)):
            if pixels is not None and (pixels < self._patch or pixels % self._patch):
                raise ValueError(
                    f"{name} is {pixels} pixels; expected a positive multiple of the patch, {self._patch}"
                )
        if height is None and model.needs_height:
            raise ValueError(
                "learned position embeddings are resampled to the whole image's grid: give its height, or use a model "
                "made with position='sincos'"
            )
        self.width, self.height, self.batch = width, height, batch
        self._normalization, self._model = normalization, model.options
        # Once, so that reading a row copies no weights.
        self._graph, self._variables = nnx.split(apart)
        self._read = partial(_read, self._graph, chunk_size, normalization)
        self._classes = model.num_classes if model.dense else None
        self._waiting = model.readout.waiting
        self._chunk = self._patch * rows_at_once(apart, width // self._patch, chunk_size)
        self._rows = None if height is None else np.int32(height // self._patch)
        dtype = np.float32 if normalization is None else np.uint8
        check_pixels(dtype, normalization)
        # The pixels of a row of patches that is not yet whole.
        self._strip = np.zeros((batch, self._patch, width, colours_of(model.channels, normalization)), dtype)
        self._received = 0
        self._state: StreamState = initial_state(apart, batch, width)

    @property
    def received(self) -> int:
        """Rows of pixels that were pushed."""
        return self._received

    @property
    def read(self) -> int:
        """Rows of pixels that the model has read: those of whole rows of patches."""
        return self._received - self._received % self._patch

    def push(
        self, rows: Num[np.ndarray, "*b n width colours"]
    ) -> Float[np.ndarray, "b _n width classes"] | None:
        """Take the next rows of pixels, any number of them.

        Args:
            rows: [batch, n, width, 3], or [n, width, 3] where the batch is 1; they are copied.

        Returns:
            Of a dense model the logits of those pixels that are known by this call and not before, float32: none, or
            the rows of patches that `rows` complete. Those that wait for a row below come with it, or with the last row
            of an image of known height; see `pending`. Of models that are not dense None.

        Raises:
            ValueError: another shape or dtype, or more rows than the image has. Nothing was taken then.
        """
        rows = self._checked(rows)
        dense = [np.zeros((self.batch, 0, self.width, self._classes or 0), np.float32)]
        while rows.shape[1]:
            filled = self._received % self._patch
            if not filled and rows.shape[1] >= self._chunk:
                taken = self._chunk
                dense += self._read_whole(rows[:, :taken].copy())
            else:
                taken = min(self._patch - filled, rows.shape[1])
                self._strip[:, filled : filled + taken] = rows[:, :taken]
                if filled + taken == self._patch:
                    strip, self._strip = self._strip, np.zeros_like(self._strip)
                    dense += self._read_whole(strip)
            rows = rows[:, taken:]
            self._received += taken
            if self._received == self.height:
                dense.append(self._pending())
        return None if self._classes is None else np.concatenate(dense, axis=1)

    def _read_whole(
        self, pixels: Num[np.ndarray, "b y x colours"]
    ) -> list[Float[np.ndarray, "b _y x classes"]]:
        """Read whole rows of patches, whose pixels are never written to again: the device may read them later on.

        Returns:
            Of a dense model their logits, in a list of one; else an empty one.
        """
        # Wait for the rows before, lest rows pile up in memory that arrive faster than they are read.
        jax.block_until_ready(self._state)
        above = 0 if self.read else self._waiting
        self._state, logits = self._read(self._variables, self._state, pixels, self._rows)
        return [] if self._classes is None else [np.asarray(logits)[:, above:]]

    def pending(self) -> Float[np.ndarray, "b _n width classes"]:
        """Return the logits of the pixels that wait for a row of patches below, as if the image ended here.

        More rows may follow. None wait with `readout="dense_patch"`, nor once an image of known height is read.

        Raises:
            ValueError: the model is not dense.
        """
        if self._classes is None:
            raise ValueError(
                "the model gives logits to the image, and none to its pixels; use `predict`, or a model made with "
                "readout='dense_patch' or 'dense_linear'"
            )
        if not self.read or self._received == self.height:
            return np.zeros((self.batch, 0, self.width, self._classes), np.float32)
        return self._pending()

    def _pending(self) -> Float[np.ndarray, "b _n width classes"]:
        if self._state.logits is None:
            return np.zeros((self.batch, 0, self.width, self._classes or 0), np.float32)
        return np.asarray(_last_pixels(self._graph, self._variables, self._state.logits))

    def predict(self) -> Float[Array, "b classes"]:
        """Return the logits of what the model has read so far; more rows may follow.

        The class token is read as if the image ended here. With sine-cosine positions these are the logits of the image
        cut off here. With learned positions they are not quite: the patches carry the positions that they have in the
        whole image, while `model`, given the rows read so far, would stretch its embeddings over these alone. At the
        last row both are the same.

        Raises:
            ValueError: there is no whole row of patches yet; or the model is dense, whose logits `push` returns.
        """
        if not self.read:
            raise ValueError(
                f"{self._received} rows of pixels have arrived; a prediction needs a row of patches, {self._patch}"
            )
        return _predict(self._graph, self.width // self._patch, self._variables, self._state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a NumPy .npz file, from which `restore` goes on. An older file is replaced at once."""
        temporary = Path(path).with_name(Path(path).name + ".tmp")
        with temporary.open("wb") as file:
            identity = np.asarray(json.dumps(self._identity()))
            np.savez(file, allow_pickle=False, identity=identity, **self._contents())
        temporary.replace(path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from a saved state, bit for bit, in a stream made with the same arguments.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no saved stream, is damaged, or belongs to another model, image size, batch or
                normalization; what differs is named. The stream is left as it was.
        """
        found, contents = _load(path)
        for name, value in self._identity().items():
            if found.get(name) != value:
                raise ValueError(f"{path}: {name} is {found.get(name)!r}, of this stream it is {value!r}")
        wanted = self._contents()
        if {k: v.shape for k, v in contents.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ValueError(f"{path} is damaged: its arrays are not those of such a stream")
        self._received, self._strip = int(contents["received"]), contents["strip"]
        leaves = [jnp.array(contents[name]) for name in wanted if name.startswith("state")]
        self._state = jax.tree.unflatten(jax.tree.structure(self._state), leaves)

    def _identity(self) -> dict[str, Any]:
        """Return all that a state means nothing without; equal where a state may be restored. JSON data."""
        weights = 0
        for leaf in jax.tree.leaves(self._variables):
            weights = zlib.crc32(np.asarray(leaf).tobytes(), weights)
        return {
            "width": self.width,
            "height": self.height,
            "batch": self.batch,
            "normalization": self._normalization
            and [[float(x) for x in colours] for colours in self._normalization],
            "model": self._model,
            "checksum_of_weights": weights,
        }

    def _contents(self) -> dict[str, np.ndarray]:
        state = {f"state{i:03}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._state))}
        return {"received": np.asarray(self._received), "strip": self._strip, **state}

    def _checked(self, rows: Num[np.ndarray, "*b n width colours"]) -> Num[np.ndarray, "b n width colours"]:
        shape, dtype, colours = rows.shape, rows.dtype, self._strip.shape[-1]
        if rows.ndim == 3 and self.batch == 1:
            rows = rows[None]
        if rows.ndim != 4 or (rows.shape[0], *rows.shape[2:]) != (self.batch, self.width, colours):
            raise ValueError(
                f"rows have shape {shape}; expected [{self.batch}, any, {self.width}, {colours}]"
            )
        if dtype != self._strip.dtype:
            raise ValueError(
                f"rows are {dtype}; expected {self._strip.dtype}: uint8 where the stream has a normalization, "
                "else normalised float32"
            )
        if self.height is not None and self._received + rows.shape[1] > self.height:
            raise ValueError(
                f"{rows.shape[1]} rows after {self._received} are more than the {self.height} of the image"
            )
        return rows


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _read(
    graph: nnx.GraphDef[StreamModel],
    chunk_size: int,
    normalization: Normalization | None,
    variables: Any,
    state: StreamState,
    strip: Num[Array, "b y x colours"],
    rows: Int[Array, ""] | None,
) -> tuple[StreamState, Float[Array, "b y x classes"] | None]:
    model = nnx.merge(graph, variables)
    options: dict[str, Any] = {"rows": rows, "chunk_size": chunk_size, "normalization": normalization}
    if model.readout.reads in DENSE:
        return read_dense_rows(model, state, strip, **options)
    return read_rows(model, state, strip, **options), None


@partial(jax.jit, static_argnums=0)
def _last_pixels(
    graph: nnx.GraphDef[StreamModel], variables: Any, last: Float[Array, "b 1 cols classes"]
) -> Float[Array, "b y x classes"]:
    return nnx.merge(graph, variables).readout.of_last_pixels(last)


@partial(jax.jit, static_argnums=(0, 1))
def _predict(
    graph: nnx.GraphDef[StreamModel], cols: int, variables: Any, state: StreamState
) -> Float[Array, "b classes"]:
    return read_out(nnx.merge(graph, variables), state, cols=cols)


def _load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what a stream saved: its identity and its arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no saved stream, or damaged.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as contents:
            arrays = dict(contents)
        return json.loads(str(arrays.pop("identity"))), arrays
    except FileNotFoundError:
        raise
    # What NumPy and zipfile raise of a file that is something else, or cut off; NumPy would advise to unpickle it.
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no state that ImageStream.save wrote, or it is damaged") from error
