"""Batches for training and evaluation, loaded by threads with Grain.

Training examples stand in one endless global order: epoch after epoch, each shuffled on its own. Which
example stands at position p, and all randomness in preparing it, are pure functions of (seed, p). A batch is
the next `batch_size` positions, and each process loads the rows of it that its devices hold: a batch is the same
however many processes share it, and the state of a loader is no more than a position.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Int32, UInt8

from vir_jax.data.augment import AugmentConfig, augment_example
from vir_jax.data.corrupt import MAX_CORRUPT_FRACTION, check_corrupt, read_example
from vir_jax.data.decode import decode_image
from vir_jax.data.errors import CorruptExampleError, TooManyCorruptError
from vir_jax.data.masks import check_same_size, eval_mask, is_mask
from vir_jax.data.pixels import WHITE, Colour
from vir_jax.data.resize import eval_transform, size_pair
from vir_jax.data.source import Source, is_per_pixel
from vir_jax.label_maps import IGNORED

# Examples tried for one place in a batch before giving up.
MAX_ATTEMPTS = 20
# Examples that a thread prepares at a time, at most.
MAX_CHUNK_SIZE = 8
# Doubtful images that are named in the log; of a folder full of them the first ones say enough.
MAX_WARNINGS = 20


class TrainBatch(TypedDict):
    """What a step takes, before the device's part of the augmentation."""

    image: UInt8[np.ndarray, "b y x 3"]
    label: Int32[np.ndarray, " b"] | UInt8[np.ndarray, "b y x"]


class EvalBatch(TypedDict):
    """As `TrainBatch`; entries whose mask is False are padding or corrupt and must not be counted."""

    image: UInt8[np.ndarray, "b y x 3"]
    label: Int32[np.ndarray, " b"] | UInt8[np.ndarray, "b y x"]
    mask: Bool[np.ndarray, " b"]


# --- Training ---


def train_loader(
    source: Source,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    augment: AugmentConfig,
    seed: int,
    rows: Sequence[int] | None = None,
    num_threads: int | None = None,
    prefetch: int = 2,
    max_corrupt_fraction: float = MAX_CORRUPT_FRACTION,
    background: Colour = WHITE,
) -> "TrainLoader":
    """Return endless batches of shuffled and augmented examples, or some rows of each.

    Args:
      source: the examples.
      batch_size: examples per batch, over all processes.
      image_size: side, or (height, width), of the images.
      augment: what is done to each image.
      seed: of order and augmentation, non-negative.
      rows: of each batch, those to load here, ascending; None: all.
      num_threads: threads that read and decode; None: one per core. The batches do not depend on it.
      prefetch: batches prepared ahead.
      max_corrupt_fraction: share of corrupt examples above which `TooManyCorruptError` is raised; see
        `vir_jax.data.corrupt`. Those loaded here are counted.
      background: RGB, 0 to 255, that shows where an image is transparent.

    Raises:
      ValueError: an empty source, or arguments out of range.
    """
    places = _Places(batch_size, _check_rows(rows, batch_size))
    _check_arguments(source, num_threads, prefetch)
    # Grain adds the epoch to the seed of its shuffle; hashing keeps the orders of neighbouring seeds apart.
    shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    load = functools.partial(
        _load_augmented, source=source, size=size_pair(image_size), config=augment, background=background
    )
    examples = (
        grain.MapDataset.range(len(source))
        .random_map(load, seed=augment_seed)  # ahead of the shuffle: random by epoch and example
        .shuffle(seed=shuffle_seed)
        .repeat()
    )
    return TrainLoader(
        examples,
        places=places,
        batching=_Batching(len(places.rows), num_threads or _num_cores(), prefetch),
        max_corrupt_fraction=max_corrupt_fraction,
        identity={"seed": seed, "examples": len(source)},
    )


class TrainLoader(Iterator[TrainBatch]):
    """The iterator that `train_loader` makes.

    Attributes:
      skipped: corrupt examples skipped by this loader. Another example, drawn at random, takes the place of
        each, so that processes stay in step.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        *,
        places: "_Places",
        batching: "_Batching",
        max_corrupt_fraction: float,
        identity: dict[str, int],
    ):
        self._examples = examples  # the global order, endless
        self._places = places
        self._batching = batching
        self._max_corrupt_fraction = max_corrupt_fraction
        self._identity = identity  # what a saved state must agree with
        self._position = 0  # in the global order, of the next batch's first example
        self._batches: grain.DatasetIterator | None = None
        self._corrupt: set[int] = set()
        self.skipped = 0

    def __next__(self) -> TrainBatch:
        if self._batches is None:
            load = functools.partial(_load_place, self._examples, self._places, self._position)
            own = grain.MapDataset.range(len(self._examples) - self._position).map(load)
            self._batches = self._batching.iterate(own)
        batch = next(self._batches)
        self._position += self._places.batch_size
        corrupt = batch.pop("corrupt")
        corrupt = corrupt[corrupt >= 0]
        self.skipped += corrupt.size
        self._corrupt.update(corrupt.tolist())
        check_corrupt(len(self._corrupt), self._identity["examples"], self._max_corrupt_fraction)
        return batch

    def get_state(self) -> bytes:
        """Return the position after the last batch taken, as JSON; the same in every process."""
        return json.dumps({"position": self._position, **self._identity}).encode()

    def set_state(self, state: bytes) -> None:
        """Go on after the batch that came before `state` was taken, with any number of threads or processes.

        Raises:
          ValueError: the state belongs to another seed or to a source of another length.
        """
        values = json.loads(state)
        for name, own in self._identity.items():
            if values[name] != own:
                raise ValueError(
                    f"the saved state has {name} = {values[name]}, this loader {name} = {own}: the examples "
                    "would come in another order. Use the data and the seed that the state was saved with"
                )
        self.close()
        self._position = values["position"]

    def close(self) -> None:
        """Stop the threads. Asking for the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _load_place(examples: grain.MapDataset, places: "_Places", start: int, index: int) -> dict[str, Any]:
    """Return the `index`-th example loaded here, counted from position `start` of the global order."""
    return examples[start + places.position(index)]


def _load_augmented(
    index: int,
    rng: np.random.Generator,
    *,
    source: Source,
    size: tuple[int, int],
    config: AugmentConfig,
    background: Colour,
) -> dict[str, Any]:
    """Return a random view of example `index`, or of one drawn at random where that is corrupt."""
    corrupt = np.full(MAX_ATTEMPTS, -1)  # numbers of those tried in vain
    for attempt in range(MAX_ATTEMPTS):
        try:
            example = read_example(source, index)
            decode = _decoder(source, index, background)
            image, label = augment_example(example, size, config, rng, decode=decode)
        except CorruptExampleError as error:
            logging.warning("skipped corrupt example %s: %s", source.name(index), error)
            corrupt[attempt] = index
            index = int(rng.integers(len(source)))
        else:
            return {"image": image, "label": label, "corrupt": corrupt}
    raise TooManyCorruptError(f"{MAX_ATTEMPTS} examples drawn in a row were corrupt; the log names them")


# --- Evaluation ---


def eval_loader(
    source: Source,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    crop_fraction: float = 0.875,
    rows: Sequence[int] | None = None,
    num_threads: int | None = None,
    prefetch: int = 2,
    max_corrupt_fraction: float = MAX_CORRUPT_FRACTION,
    background: Colour = WHITE,
) -> "EvalLoader":
    """Return one pass over a source: every example exactly once over all processes, and as many batches in each.

    Args:
      source: the examples, read in their own order.
      batch_size: examples per batch, over all processes; the last batch is padded to it.
      image_size: side, or (height, width), of the images.
      crop_fraction: see `eval_transform`.
      rows: of each batch, those to load here, ascending; None: all.
      num_threads: threads that read and decode; None: one per core.
      prefetch: batches prepared ahead.
      max_corrupt_fraction: as for `train_loader`.
      background: as for `train_loader`.

    Raises:
      ValueError: an empty source, or arguments out of range.
    """
    places = _Places(batch_size, _check_rows(rows, batch_size))
    _check_arguments(source, num_threads, prefetch)
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction is {crop_fraction}: expected 0 < crop_fraction <= 1")
    num_batches = -(-len(source) // batch_size)
    load = functools.partial(
        _load_centered,
        source=source,
        size=size_pair(image_size),
        crop_fraction=crop_fraction,
        background=background,
    )
    own = grain.MapDataset.range(num_batches * len(places.rows)).map(places.position)
    return EvalLoader(
        own.map(load),
        num_examples=len(source),
        batching=_Batching(len(places.rows), num_threads or _num_cores(), prefetch),
        max_corrupt_fraction=max_corrupt_fraction,
    )


class EvalLoader:
    """The iterable that `eval_loader` makes; each `iter()` starts a new pass.

    Attributes:
      skipped: corrupt examples met so far in the pass that was started last.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        *,
        num_examples: int,
        batching: "_Batching",
        max_corrupt_fraction: float,
    ):
        self._examples = examples  # with the padding
        self._num_examples = num_examples  # without it
        self._batching = batching
        self._max_corrupt_fraction = max_corrupt_fraction
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._examples) // self._batching.batch_size

    def __iter__(self) -> Iterator[EvalBatch]:
        self.skipped = 0
        batches = self._batching.iterate(self._examples)
        try:
            for batch in batches:
                self.skipped += int(batch.pop("skipped").sum())
                check_corrupt(self.skipped, self._num_examples, self._max_corrupt_fraction)
                yield batch
        finally:
            batches.close()


def _load_centered(
    index: int, *, source: Source, size: tuple[int, int], crop_fraction: float, background: Colour
) -> dict[str, Any]:
    """Return the central crop of example `index`, or a masked blank where that is padding or corrupt."""
    no_label = np.full(size, IGNORED, np.uint8) if is_per_pixel(source) else np.int32(0)
    blank = {"image": np.zeros((*size, 3), np.uint8), "label": no_label, "mask": np.bool_(False)}
    if index >= len(source):
        return {**blank, "skipped": 0}
    try:
        example = read_example(source, index)
        image, label = example["image"], example["label"]
        pixels = _decoder(source, index, background)(image) if isinstance(image, bytes) else image
        if is_mask(label):
            check_same_size(pixels, label)
    except CorruptExampleError as error:
        logging.warning("skipped corrupt example %s: %s", source.name(index), error)
        return {**blank, "skipped": 1}
    return {
        "image": eval_transform(pixels, size, crop_fraction),
        "label": eval_mask(label, size, crop_fraction) if is_mask(label) else np.int32(label),
        "mask": np.bool_(True),
        "skipped": 0,
    }


# --- Both ---


def _decoder(source: Source, index: int, background: Colour) -> Callable[..., UInt8[np.ndarray, "y x 3"]]:
    """Return `decode_image` for one example, which is named where it is doubtful."""

    def warn(doubt: str) -> None:
        logging.log_first_n(logging.WARNING, "%s: %s", MAX_WARNINGS, source.name(index), doubt)

    return functools.partial(decode_image, background=background, warn=warn)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where in the global order the examples stand that are loaded here."""

    batch_size: int  # over all processes
    rows: Sequence[int]  # of each batch, loaded here

    def position(self, index: int) -> int:
        """Return the place in the global order of the `index`-th example loaded here."""
        batch, row = divmod(index, len(self.rows))
        return batch * self.batch_size + self.rows[row]


@dataclasses.dataclass(frozen=True)
class _Batching:
    """How examples become batches. What is in them does not depend on threads and prefetch."""

    batch_size: int
    threads: int
    prefetch: int  # batches ahead

    def iterate(self, examples: grain.MapDataset) -> grain.DatasetIterator:
        """Return batches of consecutive examples; an incomplete last one is left out.

        Threads work on chunks of a few examples: handing over each example by itself costs more than a tenth
        of a millisecond, in the one thread that asks for batches.
        """
        chunk_size = max(size for size in range(1, MAX_CHUNK_SIZE + 1) if self.batch_size % size == 0)
        chunks_per_batch = self.batch_size // chunk_size
        options = grain.ReadOptions(
            num_threads=self.threads, prefetch_buffer_size=max(self.threads, self.prefetch * chunks_per_batch)
        )
        chunks = examples.batch(chunk_size, drop_remainder=True).to_iter_dataset(options)
        return iter(chunks.batch(chunks_per_batch, drop_remainder=True, batch_fn=_concatenate))


def _concatenate(chunks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _num_cores() -> int:
    """Return the cores that this process may use, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_rows(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    rows = range(batch_size) if rows is None else tuple(rows)
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows are {rows}: expected ascending numbers, 0 <= row < batch_size = {batch_size}")
    return rows


def _check_arguments(source: Source, num_threads: int | None, prefetch: int) -> None:
    if not len(source):
        raise ValueError("the source has no examples")
    for name, value in {"num_threads": num_threads, "prefetch": prefetch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
