"""A window of training steps that JAX's profiler watches."""

import types
from typing import Any

import jax
from absl import logging

from vir_jax.runs.bucket import BucketPath
from vir_jax.runs.storage import RunPath


class Profiler:
    """Traces the steps of `config.profile` in process 0, into `workdir/profile`; TensorBoard's profile plugin shows it.

    Args:
      window: "first:last", or "" for none.
      workdir: folder of the run, a local one.

    Raises:
      ValueError: a window, and a workdir in a bucket.
    """

    def __init__(self, window: str, workdir: RunPath) -> None:
        first, _, last = window.partition(":")
        self._first, self._last = (int(first), int(last)) if window else (0, 0)
        self._folder = str(workdir / "profile")
        self._running = False
        if window and isinstance(workdir, BucketPath):
            raise ValueError(
                f"config.profile is {window!r}, and the workdir {workdir} lies in a bucket, where the profiler does not"
                " write; expected a local workdir. Profile a short run of its own"
            )

    def before(self, step: int, state: Any) -> None:
        """Begin ahead of the window's first step, and end ahead of the first one after it.

        Args:
          step: that comes next.
          state: arrays of the step before, waited for.
        """
        if self._running and step > self._last:
            jax.block_until_ready(state)
            self._stop()
        elif not self._running and self._first <= step <= self._last and jax.process_index() == 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        logging.info("profile of steps %d to %d: %s", self._first, self._last, self._folder)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()
