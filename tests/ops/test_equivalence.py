"""One pass of the modes with XLA's optimisations on, as users run them: this process has them off (see conftest.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOLERANCES = {"float32": 3e-6, "bfloat16": 5e-3}
MEASURE = """
import dataclasses, json, sys
from benchmarks.equivalence import measure
records = measure(sequences=(197,), grids=((9, 14),), dtypes=sys.argv[1:])
print(json.dumps([dataclasses.asdict(record) for record in records]))
"""


def test_optimised_programs_give_the_specification():
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *TOLERANCES],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert len(records) == 2 * 2 * 3  # sizes, dtypes, modes
    for record in records:
        errors = {name: value for name, value in record.items() if name.endswith("_error")}
        assert len(errors) == 3
        assert max(errors.values()) <= TOLERANCES[record["dtype"]], record
