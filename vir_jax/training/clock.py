"""Speed of a run: images/s, model FLOPs utilisation, time left."""

import contextlib
import time
from collections.abc import Iterator

import jax

from vir_jax.parallel.hardware import CHIPS


def peak_flops() -> float | None:
    """Return peak bf16 FLOP/s of all devices together; None where it is not known (CPUs, other chips)."""
    chip = CHIPS.get(jax.devices()[0].device_kind)
    return None if chip is None else chip.peak_flops * jax.device_count()


class Clock:
    """Measures the time of training steps, without what is done between them.

    Args:
      batch_size: images of a step, over all devices.
      flops_per_image: of the model, forward and backward; None where they are not counted.
    """

    def __init__(self, batch_size: int, *, flops_per_image: int | None) -> None:
        self._batch_size = batch_size
        self._flops_per_image = flops_per_image
        self._peak = peak_flops()
        self._started = time.perf_counter()
        self._steps = 0

    def tick(self) -> None:
        """Count a step."""
        self._steps += 1

    def read(self, *, remaining_steps: int) -> dict[str, float]:
        """Return means since the last reading.

        Returns:
          images_per_second; eta_seconds, of the steps alone; mfu, the model's FLOPs (recomputation not counted)
          over the devices' peak, where both are known.
        """
        now = time.perf_counter()
        seconds_per_step = (now - self._started) / self._steps
        self._started, self._steps = now, 0
        images_per_second = self._batch_size / seconds_per_step
        speed = {
            "images_per_second": images_per_second,
            "eta_seconds": remaining_steps * seconds_per_step,
        }
        if self._peak is not None and self._flops_per_image is not None:
            speed["mfu"] = images_per_second * self._flops_per_image / self._peak
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of an evaluation or a checkpoint."""
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun
