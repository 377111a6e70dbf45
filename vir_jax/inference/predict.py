"""The classes of image files, by a checkpoint of a run or by a model from elsewhere."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vir_jax.inference.files import Window
from vir_jax.inference.image_stream import ImageStream
from vir_jax.inference.views import FilePath, Viewer, attempt, failure, find_images, viewer_fields
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import make_predict
from vir_jax.tasks.classification import Classification, check_classifies

# Images classified together, at most.
BATCH_SIZE = 16

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
class Classifier(Viewer):
    """A model and what it takes to classify image files with it.

    Attributes:
      probabilities: of logits.
    """

    probabilities: Callable[[Array], Array]


def classifier_of(run: Run) -> Classifier:
    """Return the classifier of a run.

    Raises:
      ValueError: its task is another.
    """
    check_classifies(run.task)
    assert isinstance(run.task, Classification)
    return Classifier(**viewer_fields(run), probabilities=run.task.probabilities)


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
            _classify_files, forward, functools.partial(source.view, window=window), batch
        )
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        for file, result in zip(part, logits_of(part), strict=True):
            yield _prediction(file, result, source, top)


def _prediction(file: Path, result: Logits | Exception, classifier: Classifier, top: int) -> Prediction:
    if isinstance(result, Exception):
        return Prediction(str(file), (), failure(result))
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
    images = [attempt(transform, file) for file in files]
    good = [image for image in images if not isinstance(image, Exception)]
    if not good:
        return images
    padding = [np.zeros_like(good[0])] * (batch - len(good))
    logits = iter(np.asarray(forward(np.stack(good + padding))))
    return [image if isinstance(image, Exception) else next(logits) for image in images]


def _stream_files(
    classifier: Classifier, window: Window | None, files: Sequence[Path]
) -> list[Logits | Exception]:
    return [attempt(functools.partial(_stream_file, classifier, window), file) for file in files]


def _stream_file(classifier: Classifier, window: Window | None, file: Path) -> Logits:
    (height, width), strips = classifier.strips(file, window)
    normalization = (classifier.mean, classifier.std)
    stream = ImageStream(classifier.model, width=width, height=height, normalization=normalization)
    for rows in strips:
        stream.push(rows)
    return np.asarray(stream.predict()[0])
