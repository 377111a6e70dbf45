"""Hostile images, through the loaders."""

import faulthandler
from pathlib import Path

from absl import logging
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.faults.bench import Record
from benchmarks.faults.hostile import mutations, originals, write_hostile_folder
from vir_jax.data import AugmentConfig, Example, eval_loader, open_source, train_loader

MUTATIONS = 10_000


class Mutated:
    """A source of mutated image files."""

    num_classes = 1
    class_names = ("mutated",)

    def __init__(self, count: int) -> None:
        photo = Image.fromarray(load_sample_image("china.jpg")[100:148, 200:264])
        self.files = list(mutations(originals(photo), count, seed=0))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.files[index], "label": 0}

    def name(self, index: int) -> str:
        """The number."""
        return f"number {index}"


def images(folder: Path) -> list[Record]:
    """Hostile files and mutated ones, through the loaders."""
    logging.set_verbosity(logging.FATAL)  # They are named in their thousands.
    write_hostile_folder(folder, Image.fromarray(load_sample_image("china.jpg")))
    source = open_source("folder", "train", data_dir=str(folder))
    good = sum("good_" in source.name(index) for index in range(len(source)))
    loader = eval_loader(source, batch_size=1, image_size=32, max_corrupt_fraction=1.0)
    right = sum(
        bool(batch["mask"][0]) == ("good_" in source.name(index)) for index, batch in enumerate(loader)
    )
    hostile = Record("hostile image files, of every kind", len(source), right)
    hostile.note = f"{good} read, {loader.skipped} skipped, counted and named"

    faulthandler.dump_traceback_later(600, exit=True)  # A decoder that hangs ends the benchmark.
    mutated = Mutated(MUTATIONS)
    augment = AugmentConfig(crop="resized", hflip=0.5, randaugment_ops=2, erase=0.25)
    batches = train_loader(
        mutated, batch_size=100, image_size=32, augment=augment, seed=0, max_corrupt_fraction=1.0
    )
    loaded = sum(len(next(batches)["label"]) for _ in range(MUTATIONS // 100))
    batches.close()
    faulthandler.cancel_dump_traceback_later()
    note = f"{batches.skipped} skipped on the way; no crash, no hang"
    return [hostile, Record("randomly mutated image files", MUTATIONS, loaded, note=note)]
