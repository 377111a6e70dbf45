"""Train a model: python train.py --config=configs/vir_b.py --workdir=runs/vir_b [--config.optim.lr=1e-3 ...].

Exit codes: 0 done, or done before; 75 SIGTERM came and the run is saved, so that the same command goes on; 1 anything
else, a save that failed after SIGTERM too. An error that is foreseen is told in a sentence; --traceback shows where it
arose.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from vir_jax import command_line
from vir_jax.parallel.processes import initialize_from_flags
from vir_jax.paths import define_path
from vir_jax.runs.preemption import EXIT_CODE, PreemptedError
from vir_jax.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", help_string="recipe, configs/NAME.py[:argument=value,...]")
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
    initialize_from_flags()
    try:
        metrics = train(CONFIG.value, WORKDIR.value)
    except PreemptedError as notice:
        logging.warning("SIGTERM: %s. The same command goes on; exit code %d", notice, EXIT_CODE)
        sys.exit(EXIT_CODE)
    if jax.process_index() == 0:
        command_line.write_line(
            "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "count")
        )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main)
