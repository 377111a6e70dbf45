"""Training curves: the series of a run's metrics."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64


class Curve(NamedTuple):
    """One metric of a run."""

    step: Int64[np.ndarray, "n"]
    value: Float64[np.ndarray, "n"]  # NaN where it was not finite.


def metric_curves(lines: Sequence[Mapping[str, float | int | None]]) -> dict[str, Curve]:
    """Return every metric by name ("train/loss", "eval/top1"), at the steps where it was written.

    Args:
        lines: of a run's `metrics.jsonl`; null stands for what was not finite.
    """
    series = {}
    for name in dict.fromkeys(name for line in lines for name in line if name != "step"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = zip(*points, strict=True)
        finite = [np.nan if value is None else value for value in values]
        series[name] = Curve(np.array(steps, np.int64), np.array(finite, np.float64))
    return series
