"""Images for the data tests: real photographs that ship with scikit-learn, and optional real data sets."""

import importlib.resources
from pathlib import Path

import numpy as np
import pytest

from vir_jax.data import decode_image

# Optional, beside the repository: tests that need it skip where it is absent.
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def photo_jpeg() -> bytes:
    """A real JPEG of 427 x 640 pixels."""
    return (importlib.resources.files("sklearn.datasets") / "images" / "china.jpg").read_bytes()


@pytest.fixture(scope="session")
def photo(photo_jpeg: bytes) -> np.ndarray:
    pixels = decode_image(photo_jpeg)
    pixels.flags.writeable = False
    return pixels


@pytest.fixture(scope="session")
def cifar10_dir() -> str:
    folder = REAL_DATA / "tfds"
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no prepared cifar10 in {folder}")
    return str(folder)
