"""What a run survives: `python -m benchmarks.faults`.

Injects every fault of the table into runs of train.py, starts them again, and compares what they end with, bit for
bit, with a run that nothing happened to: parameters, moving average, optimiser state, position in the data,
evaluations and metrics. Writes the table into docs/faults.md between its markers and into
benchmarks/results/faults.{md,json}.
"""

import random
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults.bench import Bench, Record
from benchmarks.faults.damage import damaged
from benchmarks.faults.images import images
from benchmarks.faults.kills import sigkill, sigterm, sigterm_together
from benchmarks.faults.workdirs import workdirs
from benchmarks.timing import markdown_table, replace_between_markers, write_results

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"

INTRODUCTION = """\
A ViR-pico/4 on digits with augmentation, mixup, cutmix, drop path, accumulation and a moving average, a checkpoint
every 5 steps. Every run that was disturbed ended with the parameters, moving average, optimiser state, position in the
data, evaluations and metrics of one that was not, bit for bit. Lost steps are those to be done again, resume the time
from a start to its first new step (compiled programs cached): mean (largest). Written by `python -m benchmarks.faults`.

"""


def table(records: list[Record]) -> str:
    """The results as Markdown."""

    def spread(values: Sequence[float], digits: int) -> str:
        if not values:
            return ""
        return f"{statistics.mean(values):.{digits}f} ({max(values):.{digits}f})"

    rows = [
        [
            record.fault,
            str(record.injected),
            str(record.survived),
            spread(record.lost_steps, 1),
            spread(record.resume_seconds, 1),
            record.note,
        ]
        for record in records
    ]
    return markdown_table(["fault", "injected", "survived", "lost steps", "resume, s", ""], rows)


def main() -> None:
    """Injects, prints and writes."""
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name in ("cache", "long", "short"):
            (folder / name).mkdir()
        long = Bench(folder / "long", folder / "cache", epochs=8.0)
        short = Bench(folder / "short", folder / "cache")
        parts: list[Callable[[], list[Record]]] = [
            lambda: sigkill(long, rng),
            lambda: sigterm(long, rng),
            lambda: sigterm_together(short),
            lambda: damaged(short, rng),
            lambda: workdirs(short),
            lambda: images(folder / "images"),
        ]
        records, failed = [], False
        for part in parts:
            try:
                records += part()
            except Exception:  # The other parts are measured all the same.
                traceback.print_exc()
                failed = True
            print(table(records), flush=True)
    if failed:
        sys.exit("a fault was not survived: nothing is written")
    markdown = INTRODUCTION + table(records)
    write_results("faults", markdown, records)
    PAGE.write_text(replace_between_markers(PAGE.read_text(), "faults", markdown))


if __name__ == "__main__":
    main()
