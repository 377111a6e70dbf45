"""Checkpoints that are damaged while their run is stopped."""

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.bench import Bench, Record, ended, expect
from benchmarks.faults.runs import arrays, differences, saved_step
from vir_jax.runs.checkpoint_reader import FOLDER
from vir_jax.runs.manifest import DamagedCheckpointError, verify

FLIPS = 1000


def truncate(folder: Path, rng: random.Random) -> str:
    """Cuts a file short; what the run should say of it."""
    path = rng.choice(_data_files(folder))
    os.truncate(path, rng.randrange(path.stat().st_size))
    return f"{path.relative_to(folder)} has "


def flip(folder: Path, rng: random.Random) -> str:
    """Flips a bit of a file; what the run should say of it."""
    path = rng.choice(_data_files(folder))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.relative_to(folder)} holds other bytes"


def remove_item(folder: Path, rng: random.Random) -> str:
    """Removes an item; what the run should say of it."""
    item = rng.choice(("params", "ema", "optimizer", "progress", "config", "metadata"))
    shutil.rmtree(folder / item)
    return f"{item}/"


def _data_files(folder: Path) -> list[Path]:
    """The files that hold arrays."""
    return [path for path in sorted(folder.rglob("d/*")) if path.stat().st_size]


def damaged(bench: Bench, rng: random.Random) -> list[Record]:
    """The newest checkpoint damaged while the run was stopped."""
    base = bench.stopped("damaged")
    records = []
    kinds: dict[str, Callable[[Path, random.Random], str]] = {
        "truncated": truncate,
        "a bit flipped": flip,
        "an item missing": remove_item,
    }
    for name, damage in kinds.items():
        record = Record(f"newest checkpoint: {name}", 0, 0)
        for number in range(1 if damage is remove_item else 2):
            workdir = base.with_name(f"{damage.__name__}-{number}")
            shutil.copytree(base, workdir)
            before = saved_step(workdir)
            said = damage(workdir / FOLDER / str(before), rng)
            run = bench.start(workdir)
            expect(run.until(run.stepped), run)
            ended(run)
            log = run.log()
            expect(f"{FOLDER}/{before} is damaged: {said}" in log and "falling back to step" in log, run)
            bench.check(workdir)
            record.injected += 1
            record.survived += 1
            record.lost_steps.append(before - run.began_at())
            record.resume_seconds.append(run.first_step_seconds or 0.0)
        records.append(record)
    return [*records, _every_flip(base, rng), _none_left(bench, base, rng)]


def _every_flip(base: Path, rng: random.Random) -> Record:
    """Bits flipped anywhere in a checkpoint: how many are noticed, and how many Orbax alone would notice."""
    step = saved_step(base)
    folder = base.with_name("flips") / str(step)
    shutil.copytree(base / FOLDER / str(step), folder)
    expected = {item: arrays(folder / item) for item in ("params", "ema", "optimizer")}
    paths = [path for item in expected for path in sorted((folder / item).rglob("*")) if path.is_file()]
    paths = [path for path in paths if path.stat().st_size]
    sizes = [path.stat().st_size for path in paths]
    noticed, silent = 0, 0
    for number in range(FLIPS):
        path = rng.choices(paths, sizes)[0]
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            verify(folder, step=step)
        except DamagedCheckpointError:
            noticed += 1
        if number < FLIPS // 10:
            item = path.relative_to(folder).parts[0]
            with contextlib.suppress(Exception):
                silent += bool(differences({item: expected[item]}, {item: arrays(folder / item)}))
        path.write_bytes(data)
    note = f"Orbax by itself restored other values silently in {silent} of {FLIPS // 10}"
    return Record("a bit flipped anywhere in a checkpoint", FLIPS, noticed, note=note)


def _none_left(bench: Bench, base: Path, rng: random.Random) -> Record:
    workdir = base.with_name("none-left")
    shutil.copytree(base, workdir)
    for folder in sorted((workdir / FOLDER).iterdir()):
        flip(folder, rng)
    run = bench.start(workdir)
    expect(run.wait() == 1 and "can be restored" in run.log(), run)
    return Record(
        "every checkpoint damaged", 1, 1, note="an error that names each; nothing is started afresh"
    )
