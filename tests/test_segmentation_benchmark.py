"""What the benchmark of segmentation says, of predictions and records that are made up here."""

import dataclasses

import numpy as np
import pytest

from benchmarks import segmentation
from benchmarks.segmentation import VARIANTS, FirstScenes, Record
from vir_jax.data.digits_scenes import DigitsScenesSource
from vir_jax.runs.config import flatten
from vir_jax.runs.recipes import load_recipe
from vir_jax.runs.validate import validate

RECORD = Record("causal", 0, 25.0, 500, 1234, 0.4, 0.9, [0.5] * 32, [0.1, *[0.6] * 7])


@pytest.fixture(scope="module")
def scenes():
    return FirstScenes("test", 4)


def test_rows_that_are_right(scenes):
    """All but the digits' first rows: those rows alone are wrong, wherever they stand on the canvas."""
    truth = np.stack([scenes[index]["label"] for index in range(4)])
    canvas, digit = segmentation.rows_right(scenes, truth)
    inked = (truth > 0).any(axis=(0, 2))
    np.testing.assert_array_equal(canvas, inked)
    np.testing.assert_array_equal(digit, np.ones(8))
    wrong = truth.copy()
    for index in range(4):
        for top, left, _ in scenes.scene(index).places:
            wrong[index, top, left : left + 8] = 0
    canvas, digit = segmentation.rows_right(scenes, wrong)
    np.testing.assert_array_equal(digit, [0, *[1] * 7])
    assert (canvas[inked] < 1).any()


def test_variants_are_of_one_recipe():
    recipe = flatten(load_recipe("vir_digits_segmentation"))
    for variant, changes in VARIANTS.items():
        config = segmentation.variant_config(variant, 0, 25.0)
        validate(config)
        now = flatten(config)
        changed = {name for name in recipe if recipe[name] != now[name]}
        assert changed == {"epochs", "eval_every", *(f"model.{name}" for name in changes)}
    assert segmentation.variant_config("causal", 3, 1.0).seed == 3


def test_the_page_says_how_much_of_the_gap_is_closed():
    records = [
        RECORD,
        dataclasses.replace(RECORD, seed=1, miou=0.6),
        dataclasses.replace(RECORD, variant="bidirectional", miou=0.65),
        dataclasses.replace(RECORD, variant="vit", miou=0.7),
    ]
    page = segmentation.markdown(records)
    assert "| causal | 50.0 ± 14.1 | 90.0 ± 0.0 | 1,234 | 2 |" in page
    assert "| vit | 10.0 | 60.0 |" in page
    assert "Of the gap in mIoU between causal and vit is closed: bidirectional 75%." in page
    assert "gap" not in segmentation.markdown(records[:2])
    behind = [RECORD, dataclasses.replace(RECORD, variant="vit", miou=0.3)]
    assert "gap" not in segmentation.markdown(behind)


def test_the_figure_shows_scenes_and_masks():
    scenes = DigitsScenesSource("test")
    predicted = np.zeros((segmentation.SHOWN, 32, 32), np.uint8)
    records = [RECORD, dataclasses.replace(RECORD, seed=1, digit_rows=[0.3] * 8)]
    figure = segmentation.draw(scenes, {"causal": predicted, "vit": predicted}, records)
    by_digit, by_canvas, *shown = figure.axes
    assert [axes.get_ylabel() for axes in shown] == ["scene", "mask", "causal", "vit"]
    (line,) = by_digit.lines
    np.testing.assert_allclose(line.get_ydata(), [20, *[45] * 7])
    np.testing.assert_allclose(by_canvas.lines[0].get_xydata(), [(4 * i + 1.5, 50) for i in range(8)])
