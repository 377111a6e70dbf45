"""Full disks, second runs, other configs, and steps that are not finite."""

import contextlib
import shutil
import subprocess
from pathlib import Path

from benchmarks.faults.bench import Bench, Record, ended, expect
from benchmarks.faults.runs import ROOT, Run, last_step, saved_step
from vir_jax.runs.checkpoint_reader import FOLDER
from vir_jax.runs.manifest import verify


def disk_full(bench: Bench) -> Record:
    """A file system of its own, filled up while the run writes its checkpoints, and emptied again."""
    record = Record("disk full while saving", 0, 0)
    mount = bench.folder / "disk"
    mount.mkdir()
    # Its own mount name space, so that no privilege is needed; it lasts as long as the process that holds it.
    script = f"mount -t tmpfs -o size=64m tmpfs {mount} && echo mounted && exec sleep 1000"
    holder = subprocess.Popen(["unshare", "-Urm", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    run = None
    try:
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "mounted":
            record.note = "not run: no user name spaces here"
            return record
        seen = Path(f"/proc/{holder.pid}/root{mount}")
        enter = [
            "nsenter",
            f"--target={holder.pid}",
            "--user",
            "--mount",
            "--preserve-credentials",
            f"--wd={ROOT}",
        ]
        run = Run(mount / "run", bench.recipe, cache=bench.cache, prefix=enter, seen_as=seen / "run")
        expect(run.until(run.stepped), run)
        for _ in range(2):
            _fill_and_free(run, seen / "ballast")
            record.injected += 1
            record.survived += 1
        ended(run)
        shutil.copytree(run.workdir, bench.folder / "disk-full")
        # The best evaluation may be that of a step which found no room.
        bench.check(bench.folder / "disk-full", but=("best",))
        record.note = f"{run.log().count('was not written')} saves failed, each one tried again"
    finally:
        if run is not None:
            run.kill()
        holder.kill()
        holder.wait()
    return record


def _fill_and_free(run: Run, ballast: Path) -> None:
    """Leaves no room until a save has failed, with one before that has not, then waits for one that succeeds."""
    step, failures = last_step(run.workdir), run.log().count("was not written")
    expect(run.until(lambda: last_step(run.workdir) > step + 7 and saved_step(run.workdir) > 0), run)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    expect(run.until(lambda: run.log().count("was not written") > failures), run)
    saved = saved_step(run.workdir)
    verify(run.workdir / FOLDER / str(saved), step=saved)
    ballast.unlink()
    expect(run.until(lambda: saved_step(run.workdir) > saved), run)


def two_runs(bench: Bench) -> Record:
    """A second run in a workdir that a first one holds."""
    workdir = bench.folder / "two"
    first = bench.start(workdir)
    expect(first.until(first.stepped), first)
    second = bench.start(workdir)
    expect(second.wait() == 1 and "another run holds" in second.log(), second)
    ended(first)
    bench.check(workdir)
    return Record("a second run on the same workdir", 1, 1, note="refused; the first one went on")


def other_config(bench: Bench) -> Record:
    """A run started again with another config."""
    workdir = bench.stopped("config")
    for field, value in (("model.name", "vit_pico4"), ("seed", 1), ("batch_size", 32)):
        run = bench.start(workdir, f"--config.{field}={value}")
        expect(run.wait() == 1 and f"  {field}: " in run.log(), run)
    run = bench.finish(workdir, "--config.data.threads=1")
    expect("config.data.threads changed on resume: 2 -> 1" in run.log(), run)
    bench.check(workdir)
    return Record(
        "another config on resume", 4, 4, note="3 refused with the field named, 1 allowed and logged"
    )


def non_finite(bench: Bench) -> Record:
    """A learning rate at which the loss is soon infinite."""
    for allowed in (0, 2):
        workdir = bench.folder / f"non-finite-{allowed}"
        fields = [f"--config.max_skipped_steps={allowed}", "--config.optim.lr=1e30"]
        run = bench.start(workdir, *fields, "--config.optim.warmup_epochs=0.0")
        expect(run.wait() == 1 and run.log().count("Left out: ") == allowed, run)
        expect("Last checkpoint: step" in run.log() and "gradient norm" in run.log(), run)
    note = "stopped at the first; with two allowed at the third; step, norms and last checkpoint named"
    return Record("loss or gradients not finite", 2, 2, note=note)


def workdirs(bench: Bench) -> list[Record]:
    """All of the above."""
    return [disk_full(bench), two_runs(bench), other_config(bench), non_finite(bench)]
