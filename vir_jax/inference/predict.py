"""The classes of image files, by a checkpoint of a run or by a model from elsewhere."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, UInt8

from vir_jax.data import CorruptImageError, eval_transform
from vir_jax.data.decode import MAX_PIXELS
from vir_jax.data.pixels import Colour
from vir_jax.data.walk import EXTENSIONS, describe
from vir_jax.data.walk import find_images as find_images_below
from vir_jax.data.zarr import is_zarr
from vir_jax.inference.files import ImageFile, Window, open_image
from vir_jax.inference.image_stream import ImageStream
from vir_jax.models import VisionModel
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import ModelFunctions, image_size, make_predict
from vir_jax.runs.state import Params
from vir_jax.tasks.classification import Classification, check_classifies

# Images classified together, at most.
BATCH_SIZE = 16

FilePath = str | os.PathLike[str]
Logits = Float[np.ndarray, "classes"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a file shows, or why that is not known."""

    file: str
    classes: tuple[tuple[str, float], ...]  # Names and probabilities, the most probable first.
    error: str | None = None

    def __str__(self) -> str:
        found = self.error or "  ".join(f"{name} {probability:.2%}" for name, probability in self.classes)
        return f"{self.file}: {found}"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model and what it takes to classify image files with it.

    Attributes:
      functions: the model as pure functions of `params`.
      params: its weights.
      class_names: in the order of the logits.
      image_size: (height, width) that files are resized and cropped to.
      mean: of the colours in [0, 1].
      std: that they are divided by.
      crop_fraction: see `vir_jax.data.eval_transform`.
      background: RGB that shows where an image is transparent.
      probabilities: of logits.
    """

    functions: ModelFunctions
    params: Params
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    background: Colour
    probabilities: Callable[[Array], Array]

    @functools.cached_property
    def model(self) -> VisionModel:
        """The model with these weights, as a module."""
        return self.functions.model(self.params)


def classifier_of(run: Run) -> Classifier:
    """Return the classifier of a run.

    Raises:
      ValueError: its task is another.
    """
    check_classifies(run.task)
    assert isinstance(run.task, Classification)
    data = run.config.data
    return Classifier(
        functions=run.functions,
        params=run.params,
        class_names=run.class_names,
        image_size=image_size(run.config.model),
        mean=tuple(data.mean),
        std=tuple(data.std),
        crop_fraction=data.crop_fraction,
        background=tuple(data.background),
        probabilities=run.task.probabilities,
    )


def predict_files(
    source: str | os.PathLike[str] | Classifier,
    paths: FilePath | Sequence[FilePath],
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    top: int = 5,
    streamed: bool = False,
    window: Window | None = None,
) -> Iterator[Prediction]:
    """Classify image files one after another; those that cannot be read are told, and do not stop the rest.

    Args:
      source: folder of a run, or a classifier.
      paths: a file or folder, or several. Of a folder the images are taken, those of folders below it too.
      checkpoint: of a run: "last", "best" or the number of a step.
      weights: of a run: "raw" or "ema"; None takes the average where it kept one.
      top: classes named for each file.
      streamed: read images at their own size, row by row, less the few pixels at the edges by which a side exceeds a
        multiple of the patch; otherwise they are resized and cropped as for evaluation. TIFF and .npy files may be
        larger than memory then.
      window: part of each image to read, (x, y, width, height) in pixels; None: all of it.

    Raises:
      ValueError: no such checkpoint or weights; a model that cannot be streamed.
    """
    quiet_libraries()
    if not isinstance(source, Classifier):
        source = classifier_of(load_run(source, checkpoint, weights=weights))
    files = list(find_images(paths))
    if streamed:
        source.model.check_streamable()
        logits_of = functools.partial(_stream_files, source, window)
        batch = 1
    else:
        predict = make_predict(source.functions, mean=source.mean, std=source.std)
        forward = functools.partial(predict, source.params, mode="auto")
        batch = max(min(BATCH_SIZE, len(files)), 1)
        logits_of = functools.partial(
            _classify_files, forward, functools.partial(_whole_image, source, window), batch
        )
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        for file, result in zip(part, logits_of(part), strict=True):
            yield _prediction(file, result, source, top)


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


def _prediction(file: Path, result: Logits | Exception, classifier: Classifier, top: int) -> Prediction:
    if isinstance(result, IsADirectoryError):
        return Prediction(str(file), (), f"no images in this folder; looked for {', '.join(EXTENSIONS)}")
    if isinstance(result, Exception):
        return Prediction(str(file), (), getattr(result, "strerror", None) or str(result))
    probabilities = np.asarray(classifier.probabilities(jnp.asarray(result)[None])[0])
    best = np.argsort(-probabilities, kind="stable")[:top]
    names = classifier.class_names
    return Prediction(str(file), tuple((names[i], float(probabilities[i])) for i in best))


def _classify_files(
    forward: Callable[[UInt8[np.ndarray, "b y x 3"]], Any],
    transform: Callable[[Path], UInt8[np.ndarray, "y x 3"]],
    batch: int,
    files: Sequence[Path],
) -> list[Logits | Exception]:
    """Return the logits of each file, or what went wrong; one call of the model, always of `batch` images."""
    images = [_attempt(transform, file) for file in files]
    good = [image for image in images if not isinstance(image, Exception)]
    if not good:
        return images
    padding = [np.zeros_like(good[0])] * (batch - len(good))
    logits = iter(np.asarray(forward(np.stack(good + padding))))
    return [image if isinstance(image, Exception) else next(logits) for image in images]


def _stream_files(
    classifier: Classifier, window: Window | None, files: Sequence[Path]
) -> list[Logits | Exception]:
    return [_attempt(functools.partial(_stream_file, classifier, window), file) for file in files]


def _attempt(function: Callable[[Path], Any], file: Path) -> Any:
    try:
        return function(file)
    except (OSError, CorruptImageError) as error:
        return error


def _whole_image(classifier: Classifier, window: Window | None, file: Path) -> UInt8[np.ndarray, "y x 3"]:
    image = open_image(file, background=classifier.background, window=window)
    _check_large_enough(image, classifier.functions.abstract.patch)
    if image.height * image.width > MAX_PIXELS:
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels: more than the {MAX_PIXELS:,} that are decoded; --stream reads it"
        )
    return eval_transform(
        np.concatenate(list(image.strips())), classifier.image_size, classifier.crop_fraction
    )


def _stream_file(classifier: Classifier, window: Window | None, file: Path) -> Logits:
    model = classifier.model
    image = open_image(file, background=classifier.background, window=window)
    _check_large_enough(image, model.patch)
    height, width = (side // model.patch * model.patch for side in (image.height, image.width))
    top, left = (image.height - height) // 2, (image.width - width) // 2
    stream = ImageStream(model, width=width, height=height, normalization=(classifier.mean, classifier.std))
    y = 0
    for strip in image.strips():
        rows = strip[max(top - y, 0) : max(top + height - y, 0), left : left + width]
        stream.push(rows)
        y += len(strip)
    return np.asarray(stream.predict()[0])


def _check_large_enough(image: ImageFile, patch: int) -> None:
    if min(image.height, image.width) < patch:
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels: smaller than one patch of the model, {patch} x {patch}"
        )
