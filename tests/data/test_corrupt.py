"""How many corrupt examples a split may have: one rule for training, evaluation and the look before the first step."""

import dataclasses
import io
import logging

import numpy as np
import pytest

from tests.data.test_loader import OFF, Numbered, numbered_loader, take, unreadable
from vir_jax.data import TooManyCorruptError, check_examples, eval_loader, train_loader


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="absl")
    return caplog


def with_corrupt(length: int, corrupt: int) -> Numbered:
    """The corrupt ones evenly spread."""
    return Numbered(
        length, dict.fromkeys(np.linspace(0, length - 1, corrupt).astype(int).tolist(), unreadable)
    )


def read_all(source: Numbered, *, training: bool, **options: float) -> None:
    """Three passes of training, or one of evaluation."""
    if training:
        loader = numbered_loader(source=source, batch_size=20, **options)
        take(loader, 3 * len(source) // 20)
        loader.close()
    else:
        list(eval_loader(source, batch_size=20, image_size=(1, 2), crop_fraction=1.0, **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("length", "corrupt", "fraction", "borne"),
    [
        (60, 1, 0.01, True),
        (60, 10, 0.01, True),
        (60, 11, 0.01, False),
        (1400, 14, 0.01, True),
        (1400, 15, 0.01, False),
        (60, 1, 0.0, False),
        (60, 40, 0.05, True),
        (1000, 570, 0.57, True),
    ],
)
def test_one_rule_of_how_many(training: bool, length: int, corrupt: int, fraction: float, borne: bool):
    """In training and in evaluation; an example counts once, however often it comes."""
    source = with_corrupt(length, corrupt)

    def check() -> None:
        check_examples(source, max_corrupt_fraction=fraction, num_threads=2)

    def read() -> None:
        read_all(source, training=training, max_corrupt_fraction=fraction)

    for attempt in (read, check) if length <= 1000 else (read,):
        if borne:
            attempt()
        else:
            with pytest.raises(TooManyCorruptError, match=rf"examples were corrupt; .* = {fraction:g} bears"):
                attempt()


def test_one_bad_image_never_stops_a_long_training():
    loader = numbered_loader(source=with_corrupt(50, 1), batch_size=50)
    take(loader, 40)
    assert loader.skipped >= 40


def test_a_large_split_is_looked_at_here_and_there(log: pytest.LogCaptureFixture):
    for corrupt, message in ((2500, "of 5,000 examples"), (200, "of 1,000 examples .* bears 28 of so many")):
        with pytest.raises(TooManyCorruptError, match=message):
            check_examples(with_corrupt(5000, corrupt), max_corrupt_fraction=0.01, num_threads=2)
    assert any("corrupt example number 0: unreadable: OSError: disk on fire" in m for m in log.messages)
    check_examples(with_corrupt(5000, 5), max_corrupt_fraction=0.01, num_threads=2)


def test_training_stops_where_nothing_can_be_used():
    most = numbered_loader(source=with_corrupt(100, 60), batch_size=100, max_corrupt_fraction=0.06)
    take(most, 20)  # Each is replaced by one that is corrupt as often: more are skipped than used.
    assert most.skipped > 2000
    with pytest.raises(TooManyCorruptError, match="20 examples drawn in a row were corrupt"):
        next(numbered_loader(source=Numbered(5, dict.fromkeys(range(5), unreadable))))


def test_doubtful_and_transparent_images_reach_both_loaders_alike(log: pytest.LogCaptureFixture):
    dark, clear = io.BytesIO(), io.BytesIO()
    np.save(dark, np.full((4, 4), 4095, np.uint16))
    np.save(clear, np.full((4, 4, 4), [9, 9, 9, 0], np.uint8))
    files = [dark.getvalue(), clear.getvalue()]
    source = Numbered(2, {i: lambda i=i: {"image": files[i], "label": 0} for i in range(2)})
    options = {"batch_size": 2, "image_size": (4, 4), "background": (1, 2, 3), "num_threads": 1}
    evaluated = next(iter(eval_loader(source, **options, crop_fraction=1.0)))["image"]
    loader = train_loader(source, **options, augment=dataclasses.replace(OFF, crop="none"), seed=0)
    trained = next(loader)["image"]
    loader.close()
    assert {image.tobytes() for image in trained} == {image.tobytes() for image in evaluated}
    np.testing.assert_array_equal(evaluated[1], np.broadcast_to([1, 2, 3], (4, 4, 3)))
    assert any("number 0: nearly black" in message for message in log.messages)
