"""Trains the runs of a grid side by side and compares them: `python -m benchmarks.ablation GRID`.

A grid is a file such as benchmarks/grids/digits.py: a recipe, fields that all runs change, named rows that change a few
more, and seeds. All of it is checked before the first run starts. Every run is a `train.py` with cores and a workdir of
its own, FOLDER/<grid>/<row>/seed_<n>: a finished one is not run again, an interrupted one goes on, a failed one is told
in the table and begins again with the next call. What the results file has of a run with the same config is not run
again either, though its workdir be gone or on another machine.

    python -m benchmarks.ablation benchmarks/grids/digits.py
    python -m benchmarks.ablation benchmarks/grids/cifar10.py --rows vir vit --seeds 0 --data_dir=DIR

Writes benchmarks/results/ablation_<grid>.{md,json}, docs/figures/ablation_<grid>.png and, where docs/results.md has a
place for it, the table there: after every run, of all runs of the grid that are finished.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.ablation.grid import ROOT, Grid, load_grid, runs_of
from benchmarks.ablation.report import Record, draw, markdown, read_records, record_of
from benchmarks.ablation.runs import Outcome, other_config, outcome_of, run_side_by_side, split_cores
from benchmarks.timing import replace_between_markers, write_results
from vir_jax.runs.preemption import EXIT_CODE

DOCS = ROOT / "docs"
PAGE = "results.md"


def report(grid: Grid, records: Sequence[Record]) -> None:
    """Write table, records and figure, in the order of the grid, and the table into the page of results."""
    rows = list(grid.rows)
    records = sorted(records, key=lambda record: (rows.index(record.row), record.seed))
    text = markdown(grid, records)
    write_results(f"ablation_{grid.name}", f"# Ablation: {grid.name}\n\n{text}", records)
    draw(grid, records).savefig(DOCS / "figures" / f"ablation_{grid.name}.png", dpi=130)
    page = (DOCS / PAGE).read_text()
    if f"<!-- ablation_{grid.name}:begin -->" in page:
        (DOCS / PAGE).write_text(replace_between_markers(page, f"ablation_{grid.name}", text))


def main(arguments: Sequence[str] | None = None) -> None:
    """Check all, run what is not finished, report."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path, metavar="GRID", help="its file")
    parser.add_argument("--rows", nargs="+", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all")
    parser.add_argument("--workers", type=int, default=len(cores), help="runs at a time; default: one a core")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="of all workdirs")
    parser.add_argument("--data_dir", help="where the data lie; default: as the recipe says")
    parser.add_argument("--report", action="store_true", help="run nothing, write the results again")
    given = parser.parse_args(arguments)
    try:
        grid = load_grid(given.grid)
        slots = split_cores(cores, given.workers)
        fields: dict[str, Any] = {"data.threads": len(slots[0])}
        if given.data_dir is not None:
            fields["data.data_dir"] = str(Path(given.data_dir).expanduser().resolve())
        everything = runs_of(grid, given.folder, rows=grid.rows, seeds=grid.seeds, fields=fields)
        for run in everything:
            _ = run.config  # Checks it.
        for name, chosen, known in (("rows", given.rows, grid.rows), ("seeds", given.seeds, grid.seeds)):
            if unknown := set(chosen or ()) - set(known):
                raise ValueError(f"--{name} has {sorted(unknown)}; {given.grid} has {list(known)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    # ------------------------------------------------------------------ what there is already
    records: dict[tuple[str, int], Record] = {}
    waiting = []
    told = {
        (r.row, r.seed): r for r in read_records(timing.RESULTS / f"ablation_{grid.name}.json") if r.result
    }
    for run in everything:
        key, outcome, difference = (run.row, run.seed), outcome_of(run), other_config(run)
        chosen = run.row in (given.rows or grid.rows) and run.seed in (given.seeds or grid.seeds)
        if difference is not None:
            records[key] = Record(*key, grid.rows[run.row], run.identity, Outcome(difference, "", 0, 0), None)
        elif outcome is None and key in told and told[key].identity == run.identity:
            records[key] = told[key]
        elif outcome is not None and (outcome.error is None or given.report or not chosen):
            records[key] = record_of(grid, run, outcome)
        elif chosen and not given.report:
            waiting.append(run)
    print(f"{len(records)} runs are there, {len(waiting)} are to run", flush=True)
    if records:
        report(grid, list(records.values()))

    # ------------------------------------------------------------------ what there is not
    with contextlib.closing(run_side_by_side(waiting, slots)) as ended:
        for run, outcome in ended:
            record = records[run.row, run.seed] = record_of(grid, run, outcome)
            print(record.said(), flush=True)
            report(grid, list(records.values()))
    print(markdown(grid, list(records.values())))
    failed = [record for record in records.values() if record.result is None]
    if failed:
        sys.exit(f"{len(failed)} of {len(records)} runs failed; {given.folder / grid.name} has their log.txt")


def _stop(number: int, frame: object) -> None:
    sys.exit(EXIT_CODE)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # The runs are then told to save.
    # On an accelerator, this process takes no more memory than it needs, and neither do runs side by side.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
