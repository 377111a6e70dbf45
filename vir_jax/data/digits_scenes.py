"""Scenes of digits: scikit-learn's real digits at random places of a cluttered canvas, with exact masks.

Each scene is composed, of a seed of its own, when it is first asked for: nothing is stored on the disk or downloaded.
Scenes of the test split show digits of the test split of `vir_jax.data.digits` alone.
"""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from vir_jax.data.digits import DigitsSource
from vir_jax.data.source import Example

SIDE, DIGIT = 32, 8
"""Pixels along a side of the canvas, and of a digit."""

SCENES = {"train": 10_000, "test": 500}
DIGITS = (3, 6)
"""In a scene, at least and at most."""

FRAGMENTS, FRAGMENT = 6, 4
"""Pieces of digits that are no digits, and pixels along their sides."""

NOISE = 40
"""The brightest pixel of the noise that is added, exclusive, of 255."""

INK = 64
"""A pixel belongs to a digit from this brightness of the digit on, of 255."""

_ATTEMPTS = 50  # Places tried for a digit.


@dataclasses.dataclass(frozen=True)
class Scene:
    """A composed image.

    Attributes:
      image: grey, as RGB.
      mask: 0, or 1 + the digit whose ink is there.
      places: (top, left, digit) of each digit; they do not overlap.
    """

    image: UInt8[np.ndarray, "y x 3"]
    mask: UInt8[np.ndarray, "y x"]
    places: tuple[tuple[int, int, int], ...]


class DigitsScenesSource:
    """One split of the scenes: 10,000 for training and 500 to test, of 32 x 32 pixels and 11 classes."""

    per_pixel = True
    class_names = ("background", *DigitsSource.class_names)
    num_classes = len(class_names)

    def __init__(self, split: str):
        if split not in SCENES:
            raise ValueError(f"digits_scenes has no split {split!r}: choose one of {', '.join(SCENES)}")
        self._split, digits = split, DigitsSource(split)
        self._digits = np.stack([digits[index]["image"] for index in range(len(digits))])[..., 0]
        self._labels = digits.labels
        self._scenes: dict[int, Scene] = {}

    def __len__(self) -> int:
        return SCENES[self._split]

    def __getitem__(self, index: int) -> Example:
        scene = self.scene(index)
        return {"image": scene.image, "label": scene.mask}

    def name(self, index: int) -> str:
        """Return split and number."""
        return f"digits_scenes {self._split}[{index}]"

    def scene(self, index: int) -> Scene:
        """Return a scene, always the same for a number."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index}: {self._split} has 0 to {len(self) - 1}")
        if index not in self._scenes:
            self._scenes[index] = self._compose(index)
        return self._scenes[index]

    def _compose(self, index: int) -> Scene:
        rng = np.random.default_rng((list(SCENES).index(self._split), index))
        canvas, mask = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        for _ in range(FRAGMENTS):
            digit = self._digits[rng.integers(len(self._digits))]
            y, x = rng.integers(DIGIT - FRAGMENT + 1, size=2)
            top, left = rng.integers(SIDE - FRAGMENT + 1, size=2)
            window = canvas[top : top + FRAGMENT, left : left + FRAGMENT]
            np.maximum(window, digit[y : y + FRAGMENT, x : x + FRAGMENT], out=window)
        places: list[tuple[int, int, int]] = []
        for _ in range(rng.integers(DIGITS[0], DIGITS[1] + 1)):
            corner = _free_corner([place[:2] for place in places], rng)
            if corner is None:
                continue
            (top, left), number = corner, int(rng.integers(len(self._digits)))
            there = slice(top, top + DIGIT), slice(left, left + DIGIT)
            np.maximum(canvas[there], self._digits[number], out=canvas[there])
            mask[there][self._digits[number] >= INK] = 1 + self._labels[number]
            places.append((top, left, self._labels[number]))
        noise = rng.integers(NOISE, size=canvas.shape)
        grey = np.minimum(canvas + noise, 255).astype(np.uint8)
        return Scene(np.repeat(grey[..., None], 3, axis=-1), mask, tuple(places))


def _free_corner(taken: list[tuple[int, int]], rng: np.random.Generator) -> tuple[int, int] | None:
    """Return (top, left) of a digit that overlaps none of those there, or None where none was found."""
    for _ in range(_ATTEMPTS):
        top, left = rng.integers(SIDE - DIGIT + 1, size=2).tolist()
        if all(abs(top - y) >= DIGIT or abs(left - x) >= DIGIT for y, x in taken):
            return top, left
    return None
