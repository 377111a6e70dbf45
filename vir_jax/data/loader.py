"""Batches for training and evaluation, loaded by threads with Grain.

Training examples stand in one endless global order: epoch after epoch, each shuffled on its own. Which
example stands at position p, and all randomness in preparing it, are pure functions of (seed, p). Shard s of
n takes positions s, s + n, s + 2n, ..., so that a step covers the same examples however many shards share
it, and the state of a loader is no more than a position.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Int32, UInt8

from vir_jax.data.augment import AugmentConfig, augment_image
from vir_jax.data.decode import decode_image
from vir_jax.data.resize import eval_transform, size_pair
from vir_jax.data.source import CorruptExampleError, Example, Source

# The share of corrupt examples is judged against at least this many in training: one bad image in the first
# batch is no trend.
MIN_EXAMPLES_FOR_FRACTION = 1000
# Examples tried for one place in a batch before giving up.
MAX_ATTEMPTS = 20
# Examples that a thread prepares at a time, at most.
MAX_CHUNK_SIZE = 8


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


# --- Training ---


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
      seed: of order and augmentation, non-negative.
      shard_index: which shard this is, 0 <= shard_index < shard_count.
      shard_count: number of shards, one per process.
      num_threads: threads that read and decode; None: one per core. The batches do not depend on it.
      prefetch: batches prepared ahead.
      max_corrupt_fraction: share of corrupt examples (of those seen, at least 1,000) above which
        `TooManyCorruptError` is raised.

    Raises:
      ValueError: an empty source, or arguments out of range.
    """
    _check_arguments(source, batch_size, shard_index, shard_count, num_threads, prefetch)
    # Grain adds the epoch to the seed of its shuffle; hashing keeps the orders of neighbouring seeds apart.
    shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    load = functools.partial(_load_augmented, source=source, size=size_pair(image_size), config=augment)
    examples = (
        grain.MapDataset.range(len(source))
        .random_map(load, seed=augment_seed)  # ahead of the shuffle: random by epoch and example
        .shuffle(seed=shuffle_seed)
        .repeat()
    )
    return TrainLoader(
        examples,
        batching=_Batching(batch_size, num_threads or _num_cores(), prefetch),
        shard_index=shard_index,
        shard_count=shard_count,
        max_corrupt_fraction=max_corrupt_fraction,
        identity={"seed": seed, "examples": len(source)},
    )


class TrainLoader(Iterator[TrainBatch]):
    """The iterator that `train_loader` makes.

    Attributes:
      skipped: corrupt examples skipped so far in this shard. Another example, drawn at random, takes the
        place of each, so that shards stay in step.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        *,
        batching: "_Batching",
        shard_index: int,
        shard_count: int,
        max_corrupt_fraction: float,
        identity: dict[str, int],
    ):
        self._examples = examples  # the global order, endless
        self._batching = batching
        self._shard_index = shard_index
        self._shard_count = shard_count
        self._max_corrupt_fraction = max_corrupt_fraction
        self._identity = identity  # what a saved state must agree with
        self._position = 0  # in the global order, of the next batch's first example over all shards
        self._batches: grain.DatasetIterator | None = None
        self.skipped = 0

    def __next__(self) -> TrainBatch:
        if self._batches is None:
            shard = self._examples[self._position + self._shard_index :: self._shard_count]
            self._batches = self._batching.iterate(shard)
        batch = next(self._batches)
        self._position += self._batching.batch_size * self._shard_count
        self.skipped += int(batch.pop("skipped").sum())
        seen = self._position // self._shard_count
        _check_corrupt(self.skipped, seen, self._max_corrupt_fraction * max(seen, MIN_EXAMPLES_FOR_FRACTION))
        return batch

    def get_state(self) -> bytes:
        """The position after the last batch taken, as JSON. Only `skipped` in it differs between shards."""
        return json.dumps({"position": self._position, "skipped": self.skipped, **self._identity}).encode()

    def set_state(self, state: bytes) -> None:
        """Go on after the batch that came before `state` was taken, with any number of threads or shards.

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
        self._position, self.skipped = values["position"], values["skipped"]

    def close(self) -> None:
        """Stop the threads. Asking for the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _load_augmented(
    index: int, rng: np.random.Generator, *, source: Source, size: tuple[int, int], config: AugmentConfig
) -> dict[str, Any]:
    """A random view of example `index`, or of one drawn at random where that is corrupt."""
    for skipped in range(MAX_ATTEMPTS):
        try:
            example = _read(source, index)
            image = augment_image(example["image"], size, config, rng)
        except CorruptExampleError as error:
            logging.warning("skipped corrupt example %s: %s", source.name(index), error)
            index = int(rng.integers(len(source)))
        else:
            return {"image": image, "label": np.int32(example["label"]), "skipped": skipped}
    raise TooManyCorruptError(f"{MAX_ATTEMPTS} examples drawn in a row were corrupt; the log names them")


# --- Evaluation ---


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
    """One pass over a source: every example exactly once over all shards, and as many batches on each shard.

    Args:
      source: the examples, read in their own order.
      batch_size: examples per batch of this shard (this process); the last batches are padded to it.
      image_size: side, or (height, width), of the images.
      crop_fraction: see `eval_transform`.
      shard_index: which shard this is, 0 <= shard_index < shard_count.
      shard_count: number of shards, one per process.
      num_threads: threads that read and decode; None: one per core.
      prefetch: batches prepared ahead.
      max_corrupt_fraction: share of corrupt examples in this shard above which `TooManyCorruptError` is
        raised.

    Raises:
      ValueError: an empty source, or arguments out of range.
    """
    _check_arguments(source, batch_size, shard_index, shard_count, num_threads, prefetch)
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction is {crop_fraction}: expected 0 < crop_fraction <= 1")
    num_batches = -(-len(source) // (batch_size * shard_count))
    load = functools.partial(
        _load_centered, source=source, size=size_pair(image_size), crop_fraction=crop_fraction
    )
    examples = grain.MapDataset.range(num_batches * batch_size * shard_count).map(load)
    return EvalLoader(
        examples[shard_index::shard_count],
        num_examples=len(range(shard_index, len(source), shard_count)),
        batching=_Batching(batch_size, num_threads or _num_cores(), prefetch),
        max_corrupt_fraction=max_corrupt_fraction,
    )


class EvalLoader:
    """The iterable that `eval_loader` makes; each `iter()` starts a new pass.

    Attributes:
      skipped: corrupt examples met so far in the pass that was started last, in this shard.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        *,
        num_examples: int,
        batching: "_Batching",
        max_corrupt_fraction: float,
    ):
        self._examples = examples  # of this shard, with the padding
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
                allowed = self._max_corrupt_fraction * self._num_examples
                _check_corrupt(self.skipped, self._num_examples, allowed)
                yield batch
        finally:
            batches.close()


def _load_centered(
    index: int, *, source: Source, size: tuple[int, int], crop_fraction: float
) -> dict[str, Any]:
    """The central crop of example `index`, or a masked blank where that is padding or corrupt."""
    blank = {"image": np.zeros((*size, 3), np.uint8), "label": np.int32(0), "mask": np.bool_(False)}
    if index >= len(source):
        return {**blank, "skipped": 0}
    try:
        example = _read(source, index)
        image = example["image"]
        pixels = decode_image(image) if isinstance(image, bytes) else image
    except CorruptExampleError as error:
        logging.warning("skipped corrupt example %s: %s", source.name(index), error)
        return {**blank, "skipped": 1}
    return {
        "image": eval_transform(pixels, size, crop_fraction),
        "label": np.int32(example["label"]),
        "mask": np.bool_(True),
        "skipped": 0,
    }


# --- Both ---


def _read(source: Source, index: int) -> Example:
    """`source[index]`, with failures to read and impossible labels as `CorruptExampleError`."""
    try:
        example = source[index]
    except Exception as error:  # whatever the storage raises: the example is lost, the run need not be
        raise CorruptExampleError(f"unreadable: {type(error).__name__}: {error}") from error
    if not 0 <= example["label"] < source.num_classes:
        raise CorruptExampleError(f"label {example['label']} is not one of {source.num_classes} classes")
    return example


def _check_corrupt(skipped: int, seen: int, allowed: float) -> None:
    if skipped > allowed:
        raise TooManyCorruptError(
            f"{skipped} of {seen:,} examples were corrupt, more than max_corrupt_fraction allows "
            f"({allowed:.6g}); the log names them"
        )


@dataclasses.dataclass(frozen=True)
class _Batching:
    """How a shard becomes batches. What is in them does not depend on threads and prefetch."""

    batch_size: int
    threads: int
    prefetch: int  # batches ahead

    def iterate(self, shard: grain.MapDataset) -> grain.DatasetIterator:
        """Batches of consecutive examples; an incomplete last one is left out.

        Threads work on chunks of a few examples: handing over each example by itself costs more than a tenth
        of a millisecond, in the one thread that asks for batches.
        """
        chunk_size = max(size for size in range(1, MAX_CHUNK_SIZE + 1) if self.batch_size % size == 0)
        chunks_per_batch = self.batch_size // chunk_size
        options = grain.ReadOptions(
            num_threads=self.threads, prefetch_buffer_size=max(self.threads, self.prefetch * chunks_per_batch)
        )
        chunks = shard.batch(chunk_size, drop_remainder=True).to_iter_dataset(options)
        return iter(chunks.batch(chunks_per_batch, drop_remainder=True, batch_fn=_concatenate))


def _concatenate(chunks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _num_cores() -> int:
    """Cores that this process may use, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_arguments(
    source: Source,
    batch_size: int,
    shard_index: int,
    shard_count: int,
    num_threads: int | None,
    prefetch: int,
) -> None:
    if not len(source):
        raise ValueError("the source has no examples")
    at_least_one = {
        "batch_size": batch_size,
        "shard_count": shard_count,
        "num_threads": 1 if num_threads is None else num_threads,
        "prefetch": prefetch,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index is {shard_index}: expected 0 <= shard_index < {shard_count}")
