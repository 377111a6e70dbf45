"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from vir_jax.parallel.processes import decided_by_process_0
from vir_jax.runs.bucket import BucketError, BucketPath
from vir_jax.runs.lease import Lease, LeaseHeldError
from vir_jax.runs.storage import RunPath

LOCK_FILE = "lock"


class WorkdirInUseError(RuntimeError):
    """Another run holds the workdir."""


@contextlib.contextmanager
def exclusive(workdir: RunPath) -> Iterator[Callable[[], None]]:
    """Hold the workdir for this run; process 0 does, for all. Every process must call it.

    On a disk the kernel lets go of the lock when the process ends, however it ends, so that a killed run blocks nobody.
    Over NFS the lock holds between hosts (Linux makes it a lock of the server's); a host that vanishes keeps it until
    the server gives it up (about 90 s with NFSv4). Where the file system knows no locks the run goes on, with a
    warning. In a bucket the lock is a `Lease`: a killed run blocks the next for a minute.

    Yields:
      A function for every process to call before something is written: it raises WorkdirInUseError where the lock was
      lost.

    Raises:
      WorkdirInUseError: another run holds it, with its host and process.
      NotADirectoryError: the workdir is a file.
    """
    with contextlib.ExitStack() as held:
        checks: list[Callable[[], None]] = []

        def hold() -> None:
            lock = _lease(workdir) if isinstance(workdir, BucketPath) else _flock(workdir)
            checks.append(held.enter_context(lock))

        decided_by_process_0(hold, WorkdirInUseError, NotADirectoryError, BucketError)
        yield lambda: decided_by_process_0(lambda: checks[0](), WorkdirInUseError)


@contextlib.contextmanager
def _flock(workdir: Path) -> Iterator[Callable[[], None]]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{workdir} is no folder, or lies in a file: choose another workdir"
        ) from error
    with (workdir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(workdir, file.read().strip() or "it has just begun") from None
        except OSError as error:
            logging.warning("cannot lock %s (%s): see that no second run is started there", workdir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield lambda: None  # The kernel does not take it away.


@contextlib.contextmanager
def _lease(workdir: BucketPath) -> Iterator[Callable[[], None]]:
    lease = Lease(workdir / LOCK_FILE)

    def check() -> None:
        try:
            lease.check()
        except LeaseHeldError as error:
            raise WorkdirInUseError(f"{error}; another run may go on in {workdir}, this one stops") from error

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lease)
        except LeaseHeldError as error:
            raise _in_use(workdir, str(error)) from error
        yield check


def _in_use(workdir: RunPath, holder: str) -> WorkdirInUseError:
    return WorkdirInUseError(
        f"another run holds {workdir} ({holder}): wait for its end, stop it, or choose another workdir"
    )
