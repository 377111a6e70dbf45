"""A list of files and labels: `data_dir/split.csv` or `data_dir/split.parquet` with the columns `file` and `label`."""

import csv
import os
from pathlib import Path

from vir_jax.data.source import Example
from vir_jax.extras import require

COLUMNS = ("file", "label")
KINDS = (".csv", ".parquet")


class TableSource:
    """The images that the rows of a table name, in their order.

    Files are relative to `data_dir`, or absolute. A label is the name of a class, as text; the classes are those of the
    split itself, sorted (labels of two splits are compared by name alone, `match_classes`).
    """

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        root = Path(data_dir).expanduser()
        tables = [path for kind in KINDS if (path := root / f"{split}{kind}").is_file()]
        if len(tables) != 1:
            there = sorted(path.name for path in root.glob("*") if path.suffix in KINDS) or "none"
            raise FileNotFoundError(
                f"{len(tables)} tables of split {split!r} in {root} (tables there: {there}); expected"
                f" {split}.csv or {split}.parquet, with the columns file and label"
            )
        (table,) = tables
        rows = _read_csv(table) if table.suffix == ".csv" else _read_parquet(table)
        for number, row in enumerate(rows, 1):
            if not all(row):
                raise ValueError(
                    f"{table}: row {number} has no {COLUMNS[row.index('')]}; expected a file and a label"
                )
        if not rows:
            raise ValueError(f"{table} has no rows")
        self.class_names = tuple(sorted({label for _, label in rows}))
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._examples = [(root / file, labels[label]) for file, label in rows]

    @property
    def num_classes(self) -> int:
        """Number of different labels."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        path, label = self._examples[index]
        return {"image": path.read_bytes(), "label": label}

    def name(self, index: int) -> str:
        """Return the file's path."""
        return str(self._examples[index][0])


def _read_csv(table: Path) -> list[tuple[str, str]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        _check_columns(table, list(reader.fieldnames or ()))
        return [((row["file"] or "").strip(), (row["label"] or "").strip()) for row in reader]


def _read_parquet(table: Path) -> list[tuple[str, str]]:
    require("parquet", "pyarrow")
    import pyarrow.parquet

    _check_columns(table, pyarrow.parquet.read_schema(table).names)
    columns = pyarrow.parquet.read_table(table, columns=list(COLUMNS)).to_pydict()
    files, labels = (["" if value is None else str(value) for value in columns[name]] for name in COLUMNS)
    return list(zip(files, labels, strict=True))


def _check_columns(table: Path, found: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ValueError(f"{table} has the columns {found}; expected file and label, so {missing} lack")
