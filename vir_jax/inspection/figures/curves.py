"""Training curves of one or several runs in one figure."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vir_jax.inspection.curves import Curve
from vir_jax.inspection.figures.style import line, new_figure

PANELS = (
    ("loss", "loss, nats", 1.0),
    ("top1", "top-1, %", 100.0),
    ("learning_rate", "learning rate", 1.0),
    ("gradient_norm", "gradient norm", 1.0),
)


def draw_curves(runs: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Draw loss, top-1, learning rate and gradient norm against the step.

    Training is drawn as lines, evaluation as markers; a run has one shade and dash.

    Args:
        runs: by name, `read_curves` of each.
    """
    figure = new_figure(
        9.0, 5.6, "Training curves (lines: training batches, as augmented; marks: evaluation)"
    )
    for axes, (metric, label, factor) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        for index, (run, curves) in enumerate(runs.items()):
            _draw_run(axes, curves, metric, factor, index, run)
        axes.set_ylabel(label)
        axes.grid(color="0.92")
    for axes in figure.axes[2:]:
        axes.set_xlabel("step")
    handles, names = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(handles), 2), fontsize=8)
    return figure


def _draw_run(
    axes: Axes, curves: Mapping[str, Curve], metric: str, factor: float, index: int, run: str
) -> None:
    if (training := curves.get(f"train/{metric}")) is not None:
        axes.plot(training.step, factor * training.value, label=f"{run}: training", **line(index))
    if (evaluation := curves.get(f"eval/{metric}")) is not None:
        last = f", top-1 {factor * float(evaluation.value[-1]):.1f} %" if metric == "top1" else ""
        axes.plot(
            evaluation.step,
            factor * evaluation.value,
            label=f"{run}: evaluation{last}",
            color=line(index)["color"],
            marker="osD^"[index % 4],
            markersize=6 + 2 * index,
            fillstyle="none",
            linestyle="",
        )
