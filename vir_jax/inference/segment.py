"""The masks of image files, by a run of the task segmentation: PNGs of class numbers, and images overlaid with them."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vir_jax.inference.files import Window
from vir_jax.inference.image_stream import ImageStream
from vir_jax.inference.png_rows import PngRows
from vir_jax.inference.predict import BATCH_SIZE
from vir_jax.inference.views import FilePath, Viewer, attempt, failure, find_images, viewer_fields
from vir_jax.label_maps import palette
from vir_jax.models.pixels import normalize
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.state import Params
from vir_jax.tasks.segmentation import check_segments

OVERLAY = ".overlay.png"
"""What the name of an overlay ends with."""

Pair = tuple[UInt8[np.ndarray, "n width 3"], UInt8[np.ndarray, "n width"]]
"""Rows of pixels and their labels."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """What was written of a file, or why nothing was."""

    file: str
    classes: tuple[
        tuple[str, float], ...
    ]  # Names and fractions of the pixels, the largest first; those that are there.
    mask: str = ""
    overlay: str = ""
    error: str | None = None

    def __str__(self) -> str:
        shares = "  ".join(f"{name} {share:.2%}" for name, share in self.classes)
        return f"{self.file}: {self.error or f'{self.mask}  {shares}'}"


def viewer_of(run: Run) -> Viewer:
    """Return what shows image files to the model of a run.

    Raises:
      ValueError: its task gives no class to each pixel.
    """
    check_segments(run.task)
    return Viewer(**viewer_fields(run))


def segment_files(
    workdir: str | os.PathLike[str],
    paths: FilePath | Sequence[FilePath],
    folder: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    top: int = 5,
    streamed: bool = False,
    window: Window | None = None,
) -> Iterator[Segments]:
    """Write masks of image files, one after another; those that cannot be read are told, and do not stop the rest.

    Of NAME.jpg NAME.png is written, with the colours of `palette` for the numbers of the classes, and
    NAME.overlay.png, in which they are laid over the image.

    Args:
      workdir: folder of the run.
      paths: a file or folder, or several. Of a folder the images are taken, those of folders below it too.
      folder: that is written to, made where it is absent.
      checkpoint: "last", "best" or the number of a step.
      weights: "raw" or "ema"; None takes the average where the run kept one.
      top: classes named for each file.
      streamed: read images at their own size, row by row, less the few pixels at the edges by which a side exceeds a
        multiple of the patch; masks are written as rows are read, in memory that does not grow with the height. Else
        they are resized and cropped as for evaluation, and masks are of that view.
      window: part of each image to read, (x, y, width, height) in pixels; None: all of it.

    Raises:
      ValueError: no such checkpoint or weights; a run of another task; a model that cannot be streamed.
    """
    quiet_libraries()
    viewer = viewer_of(load_run(workdir, checkpoint, weights=weights))
    folder, files = Path(folder), list(find_images(paths))
    folder.mkdir(parents=True, exist_ok=True)
    if streamed:
        viewer.model.check_streamable()
    label = jax.jit(functools.partial(_labels, viewer))
    written: set[str] = set()
    batch = 1 if streamed else max(min(BATCH_SIZE, len(files)), 1)
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        opened = (
            [attempt(functools.partial(_streamed_rows, viewer, window), file) for file in part]
            if streamed
            else (_viewed(viewer, label, window, batch, part))
        )
        for file, rows in zip(part, opened, strict=True):
            if not isinstance(rows, Exception) and file.stem in written:
                rows = ValueError(
                    f"another image of this call is called {file.stem}, too, and its mask is kept"
                )
            if not isinstance(rows, Exception):
                written.add(file.stem)
                size, pieces = rows
                rows = attempt(functools.partial(_write, size, pieces, folder), file)
            yield _segments(file, rows, viewer, folder, top)


def _labels(viewer: Viewer, params: Params, images: UInt8[Array, "b y x 3"]) -> UInt8[Array, "b y x"]:
    logits = viewer.functions.apply(params, normalize(images, viewer.mean, viewer.std), mode="auto")
    return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


def _viewed(
    viewer: Viewer, label: Callable[..., Array], window: Window | None, batch: int, files: Sequence[Path]
) -> list[Any]:
    """Return of each file its size and its only piece of rows, or what went wrong; one call of the model."""
    views = [attempt(functools.partial(viewer.view, window=window), file) for file in files]
    good = [view for view in views if not isinstance(view, Exception)]
    if not good:
        return views
    padding = [np.zeros_like(good[0])] * (batch - len(good))
    masks = iter(np.asarray(label(viewer.params, np.stack(good + padding))))
    return [
        view if isinstance(view, Exception) else (viewer.image_size, iter([(view, next(masks))]))
        for view in views
    ]


def _streamed_rows(
    viewer: Viewer, window: Window | None, file: Path
) -> tuple[tuple[int, int], Iterator[Pair]]:
    """Return the size of what is read of a file, and its rows with their labels, a row of patches at a time."""
    (height, width), strips = viewer.strips(file, window)
    normalization = (viewer.mean, viewer.std)
    stream = ImageStream(viewer.model, width=width, height=height, normalization=normalization)
    patch = viewer.model.patch

    def rows() -> Iterator[Pair]:
        waiting = np.zeros((0, width, 3), np.uint8)
        for strip in strips:
            for start in range(0, len(strip), patch):
                pushed = strip[start : start + patch]
                logits: Float[np.ndarray, "1 n width classes"] | None = stream.push(pushed)
                assert logits is not None
                waiting = np.concatenate([waiting, pushed])
                known = logits.shape[1]
                yield waiting[:known], np.argmax(logits[0], axis=-1).astype(np.uint8)
                waiting = waiting[known:]

    return (height, width), rows()


def _write(size: tuple[int, int], rows: Iterator[Pair], folder: Path, file: Path) -> dict[int, int]:
    """Write mask and overlay, and return how many pixels of each class there are."""
    (height, width), colours = size, palette()
    counts = np.zeros(len(colours), np.int64)
    with (
        PngRows(folder / f"{file.stem}.png", width=width, height=height, palette=colours) as mask,
        PngRows(folder / f"{file.stem}{OVERLAY}", width=width, height=height) as overlay,
    ):
        for pixels, labels in rows:
            mask.write(labels)
            overlay.write(((pixels.astype(np.uint16) + colours[labels]) // 2).astype(np.uint8))
            counts += np.bincount(labels.ravel(), minlength=len(colours))
    return {label: int(counts[label]) for label in np.flatnonzero(counts).tolist()}


def _segments(
    file: Path, result: dict[int, int] | Exception, viewer: Viewer, folder: Path, top: int
) -> Segments:
    if isinstance(result, Exception):
        return Segments(str(file), (), error=failure(result))
    pixels = sum(result.values())
    largest = sorted(result, key=lambda label: -result[label])[:top]
    return Segments(
        str(file),
        tuple((viewer.class_names[label], result[label] / pixels) for label in largest),
        mask=str(folder / f"{file.stem}.png"),
        overlay=str(folder / f"{file.stem}{OVERLAY}"),
    )
