"""Runs that are killed, or asked to stop, at random moments."""

import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import Bench, Record, ended, expect
from benchmarks.faults.runs import Run, differences, evaluating, final_state, last_step, saved_step, writing
from vir_jax.runs.preemption import EXIT_CODE

KILLS_EACH = 5

START, STEP, WRITE, EVALUATE = (
    "at start-up",
    "during a step",
    "while a checkpoint is written",
    "during an evaluation",
)


def disturb(run: Run, phase: str, rng: random.Random, *, max_steps: int = 25) -> bool:
    """Waits for a random moment of a phase; whether the run came to it."""
    if phase == START:
        time.sleep(rng.uniform(0, 3))
    else:
        steps = rng.randint(1, max_steps)
        expect(run.until(run.stepped) or run.process.returncode == 0, run)
        first = last_step(run.workdir)
        if not run.until(lambda: last_step(run.workdir) >= first + steps):
            return False
        occasion = {WRITE: writing, EVALUATE: evaluating}.get(phase)
        if occasion is not None and not run.until(lambda: occasion(run.workdir)):
            return False
        time.sleep(rng.uniform(0, 0.03 if occasion is None else 0.01))  # Evaluating takes little more.
    return run.process.poll() is None


def phase_of(run: Run) -> str:
    """In which phase a run was killed, by what it left behind.

    A start that has come neither to a step nor to its checkpoint finds what the kill before left: that is start-up.
    """
    if not run.stepped() and not run.began_at():
        return START
    if writing(run.workdir):
        return WRITE
    if evaluating(run.workdir):
        return EVALUATE
    return STEP


def sigkill(
    bench: Bench, rng: random.Random, *, each: int = KILLS_EACH, limit: int = 60, max_steps: int = 25
) -> list[Record]:
    """One run, killed until every phase has had its share, or `limit` times, or until it has come to its end.

    A kill counts for the phase that it hit, which on a busy machine is not always the one that it was meant for.
    """
    workdir = bench.folder / "killed"
    records = {phase: Record(f"SIGKILL {phase}", 0, 0) for phase in (START, STEP, WRITE, EVALUATE)}
    before: Record | None = None
    for _ in range(limit):
        wanted = [phase for phase, record in records.items() if record.injected < each]
        if not wanted:
            break
        run = bench.start(workdir)
        if not disturb(run, rng.choice(wanted), rng, max_steps=max_steps):
            ended(run)
            break
        run.kill()
        if before is not None and run.first_step_seconds is not None:
            before.resume_seconds.append(run.first_step_seconds)
        before = records[phase_of(run)]
        before.injected += 1
        if before is not records[START]:
            before.lost_steps.append(last_step(workdir) - saved_step(workdir))
    bench.finish(workdir)
    bench.check(workdir)
    for record in records.values():
        record.survived = record.injected
    return list(records.values())


def sigterm(bench: Bench, rng: random.Random) -> list[Record]:
    """One run, asked to stop again and again."""
    workdir = bench.folder / "terminated"
    records = []
    for phase, times in ((STEP, 2), (EVALUATE, 2)):
        record = Record(f"SIGTERM {phase}", 0, 0)
        leaving = []
        for _ in range(times):
            run = bench.start(workdir)
            expect(disturb(run, phase, rng, max_steps=8), run)
            record.resume_seconds += [run.first_step_seconds] if run.first_step_seconds else []
            asked = time.perf_counter()
            run.process.send_signal(signal.SIGTERM)
            expect(run.wait() == EXIT_CODE, run)
            leaving.append(time.perf_counter() - asked)
            record.injected += 1
            record.lost_steps.append(last_step(workdir) - saved_step(workdir))
        record.survived = record.injected
        record.note = f"exit code {EXIT_CODE} after at most {max(leaving):.1f} s"
        records.append(record)
    bench.finish(workdir)
    bench.check(workdir)
    return records


def sigterm_together(bench: Bench) -> list[Record]:
    """Two processes of one run, of which one is asked to stop."""

    def start(workdir: Path) -> list[Run]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
        numbers = [["--num_processes=2", f"--process_id={number}"] for number in range(2)]
        return [bench.start(workdir, address, *number) for number in numbers]

    def finish(workdir: Path) -> dict[str, Any]:
        for run in start(workdir):
            ended(run)
        return final_state(workdir)

    expected = finish(bench.folder / "two-whole")
    workdir = bench.folder / "two-terminated"
    first, second = start(workdir)
    expect(first.until(lambda: last_step(workdir) >= 20), first)
    asked = time.perf_counter()
    second.process.send_signal(signal.SIGTERM)
    for run in (first, second):
        expect(run.wait() == EXIT_CODE, run)
    seconds = time.perf_counter() - asked
    lost = last_step(workdir) - saved_step(workdir)
    wrong = differences(expected, finish(workdir))
    expect(not wrong, first)
    note = f"both left at the same step, exit code {EXIT_CODE} after {seconds:.1f} s"
    return [Record("SIGTERM to one of two processes", 1, 1, lost_steps=[lost], note=note)]
