"""Hugging Face `datasets`: what `save_to_disk` wrote, without a network."""

import sys

import pytest

from tests.data.helpers import png
from vir_jax.data import decode_image, open_source
from vir_jax.extras import MissingPackageError


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "vir_jax.data.hf_source", raising=False)
    with pytest.raises(
        MissingPackageError, match=r'datasets is not installed: pip install "vir-jax\[datasets\]"'
    ):
        open_source("hf:user/set", "train")


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "id": datasets.Value("int32"),
        }
    )
    columns = {
        "picture": [{"bytes": png((i, 0, 0)), "path": None} for i in range(4)],
        "kind": [0, 1, 1, 0],
        "id": [4, 3, 2, 1],
    }
    rows = datasets.Dataset.from_dict(columns, features=features)
    folder = str(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.remove_columns("kind")}).save_to_disk(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # Its own.
def test_a_saved_set(saved):
    source = open_source("hf", "train", data_dir=saved)
    assert (len(source), source.num_classes, source.class_names) == (4, 2, ("cat", "dog"))
    assert [source[i]["label"] for i in range(4)] == [0, 1, 1, 0]
    assert all(isinstance(source[i]["image"], bytes) for i in range(4))  # Decoding is the loaders' business.
    assert [decode_image(source[i]["image"])[0, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert source.name(2) == "hf train[2]"


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_named(saved):
    with pytest.raises(ValueError, match=r"no split 'val' in .* \(there: \['train', 'test'\]\)"):
        open_source("hf", "val", data_dir=saved)
    with pytest.raises(ValueError, match=r"expected one of images .* and one of classes"):
        open_source("hf", "test", data_dir=saved)
    with pytest.raises(ValueError, match="'hf' needs data_dir"):
        open_source("hf", "train")
