"""Evaluation of a run: the metrics of its task on its evaluation sets, in one form of the mixer or in all of them."""

from vir_jax.evaluation.predictions import Predictions
from vir_jax.evaluation.report import format_report, report, write_report
from vir_jax.evaluation.workdir import (
    ModesDisagreeError,
    evaluate_workdir,
    evaluation_mesh,
    format_results,
    select_modes,
)

__all__ = [
    "ModesDisagreeError",
    "Predictions",
    "evaluate_workdir",
    "evaluation_mesh",
    "format_report",
    "format_results",
    "report",
    "select_modes",
    "write_report",
]
