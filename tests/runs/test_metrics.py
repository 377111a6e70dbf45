import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vir_jax.runs.metrics import MetricMeans, MetricsWriter, read_metrics
from vir_jax.training.clock import Clock


def test_a_windows_state_is_that_of_its_moment():
    """Checkpoints are written while training goes on: what is added meanwhile is of a later step."""
    means = MetricMeans()
    state = means.state()
    means.add({"loss": 1.0})
    assert state == MetricMeans().state()


def test_lines_and_events(tmp_path):
    with MetricsWriter(tmp_path, start_step=0, total_steps=4) as writer:
        writer.write(1, {"train/loss": 2.5, "train/top1": 0.25})
        writer.write(2, {"train/loss": float("nan")})
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 2.5, "train/top1": 0.25},
        {"step": 2, "train/loss": None},
    ]
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.summary.value]
    scalars = {(e.step, v.tag): v.tensor.float_val[0] for e in events for v in e.summary.value}
    assert scalars[1, "train/loss"] == 2.5
    assert scalars[1, "train/top1"] == 0.25


def test_images_are_events_too(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with MetricsWriter(tmp_path, start_step=0, total_steps=4) as writer:
        writer.image(3, "data/first_batch", picture)
    (path,) = (tmp_path / "tensorboard").iterdir()
    (event,) = [event for event in EventFileLoader(str(path)).Load() if event.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (3, "data/first_batch")
    width, height, encoded = value.tensor.string_val
    assert (width, height) == (b"6", b"4")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), picture)


def test_no_writer_leaves_the_lines(tmp_path):
    with MetricsWriter(tmp_path, start_step=0, total_steps=4, writers=()) as writer:
        writer.write(1, {"train/loss": 2.5})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(tmp_path)) == 1


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    """As on a disk that was full: a part of the line went in, and the run stopped before the rest."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "tra')
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/lo')
    assert read_metrics(tmp_path) == []


def test_lines_after_the_restored_step_are_taken_out(tmp_path):
    lines = [json.dumps({"step": step, "train/loss": float(step)}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "tra')
    with MetricsWriter(tmp_path, start_step=2, total_steps=4) as writer:
        writer.write(3, {"train/loss": 30.0})
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 30),
    ]


def test_window_goes_on_from_its_saved_state():
    whole, first = MetricMeans(), MetricMeans()
    for value in (0.1, 0.7, 1.3):
        whole.add({"loss": value})
    first.add({"loss": 0.1})
    second = MetricMeans(**json.loads(json.dumps(first.state())))
    for value in (0.7, 1.3):
        second.add({"loss": value})
    assert second.pop_means() == whole.pop_means() == {"loss": pytest.approx(0.7)}
    assert whole.state() == {"sums": {}, "count": 0, "skipped_steps": 0}


def test_clock_leaves_out_pauses(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock(batch_size=10, flops_per_image=1)
    for _ in range(4):
        clock.tick()
    now = 2.0
    with clock.paused():
        now = 100.0
    assert clock.read(remaining_steps=6) == {"images_per_second": 20.0, "eta_seconds": 3.0}


def test_utilisation_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr("vir_jax.training.clock.peak_flops", lambda: 1e12)
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock(batch_size=100, flops_per_image=10**9)
    clock.tick()
    now = 0.5
    assert clock.read(remaining_steps=0)["mfu"] == pytest.approx(0.2)
