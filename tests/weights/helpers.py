"""Folders of weights as other libraries write them, of the tensors in tests/golden/weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.golden.weights.make import filled

GOLDEN = Path(__file__).parents[1] / "golden" / "weights"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def tensors_of(case, *, of_files=False):
    """The tensors of a case of `make.py`; of_files: by the names of its files, where these differ."""
    drawn = {name: filled(name, tuple(shape)) for name, shape in case["shapes"].items()}
    return {file: drawn[name] for file, name in case["names_in_files"].items()} if of_files else drawn


def write(folder, tensors, **beside):
    """A folder of weights with JSON files, `config=...` for config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def relative(actual, expected):
    """Root mean square of the difference, relative to the expected."""
    expected = np.asarray(expected)
    return np.sqrt(np.mean((np.asarray(actual) - expected) ** 2) / np.mean(expected**2))
