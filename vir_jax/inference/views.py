"""Image files as a model reads them: resized and cropped as for evaluation, or at their own size in strips."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from vir_jax.data import CorruptImageError, eval_transform
from vir_jax.data.decode import MAX_PIXELS
from vir_jax.data.pixels import Colour
from vir_jax.data.walk import EXTENSIONS, describe
from vir_jax.data.walk import find_images as find_images_below
from vir_jax.data.zarr import is_zarr
from vir_jax.inference.files import ImageFile, Window, open_image
from vir_jax.models import VisionModel
from vir_jax.runs.load import Run
from vir_jax.runs.model import ModelFunctions, image_size
from vir_jax.runs.state import Params

FilePath = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Viewer:
    """A model and what it takes to show it image files.

    Attributes:
      functions: the model as pure functions of `params`.
      params: its weights.
      class_names: in the order of the logits.
      image_size: (height, width) that files are resized and cropped to.
      mean: of the colours in [0, 1].
      std: that they are divided by.
      crop_fraction: see `vir_jax.data.eval_transform`.
      background: RGB that shows where an image is transparent.
    """

    functions: ModelFunctions
    params: Params
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    background: Colour

    @functools.cached_property
    def model(self) -> VisionModel:
        """The model with these weights, as a module."""
        return self.functions.model(self.params)

    def view(self, file: Path, window: Window | None) -> UInt8[np.ndarray, "y x 3"]:
        """Return an image as it is evaluated.

        Raises:
          CorruptImageError: it cannot be decoded, is smaller than a patch, or too large to be decoded whole.
          OSError: it cannot be read.
        """
        image = self._open(file, window)
        if image.height * image.width > MAX_PIXELS:
            raise CorruptImageError(
                f"{image.width} x {image.height} pixels: more than the {MAX_PIXELS:,} that are decoded; --stream reads"
                " it"
            )
        return eval_transform(np.concatenate(list(image.strips())), self.image_size, self.crop_fraction)

    def strips(
        self, file: Path, window: Window | None
    ) -> tuple[tuple[int, int], Iterator[UInt8[np.ndarray, "_y x 3"]]]:
        """Return (height, width) of an image less the few pixels at its edges beyond a multiple of the patch, and it.

        Errors are those of `view`, but for an image too large.
        """
        image, patch = self._open(file, window), self.functions.abstract.patch
        height, width = (side // patch * patch for side in (image.height, image.width))
        top, left = (image.height - height) // 2, (image.width - width) // 2

        def rows() -> Iterator[UInt8[np.ndarray, "_y x 3"]]:
            y = 0
            for strip in image.strips():
                yield strip[max(top - y, 0) : max(top + height - y, 0), left : left + width]
                y += len(strip)

        return (height, width), rows()

    def _open(self, file: Path, window: Window | None) -> ImageFile:
        image, patch = (
            open_image(file, background=self.background, window=window),
            self.functions.abstract.patch,
        )
        if min(image.height, image.width) < patch:
            raise CorruptImageError(
                f"{image.width} x {image.height} pixels: smaller than one patch of the model, {patch} x {patch}"
            )
        return image


def viewer_fields(run: Run) -> dict[str, Any]:
    """Return the fields of a `Viewer` of a run."""
    data = run.config.data
    return {
        "functions": run.functions,
        "params": run.params,
        "class_names": run.class_names,
        "image_size": image_size(run.config.model),
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "crop_fraction": data.crop_fraction,
        "background": tuple(data.background),
    }


def find_images(paths: FilePath | Iterable[FilePath]) -> Iterator[Path]:
    """Yield the files, and in place of a folder the images in and below it, sorted.

    What is missing, and a folder without images, stays in the list. What was left out of a folder is counted and
    logged.
    """
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if not path.is_dir() or is_zarr(path):
            yield path
            continue
        left_out: Counter[str] = Counter()
        found = [Path(file) for file in find_images_below(path, left_out)]
        if left_out:
            logging.warning("left out in %s: %s", path, describe(left_out))
        yield from found or [path]


def attempt(function: Callable[[Path], Any], file: Path) -> Any:
    """Return what a function makes of a file, or the error that tells why the file cannot be read."""
    try:
        return function(file)
    except (OSError, CorruptImageError) as error:
        return error


def failure(error: Exception) -> str:
    """Return such an error in words."""
    if isinstance(error, IsADirectoryError):
        return f"no images in this folder; looked for {', '.join(EXTENSIONS)}"
    return getattr(error, "strerror", None) or str(error)
