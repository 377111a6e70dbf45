"""Runs of train.py as processes of their own, for tests of what happens when they are disturbed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vir_jax.runs.checkpoint_reader import FOLDER, CheckpointReader
from vir_jax.runs.evaluation_record import FILE as EVALUATION
from vir_jax.runs.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]
EVAL_EVERY = 20

# A small model on the digits with everything on that state or randomness can hide in.
RECIPE = {
    "epochs": 1.0,  # 90 steps
    "batch_size": 16,
    "accumulation_steps": 2,
    "eval_batch_size": 8,
    "ema_decay": 0.9,
    "model.name": "vir_pico4",
    "model.drop_path_rate": 0.2,
    "augment.crop": "pad",
    "augment.crop_padding": 1,
    "augment.hflip": 0.5,
    "augment.randaugment_ops": 2,
    "augment.erase": 0.25,
    "mixing.mixup_alpha": 0.8,
    "mixing.cutmix_alpha": 1.0,
    "optim.warmup_epochs": 0.5,
    "log_every": 1,
    "checkpoint_every": 5,
    "eval_every": EVAL_EVERY,
}


class Run:
    """One start of train.py.

    Args:
      workdir: of the run.
      recipe: fields that differ from `configs/vir_digits.py`.
      cache: folder of compiled programs, shared between starts so that each takes seconds.
      arguments: of the command line, besides.
      prefix: command to start it under.
      seen_as: the workdir as this process sees it, where that is another path.
    """

    def __init__(
        self,
        workdir: Path,
        recipe: Mapping[str, object],
        *,
        cache: Path,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        seen_as: Path | None = None,
    ) -> None:
        self.workdir = seen_as or workdir
        self.first_step_seconds: float | None = None  # From the start, once `stepped` has seen it.
        self._metrics_before = _identity(self.workdir / METRICS_FILE)
        self._started = time.perf_counter()
        self._log = cache / f"log-{time.time_ns()}"
        fields = [f"--config.{name}={value}" for name, value in recipe.items()]
        files = ["train.py", "--config=configs/vir_digits.py", f"--workdir={workdir}"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *files, *fields, *arguments],
                cwd=ROOT,
                env=environment(cache),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout: float = 300) -> int:
        """The exit code."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def until(self, condition: Callable[[], Any], timeout: float = 120) -> bool:
        """Waits for something to come true while the process runs; whether it did."""
        end = time.perf_counter() + timeout
        while self.process.poll() is None and time.perf_counter() < end:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def log(self) -> str:
        """What it has written to stdout and stderr."""
        return self._log.read_text()

    def stepped(self) -> bool:
        """Whether it has done a step of its own: a start writes the metrics' file anew, cut to its first step."""
        if _identity(self.workdir / METRICS_FILE) == self._metrics_before:
            return False
        stepped = last_step(self.workdir) > self.began_at()
        if stepped and self.first_step_seconds is None:
            self.first_step_seconds = time.perf_counter() - self._started
        return stepped

    def began_at(self) -> int:
        """The step that it went on from; 0 for a run that began."""
        log = self.log()
        return int(log.split("going on from step ")[1].split()[0]) if "going on from step " in log else 0


def environment(cache: Path) -> dict[str, str]:
    """Of a user, but for the cache of compiled programs."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**kept, **caching, "JAX_PLATFORMS": "cpu"}


def _identity(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def last_step(workdir: Path) -> int:
    """The newest step in the metrics, 0 before the first; a line that is being written does not count."""
    path = workdir / METRICS_FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def writing(workdir: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(ocp.utils.TMP_DIR_SUFFIX in name for name in _checkpoints(workdir))


def evaluating(workdir: Path) -> bool:
    """Whether a checkpoint is complete that is to be evaluated, and not evaluated yet."""
    newest = saved_step(workdir)
    evaluated = workdir / FOLDER / str(newest) / EVALUATION
    return newest > 0 and newest % EVAL_EVERY == 0 and last_step(workdir) == newest and not evaluated.exists()


def saved_step(workdir: Path) -> int:
    """The newest complete checkpoint, 0 before the first."""
    return max((int(name) for name in _checkpoints(workdir) if name.isdigit()), default=0)


def _checkpoints(workdir: Path) -> list[str]:
    folder = workdir / FOLDER
    return os.listdir(folder) if folder.is_dir() else []


def final_state(workdir: Path) -> dict[str, Any]:
    """All that a run leaves behind that should not depend on its fate: arrays, progress, evaluation, metrics."""
    with CheckpointReader(workdir) as checkpoints:
        step = checkpoints.resolve("last")
        best = checkpoints.resolve("best")
        evaluation = checkpoints.metrics(step)
    folder = workdir / FOLDER / str(step)
    timing = ("images_per_second", "eta_seconds", "mfu")
    lines = [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(workdir)]
    state: dict[str, Any] = {"step": step, "best": best, "evaluation": evaluation, "metrics": lines}
    state["progress"] = json.loads((folder / "progress" / "metadata").read_text())
    return {**state, **{item: arrays(folder / item) for item in ("params", "ema", "optimizer")}}


def arrays(folder: Path) -> Any:
    """The arrays of one item of a checkpoint."""
    handler = ocp.StandardCheckpointHandler()
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), handler.metadata(folder).tree
    )
    return jax.tree.map(np.asarray, handler.restore(folder, args=ocp.args.StandardRestore(target)))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts of two final states that are not equal bit for bit."""
    return [name for name in one if not _equal(one[name], other[name])]


def _equal(one: Any, other: Any) -> bool:
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    return structure == other_structure and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, others, strict=True)
    )
