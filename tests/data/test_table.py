"""A list of files and labels, as CSV and as Parquet."""

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.helpers import png
from vir_jax.data import decode_image, open_source

ROWS = [("cats/1.png", "cat"), ("2.png", "dog"), ("cats/3.png", "cat")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    for number, (file, _) in enumerate(ROWS):
        (tmp_path / file).write_bytes(png((number, 0, 0)))
    return tmp_path


def write(folder, kind, split="train", rows=ROWS, columns=("file", "label")):
    if kind == "csv":
        lines = [",".join(columns), *(",".join(row) for row in rows)]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    else:
        table = pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table(folder, kind):
    write(folder, kind)
    source = open_source("table", "train", data_dir=str(folder))
    assert (len(source), source.num_classes, source.class_names) == (3, 2, ("cat", "dog"))
    assert [source[i]["label"] for i in range(3)] == [0, 1, 0]
    assert [decode_image(source[i]["image"])[0, 0, 0] for i in range(3)] == [0, 1, 2]
    assert source.name(1) == str(folder / "2.png")


def test_more_columns_do_not_matter(folder):
    write(folder, "csv", rows=[("x", *row) for row in ROWS], columns=("id", "file", "label"))
    assert len(open_source("table", "train", data_dir=str(folder))) == 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_is_wrong_is_named(folder, kind):
    with pytest.raises(FileNotFoundError, match=r"0 tables of split 'train' .*tables there: none"):
        open_source("table", "train", data_dir=str(folder))
    write(folder, kind, columns=("path", "label"))
    with pytest.raises(
        ValueError, match=r"columns \['path', 'label'\]; expected file and label, so \['file'\]"
    ):
        open_source("table", "train", data_dir=str(folder))
    write(folder, kind, rows=[*ROWS, ("4.png", "")])
    with pytest.raises(ValueError, match="row 4 has no label"):
        open_source("table", "train", data_dir=str(folder))


def test_one_table_a_split(folder):
    write(folder, "csv")
    write(folder, "parquet")
    with pytest.raises(FileNotFoundError, match="2 tables of split 'train'"):
        open_source("table", "train", data_dir=str(folder))
    with pytest.raises(ValueError, match="'table' needs data_dir"):
        open_source("table", "train")
