"""Two processes of two devices each, started as a user would, do what one process of four devices does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.test_configs import load
from vir_jax.evaluation import evaluate_workdir
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.metrics import read_metrics
from vir_jax.tasks import make_task
from vir_jax.training.plan import make_plan

ROOT = Path(__file__).parents[1]
RUN = [
    "--config=configs/vir_digits.py",
    "--config.epochs=1",
    "--config.optim.warmup_epochs=0.5",
    "--config.mesh.fsdp=2",
    "--config.log_every=5",
    "--config.checkpoint_every=10",
]


def free_port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def start(script, *arguments, processes, devices):
    """Runs a command in so many processes; (standard output, standard error) of each."""
    # Without the tests' cache of compiled programs: see `compiled_afresh` in conftest.py.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    address = f"--coordinator_address=localhost:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, script, *arguments]
            + ([address, f"--num_processes={processes}", f"--process_id={index}"] if processes > 1 else []),
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [
        ("".join(x for x in out.splitlines(keepends=True) if not is_noise(x)), err) for out, err in outputs
    ]


def is_noise(line):
    # JAX's CPU collectives report on the standard output, from threads that break each other's lines.
    return not line.strip() or "[Gloo]" in line or "peer ranks" in line


# What each process makes of a workdir that process 0 alone sees, as on a network file system that lags.
DECISIONS = """
import json, sys
from pathlib import Path

import jax
from absl import app

from vir_jax.parallel.processes import check_equal, decided_by_process_0, initialize_from_flags
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.lock import WorkdirInUseError, exclusive
from vir_jax.runs.workdir import check_config
from vir_jax.runs.config import default_config


def refused(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def locked_twice(workdir):
    with exclusive(workdir), exclusive(workdir):
        pass


def main(argv):
    initialize_from_flags()
    process = jax.process_index()
    workdir = Path(argv[1] if process == 0 else argv[2])
    config = default_config()
    said = {}
    with Checkpoints(workdir, keep=9) as checkpoints:
        said["newest"] = checkpoints.newest_intact()
        said["step"] = checkpoints.resolve("last")
        said["ema"] = checkpoints.has_ema(said["step"])
        said["metrics"] = checkpoints.metrics(said["step"])
        stored, metadata = checkpoints.restore_config(said["step"])
        said["model"], said["classes"] = stored.model.name, metadata["class_names"]
        said["no step"] = refused(checkpoints.resolve, "7")
    said["config"] = refused(check_config, workdir, config)
    said["lock"] = refused(locked_twice, workdir)
    said["derived"] = refused(decided_by_process_0, lambda: {}[0], LookupError)
    said["other"] = refused(decided_by_process_0, lambda: {}[0])
    config.seed = process
    said["seed"] = refused(check_config, workdir, config)
    config.seed, config.data.threads = 0, 4 + process
    said["threads"] = refused(check_config, workdir, config)
    print("SAID " + json.dumps(said), flush=True)


app.run(main)
"""


def test_process_0_decides_from_files_for_all(workdirs, tmp_path):
    folder, *_ = workdirs
    (tmp_path / "decisions.py").write_text(DECISIONS)
    seen = [folder / "two", tmp_path / "nothing"]
    outputs = start(tmp_path / "decisions.py", *map(str, seen), processes=2, devices=1)
    first, second = (json.loads(output.split("SAID ")[1]) for output, _ in outputs)
    assert first["newest"] == first["step"] == 11
    assert first["ema"] is True
    assert first["metrics"]["count"] == 355
    assert first["model"] == "vir_pico2"
    assert first["no step"].startswith("ValueError: no checkpoint '7'")
    assert "holds a run with another config" in first["config"]
    assert first["lock"].startswith("WorkdirInUseError: another run holds")
    assert (first["derived"], second["derived"]) == ("KeyError: 0", "LookupError: 0")
    assert first["other"] == "KeyError: 0"
    assert second["other"] == "RuntimeError: process 0 failed, KeyError: 0"
    assert "another process names the differences" in first["seed"]
    assert "config.seed: 1, in process 0 0" in second["seed"]
    assert "holds a run with another config" in first["threads"]  # Each host may have its own number.
    for said in (first, second):
        del said["derived"], said["other"], said["seed"]
    assert second == first


def numbers(workdir, name):
    return [line[name] for line in read_metrics(workdir) if name in line]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (one,) = start("train.py", *RUN, f"--workdir={folder / 'one'}", processes=1, devices=4)
    two = start("train.py", *RUN, f"--workdir={folder / 'two'}", processes=2, devices=2)
    return folder, one, two


def test_training_is_the_same(workdirs):
    folder, one, two = workdirs
    for name in ("train/loss", "train/top1", "train/gradient_norm", "eval/loss", "eval/top1", "eval/count"):
        values = numbers(folder / "two", name)
        assert values
        np.testing.assert_allclose(values, numbers(folder / "one", name), rtol=1e-5, err_msg=name)
    assert two[0][0] == one[0]


def test_process_0_alone_reports(workdirs):
    (_, first), (printed, second) = workdirs[2]
    assert "4 x cpu (cpu), 2 process(es)" in first
    assert "step 5:" in first
    assert printed == ""
    assert "step 5:" not in second
    assert "parameters" not in second


def test_what_two_processes_wrote_one_can_read_and_go_on_with(workdirs):
    folder, *_ = workdirs
    results = {
        name: evaluate_workdir(folder / name, mode="parallel")["parallel"].metrics for name in ("one", "two")
    }
    assert results["two"] == pytest.approx(results["one"], rel=1e-5)
    config, _ = load("vir_digits")
    config.mesh.fsdp = 2
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:4])
    plan = make_plan(config, mesh, task=make_task(config, "0123456789"), steps_per_epoch=22.0)
    states = []
    for name in ("one", "two"):
        with CheckpointReader(folder / name) as checkpoints:
            states.append(checkpoints.restore(plan.state, checkpoints.resolve("last")))
    (one, progress), (two, other_progress) = states
    assert progress["data"] == other_progress["data"]
    for ours, theirs in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        error = np.linalg.norm(ours - theirs)
        assert error <= 1e-4 * np.linalg.norm(theirs)
    longer = [*RUN, "--config.epochs=1.2", f"--workdir={folder / 'two'}"]
    ((_, log),) = start("train.py", *longer, processes=1, devices=2)
    assert "going on from step 11 of 14" in log
    assert numbers(folder / "two", "eval/count")[-1] == 355


def test_evaluation_counts_every_example_once(workdirs, tmp_path):
    folder, *_ = workdirs
    rng = np.random.default_rng(0)
    for index in range(1003):
        place = tmp_path / "test" / str(index % 10)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(place / f"{index}.png")
    data = ["--dataset=folder", f"--data_dir={tmp_path}", "--batch_size=128"]
    (first, _), (second, _) = start("eval.py", f"--workdir={folder / 'two'}", *data, processes=2, devices=2)
    assert first.splitlines()[1].split()[4] == "1,003"
    assert second == ""
