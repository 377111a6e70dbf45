"""Corrupt examples: what counts as one, and how many a split may have.

One rule for training and evaluation: of the examples of a split, each counted once however often it comes, a fraction
may be corrupt, `max_corrupt_fraction`; of fewer than 1,000 examples as many as of 1,000. A fraction of 0.01 so bears 10
in a small split and 1 % of a large one; a fraction of 0 bears none.
"""

import math
import operator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from vir_jax.data.decode import decode_image
from vir_jax.data.errors import CorruptExampleError, TooManyCorruptError, reason
from vir_jax.data.masks import check_mask, check_same_size, is_mask
from vir_jax.data.source import Example, Source, is_per_pixel

# What a config starts from.
MAX_CORRUPT_FRACTION = 0.01
# The fraction is of at least this many examples: one bad image of a few is no trend.
MIN_EXAMPLES = 1000
# Examples of a split that are looked at before it is used.
CHECKED_EXAMPLES = 1000
# By which a sample may be worse than the rule: what chance does not explain.
STANDARD_DEVIATIONS = 6


def read_example(source: Source, index: int) -> Example:
    """Return `source[index]`.

    Raises:
      CorruptExampleError: it cannot be read, or has an impossible label or impossible pixels.
    """
    try:
        example = source[index]
        image, label = example["image"], example["label"]
        number = None if is_per_pixel(source) else operator.index(label)
    except CorruptExampleError:  # a source that decodes masks says why
        raise
    except Exception as error:  # whatever the storage raises: the example is lost, the run need not be
        raise CorruptExampleError(f"unreadable: {reason(error)}") from error
    if number is None:
        check_mask(label, source.num_classes)
    elif not 0 <= number < source.num_classes:
        raise CorruptExampleError(f"label {label} is not one of {source.num_classes} classes")
    if not isinstance(image, bytes):
        described = (
            f"{getattr(image, 'shape', type(image).__name__)} of {getattr(image, 'dtype', 'no dtype')}"
        )
        rgb = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)
        if not (rgb and image.size):
            raise CorruptExampleError(f"pixels {described}: expected uint8 [height, width, 3]")
    return example


def check_corrupt(corrupt: int, num_examples: int, max_corrupt_fraction: float) -> None:
    """Hold the number of corrupt examples against the rule.

    Args:
      corrupt: examples found corrupt so far, each counted once.
      num_examples: of the split.
      max_corrupt_fraction: see the module's docstring.

    Raises:
      TooManyCorruptError: more than the rule bears.
    """
    allowed = _allowed(num_examples, max_corrupt_fraction)
    if corrupt > allowed:
        raise TooManyCorruptError(_message(corrupt, num_examples, allowed, max_corrupt_fraction))


def check_examples(source: Source, *, max_corrupt_fraction: float, num_threads: int) -> None:
    """Look at a split before it is used: read and decode its examples, or `CHECKED_EXAMPLES` spread over it.

    The corrupt ones are named in the log. All processes look at the same, and come to the same end.

    Raises:
      TooManyCorruptError: more of them are corrupt than the rule bears; or so many of a sample that the split breaks
        it, too.
    """
    indices = spread(len(source), CHECKED_EXAMPLES)
    with ThreadPoolExecutor(num_threads) as threads:
        corrupt = sum(threads.map(lambda index: _is_corrupt(source, index), indices))
    check_corrupt(corrupt, len(source), max_corrupt_fraction)
    if len(indices) < len(source):
        expected = _allowed(len(source), max_corrupt_fraction) * len(indices) / len(source)
        bound = math.floor(expected + STANDARD_DEVIATIONS * math.sqrt(expected))
        if corrupt > bound:
            raise TooManyCorruptError(_message(corrupt, len(indices), bound, max_corrupt_fraction))


def _allowed(num_examples: int, max_corrupt_fraction: float) -> int:
    return math.floor(round(max_corrupt_fraction * max(num_examples, MIN_EXAMPLES), 6))  # 0.57 * 1000 < 570


def _message(corrupt: int, num_examples: int, allowed: int, max_corrupt_fraction: float) -> str:
    return (
        f"{corrupt:,} of {num_examples:,} examples were corrupt; config.data.max_corrupt_fraction = "
        f"{max_corrupt_fraction:g} bears {allowed:,} of so many. The log names them: mend or remove them, "
        "or raise the fraction"
    )


def spread(count: int, chosen: int) -> list[int]:
    """Return at most `chosen` numbers from 0 to count - 1, evenly spread, ends included."""
    return np.linspace(0, count - 1, min(count, chosen)).round().astype(int).tolist()


def _is_corrupt(source: Source, index: int) -> bool:
    try:
        example = read_example(source, index)
        image, label = example["image"], example["label"]
        if isinstance(image, bytes):
            image = decode_image(image, warn=lambda _: None)  # the loaders tell what is doubtful
        if is_mask(label):
            check_same_size(image, label)
    except CorruptExampleError as error:
        logging.warning("corrupt example %s: %s", source.name(index), error)
        return True
    return False
