"""Compile a recipe's training step for machines that are not there: memory, FLOPs and communication per chip.

    vir-compile --config=vir_l --topology=v5e:16x16
    vir-compile --config=vir_digits --num_classes=10 --topology=cpu:8

In a checkout `python -m vir_jax.commands.compile` is the same. TPU slices (v4, v5e, v5p, v6e) need the package libtpu
(`pip install "vir-jax[compile]"`), and no TPU. Exit codes: 0 the step fits the chip's memory; 1 it does not, or an
error, of which --traceback shows where it arose.
"""

import re

import jax
from absl import app, flags, logging

from vir_jax import command_line
from vir_jax.runs.recipes import define_recipe
from vir_jax.training.compile_report import compile_report, format_report

CONFIG = define_recipe("config", "recipe: a name, or a file as configs/NAME.py, [:argument=value,...]")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v5p:4x4x4, 2*v6e:16x16, cpu:8, ...")
NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "of the data", lower_bound=1)


def main(argv: list[str]) -> int:
    """Print the report that the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    topology = TOPOLOGY.value
    assert topology is not None  # It is required.
    # Where libtpu is installed JAX would look for a TPU.
    jax.config.update("jax_platforms", "cpu")
    if match := re.fullmatch(r"cpu:(\d+)", topology):
        jax.config.update("jax_num_cpu_devices", int(match.group(1)))
    logging.set_verbosity(logging.ERROR)
    report = compile_report(CONFIG.value, topology, num_classes=NUM_CLASSES.value)
    command_line.write_line(format_report(report))
    return 0 if report.fits else 1


def run() -> None:
    """Run the command."""
    command_line.run(main, required=("config", "topology"))


if __name__ == "__main__":
    run()
