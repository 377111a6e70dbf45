"""Several processes, one run: a process for each host of a TPU slice, or for each GPU or node.

JAX recognises TPU VMs, GKE, Slurm, Open MPI and Kubernetes by itself; elsewhere the flags below say where process 0
listens. Every process starts the same command.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

T = TypeVar("T")

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
    """Join the other processes of the run; comes before anything asks JAX for its devices.

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
        logging.info("one process: no cluster was found")
    if jax.process_index() > 0:
        logging.set_verbosity(logging.WARNING)


def initialize_from_flags() -> None:
    """Call `initialize` with what the command line says."""
    initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)


def sum_over_processes(value: int) -> int:
    """Return the sum of a number that each process has its own of. Every process must call it."""
    if jax.process_count() == 1:
        return value
    return int(np.sum(multihost_utils.process_allgather(np.int32(value))))


def any_process(value: bool) -> bool:
    """Return whether the value is True in some process. Every process must call it."""
    return sum_over_processes(int(value)) > 0


def decided_by_process_0(decide: Callable[[], T], *errors: type[Exception]) -> T:
    """Return in every process what `decide` gives in process 0, or raise in all of them what it raised there.

    For whatever is read from files ahead of a collective: of two processes that each look for themselves, one may see
    a file that the other does not see yet, and they then wait for each other in different places. Every process must
    call it.

    Args:
      decide: runs in process 0 alone; gives JSON data.
      *errors: kinds of errors to raise as such in all processes; one that is derived from them as what it derives from.

    Raises:
      RuntimeError: in the other processes, where process 0 met an error of another kind.
    """
    if jax.process_count() == 1:
        return decide()
    failure, outcome = None, b""
    if jax.process_index() == 0:
        try:
            outcome = json.dumps({"value": decide()}).encode()
        except Exception as error:
            failure = error
            kinds = [kind.__name__ for kind in type(error).__mro__]
            outcome = json.dumps({"error": kinds, "message": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(outcome))))
    sent = np.frombuffer(outcome.ljust(size), np.uint8)
    received = json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
    if failure is not None:
        raise failure
    if "error" in received:
        known = {error.__name__: error for error in errors}
        names, message = received["error"], received["message"]
        for name in names:
            if name in known:
                raise known[name](message)
        raise RuntimeError(f"process 0 failed, {names[0]}: {message}")
    return received["value"]


def check_equal(values: Mapping[str, Any]) -> None:
    """Check that every process has the same values. Every process must call it.

    Args:
      values: JSON data by the name that the user knows it by.

    Raises:
      ValueError: in all processes, where one has other values than process 0; that one names them.
    """
    own = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    first = decided_by_process_0(lambda: own)
    names = sorted(own.keys() | first.keys())
    lines = [
        f"\n  {name}: {own.get(name, 'absent')}, in process 0 {first.get(name, 'absent')}"
        for name in names
        if own.get(name) != first.get(name)
    ]
    if any_process(bool(lines)):
        differences = "".join(lines) or " another process names the differences"
        raise ValueError(
            "the processes of this run were started differently, or see different files:"
            f"{differences}\nGive all of them the same command and the same data"
        )
