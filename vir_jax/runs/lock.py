"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from vir_jax.parallel.processes import decided_by_process_0

LOCK_FILE = "lock"


class WorkdirInUseError(RuntimeError):
    """Another run holds the workdir."""


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run; process 0 does, for all. Every process must call it.

    The kernel lets go of the lock when the process ends, however it ends, so that a killed run blocks nobody. Over NFS
    the lock holds between hosts (Linux makes it a lock of the server's); a host that vanishes keeps it until the server
    gives it up (about 90 s with NFSv4). Where the file system knows no locks the run goes on, with a warning.

    Raises:
      WorkdirInUseError: another run holds it, with its host and process.
    """
    with contextlib.ExitStack() as held:
        decided_by_process_0(lambda: held.enter_context(_locked(workdir)), WorkdirInUseError)
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WorkdirInUseError(
                f"another run holds {workdir} ({file.read().strip() or 'it has just begun'}): wait for its end, stop"
                " it, or choose another workdir"
            ) from None
        except OSError as error:
            logging.warning("cannot lock %s (%s): see that no second run is started there", workdir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
