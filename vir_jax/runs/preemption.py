"""SIGTERM, the notice that the machine is about to be taken away: save, and leave for a later start.

The command then exits with `EXIT_CODE`, by which a scheduler tells a run to start again from one that failed. It
does so only where the save went through.
"""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later.


class PreemptedError(Exception):
    """The run was asked to stop and has saved what it had; the same command goes on with it."""


class Preemption:
    """Listens for SIGTERM while its `with` block runs.

    One process listens by itself. Several leave that to JAX's preemption service: the notice may come to any of them,
    and the service picks the step at which all of them stop.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._asked = 0  # times, the same on every process

    def requested(self) -> bool:
        """Return whether to stop now. Every process must ask equally often, and gets the same answer."""
        if jax.process_count() > 1 and not self._noticed:
            self._asked += 1
            self._noticed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._noticed

    def check(self) -> None:
        """Stop an evaluation, between two of its batches, after a notice. Every process must call it equally often.

        Raises:
          PreemptedError: the notice came.
        """
        if self.requested():
            raise PreemptedError("stopped during an evaluation; the next start does it again")

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True  # And no more: a handler may interrupt anything, the log's own writing included.

    def __enter__(self) -> "Preemption":
        # Python takes signals in its main thread alone; where `train` runs in another, its caller has the say.
        self._listens = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)
