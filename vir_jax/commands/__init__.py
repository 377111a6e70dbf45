"""The commands that the package installs: vir-train, vir-eval, vir-predict, vir-generate, vir-compile,
vir-bench.

Each is a module of its own with flags and a `main`, which turns them into one call of vir_jax. In a checkout train.py,
eval.py, predict.py and generate.py are the same.
"""

import importlib
import sys

from vir_jax.extras import MissingPackageError, require


def train() -> None:
    """Train a model (vir-train)."""
    _run("train")


def evaluate() -> None:
    """Evaluate a run (vir-eval)."""
    _run("eval")


def predict() -> None:
    """Classify images (vir-predict)."""
    _run("predict")


def generate() -> None:
    """Draw images (vir-generate)."""
    _run("generate")


def compile_step() -> None:
    """Compile a training step for machines that are not there (vir-compile)."""
    _run("compile")


def bench() -> None:
    """Measure images/s and memory of a model (vir-bench)."""
    _run("bench")


def _run(name: str) -> None:
    try:
        require("train", "absl", "ml_collections", "optax")
        sys.path.append(
            ""
        )  # A task or transform of one's own, in the folder of the command, as `python` does.
        command = importlib.import_module(f"vir_jax.commands.{name}")
    except MissingPackageError as error:
        sys.exit(f"vir-{name}: {error}")
    command.run()
