"""How fast images are decoded and augmented: `python -m benchmarks.input_pipeline`.

Two kinds of rows, in images per second and core, medians over repeats: one thread calling the functions, and
the whole training loader (Grain, threads on all cores, batches of 64) divided by the cores.

The images are 300 of ImageNet where ../shared/data/ilsvrc holds its archive, else the two photographs that ship
with scikit-learn. The bar: 500 images/s per core for crop and flip to 224, and half of what crop and flip reaches
for the full recipe. The exit status is 1 where the loader misses it.
"""

import dataclasses
import importlib.resources
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import PIL
import simplejpeg

from benchmarks.timing import processor
from vir_jax.data import AugmentConfig, Example, augment_image, decode_image, eval_transform, train_loader

ROOT = Path(__file__).parents[1]
ARCHIVE = ROOT.parent / "shared" / "data" / "ilsvrc" / "ILSVRC2012_img_train.tar"
RESULTS = ROOT / "benchmarks" / "results" / "input_pipeline.json"

IMAGE_SIZE = 224
BATCH_SIZE = 64
REPEATS = 7
IMAGES_PER_REPEAT = 600
BAR = 500.0  # images/s per core, crop and flip
FULL_RECIPE_SHARE = 0.5

CROP_AND_FLIP = AugmentConfig(crop="resized", hflip=0.5)
FULL_RECIPE = dataclasses.replace(CROP_AND_FLIP, randaugment_ops=2, erase=0.25)


class Images:
    """Encoded images in memory, as a source."""

    num_classes = 1
    class_names = ("image",)

    def __init__(self, images: list[bytes]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": 0}

    def name(self, index: int) -> str:
        """The number of the image."""
        return str(index)


def load_images() -> tuple[list[bytes], str]:
    """JPEGs, and where they are from."""
    if not ARCHIVE.is_file():
        folder = importlib.resources.files("sklearn.datasets") / "images"
        images = [(folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")]
        return images, "scikit-learn's two photographs (no ImageNet here)"
    images = []
    with tarfile.open(ARCHIVE) as classes:
        for member in classes:
            with tarfile.open(fileobj=io.BytesIO(classes.extractfile(member).read())) as files:
                images += [files.extractfile(file).read() for file in files]
    return images, f"{len(images)} ImageNet training images"


def rates_of_function(function: Callable[[bytes], object], images: list[bytes]) -> list[float]:
    """Images per second of one thread, one figure per repeat."""
    rates = []
    for _ in range(REPEATS):
        chosen = list(itertools.islice(itertools.cycle(images), IMAGES_PER_REPEAT))
        start = time.perf_counter()
        for image in chosen:
            function(image)
        rates.append(len(chosen) / (time.perf_counter() - start))
    return rates


def rates_of_loader(config: AugmentConfig, images: list[bytes], cores: int) -> list[float]:
    """Images per second and core of the training loader, one figure per repeat; the first batches warm up."""
    loader = train_loader(
        Images(images),
        batch_size=BATCH_SIZE,
        image_size=IMAGE_SIZE,
        augment=config,
        seed=0,
        num_threads=cores,
    )
    for _ in range(4):
        next(loader)
    batches = -(-IMAGES_PER_REPEAT * cores // BATCH_SIZE)
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(batches):
            next(loader)
        rates.append(batches * BATCH_SIZE / (time.perf_counter() - start) / cores)
    loader.close()
    return rates


def table(rows: Iterable[tuple[str, list[float]]]) -> str:
    """The rows as text: median, lowest and highest."""
    lines = [f"{'images/s per core':<34}{'median':>8}{'lowest':>8}{'highest':>9}"]
    for name, rates in rows:
        lines.append(f"{name:<34}{statistics.median(rates):>8.0f}{min(rates):>8.0f}{max(rates):>9.0f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the results."""
    images, origin = load_images()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    heights, widths = np.array([decode_image(image).shape[:2] for image in images]).T
    print(
        f"{origin}: median {np.median(heights):.0f} x {np.median(widths):.0f}, to {IMAGE_SIZE}; {cores} cores"
    )

    rng = np.random.default_rng(0)
    measured = {
        "decode, one thread": rates_of_function(decode_image, images),
        "crop and flip, one thread": rates_of_function(
            lambda image: augment_image(image, IMAGE_SIZE, CROP_AND_FLIP, rng), images
        ),
        "full recipe, one thread": rates_of_function(
            lambda image: augment_image(image, IMAGE_SIZE, FULL_RECIPE, rng), images
        ),
        "evaluation, one thread": rates_of_function(
            lambda image: eval_transform(decode_image(image), IMAGE_SIZE), images
        ),
        "crop and flip, loader": rates_of_loader(CROP_AND_FLIP, images, cores),
        "full recipe, loader": rates_of_loader(FULL_RECIPE, images, cores),
    }
    print(table(measured.items()))

    medians = {name: statistics.median(rates) for name, rates in measured.items()}
    crop_and_flip, full = medians["crop and flip, loader"], medians["full recipe, loader"]
    met = crop_and_flip >= BAR and full >= FULL_RECIPE_SHARE * crop_and_flip
    print(
        f"bar {'met' if met else 'MISSED'}: {crop_and_flip:.0f} >= {BAR:.0f}, "
        f"and {full:.0f} is {full / crop_and_flip:.0%} of it (>= {FULL_RECIPE_SHARE:.0%})"
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "unit": "images/s per core, median",
        "images": origin,
        "median_height_width": [float(np.median(heights)), float(np.median(widths))],
        "image_size": IMAGE_SIZE,
        "cores": cores,
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (cv2, np, PIL, simplejpeg)},
        "medians": {name: round(value, 1) for name, value in medians.items()},
        "repeats": {name: [round(rate, 1) for rate in rates] for name, rates in measured.items()},
        "bar_met": met,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
