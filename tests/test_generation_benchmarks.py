"""What the benchmarks of generation and pretraining say, of measurements that are made up here."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import coding, generation, pixel_floor, pretraining
from benchmarks.ablation.grid import runs_of
from benchmarks.ablation.report import Curve, Record, Result
from benchmarks.ablation.runs import Outcome
from tests.generation.helpers import model_of, some_images

# --- Speed ---


def of_times(retention, softmax):
    """Records of one batch, from milliseconds by the number of pixels; None: not run."""
    return [
        generation.Record("vir_pico1", mixer, pixels, 1, ms, 10**6, 10**7)
        for mixer, times in (("retention", retention), ("causal_softmax", softmax))
        for pixels, ms in times.items()
    ]


@pytest.mark.parametrize(
    ("softmax", "said"),
    [
        ({16: 1.0, 64: 4.0, 256: 16.0}, "The lines cross at about N = 32; at N = 256 ViR is 8 times as fast"),
        (
            {16: 4.0, 64: 8.0, 256: 16.0},
            "ViR is faster at all of these sizes: 2 times as fast at N = 16, 8 times at N = 256",
        ),
        (
            {16: 1.0, 64: 1.5, 256: None},
            "ViR is not faster at any of these sizes, where both were run, up to N = 64",
        ),
    ],
)
def test_where_the_lines_cross(softmax, said):
    assert generation.crossing(of_times({16: 2.0, 64: 2.0, 256: 2.0}, softmax)) == said


def test_an_image_takes_as_long_as_its_pixels():
    (record, *_) = of_times({16: 2.0}, {16: 4.0})
    assert record.images_per_second == pytest.approx(1000 / 32)
    assert dataclasses.replace(record, batch=64).images_per_second == pytest.approx(64 * 1000 / 32)
    assert record.cell() == "31.2 (1, 10)"
    assert dataclasses.replace(record, ms=None).cell() == "not run (1, 10)"


def test_the_state_is_of_one_size_and_the_cache_is_not():
    small, large = (generation.measure("vir_pico1", pixels, 2) for pixels in (16, 64))
    (retention, softmax), (large_retention, large_softmax) = small, large
    assert retention.ms > 0
    assert retention.state_bytes < 1.01 * large_retention.state_bytes
    assert large_softmax.state_bytes > 3.5 * softmax.state_bytes
    assert large_softmax.state_bytes < large_softmax.program_bytes
    axes, _ = generation.draw([*small, *large]).axes
    assert len(axes.get_lines()) == 2


# --- The floor ---


def test_a_neighbour_is_an_earlier_pixel():
    images = np.random.default_rng(0).integers(17, size=(1, 8, 8))
    assert len(set(pixel_floor.NEIGHBOURS)) == 9
    for y, x in ((0, 0), (3, 4), (7, 7), (5, 0)):
        changed = images.copy()
        changed.reshape(1, 64)[:, 8 * y + x :] = 0
        np.testing.assert_array_equal(
            pixel_floor.neighbours(images, y, x), pixel_floor.neighbours(changed, y, x)
        )
    np.testing.assert_array_equal(pixel_floor.neighbours(images, 0, 0), 0)
    np.testing.assert_array_equal(pixel_floor.neighbours(images, 3, 4)[0, 0], images[0, 3, 3] / 16)


def test_a_regression_learns_what_its_neighbours_say():
    """Pixels that equal the one to the left, in images whose first column is random."""
    rng = np.random.default_rng(0)
    train, test = (np.repeat(rng.choice([0, 16], size=(n, 8, 1)), 8, axis=2) for n in (60, 40))
    found = pixel_floor.regression(train, test, 4, 3, strength=10.0)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found[np.arange(40), test[:, 4, 3]].min() > 0.9
    uniform = pixel_floor.bits(np.full((2, 8, 8), 1 / 17), 0.5)
    np.testing.assert_allclose(uniform, np.log2(17))
    assert np.isfinite(pixel_floor.bits(np.zeros((2, 8, 8)), 0.01)).all()


# --- Pretraining ---


def records_of(top1, seconds):
    outcome = Outcome(None, "2024-05-01 12:00", 2, 1)
    curves = {row: Curve([1], [time], [0.5]) for row, time in seconds.items()}
    return [
        Record(row, seed, {}, {}, outcome, Result("top1", value, 1.0, 1, curves[row]))
        for row, values in top1.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("pretrained", "verdict"),
    [
        ((0.55, 0.57, 0.56), "by +5.0 ± 1.2 points (standard error): a gain."),
        ((0.45, 0.47, 0.46), "by -5.0 ± 1.2 points (standard error): a loss."),
        ((0.54, 0.51, 0.51), "by +1.0 ± 1.7 points (standard error): no gain that can be told from chance."),
    ],
)
def test_whether_pretraining_gains(pretrained, verdict):
    top1 = {"scratch": (0.50, 0.50, 0.53), "half": (0.4, 0.4, 0.4), "pretrained": pretrained}
    seconds = {"scratch": 300.0, "half": 150.0, "pretrained": 151.0, "next_patch": 149.0}
    squared_error = records_of({"next_patch": (0.6, 0.6, 0.6)}, seconds)
    page = pretraining.report([*records_of(top1, seconds), *squared_error], [], 800)
    assert verdict in page
    assert "| scratch | labels alone | 51.0 ± 1.7 | 300 | 3 |" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| pretrained |"))
    assert line.endswith("| 300 | 3 |")


def test_runs_of_the_arms_are_valid_and_of_equal_cost():
    grid = pretraining.make_grid(800)
    runs = {run.row: run for run in runs_of(grid, Path("runs"), rows=grid.rows, seeds=[1], fields={})}
    images = {"train": 50_000, "train[:10%]": 5_000}
    steps = {
        row: run.config.epochs * images[run.config.data.train_split] / run.config.batch_size
        for row, run in runs.items()
    }
    assert steps == pytest.approx({"next_patch": 400, "scratch": 800, "half": 400, "pretrained": 400})
    assert runs["next_patch"].config.data.train_split == "train"
    assert pretraining.pretraining_of(runs["scratch"], list(runs.values())) is runs["next_patch"]


# --- Coding ---


def test_a_coder_gives_back_what_it_was_given():
    """Symbols of every probability, in about the bits that they have; an empty file is of no symbols."""
    rng = np.random.default_rng(0)
    log_masses = np.float32(rng.normal(scale=6.0, size=(2000, 5)))
    counts = coding.frequencies(log_masses)
    assert counts.min() >= 1
    np.testing.assert_array_equal(counts.sum(axis=1), coding.TOTAL)
    ends = np.cumsum(counts, axis=1)
    symbols = np.array([rng.choice(5, p=row / coding.TOTAL) for row in counts])
    symbols[::50] = rng.integers(5, size=len(symbols[::50]))  # Improbable ones too.
    starts = ends[np.arange(2000), symbols] - counts[np.arange(2000), symbols]
    encoder = coding.Encoder()
    for row, (symbol, start) in enumerate(zip(symbols, starts.tolist(), strict=True)):
        encoder.put(start, int(counts[row, symbol]))
    data = encoder.finish()
    decoder, found = coding.Decoder(data), []
    for row in range(2000):
        symbol = int(np.searchsorted(ends[row], decoder.target(), side="right"))
        start = int(ends[row, symbol] - counts[row, symbol])
        decoder.take(start, int(counts[row, symbol]))
        found.append(symbol)
    np.testing.assert_array_equal(found, symbols)
    bits = -np.log2(counts[np.arange(2000), symbols] / coding.TOTAL).sum()
    assert bits <= 8 * len(data) < 1.0001 * bits + 16


@pytest.mark.parametrize(
    "options", [{"local_context": 1}, {"mixtures": 2}, {"mixer": "causal_softmax"}], ids=str
)
def test_images_are_packed_in_the_bits_of_their_likelihood(options):
    model, images = model_of(4, 5, 6, **options), some_images(30, 4, 5, 6)
    records, bits = coding.measure(model, images)
    assert bits <= records[0].bits_per_dim < 1.005 * bits
    damaged = bytearray(coding.encode(model, images))
    damaged[len(damaged) // 2] ^= 1
    found = coding.decode(model, bytes(damaged), len(images)).reshape(30, 20)
    different = np.any(found != images.reshape(30, 20), axis=0)
    assert not different[:5].any()  # Pixels are packed in raster order, all images' first ones first.
    assert different[15:].all()
