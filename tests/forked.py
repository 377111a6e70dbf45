"""Commands that end before they compute: what takes them seconds, to import all that they need, is done once.

One process imports it, and a fork of it runs each command, with flags, output and exit code of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, os, runpy, sys

import vir_jax.evaluation
import vir_jax.inference.predict
import vir_jax.training.loop

folder, commands, codes = sys.argv[1], json.load(sys.stdin), []
for index, arguments in enumerate(commands):
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(folder, f"{index}.{name}"), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def run_forked(commands, folder):
    """Runs each command, a script of the repository and its arguments; returns what `subprocess.run` would."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=ROOT,
        env=environment,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(
            command, code, *((folder / f"{index}.{name}").read_text() for name in ("out", "err"))
        )
        for index, (command, code) in enumerate(zip(commands, json.loads(done.stdout), strict=True))
    ]
