"""Ablations: what a grid says is checked first, then run once, side by side, and told as it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import timing
from benchmarks.ablation import __main__ as command
from benchmarks.ablation.grid import ROOT, Grid, Run, load_grid, runs_of
from benchmarks.ablation.report import Curve, Record, Result, draw, markdown, training_seconds
from benchmarks.ablation.runs import LOG_FILE, Outcome, run_side_by_side, split_cores
from vir_jax.runs.metrics import METRICS_FILE, read_metrics
from vir_jax.runs.preemption import EXIT_CODE

PAGE = "A page.\n\n<!-- ablation_tiny:begin -->\nold<!-- ablation_tiny:end -->\n"
TINY = {"epochs": 1.0, "optim.warmup_epochs": 0.5, "log_every": 2, "eval_every": 4}
ROWS = {
    "vir": {},
    "too_large": {"batch_size": 4096},  # Than there are digits, which is seen once they are read.
}


def write_grid(path, *, common=TINY, rows=ROWS, seeds=(0, 1)):
    values = {"RECIPE": "configs/vir_digits.py", "COMMON": common, "ROWS": rows, "SEEDS": seeds}
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    return path


def write_into(folder, patch):
    """Have results and pages written there."""
    patch.setattr(timing, "RESULTS", folder / "results")
    patch.setattr(command, "DOCS", folder / "docs")
    (folder / "docs" / "figures").mkdir(parents=True)
    (folder / "docs" / "results.md").write_text(PAGE)


@pytest.fixture
def results(tmp_path, monkeypatch):
    write_into(tmp_path, monkeypatch)
    return tmp_path / "results"


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a run was started")

    monkeypatch.setattr("benchmarks.ablation.runs.subprocess.Popen", refuse)


def records(folder):
    return {
        (r["row"], r["seed"]): r for r in json.loads((folder / "ablation_tiny.json").read_text())["records"]
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A grid that has been run: (its file, the folder of its runs, its results)."""
    folder = tmp_path_factory.mktemp("ablation")
    grid = write_grid(folder / "tiny.py", seeds=(0,))
    with pytest.MonkeyPatch.context() as patch:
        write_into(folder, patch)
        with pytest.raises(SystemExit, match="1 of 2 runs failed"):
            command.main([str(grid), f"--folder={folder}"])
    return grid, folder, folder / "results"


def test_every_run_is_told_as_its_metrics_have_it(tiny):
    _, folder, results = tiny
    told = records(results)
    assert told.keys() == {(row, 0) for row in ROWS}
    for (row, seed), record in told.items():
        if row == "too_large":
            continue
        lines = read_metrics(folder / "tiny" / row / f"seed_{seed}")
        result = record["result"]
        evaluated = [line for line in lines if "eval/top1" in line]
        assert [line["step"] for line in evaluated] == result["curve"]["step"] == [4, 8, 11]
        assert [line["eval/top1"] for line in evaluated] == result["curve"]["value"]
        assert result["metric"] == "top1"
        assert result["value"] == evaluated[-1]["eval/top1"]
        assert result["parameters"] == 203_146
        speed = [line["images_per_second"] for line in lines if "images_per_second" in line]
        assert result["milliseconds_per_step"] == pytest.approx(np.median([128e3 / s for s in speed]))
        seconds = sum(128 * steps / s for steps, s in zip((2, 2, 2, 2, 2, 1), speed, strict=True))
        assert result["curve"]["seconds"][-1] == pytest.approx(seconds)
        assert 0 < result["curve"]["seconds"][0] < result["curve"]["seconds"][1] < seconds
    with Image.open(folder / "docs" / "figures" / "ablation_tiny.png") as figure:
        assert figure.width > 1000


def test_a_failed_run_stops_no_other_and_says_why(tiny):
    _, _, results = tiny
    error = records(results)["too_large", 0]["outcome"]["error"]
    assert error.startswith("exit code 1: the training data has")
    assert "fewer than one batch of 4096" in error
    page = (results / "ablation_tiny.md").read_text()
    assert re.search(r"^\| too_large \| `batch_size=4096` \|  \| 0 of 1 \|", page, re.MULTILINE)
    assert re.search(r"^\| vir \|  \| [\d.]+ \| 1 \| [\d.]+ \| 203,146 \| 20\d\d-", page, re.MULTILINE)
    assert f"- too_large, seed 0: {error}" in page
    told = (results.parent / "docs" / "results.md").read_text()
    assert told == PAGE.replace("old", page.split("\n", 2)[2])


def test_what_is_finished_is_not_run_again(tiny, results, nothing_runs):
    grid, folder, before = tiny
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):  # That of the row that is not asked for.
        command.main([str(grid), f"--folder={folder}", "--rows", "vir"])
    assert records(results) == records(before)


def test_what_the_results_tell_of_is_not_run_again_without_its_workdir(
    tiny, tmp_path, monkeypatch, nothing_runs
):
    grid, _, before = tiny
    write_into(tmp_path, monkeypatch)
    shutil.copytree(before, tmp_path / "results")
    command.main([str(grid), f"--folder={tmp_path}", "--rows", "vir"])
    kept = {key: record for key, record in records(before).items() if key[0] != "too_large"}
    assert records(tmp_path / "results") == kept
    # Of another config it tells nothing: that is to be run.
    longer = write_grid(tmp_path / "tiny.py", common={**TINY, "epochs": 2.0}, seeds=(0,))
    with pytest.raises(AssertionError, match="a run was started"):
        command.main([str(longer), f"--folder={tmp_path}", "--rows", "vir"])


def test_a_longer_run_does_not_go_on_from_a_shorter_one(tiny, results, tmp_path, nothing_runs):
    _, folder, _ = tiny
    longer = write_grid(tmp_path / "tiny.py", common={**TINY, "epochs": 2.0}, seeds=(0,))
    with pytest.raises(SystemExit, match="2 of 2 runs failed"):
        command.main([str(longer), f"--folder={folder}", "--rows", "vir"])
    error = records(results)["vir", 0]["outcome"]["error"]
    assert "holds a run with another config (epochs: 1.0 -> 2.0)" in error


def test_an_interrupted_run_is_saved_and_goes_on(results, tmp_path):
    common = {**TINY, "epochs": 3.0, "log_every": 1, "eval_every": 17}
    grid = write_grid(tmp_path / "tiny.py", common=common, rows={"vir": {}}, seeds=(0,))
    workdir = tmp_path / "tiny" / "vir" / "seed_0"
    arguments = [str(grid), f"--folder={tmp_path}", "--workers=1"]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.ablation", *arguments], cwd=ROOT)
    end = time.monotonic() + 120
    while not (workdir / METRICS_FILE).exists() or not (workdir / METRICS_FILE).read_bytes():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_CODE
    assert read_metrics(workdir)[-1]["step"] < 34

    command.main(arguments)
    assert "going on from step" in (workdir / LOG_FILE).read_text()
    assert records(results)["vir", 0]["result"]["curve"]["step"] == [17, 34]


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ({"vir": {}, "x": {"model.layer_scales": 1}}, [], "row 'x'.*did you mean 'model.layer_scale'"),
        ({"vir": {}, "x": {"optim.lr": -1.0}}, [], "row 'x': config.optim.lr is -1.0; expected"),
        ({"vir": {}, "x": {"optim.lr": "high"}}, [], "row 'x': config.optim.lr is 'high'"),
        ({"vir": {}, "x": {"seed": 3}}, [], "row 'x'.*SEEDS"),
        ({"a/b": {}}, [], "row 'a/b'"),
        ({"vir": {}}, ["--rows", "vit"], r"--rows has \['vit'\].*\['vir'\]"),
        ({"vir": {}}, ["--seeds", "7"], r"--seeds has \[7\].*\[0, 1\]"),
        ({"vir": {}}, ["--workers", "10000"], "--workers is 10000; expected 1 to"),
        ({"vir": {}}, ["--data_dir", "."], "config.data.data_dir is .* nothing reads it"),
    ],
)
def test_nothing_runs_before_all_is_checked(rows, arguments, said, tmp_path, results, nothing_runs, capsys):
    grid = write_grid(tmp_path / "tiny.py", rows=rows)
    with pytest.raises(SystemExit, match="2"):
        command.main([str(grid), f"--folder={tmp_path}", *arguments])
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "tiny").exists()


def test_a_grid_that_lacks_something_is_refused(tmp_path):
    (tmp_path / "tiny.py").write_text("RECIPE = 'configs/vir_digits.py'\nROWS = {}\n")
    with pytest.raises(ValueError, match="does not define COMMON, SEEDS"):
        load_grid(tmp_path / "tiny.py")


def test_mean_and_standard_deviation_are_over_seeds():
    outcome = Outcome(None, "2024-05-01 12:00", 2, 1)
    curve = Curve([10], [1.0], [0.5])
    grid = Grid("g", "configs/x.py", {}, {"a": {}, "b": {"epochs": 2.0}, "c": {}}, (0, 1))
    values = [("a", 0, 0.50, 10.0), ("a", 1, 0.52, 14.0), ("b", 1, 0.61, 20.0)]
    runs = [
        Record(row, seed, {}, {}, outcome, Result("top1", value, milliseconds, 1234, curve))
        for row, seed, value, milliseconds in values
    ]
    page = markdown(grid, runs)
    assert "| row | changes | top-1, % | seeds | ms a step |" in page
    assert "| a |  | 51.00 ± 1.41 | 2 | 12.0 | 1,234 | 2024-05-01 12:00 |" in page
    assert "| b | `epochs=2.0` | 61.00 | 1 of 2 | 20.0 | 1,234 | 2024-05-01 12:00 |" in page
    assert "| c |  |  | 0 of 2 |  |  |  |" in page
    assert "2 at a time, cores of each: 1" in page


def test_bits_per_dimension_are_written_to_three_decimals():
    outcome, curve = Outcome(None, "2024-05-01 12:00", 1, 1), Curve([10], [1.0], [3.0])
    grid = Grid("g", "configs/x.py", {}, {"a": {}}, (0, 1))
    runs = [
        Record("a", seed, {}, {}, outcome, Result("bits_per_dim", value, 1.0, 1, curve))
        for seed, value in enumerate((1.8461, 1.8521))
    ]
    page = markdown(grid, runs)
    assert "| bits/dim, lower is better |" in page
    assert "| 1.849 ± 0.004 |" in page
    (axes, *_) = draw(grid, runs).axes
    assert axes.get_ylabel() == "bits/dim, lower is better"


def test_seconds_are_those_of_the_steps():
    steps, seconds = training_seconds(np.array([10, 30]), np.array([100.0, 50.0]), 5)
    np.testing.assert_array_equal(steps, [0, 10, 30])
    np.testing.assert_allclose(seconds, [0.0, 0.5, 2.5])


def test_every_run_has_cores_of_its_own(tmp_path):
    assert split_cores([0, 2, 3, 5, 7], 2) == [{0, 2}, {3, 5}]

    class SaysItsCores(Run):
        def arguments(self):
            return ["-c", "import os; print(sorted(os.sched_getaffinity(0)))"]

    cores = sorted(os.sched_getaffinity(0))
    slots = split_cores(cores, min(2, len(cores)))
    runs = [SaysItsCores("row", seed, "", {}, tmp_path / str(seed)) for seed in range(4)]
    ended = list(run_side_by_side(runs, slots))
    assert sorted(run.seed for run, _ in ended) == [0, 1, 2, 3]
    assert all(outcome.error is None and outcome.side_by_side == len(slots) for _, outcome in ended)
    logs = [json.loads((run.workdir / LOG_FILE).read_text()) for run in runs]
    assert logs[:2] == [sorted(slot) for slot in (*slots, *slots)][:2]
    assert all(set(log) in slots for log in logs)
    assert sorted(os.sched_getaffinity(0)) == cores


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "grids").glob("*.py")), ids=lambda path: path.stem
)
def test_the_grids_are_valid(path):
    grid = load_grid(path)
    runs = runs_of(grid, Path("runs"), rows=grid.rows, seeds=[0], fields={})
    assert len({run.config.to_json() for run in runs}) == len(grid.rows)
