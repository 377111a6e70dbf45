"""What the runs of a grid say: one record each, a table of the rows, and curves over steps and over seconds."""

import dataclasses
import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.ablation.grid import Grid, Run
from benchmarks.ablation.runs import Outcome
from benchmarks.timing import markdown_table
from vir_jax.inspection.curves import metric_curves
from vir_jax.inspection.figures.style import new_figure
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.model import model_functions
from vir_jax.tasks import make_task
from vir_jax.training.summary import count_parameters


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a metric is written: what it is called, what it is multiplied with, and decimals."""

    name: str
    factor: float = 1.0
    decimals: int = 2

    def text(self, value: float) -> str:
        """Return a value of the metric."""
        return f"{self.factor * value:.{self.decimals}f}"


SHOWN = {
    "top1": Shown("top-1, %", 100.0),
    "bits_per_dim": Shown("bits/dim, lower is better", decimals=3),
}
"""Metrics that are not written as they are called in the log."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The metric of a run at each of its evaluations.

    Attributes:
        step: of the evaluation.
        seconds: that training to it took, without compilation, evaluations and checkpoints; a step that was done again
            after an interruption counts once.
        value: of the metric.
    """

    step: list[int]
    seconds: list[float]
    value: list[float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        metric: that "best" goes by in its task.
        value: of it after the last step, of the moving average where one was kept.
        milliseconds_per_step: median over the lines of its metrics.
        parameters: of the model.
        curve: of the metric.
    """

    metric: str
    value: float
    milliseconds_per_step: float
    parameters: int
    curve: Curve


@dataclasses.dataclass(frozen=True)
class Record:
    """One run that has ended.

    Attributes:
        row: its name.
        seed: its seed.
        changes: the fields of the row.
        identity: of the run.
        outcome: how it ended.
        result: None where it failed.
    """

    row: str
    seed: int
    changes: Mapping[str, Any]
    identity: Mapping[str, Any]
    outcome: Outcome
    result: Result | None

    def said(self) -> str:
        """Return how it ended, in a line."""
        if self.result is None:
            return f"{self.row}, seed {self.seed}: {self.outcome.error}"
        return f"{self.row}, seed {self.seed}: {self.result.metric} {self.result.value:.4f}"


def record_of(grid: Grid, run: Run, outcome: Outcome) -> Record:
    """Return how a run ended, and what it left in its workdir."""
    result = None if outcome.error is not None else _read(run)
    return Record(run.row, run.seed, grid.rows[run.row], run.identity, outcome, result)


def read_records(path: Path) -> list[Record]:
    """Return the runs that a results file tells of, as `write_results` wrote them; none where there is no file."""
    if not path.exists():
        return []
    return [_record(**record) for record in json.loads(path.read_text())["records"]]


def _record(*, outcome: dict[str, Any], result: dict[str, Any] | None, **told: Any) -> Record:
    if result is not None:
        result["curve"] = Curve(**result["curve"])
    return Record(outcome=Outcome(**outcome), result=None if result is None else Result(**result), **told)


def _read(run: Run) -> Result:
    with CheckpointReader(run.workdir) as checkpoints:
        config, metadata = checkpoints.restore_config(checkpoints.resolve("last"))
    task = make_task(config, metadata["class_names"])
    curves = metric_curves(read_metrics(run.workdir))
    evaluated, speed = curves[f"eval/{task.best}"], curves["images_per_second"]
    steps, seconds = training_seconds(speed.step, speed.value, config.batch_size)
    return Result(
        metric=task.best,
        value=float(evaluated.value[-1]),
        milliseconds_per_step=float(np.median(1e3 * config.batch_size / speed.value)),
        parameters=count_parameters(model_functions(config.model, task.num_outputs).parameters),
        curve=Curve(
            evaluated.step.tolist(),
            np.interp(evaluated.step, steps, seconds).tolist(),
            evaluated.value.tolist(),
        ),
    )


def training_seconds(
    steps: Int64[np.ndarray, "n"], images_per_second: Float64[np.ndarray, "n"], batch_size: int
) -> tuple[Int64[np.ndarray, "n+1"], Float64[np.ndarray, "n+1"]]:
    """Return the seconds of training up to each step that speed was written at, from step 0.

    Args:
        steps: where it was written.
        images_per_second: since the step before.
        batch_size: images of a step.
    """
    steps = np.concatenate([[0], steps])
    spent = np.diff(steps) * batch_size / images_per_second
    return steps, np.concatenate([[0.0], np.cumsum(spent)])


def markdown(grid: Grid, records: Sequence[Record]) -> str:
    """Return the page of a grid: how it was made, its rows, and which runs failed."""
    shared = sorted({(r.outcome.side_by_side, r.outcome.cores) for r in records if r.result is not None})
    machine = ", ".join(f"{count} at a time, cores of each: {cores}" for count, cores in shared)
    shown = _shown([record.result for record in records if record.result is not None])
    header = ["row", "changes", shown.name, "seeds", "ms a step", "parameters", "finished, UTC"]
    rows = [_row(grid, row, records) for row in grid.rows]
    common = _fields(grid.common)
    failed = [f"- {record.said()}\n" for record in records if record.result is None]
    introduction = (
        f"`{grid.recipe}`{common and f' with {common}'}. Mean and standard deviation over seeds of the evaluation after"
        " the last step, of the moving average where the recipe keeps one. Milliseconds: median over seeds of the"
        f" medians of a run's own metrics; runs side by side slow each other{machine and f' (here {machine})'}. Written"
        " by `python -m benchmarks.ablation`."
    )
    return (
        textwrap.fill(introduction, 120, break_long_words=False, break_on_hyphens=False)
        + f"\n\n{markdown_table(header, rows)}"
        + ("\nFailed:\n\n" + "".join(failed) if failed else "")
    )


def _row(grid: Grid, row: str, records: Sequence[Record]) -> list[str]:
    results = _results(grid, records).get(row, [])
    seeds = f"{len(results)}" if len(results) == len(grid.seeds) else f"{len(results)} of {len(grid.seeds)}"
    if not results:
        return [row, _fields(grid.rows[row]), "", seeds, "", "", ""]
    shown, values = _shown(results), [result.value for result in results]
    spread = f" ± {shown.text(statistics.stdev(values))}" if len(values) > 1 else ""
    return [
        row,
        _fields(grid.rows[row]),
        f"{shown.text(statistics.mean(values))}{spread}",
        seeds,
        f"{statistics.median(result.milliseconds_per_step for result in results):.1f}",
        f"{results[0].parameters:,}",
        max(record.outcome.ended_at for record in records if record.row == row),
    ]


def _fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in fields.items())


def _results(grid: Grid, records: Sequence[Record]) -> dict[str, list[Result]]:
    """Return the results of each row that has any, in the order of the grid."""
    by_row = {row: [r.result for r in records if r.row == row and r.result is not None] for row in grid.rows}
    return {row: results for row, results in by_row.items() if results}


def _shown(results: Sequence[Result]) -> Shown:
    """Return how the metric of all results is written.

    Raises:
        ValueError: they do not have the same.
    """
    metrics = sorted({result.metric for result in results})
    if len(metrics) > 1:
        raise ValueError(
            f"the rows' tasks go by {' and '.join(metrics)}: one table needs one; make two grids"
        )
    metric = metrics[0] if metrics else "metric"
    return SHOWN.get(metric, Shown(metric))


def draw(grid: Grid, records: Sequence[Record]) -> Figure:
    """Return the curves of all rows that have finished runs: means as lines, single seeds thin.

    Rows named FIRST,REST have a colour for each FIRST, a line style for each REST.
    """
    by_row = _results(grid, records)
    firsts, rests = (list(dict.fromkeys(row.partition(",")[i] for row in by_row)) for i in (0, 2))
    shown = _shown([result for results in by_row.values() for result in results])
    height = max(4.8, 0.21 * len(by_row) + 0.5)  # The legend has a line for each row.
    figure = new_figure(11.0, height, f"{grid.name}: {shown.name} (thin: single seeds)")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    handles = []
    for row, results in by_row.items():
        first, _, rest = row.partition(",")
        colour, line = firsts.index(first), rests.index(rest)
        values = shown.factor * np.array([result.curve.value for result in results])
        style = {
            "color": colormaps["tab10"](colour % 10),
            "linestyle": ("-", "--", ":", "-.")[(line + colour // 10) % 4],
        }
        for axes, x in (
            (over_steps, np.array([result.curve.step for result in results])),
            (over_seconds, np.array([result.curve.seconds for result in results])),
        ):
            axes.plot(x.T, values.T, **style, linewidth=0.5, alpha=0.6)
            (mean,) = axes.plot(x.mean(axis=0), values.mean(axis=0), **style, linewidth=1.8, marker=".")
        mean.set_label(f"{row}: {values[:, -1].mean():.{shown.decimals}f}")
        handles.append(mean)
    over_steps.set(xlabel="step", ylabel=shown.name)
    over_seconds.set(xlabel="seconds of training, on a shared machine")
    for axes in (over_steps, over_seconds):
        axes.set_xlim(left=0)
        axes.grid(color="0.92")
    if handles:
        figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure
