import dataclasses
import json
import logging
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vir_jax.data import (
    AugmentConfig,
    Example,
    TrainLoader,
    eval_loader,
    open_source,
    train_loader,
)

OFF = AugmentConfig(crop="none", hflip=0.0, randaugment_ops=0, color_jitter=0.0, erase=0.0)
ON = AugmentConfig(crop="resized", hflip=0.5, randaugment_ops=2, erase=0.25)


class Numbered:
    """Images of two pixels that say which example they are."""

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, length: int, broken: dict[int, Callable[[], Example]] | None = None):
        self.length = length
        self.broken = broken or {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index in self.broken:
            return self.broken[index]()
        image = np.zeros((1, 2, 3), np.uint8)
        image[0, :, 0] = index >> 8, index & 255
        return {"image": image, "label": index % 10}

    def name(self, index: int) -> str:
        return f"number {index}"


def numbers(images: np.ndarray) -> list[int]:
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist()


def numbered_loader(length: int = 10, **changes) -> TrainLoader:
    arguments = {"batch_size": 4, "image_size": (1, 2), "augment": OFF, "seed": 0, "num_threads": 2}
    source = changes.pop("source", None) or Numbered(length)
    return train_loader(source, **(arguments | changes))


def take(loader: TrainLoader, batches: int) -> list[int]:
    return [number for _ in range(batches) for number in numbers(next(loader)["image"])]


def digits_loader(**changes) -> TrainLoader:
    arguments = {"batch_size": 32, "image_size": 16, "augment": ON, "seed": 3}
    return train_loader(open_source("digits", "train"), **(arguments | changes))


def assert_equal_batches(ours: Sequence, theirs: Sequence) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# --- Order ---


def test_batches_are_what_a_step_takes():
    with_loader = digits_loader(image_size=(16, 24))
    batch = next(with_loader)
    assert sorted(batch) == ["image", "label"]
    assert (batch["image"].shape, batch["image"].dtype) == ((32, 16, 24, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((32,), np.int32)


def test_every_epoch_is_another_order_of_all_examples():
    # Batches of 4 run across the ends of epochs of 10.
    loader = numbered_loader(10)
    order = take(loader, 10)
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(epoch != list(range(10)) for epoch in epochs)


def test_labels_stay_with_their_images():
    batch = next(numbered_loader(1000, batch_size=500))
    np.testing.assert_array_equal(batch["label"], np.array(numbers(batch["image"])) % 10)


def test_order_and_seed():
    first = take(numbered_loader(100), 50)
    assert take(numbered_loader(100), 50) == first
    # Also not the same orders, shifted by an epoch.
    other = take(numbered_loader(100, seed=1), 50)
    assert other != first
    assert other[:100] != first[100:200]
    assert other[100:200] != first[:100]


def test_shuffle_is_uniform():
    """Every part of the data is equally likely in every part of an epoch."""
    counts = np.zeros((6, 6))
    for seed in range(10):
        order = take(numbered_loader(900, batch_size=100, seed=seed), 9)
        for position, number in enumerate(order):
            counts[position // 150, number // 150] += 1
    # 10 epochs of 900 over 36 cells: 250 each, with a standard deviation of less than 16.
    assert (np.abs(counts - 250) < 4 * 16).all()


@pytest.mark.parametrize("parts", [[range(0, 4), range(4, 12)], [[0, 1, 6, 7], [2, 3, 8], [4, 5, 9, 10, 11]]])
def test_processes_share_a_batch_by_rows(parts):
    one = numbered_loader(11, batch_size=12)
    processes = [numbered_loader(11, batch_size=12, rows=rows) for rows in parts]
    for _ in range(9):
        together = numbers(next(one)["image"])
        for rows, process in zip(parts, processes, strict=True):
            assert numbers(next(process)["image"]) == [together[row] for row in rows]


def test_augmentation_of_rows_is_that_of_the_whole_batch():
    one, some = digits_loader(batch_size=16), digits_loader(batch_size=16, rows=[1, 2, 3, 12])
    for _ in range(3):
        together, part = next(one), next(some)
        for name in together:
            np.testing.assert_array_equal(together[name][[1, 2, 3, 12]], part[name])


def test_randomness_is_that_of_epoch_and_example():
    """The same example looks different in the next epoch, and two examples draw differently in one."""
    source = Numbered(8)
    erasing = dataclasses.replace(OFF, erase=1.0)
    views = train_loader(source, batch_size=8, image_size=(16, 32), augment=erasing, seed=0, num_threads=1)
    first, second = next(views), next(views)
    by_label = [b["image"][np.argsort(b["label"])] for b in (first, second)]
    assert not (by_label[0] == by_label[1]).all((1, 2, 3)).any()
    noise = first["image"][:, :, :, 1]  # zero but for the erased part
    assert len({n.tobytes() for n in noise}) == 8


# --- Threads and resuming ---


def test_batches_do_not_depend_on_threads_or_prefetching():
    reference = digits_loader(num_threads=1, prefetch=1)
    other = digits_loader(num_threads=5, prefetch=3)
    assert_equal_batches([next(reference) for _ in range(8)], [next(other) for _ in range(8)])


@pytest.mark.parametrize("stop", [0, 1, 45, 91])  # an epoch has 45.06 batches
def test_resume_is_exact(stop: int):
    loader = digits_loader(num_threads=2)
    for _ in range(stop):
        next(loader)
    state = loader.get_state()
    assert isinstance(state, bytes)
    expected = [next(loader) for _ in range(4)]

    resumed = digits_loader(num_threads=3)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_equal_batches([next(resumed) for _ in range(4)], expected)

    loader.set_state(state)  # going back works as well
    assert_equal_batches([next(loader) for _ in range(4)], expected)
    assert loader.get_state() == resumed.get_state()


def test_state_is_small_and_readable():
    loader = digits_loader()
    next(loader)
    assert json.loads(loader.get_state()) == {"position": 32, "seed": 3, "examples": 1442}


def test_resume_on_another_number_of_processes():
    order = take(numbered_loader(50, batch_size=12), 8)
    pair = [numbered_loader(50, batch_size=12, rows=rows) for rows in (range(6), range(6, 12))]
    for loader in pair:
        take(loader, 3)
    state = pair[0].get_state()
    assert state == pair[1].get_state()
    for count in (1, 3, 4):
        size = 12 // count
        processes = [
            numbered_loader(50, batch_size=12, rows=range(size * i, size * (i + 1))) for i in range(count)
        ]
        for process in processes:
            process.set_state(state)
        resumed = []
        for _ in range(5):
            for process in processes:
                resumed += take(process, 1)
        assert resumed == order[36:]


def test_state_of_other_data_is_refused():
    state = numbered_loader(10).get_state()
    with pytest.raises(ValueError, match="the saved state has seed = 0, this loader seed = 1"):
        numbered_loader(10, seed=1).set_state(state)
    with pytest.raises(ValueError, match="the saved state has examples = 10, this loader examples = 11"):
        numbered_loader(11).set_state(state)


def test_closing_loses_nothing():
    loader = numbered_loader(50)
    order = take(numbered_loader(50), 6)
    first = take(loader, 3)
    loader.close()
    loader.close()
    assert first + take(loader, 3) == order


# --- Evaluation ---


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [3, 8, 12])
@pytest.mark.parametrize("length", [1, 2, 7, 24, 63])
def test_evaluation_sees_every_example_exactly_once(length: int, batch_size: int, processes: int):
    seen, lengths = [], set()
    for process in range(processes):
        rows = range(process, batch_size, processes)
        loader = eval_loader(
            Numbered(length),
            batch_size=batch_size,
            image_size=(1, 2),
            crop_fraction=1.0,
            rows=rows,
            num_threads=2,
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(loader))
        for batch in batches:
            assert batch["image"].shape == (len(rows), 1, 2, 3)
            assert (batch["label"].dtype, batch["mask"].dtype) == (np.int32, np.bool_)
            mask = batch["mask"]
            seen += numbers(batch["image"][mask])
            np.testing.assert_array_equal(batch["label"][mask], np.array(numbers(batch["image"][mask])) % 10)
    assert sorted(seen) == list(range(length))
    assert lengths == {-(-length // batch_size)}


def test_evaluation_can_be_repeated_and_left_early():
    loader = eval_loader(open_source("digits", "test"), batch_size=100, image_size=12, num_threads=2)
    once, again = list(loader), list(loader)
    assert len(loader) == 4
    assert_equal_batches(once, again)
    assert sum(int(batch["mask"].sum()) for batch in once) == 355
    first = next(iter(loader))
    assert_equal_batches([first], once[:1])
    assert_equal_batches(list(loader), once)


def test_digits_reach_evaluation_unchanged():
    source = open_source("digits", "test")
    loader = eval_loader(source, batch_size=71, image_size=8, crop_fraction=1.0)
    images = np.concatenate([batch["image"] for batch in loader])
    np.testing.assert_array_equal(images, [source[i]["image"] for i in range(355)])


# --- Corrupt examples ---


def unreadable() -> Example:
    raise OSError("disk on fire")


def truncated(photo_jpeg: bytes) -> Callable[[], Example]:
    return lambda: {"image": photo_jpeg[: len(photo_jpeg) // 2], "label": 0}


@pytest.fixture
def broken(photo_jpeg: bytes) -> Numbered:
    image = np.zeros((1, 2, 3), np.uint8)
    return Numbered(
        500,
        {
            7: truncated(photo_jpeg),
            100: unreadable,
            200: lambda: {"image": b"", "label": 0},
            300: lambda: {"image": image, "label": 10},
            400: lambda: {"image": image, "label": -1},
        },
    )


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="absl")
    return caplog


def test_training_skips_counts_and_names_corrupt_examples(broken: Numbered, log: pytest.LogCaptureFixture):
    loader = numbered_loader(source=broken, batch_size=50, prefetch=1)
    order = take(loader, 10)
    loader.close()
    assert loader.skipped == 5
    assert len(order) == 500
    assert not set(order) & set(broken.broken)
    # Everything else of the epoch is there; five of them stand in for the five.
    assert len(set(order)) == 495
    for name, reason in [
        ("number 7", "truncated"),
        ("number 100", "unreadable: OSError: disk on fire"),
        ("number 200", "0 bytes"),
        ("number 300", "label 10 is not one of 10 classes"),
        ("number 400", "label -1 is not one of 10 classes"),
    ]:
        assert any(f"skipped corrupt example {name}: " in m and reason in m for m in log.messages), name


def test_corrupt_examples_change_nothing_but_their_own_places(broken: Numbered):
    """The rest of the order, on one shard or more, is as if nothing had happened."""
    healthy = take(numbered_loader(500, batch_size=50), 15)
    order = take(numbered_loader(source=broken, batch_size=50), 15)
    differing = [position for position in range(750) if order[position] != healthy[position]]
    assert {healthy[position] for position in differing} <= set(broken.broken)
    halves = [numbered_loader(source=broken, batch_size=50, rows=rows) for rows in (range(25), range(25, 50))]
    apart = []
    for _ in range(15):
        for half in halves:
            apart += take(half, 1)
    assert apart == order
    assert halves[0].skipped + halves[1].skipped == len(differing)


def test_resume_meets_the_same_corrupt_examples(broken: Numbered):
    loader = numbered_loader(source=broken, batch_size=50)
    take(loader, 6)
    before = loader.skipped
    resumed = numbered_loader(source=broken, batch_size=50, num_threads=1)
    resumed.set_state(loader.get_state())
    assert take(resumed, 9) == take(loader, 9)
    assert before + resumed.skipped == loader.skipped > 5


def test_evaluation_masks_counts_and_names_corrupt_examples(broken: Numbered, log: pytest.LogCaptureFixture):
    loader = eval_loader(broken, batch_size=30, image_size=(1, 2), crop_fraction=1.0)
    for _ in range(2):
        batches = list(loader)
        seen = [number for batch in batches for number in numbers(batch["image"][batch["mask"]])]
        assert seen == [number for number in range(500) if number not in broken.broken]
        assert loader.skipped == 5
    assert sum("skipped corrupt example number 100: unreadable" in message for message in log.messages) == 2


# --- Arguments ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"rows": [0, 2]}, r"rows are \(0, 2\): expected ascending numbers, 0 <= row < batch_size = 2"),
        ({"rows": [1, 0]}, "expected ascending numbers"),
        ({"rows": []}, "expected ascending numbers"),
        ({"source": Numbered(0)}, "the source has no examples"),
    ],
)
def test_impossible_arguments_are_refused(changes, message: str):
    arguments = {"source": Numbered(5), "batch_size": 2, "image_size": (1, 2)} | changes
    with pytest.raises(ValueError, match=message):
        train_loader(**arguments, augment=OFF, seed=0)
    with pytest.raises(ValueError, match=message):
        eval_loader(**arguments)


def test_impossible_crop_fraction_is_refused():
    with pytest.raises(ValueError, match="expected 0 < crop_fraction <= 1"):
        eval_loader(Numbered(5), batch_size=2, image_size=8, crop_fraction=1.5)
