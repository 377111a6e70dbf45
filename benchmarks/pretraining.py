"""What next_patch is worth where a tenth of the labels is known: `python -m benchmarks.pretraining`.

ViR-pico/4 on CIFAR-10, three arms over seeds, each classifying by the labels of the first tenth of the images alone:

- scratch: all steps on the labels;
- pretrained: half of the steps on the task `next_patch`, over all training images, which needs no labels, and half on
  the labels, from those weights;
- half: that half without pretraining, which says what pretraining adds where its time counts for nothing.

A step of one task costs what a step of the other does, so the first two arms take equal time; the seconds that they
took are told. Linear probes, fitted to the same labels, say what averaged tokens are worth, of the middle block and of
the last.

    python -m vir_jax.data.prepare --dataset=cifar10
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.pretraining

Runs go side by side, each on cores of its own; a finished one is not run again, an interrupted one goes on. An arm
takes about five minutes of one CPU core. Writes benchmarks/results/pretraining.{md,json} and the table in
docs/results.md after every run.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from benchmarks.ablation.grid import ROOT, Grid, Run, runs_of
from benchmarks.ablation.report import Record, Result, record_of
from benchmarks.ablation.runs import other_config, outcome_of, run_side_by_side, split_cores
from benchmarks.timing import markdown_table, replace_between_markers, write_results
from vir_jax.data import open_source
from vir_jax.probe import extract, linear_probe
from vir_jax.runs.load import load_run
from vir_jax.runs.preemption import EXIT_CODE

PAGE = ROOT / "docs" / "results.md"
RECIPE, SEEDS, STEPS = "configs/vir_cifar10.py", (0, 1, 2), 800
BATCH_SIZE, IMAGES, LABELS = 128, 50_000, 5_000
LABELLED, PROBED = "train[:10%]", "test[:2000]"

PRETRAINING, SCRATCH, HALF, PRETRAINED = "next_patch", "scratch", "half", "pretrained"
ARMS = {
    SCRATCH: "labels alone",
    PRETRAINED: "next_patch, then labels, in the same time",
    HALF: "labels alone, in half of the time",
}
UNTRAINED = "untrained"
PROBES = (UNTRAINED, PRETRAINING, SCRATCH, PRETRAINED)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Top-1 of linear probes, of averaged tokens.

    Attributes:
        row: of the run that they are of.
        seed: its seed.
        top1: by layer.
    """

    row: str
    seed: int
    top1: dict[str, float]


def make_grid(steps: int) -> Grid:
    """Return the runs, of which the longest has so many steps."""
    half = steps // 2

    def on_labels(steps: int) -> dict[str, object]:
        epochs = steps * BATCH_SIZE / LABELS
        return {"data.train_split": LABELLED, "epochs": epochs, "optim.warmup_epochs": epochs / 10}

    common = {
        "batch_size": BATCH_SIZE,
        "eval_every": 0,
        "log_every": 20,
        "checkpoint_every": 200,
        "model.position": "learned",
        "model.readout": "average",  # A class token is not read in pretraining.
    }
    epochs = half * BATCH_SIZE / IMAGES
    pretraining = {
        "task": "next_patch",
        "model.readout": "every_token",
        "label_smoothing": 0.0,
        "epochs": epochs,
        "optim.warmup_epochs": epochs / 10,
    }
    rows = {
        PRETRAINING: pretraining,
        SCRATCH: on_labels(steps),
        HALF: on_labels(half),
        PRETRAINED: on_labels(half) | {"optim.lr": 1e-3},
    }
    return Grid("pretraining", RECIPE, common, rows, SEEDS)


def pretraining_of(run: Run, runs: Sequence[Run]) -> Run:
    """Return the pretraining with the seed of a run."""
    (found,) = (other for other in runs if (other.row, other.seed) == (PRETRAINING, run.seed))
    return found


def is_finished(run: Run) -> bool:
    """Return whether a run has ended well."""
    outcome = outcome_of(run)
    return outcome is not None and outcome.error is None


def train_all(grid: Grid, runs: Sequence[Run], slots: Sequence[set[int]]) -> Iterator[Record]:
    """Run what is not finished; yield the record of each run once there is one."""
    for run in filter(is_finished, runs):
        outcome = outcome_of(run)
        assert outcome is not None
        yield record_of(grid, run, outcome)
    waiting = [run for run in runs if not is_finished(run)]
    with contextlib.closing(run_side_by_side(waiting, slots)) as ended:
        for run, outcome in ended:
            yield record_of(grid, run, outcome)


def probes_of(run: Run) -> list[Probe]:
    """Return what the tokens of a finished run's blocks are worth; of pretraining also those before its first step.

    They are kept in the run's workdir.
    """
    path = run.workdir / "probes.json"
    if path.exists():
        return [Probe(**kept) for kept in json.loads(path.read_text())]
    loaded = load_run(run.workdir, "last")
    weights = {run.row: loaded}
    if run.row == PRETRAINING:
        fresh = loaded.functions.init(jax.random.key(run.seed))
        weights[UNTRAINED] = dataclasses.replace(loaded, params=fresh)
    data = loaded.config.data
    layers = [f"blocks.{loaded.model.depth // 2 - 1}.tokens", "features"]
    probes = []
    for row, probed in weights.items():
        train, test = (
            extract(probed, open_source(data.dataset, split, data_dir=data.data_dir), layers, pool="average")
            for split in (LABELLED, PROBED)
        )
        probes.append(
            Probe(row, run.seed, {layer: linear_probe(train[layer], test[layer]) for layer in layers})
        )
    path.write_text(json.dumps([dataclasses.asdict(probe) for probe in probes]) + "\n")
    return probes


def report(records: Sequence[Record], probes: Sequence[Probe], steps: int) -> str:
    """Return the page."""
    found = {(record.row, record.seed): record.result for record in records if record.result is not None}
    arms = []
    for arm, said in ARMS.items():
        seeds = [seed for row, seed in found if row == arm]
        parts = (PRETRAINING, arm) if arm == PRETRAINED else (arm,)
        seconds = [sum(found[part, seed].curve.seconds[-1] for part in parts) for seed in seeds]
        top1 = [100 * found[arm, seed].value for seed in seeds]
        arms.append(
            [arm, said, _spread(top1), f"{statistics.mean(seconds):.0f}" if seconds else "", f"{len(seeds)}"]
        )
    layers = list(probes[0].top1) if probes else []
    rows = [
        [
            row,
            *(_spread([100 * probe.top1[layer] for probe in probes if probe.row == row]) for layer in layers),
        ]
        for row in PROBES
        if any(probe.row == row for probe in probes)
    ]
    failed = "".join(f"- {record.said()}\n" for record in records if record.result is None)
    return (
        f"`{RECIPE}`, {steps} steps of {BATCH_SIZE} images in the longer arms, the labels of `{LABELLED}` alone,\n"
        "next_patch on all training images. Top-1 on all test images after the last step, mean and standard deviation\n"
        "over seeds; seconds of training, pretraining included, on one core of a shared machine.\n"
        "Written by `python -m benchmarks.pretraining`.\n\n"
        + markdown_table(["arm", "", "top-1, %", "seconds", "seeds"], arms)
        + f"\n{_gain(found)}\n"
        + (
            f"Linear probes of averaged tokens, fitted to `{LABELLED}`: top-1 on `{PROBED}`, %.\n\n"
            + markdown_table(["weights", *layers], rows)
            if rows
            else ""
        )
        + (f"\nFailed:\n\n{failed}" if failed else "")
    )


def _gain(found: Mapping[tuple[str, int], Result]) -> str:
    """Return what pretraining gains at equal time, seed by seed."""
    pairs = [
        100 * (found[PRETRAINED, seed].value - found[SCRATCH, seed].value)
        for row, seed in found
        if row == PRETRAINED and (SCRATCH, seed) in found
    ]
    if len(pairs) < 2:
        return ""
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5
    verdict = (
        "no gain that can be told from chance"
        if abs(mean) < 2 * error
        else "a gain"
        if mean > 0
        else "a loss"
    )
    return f"At equal time pretraining changes top-1 by {mean:+.1f} ± {error:.1f} points (standard error): {verdict}.\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished: first what needs nothing, then what starts from pretraining; then probe."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretraining",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the longer arms")
    parser.add_argument("--workers", type=int, default=len(cores), help="runs at a time; default: one a core")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of all workdirs")
    parser.add_argument("--data_dir", help="where CIFAR-10 lies; default: TFDS's folder")
    given = parser.parse_args(arguments)
    grid = make_grid(given.steps)
    try:
        slots = split_cores(cores, given.workers)
        fields: dict[str, object] = {"data.threads": len(slots[0])}
        if given.data_dir is not None:
            fields["data.data_dir"] = str(Path(given.data_dir).expanduser().resolve())
        first = runs_of(
            grid, given.folder, rows=(PRETRAINING, SCRATCH, HALF), seeds=given.seeds, fields=fields
        )
        then = [
            dataclasses.replace(
                run, fields={**run.fields, "init_from": str(pretraining_of(run, first).workdir.resolve())}
            )
            for run in runs_of(grid, given.folder, rows=[PRETRAINED], seeds=given.seeds, fields=fields)
        ]
        for run in (*first, *then):
            _ = run.config  # Checks it.
            if difference := other_config(run):
                raise ValueError(difference)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    records: list[Record] = []
    probes: list[Probe] = []

    def write() -> str:
        page = report(records, probes, given.steps)
        write_results("pretraining", page, [*records, *probes])
        PAGE.write_text(replace_between_markers(PAGE.read_text(), "pretraining", page))
        return page

    for runs in (first, then):
        startable = [run for run in runs if run.row != PRETRAINED or is_finished(pretraining_of(run, first))]
        for record in train_all(grid, startable, slots):
            records.append(record)
            print(record.said(), flush=True)
            write()
    for run in filter(is_finished, (*first, *then)):
        if run.row in PROBES:
            probes += probes_of(run)
            write()
    print(write())
    if len(records) < len(first) + len(then) or any(record.result is None for record in records):
        sys.exit(f"runs failed; {given.folder / grid.name} has their log.txt")


def _stop(number: int, frame: object) -> None:
    sys.exit(EXIT_CODE)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # The runs are then told to save.
    main()
