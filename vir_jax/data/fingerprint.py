"""What tells one data set from another: how many examples, their names and labels, and a sample of their images.

A run that goes on must meet the examples that it would have met. To read all of them costs an epoch; so the names of at
most 1,024 examples are taken and the labels and images of 64, evenly spaced. A small set is taken whole.
"""

import concurrent.futures
import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vir_jax.data.masks import is_mask
from vir_jax.data.source import Source

NAMES, IMAGES = 1024, 64
_THREADS = 16  # Examples may lie behind a network.

Fingerprint = dict[str, Any]
"""JSON data: "examples", "names", "labels", "images"."""


def fingerprint(source: Source) -> Fingerprint:
    """Return what `difference` compares of a source.

    What all names begin with is left out, so that a folder may be moved. Of an example that cannot be read, nothing but
    its name is kept.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        names = list(pool.map(source.name, _spread(len(source), NAMES)))
        examples = list(pool.map(lambda index: _read(source, index), _spread(len(source), IMAGES)))
    beginning = len(os.path.commonprefix(names))  # noqa: RUF071 - of texts, not of paths
    return {
        "examples": len(source),
        "names": _digest(json.dumps([name[beginning:] for name in names]).encode()),
        "labels": [label for label, _ in examples],
        "images": [image for _, image in examples],
    }


def difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words how the data of one `fingerprint` differ from those of another; None where they are the same.

    Images that were repaired or encoded anew one by one are no other data: they are logged, up to half of the sample.
    """
    if stored["examples"] != now["examples"]:
        return f"{stored['examples']:,} examples, now {now['examples']:,}"
    if stored["names"] != now["names"]:
        return f"as many examples ({now['examples']:,}), but under other names or in another order"
    places = _spread(now["examples"], IMAGES)
    relabelled = _changed(places, stored["labels"], now["labels"])
    if relabelled:
        return (
            f"as many examples of the same names, but other labels, such as that of example {relabelled[0]}"
        )
    images = _changed(places, stored["images"], now["images"])
    if 2 * len(images) > len(places):
        return (
            f"as many examples of the same names and labels, but other images: {len(images)} of {len(places)} that were"
            f" compared, such as example {images[0]}"
        )
    if images:
        logging.warning("these training images have changed, of %d compared: %s", len(places), images)
    return None


def _changed(places: Sequence[int], stored: Sequence[Any], now: Sequence[Any]) -> list[int]:
    return [
        place
        for place, old, new in zip(places, stored, now, strict=True)
        if old != new and None not in (old, new)
    ]


def _spread(size: int, count: int) -> list[int]:
    """Return at most `count` of the numbers below `size`, evenly spaced."""
    return [index * size // count for index in range(count)] if size > count else list(range(size))


def _read(source: Source, index: int) -> tuple[int | str | None, str | None]:
    """Label, or digest of the labels of all pixels, and digest of the image as it is stored."""
    try:
        example = source[index]
        image, labelled = example["image"], example["label"]
        label = _digest_pixels(labelled) if is_mask(labelled) else operator.index(labelled)
    except Exception as error:  # Whatever the storage raises. The loader will meet it again, and judge it.
        logging.warning("example %d cannot be read: %s: %s", index, type(error).__name__, error)
        return None, None
    return label, _digest(image) if isinstance(image, bytes) else _digest_pixels(image)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _digest_pixels(pixels: np.ndarray) -> str:
    return _digest(repr(pixels.shape).encode() + pixels.tobytes())
