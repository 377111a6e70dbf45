"""Batches for training and evaluation, loaded by threads with Grain.

Training examples stand in one endless global order: epoch after epoch, each shuffled on its own. Position p of that
order, and all randomness in preparing the example there, are pure functions of (seed, p). Shard s of n takes
positions s, s + n, s + 2n, ..., so that global step t covers the same examples however many shards share them, and
the state of a loader is no more than a position.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Int32, UInt8

from vir_jax.data.augment import AugmentConfig, augment_image
from vir_jax.data.decode import decode_image
from vir_jax.data.resize import eval_transform, size_pair
from vir_jax.data.source import CorruptExampleError, Example, Source

# The share of corrupt examples is judged once this many have been seen: one bad image in the first batch is no trend.
MIN_EXAMPLES_FOR_FRACTION = 1000
# Substitutes drawn for one corrupt example before giving up.
MAX_SUBSTITUTES = 20


class TrainBatch(TypedDict):
    """What a step takes, before the device's part of the augmentation."""

    image: UInt8[np.ndarray, "b y x 3"]
    label: Int32[np.ndarray, " b"]


class EvalBatch(TypedDict):
    """As `TrainBatch`; entries whose mask is False are padding or corrupt and must not be counted."""

    image: UInt8[np.ndarray, "b y x 3"]
    label: Int32[np.ndarray, " b"]
    mask: Bool[np.ndarray, " b"]


class TooManyCorruptError(RuntimeError):
    """More corrupt examples than allowed: the data need looking at, not skipping."""


def train_loader(
    source: Source,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    augment: AugmentConfig,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
    max_corrupt_fraction: float = 0.01,
) -> "TrainLoader":
    """Endless shuffled and augmented batches of one shard of a source.

    Args:
      source: the examples.
      batch_size: examples per batch of this shard (this process).
      image_size: side, or (height, width), of the images.
      augment: what is done to each image.
      seed: of order and augmentation.
      shard_index: which shard this is, 0 <= shard_index < shard_count.
      shard_count: number of shards, one per process.
      num_threads: decoding threads; None: one per core this process may use. The batches do not depend on it.
      prefetch: batches prepared ahead.
      max_corrupt_fraction: share of corrupt examples (of those seen, at least 1,000) above which
        `TooManyCorruptError` is raised.

    Raises:
      ValueError: an empty source, or arguments out of range.
    """
    return TrainLoader(
        source,
        batch_size=batch_size,
        image_size=size_pair(image_size),
        augment=augment,
        seed=seed,
        shard_index=shard_index,
        shard_count=shard_count,
        num_threads=num_threads,
        prefetch=prefetch,
        max_corrupt_fraction=max_corrupt_fraction,
    )


def eval_loader(
    source: Source,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    crop_fraction: float = 0.875,
    shard_index: int = 0,
    shard_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
    max_corrupt_fraction: float = 0.01,
) -> "EvalLoader":
    """One pass over a source: every example exactly once over all shards, the same number of batches on each.

    Args:
      source: the examples, read in their own order.
      batch_size: examples per batch of this shard; the last batches are padded to it.
      image_size: side, or (height, width), of the images.
      crop_fraction: see `eval_transform`.
      shard_index: which shard this is, 0 <= shard_index < shard_count.
      shard_count: number of shards, one per process.
      num_threads: decoding threads; None: one per core this process may use.
      prefetch: batches prepared ahead.
      max_corrupt_fraction: share of corrupt examples in this shard's part of the source above which
        `TooManyCorruptError` is raised.

    Raises:
      ValueError: an empty source, or arguments out of range.
    """
    return EvalLoader(
        source,
        batch_size=batch_size,
        image_size=size_pair(image_size),
        crop_fraction=crop_fraction,
        shard_index=shard_index,
        shard_count=shard_count,
        num_threads=num_threads,
        prefetch=prefetch,
        max_corrupt_fraction=max_corrupt_fraction,
    )


@dataclasses.dataclass
class TrainLoader(Iterator[TrainBatch]):
    """Iterator made by `train_loader`.

    Attributes:
      skipped: corrupt examples skipped so far in this shard. The place of each is taken by another example,
        drawn at random, so that shards stay in step.
    """

    source: Source
    batch_size: int
    image_size: tuple[int, int]
    augment: AugmentConfig
    seed: int
    shard_index: int
    shard_count: int
    num_threads: int | None
    prefetch: int
    max_corrupt_fraction: float
    skipped: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        _check_arguments(self)
        self._position = 0
        self._iterator: grain.DatasetIterator | None = None
        # Grain adds the epoch to the seed of its shuffle; hashing keeps the orders of neighbouring seeds apart.
        shuffle_seed, augment_seed = np.random.SeedSequence(self.seed).generate_state(2).tolist()
        self._examples = (
            grain.MapDataset.range(len(self.source))
            .random_map(self._load, seed=augment_seed)  # before the shuffle: random by (epoch, index)
            .shuffle(seed=shuffle_seed)
            .repeat()
        )

    def __next__(self) -> TrainBatch:
        if self._iterator is None:
            shard = self._examples[self._position + self.shard_index :: self.shard_count]
            self._iterator = _iterate(shard, self.batch_size, self.num_threads, self.prefetch)
        batch = next(self._iterator)
        self._position += self.batch_size * self.shard_count
        self.skipped += int(batch.pop("skipped").sum())
        seen = max(self._position // self.shard_count, MIN_EXAMPLES_FOR_FRACTION)
        if self.skipped > self.max_corrupt_fraction * seen:
            raise TooManyCorruptError(
                f"{self.skipped} corrupt examples among the first {self._position // self.shard_count:,} of shard "
                f"{self.shard_index}: more than max_corrupt_fraction={self.max_corrupt_fraction} allows. The log names them"
            )
        return batch

    def get_state(self) -> bytes:
        """The position after the last batch taken, as JSON. It is the same on every shard, but for `skipped`."""
        state = {
            "position": self._position,
            "skipped": self.skipped,
            "seed": self.seed,
            "examples": len(self.source),
        }
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> None:
        """Go on where the loader was that gave `state`, whatever its number of threads or shards.

        Raises:
          ValueError: the state belongs to another seed or to a source of another length.
        """
        values = json.loads(state)
        for name, own in (("seed", self.seed), ("examples", len(self.source))):
            if values[name] != own:
                raise ValueError(
                    f"the state was saved with {name}={values[name]}, this loader has {name}={own}: "
                    "the order of examples would change. Restore with the same data and seed"
                )
        self.close()
        self._position, self.skipped = values["position"], values["skipped"]

    def close(self) -> None:
        """Stop the threads. The loader starts them again when the next batch is asked for."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _load(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Example `index`, or a random substitute where it is corrupt, augmented."""
        for skipped in range(MAX_SUBSTITUTES + 1):
            try:
                example = _read(self.source, index)
                image = augment_image(example["image"], self.image_size, self.augment, rng)
            except CorruptExampleError as error:
                logging.warning("skipped corrupt example %s: %s", self.source.name(index), error)
                index = int(rng.integers(len(self.source)))
            else:
                return {"image": image, "label": np.int32(example["label"]), "skipped": skipped}
        raise TooManyCorruptError(
            f"{MAX_SUBSTITUTES + 1} examples drawn in a row were corrupt. The log names them"
        )


@dataclasses.dataclass
class EvalLoader:
    """Iterable made by `eval_loader`; each `iter()` starts a new pass.

    Attributes:
      skipped: corrupt examples met so far in the pass that was started last.
    """

    source: Source
    batch_size: int
    image_size: tuple[int, int]
    crop_fraction: float
    shard_index: int
    shard_count: int
    num_threads: int | None
    prefetch: int
    max_corrupt_fraction: float
    skipped: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        _check_arguments(self)
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction is {self.crop_fraction}: expected 0 < crop_fraction <= 1")

    def __len__(self) -> int:
        return -(-len(self.source) // (self.batch_size * self.shard_count))

    def __iter__(self) -> Iterator[EvalBatch]:
        self.skipped = 0
        padded = len(self) * self.batch_size * self.shard_count
        shard = grain.MapDataset.range(padded).map(self._load)[self.shard_index :: self.shard_count]
        own = len(range(self.shard_index, len(self.source), self.shard_count))
        iterator = _iterate(shard, self.batch_size, self.num_threads, self.prefetch)
        try:
            for batch in iterator:
                self.skipped += int(batch.pop("skipped").sum())
                if self.skipped > self.max_corrupt_fraction * own:
                    raise TooManyCorruptError(
                        f"{self.skipped} corrupt examples among the {own:,} of shard {self.shard_index}: more than "
                        f"max_corrupt_fraction={self.max_corrupt_fraction} allows. The log names them"
                    )
                yield batch
        finally:
            iterator.close()

    def _load(self, index: int) -> dict[str, Any]:
        """Example `index`, or a masked blank where it is padding or corrupt."""
        blank = {
            "image": np.zeros((*self.image_size, 3), np.uint8),
            "label": np.int32(0),
            "mask": np.bool_(False),
        }
        if index >= len(self.source):
            return blank | {"skipped": 0}
        try:
            example = _read(self.source, index)
            pixels = example["image"]
            if isinstance(pixels, bytes):
                pixels = decode_image(pixels)
            image = eval_transform(pixels, self.image_size, self.crop_fraction)
        except CorruptExampleError as error:
            logging.warning("skipped corrupt example %s: %s", self.source.name(index), error)
            return blank | {"skipped": 1}
        return {"image": image, "label": np.int32(example["label"]), "mask": np.bool_(True), "skipped": 0}


def _read(source: Source, index: int) -> Example:
    """`source[index]`, with every failure to read and every impossible label as a `CorruptExampleError`."""
    try:
        example = source[index]
    except Exception as error:  # whatever the storage raises: the record is lost, the run need not be
        raise CorruptExampleError(f"unreadable: {type(error).__name__}: {error}") from error
    if not 0 <= example["label"] < source.num_classes:
        raise CorruptExampleError(
            f"label {example['label']} is out of range for {source.num_classes} classes"
        )
    return example


def _iterate(
    shard: grain.MapDataset, batch_size: int, num_threads: int | None, prefetch: int
) -> grain.DatasetIterator:
    threads = num_threads or len(os.sched_getaffinity(0))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch * batch_size))
    return iter(shard.to_iter_dataset(options).batch(batch_size, drop_remainder=True))


def _check_arguments(loader: TrainLoader | EvalLoader) -> None:
    if not len(loader.source):
        raise ValueError("the source has no examples")
    for name in ("batch_size", "shard_count", "prefetch"):
        if getattr(loader, name) < 1:
            raise ValueError(f"{name} is {getattr(loader, name)}: expected at least 1")
    if not 0 <= loader.shard_index < loader.shard_count:
        raise ValueError(
            f"shard_index is {loader.shard_index}: expected 0 <= shard_index < {loader.shard_count}"
        )
    if min(loader.image_size) < 1:
        raise ValueError(f"image_size is {loader.image_size}: expected positive height and width")
