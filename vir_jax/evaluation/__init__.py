"""Evaluation of a run: the metrics of its task on a data set, in one form of the mixer or in all of them."""

from vir_jax.evaluation.workdir import (
    ModesDisagreeError,
    evaluate_workdir,
    evaluation_mesh,
    format_results,
    select_modes,
)

__all__ = [
    "ModesDisagreeError",
    "evaluate_workdir",
    "evaluation_mesh",
    "format_results",
    "select_modes",
]
