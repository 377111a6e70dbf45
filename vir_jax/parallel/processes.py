"""Several processes, one run: a process for each host of a TPU slice, or for each GPU or node.

JAX recognises TPU VMs, GKE, Slurm, Open MPI and Kubernetes by itself; elsewhere the flags below say where process 0
listens. Every process starts the same command.
"""

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where JAX cannot know"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "with --coordinator_address: how many processes there are"
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "with --coordinator_address: which of them this is, from 0"
)


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of the run; comes before anything asks JAX for its devices.

    Without arguments JAX looks for a cluster that it knows, and where it finds none, the process is alone. All but
    process 0 log warnings only.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: of the run.
      process_id: of this process, from 0.

    Raises:
      ValueError: some of the arguments are given, others not, or out of range.
      RuntimeError: the others did not come within five minutes.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given) and None in given:
        raise ValueError(
            f"coordinator_address is {coordinator_address}, num_processes {num_processes}, process_id {process_id}:"
            " expected all three, or none where JAX recognises the cluster"
        )
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator_address is None else "deactivate",
        )
    except ValueError as error:
        # What JAX says where it recognised no cluster.
        if coordinator_address is not None or "coordinator_address should be defined" not in str(error):
            raise
        logging.info("no cluster recognised: this process is alone")
    if jax.process_index() > 0:
        logging.set_verbosity(logging.WARNING)


def initialize_from_flags() -> None:
    """`initialize` with what the command line says."""
    initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)


def sum_over_processes(value: int) -> int:
    """The sum of a number that each process has its own of. Every process must call it."""
    if jax.process_count() == 1:
        return value
    return int(np.sum(multihost_utils.process_allgather(np.int32(value))))
