"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download."""

from vir_jax.extras import require

require("train", "sklearn")

import numpy as np
from sklearn.datasets import load_digits

from vir_jax.data.source import Example

_SPLITS = ("train", "test")


class DigitsSource:
    """One split of the digits, as RGB uint8 images of 8x8 pixels.

    The split is fixed and stratified: within each class every fifth image, in the order of the package, is a
    test image (355 in all; 1,442 remain for training).
    """

    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str):
        if split not in _SPLITS:
            raise ValueError(f"digits has no split {split!r}: choose one of {', '.join(_SPLITS)}")
        digits = load_digits()
        rank_in_class = np.empty(len(digits.target), np.int64)
        for digit in range(self.num_classes):
            (members,) = np.nonzero(digits.target == digit)
            rank_in_class[members] = np.arange(len(members))
        is_test = rank_in_class % 5 == 4
        (self._numbers,) = np.nonzero(is_test == (split == "test"))
        gray = np.round(digits.images[self._numbers] * (255 / 16)).astype(np.uint8)  # stored as 0..16
        self._images = np.repeat(gray[..., None], 3, axis=-1)
        self._labels = digits.target[self._numbers]
        self._split = split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        """Split and number, with the number in scikit-learn's order."""
        return f"digits {self._split}[{index}] (number {self._numbers[index]} of scikit-learn's)"
