"""Runs of train.py side by side, each on cores of its own, and how each of them ended."""

import collections
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from benchmarks.ablation.grid import ROOT, Run
from vir_jax.runs.migrations import migrate
from vir_jax.runs.preemption import EXIT_CODE
from vir_jax.runs.workdir import CONFIG_FILE, HOST_FIELDS, compare

OUTCOME_FILE, LOG_FILE = "outcome.json", "log.txt"
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        error: why it failed; None where it is finished.
        ended_at: UTC, to the minute.
        side_by_side: runs that shared the machine, this one included.
        cores: that it had to itself.
    """

    error: str | None
    ended_at: str
    side_by_side: int
    cores: int


def outcome_of(run: Run) -> Outcome | None:
    """Return how a run ended, None where it has not."""
    path = run.workdir / OUTCOME_FILE
    return Outcome(**json.loads(path.read_text())) if path.exists() else None


def other_config(run: Run) -> str | None:
    """Return how the run that is kept in a workdir differs from this one; None where it does not, or none is there.

    A longer run that goes on from a shorter one has had another schedule: such changes, which train.py allows, are not
    allowed here. What belongs to the machine may differ.
    """
    path = run.workdir / CONFIG_FILE
    if not path.exists():
        return None
    kept = migrate(json.loads(path.read_text()), where=str(path)).to_json()
    wanted = migrate(json.loads(run.config.to_json()), where=f"row {run.row!r}").to_json()
    changes = compare(json.loads(kept), json.loads(wanted))
    told = [f"{name}: {change}" for name, change in changes.items() if name not in HOST_FIELDS]
    if not told:
        return None
    return f"{run.workdir} holds a run with another config ({'; '.join(told)}): remove it, or choose another --folder"


def split_cores(cores: Sequence[int], workers: int) -> list[set[int]]:
    """Return as many cores for each worker, neighbours together.

    Raises:
        ValueError: there is not a core for each.
    """
    if not 1 <= workers <= len(cores):
        raise ValueError(f"--workers is {workers}; expected 1 to {len(cores)}, the cores that there are")
    each = len(cores) // workers
    return [set(cores[worker * each : (worker + 1) * each]) for worker in range(workers)]


def run_side_by_side(
    runs: Sequence[Run], slots: Sequence[set[int]]
) -> Generator[tuple[Run, Outcome], None, None]:
    """Start runs, or go on with them, one on each set of cores; yield each as it ends.

    Where this is left early, the runs that have begun are told to save and to stop.

    Args:
        runs: in the order that they start in.
        slots: of `split_cores`.
    """
    waiting, free = collections.deque(runs), list(reversed(slots))
    running: dict[subprocess.Popen[bytes], tuple[Run, set[int]]] = {}
    try:
        while waiting or running:
            while waiting and free:
                run, cores = waiting.popleft(), free.pop()
                running[_start(run, cores)] = run, cores
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                run, cores = running.pop(process)
                free.append(cores)
                yield run, _end(run, process.returncode, side_by_side=len(slots), cores=len(cores))
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _start(run: Run, cores: set[int]) -> subprocess.Popen[bytes]:
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / OUTCOME_FILE).unlink(missing_ok=True)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # A process begins with those of the thread that starts it.
    try:
        with (run.workdir / LOG_FILE).open("w") as log:
            # In a session of its own: Ctrl-C comes to this process alone, which lets the runs save.
            return subprocess.Popen(
                [sys.executable, *run.arguments()],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    finally:
        os.sched_setaffinity(0, before)


def _end(run: Run, code: int, *, side_by_side: int, cores: int) -> Outcome:
    error = None if code == 0 else f"exit code {code}: {_reason(run.workdir / LOG_FILE)}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    outcome = Outcome(error, now, side_by_side, cores)
    if code != EXIT_CODE:  # Which says that the run is to go on.
        (run.workdir / OUTCOME_FILE).write_text(json.dumps(dataclasses.asdict(outcome)) + "\n")
    return outcome


def _reason(log: Path) -> str:
    """Return the sentence that train.py ends with, or the last line of what it wrote."""
    text = log.read_text(errors="replace")
    _, told, sentence = text.rpartition("train.py: ")
    return " ".join(sentence.split()) if told else (text.split("\n\n")[-1].splitlines() or ["no word"])[-1]
