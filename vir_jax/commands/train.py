"""Train a model: vir-train --config=vir_b --workdir=runs/vir_b [--config.optim.lr=1e-3 ...].

A recipe is the name of one that comes with the package, or a file: --config=configs/vir_b.py. Some take arguments,
--config=vir_cifar10:epochs=8. Any field of it can be changed, --config.batch_size=256; vir_jax/runs/config.py explains
them. The same command goes on with a run that was stopped.

Exit codes: 0 done, or done before; 75 SIGTERM came and the run is saved, so that the same command goes on; 1 anything
else, a save that failed after SIGTERM too. An expected error is told in a sentence; --traceback shows where it arose.
"""

import sys

import jax
from absl import app, logging

from vir_jax import command_line
from vir_jax.generation.workdir import draw_samples
from vir_jax.parallel.processes import initialize_from_flags
from vir_jax.paths import define_path
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.preemption import EXIT_CODE, PreemptedError
from vir_jax.runs.recipes import define_recipe
from vir_jax.training.loop import train

CONFIG = define_recipe("config", "recipe: a name, or a file as configs/NAME.py, [:argument=value,...]")
WORKDIR = define_path(
    "workdir",
    None,
    "folder of checkpoints and metrics, local or gs://bucket/folder; the same one goes on with its run",
    bucket=True,
)


def main(argv: list[str]) -> None:
    """Turn the flags into one call of vir_jax."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    quiet_libraries()
    initialize_from_flags()
    try:
        metrics = train(CONFIG.value, WORKDIR.value, draw=draw_samples)
    except PreemptedError as notice:
        logging.warning("SIGTERM: %s. The same command goes on; exit code %d", notice, EXIT_CODE)
        sys.exit(EXIT_CODE)
    if jax.process_index() == 0:
        command_line.write_line(
            "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "count")
        )


def run() -> None:
    """Run the command."""
    command_line.run(main, required=("config", "workdir"))
