"""Classes are what their names say: labels of one source are compared with those of another by name alone."""

import collections
import concurrent.futures
import operator
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Int

from vir_jax.data.errors import CorruptExampleError
from vir_jax.data.masks import check_mask
from vir_jax.data.source import Example, Source, is_per_pixel
from vir_jax.label_maps import IGNORED, MAX_CLASSES

_NAMED = 5  # Classes that a message names, at most.
_THREADS = 16  # Examples may lie behind a network.


def check_classes(source: Source, what: str, *, at_least: int = 1) -> None:
    """Check that a source says which classes it has, each by a name of its own.

    Args:
      source: the examples.
      what: the source is called in messages.
      at_least: so many classes there should be.

    Raises:
      ValueError: too few classes, another number of names than of classes, or names that are no text or not unique.
    """
    names = list(source.class_names)
    if source.num_classes != len(names):
        raise ValueError(
            f"{what} has num_classes = {source.num_classes}, but {len(names)} class_names ({_some(names)}): expected"
            " one name for each class, in the order of the labels"
        )
    if is_per_pixel(source) and len(names) > MAX_CLASSES:
        raise ValueError(
            f"{what} has {len(names)} classes; expected at most {MAX_CLASSES}, as masks are of bytes"
        )
    others = [name for name in names if not isinstance(name, str)]
    if others:
        raise ValueError(f"{what} has class_names that are no text: {_some(others)}")
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{what} has several classes of one name: {_some(repeated)}; names tell classes apart"
        )
    if len(names) < at_least:
        raise ValueError(
            f"{what} has {len(names)} class(es) ({_some(names)}): expected at least {at_least}, or there is nothing to"
            " tell apart"
        )


def match_classes(source: Source, class_names: Sequence[str], what: str) -> Source:
    """Return a source with the labels that a model's classes give its examples, class by class of the same name.

    The source may have a part of the model's classes, or have them in another order: each of its examples still has
    one right answer, and the log says what was done.

    Args:
      source: the examples.
      class_names: of the model, in the order of its outputs.
      what: the source is called in messages.

    Raises:
      ValueError: the source has a class that the model does not know, or does not say which classes it has.
    """
    check_classes(source, what)
    own, known = list(source.class_names), list(class_names)
    if own == known:
        return source
    unknown = [name for name in own if name not in set(known)]
    if unknown:
        raise ValueError(
            f"{what} has classes that the model does not know: {_some(unknown)}. It knows {_some(known)}"
        )
    order = "" if [name for name in known if name in set(own)] == own else ", and in another order"
    logging.warning(
        "%s has %d of the model's %d classes%s; labels are matched by name", what, len(own), len(known), order
    )
    return _MatchedSource(source, known)


def select_classes(source: Source, class_names: Sequence[str], what: str) -> Source:
    """Return the examples of some classes, under the class names of all.

    Labels are asked for where the source tells them apart from its images (`labels`); else every example is read once.
    One that cannot be read is left out, and named in the log: of which class it is, is not known.

    Args:
      source: the examples.
      class_names: of the classes that are wanted.
      what: the source is called in messages.

    Raises:
      ValueError: the source has no such class, or no example of any of them.
    """
    check_classes(source, what)
    if is_per_pixel(source):
        raise ValueError(
            f"{what} has a class for each pixel: its examples are not of single classes, of which some could be chosen."
            " Expected no 'classes'"
        )
    unknown = [name for name in class_names if name not in set(source.class_names)]
    if unknown:
        raise ValueError(f"{what} has no class {_some(unknown)}; it has {_some(source.class_names)}")
    wanted = {number for number, name in enumerate(source.class_names) if name in set(class_names)}
    kept = [index for index, label in enumerate(_labels(source)) if label in wanted]
    if not kept:
        raise ValueError(f"{what} has no example of {_some(class_names)}")
    return SelectedSource(source, kept)


def class_difference(old: Sequence[str], new: Sequence[str]) -> str | None:
    """Return in words how the class names of two sources differ; None where they do not."""
    if list(old) == list(new):
        return None
    gone, come = (
        [name for name in old if name not in set(new)],
        [name for name in new if name not in set(old)],
    )
    if not gone and not come:
        first = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return f"class {first} was {old[first]!r} and is {new[first]!r}: the same names in another order"
    return f"{len(old)} classes, now {len(new)}; gone: {_some(gone)}; new: {_some(come)}"


class _MatchedSource:
    """A source under the class names of a model; see `match_classes`."""

    def __init__(self, source: Source, class_names: Sequence[str]) -> None:
        self._source = source
        numbers = {name: number for number, name in enumerate(class_names)}
        self._labels = [numbers[name] for name in source.class_names]
        self.class_names, self.per_pixel = tuple(class_names), is_per_pixel(source)
        # Of masks, by their numbers; what is no class of the source is refused before.
        self._of_masks = np.full(256, IGNORED, np.uint8)
        self._of_masks[: len(self._labels)] = self._labels if self.per_pixel else IGNORED

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        if self.per_pixel:
            check_mask(example["label"], len(self._labels))
            return {"image": example["image"], "label": self._of_masks[example["label"]]}
        label = operator.index(example["label"])
        if not 0 <= label < len(self._labels):
            raise CorruptExampleError(f"label {label} is not one of {len(self._labels)} classes")
        return {"image": example["image"], "label": self._labels[label]}

    def name(self, index: int) -> str:
        return self._source.name(index)


class SelectedSource:
    """Some examples of a source, by their numbers in it."""

    def __init__(self, source: Source, kept: Sequence[int] | Int[np.ndarray, " n"]) -> None:
        self._source, self._kept = source, np.asarray(kept)
        self.num_classes, self.class_names = source.num_classes, tuple(source.class_names)
        self.per_pixel = is_per_pixel(source)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._kept[index])]

    def name(self, index: int) -> str:
        """Return the name in the whole source."""
        return self._source.name(int(self._kept[index]))


def _labels(source: Source) -> Sequence[int | None]:
    """Return the label of every example; None where it cannot be read."""
    known = getattr(source, "labels", None)
    if known is not None:
        return known

    def read(index: int) -> int | None:
        try:
            return operator.index(source[index]["label"])
        except Exception as error:  # Whatever the storage raises.
            logging.warning("left out, as it cannot be read: %s: %s", source.name(index), error)
            return None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, range(len(source))))


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown or "none"
