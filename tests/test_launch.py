"""What the files of launch/ do, the cloud's and the cluster's commands replaced by ones that write down their calls.

The command of every process is then given to train.py's own flags and checks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# Every call is a line of calls.jsonl: its name, arguments and folder.
STUB = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
home, name, arguments = pathlib.Path(os.environ["SANDBOX"]), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (home / "calls.jsonl").open("a") as file:
    file.write(json.dumps([name, arguments, os.getcwd()]) + "\\n")
"""
STUBS = {
    # gcloud compute tpus tpu-vm WHAT: `ssh` runs the command in a new host's home.
    "gcloud": """
what = arguments[3]
if what == "describe":
    sys.exit(0 if (home / "slice").exists() else 1)
if what == "create":
    (home / "slice").touch()
if what == "ssh":
    command = [a for a in arguments if a.startswith("--command=")][0].removeprefix("--command=")
    sys.exit(subprocess.run(["bash", "-c", command], cwd=os.environ["HOME"]).returncode)
""",
    "git": """
if arguments[0] == "clone":
    (pathlib.Path(arguments[2]) / "configs").mkdir(parents=True)
    for file in ("train.py", "requirements.txt", "configs/vir_b.py"):
        (pathlib.Path(arguments[2]) / file).symlink_to(pathlib.Path(os.environ["REPOSITORY_ROOT"]) / file)
""",
    "uv": """
if arguments[0] == "venv":
    folder = pathlib.Path(arguments[-1]) / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").touch()
elif arguments[:2] == ["pip", "install"] and "-r" in arguments:
    assert pathlib.Path(arguments[arguments.index("-r") + 1]).is_file()
""",
    "gcsfuse": "(pathlib.Path(arguments[-1]) / 'mounted').touch()",
    "mountpoint": "sys.exit(0 if (pathlib.Path(arguments[-1]) / 'mounted').exists() else 1)",
    "srun": """
while arguments[0].startswith("-"):
    arguments.pop(0)
sys.exit(subprocess.run(arguments).returncode)
""",
    "scontrol": "",
    # `python -c` is Python; `python train.py` ends as the test wants.
    "python": """
if arguments[0] == "-c":
    os.execv(sys.executable, [sys.executable, *arguments])
assert pathlib.Path(arguments[0]).is_file()
sys.exit(int(os.environ.get("TRAINING_ENDS", "0")))
""",
}

# What train.py makes of a command line, up to the first thing that needs data or devices.
CHECK = """
import json, runpy, sys
from absl import flags
from vir_jax.paths import check_paths
from vir_jax.runs.validate import validate
from vir_jax.runs.storage import open_workdir
runpy.run_path("train.py", run_name="not main")
flags.FLAGS(sys.argv[1:])
config = flags.FLAGS.config
validate(config)
check_paths(config)
values = flags.FLAGS.flag_values_dict()
names = ("coordinator_address", "num_processes", "process_id")
print(json.dumps({
    "workdir": str(open_workdir(flags.FLAGS.workdir)),
    "data_dir": config.data.data_dir,
    "threads": config.data.threads,
    **{name: values[name] for name in names},
}))
"""


def check(command):
    """What train.py takes from a command, `python train.py --...`."""
    assert command[:2] == ["python", "train.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", CHECK, *command[1:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


class Sandbox:
    """A machine that has the shell's own commands and the stubs, and an empty home."""

    def __init__(self, folder):
        self.folder, self.home, self.bin = folder, folder / "home", folder / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        for name, what in STUBS.items():
            (self.bin / name).write_text(STUB + what)
            (self.bin / name).chmod(0o755)

    def run(self, script, **environment):
        """The exit code, output and calls of a script."""
        (self.folder / "calls.jsonl").write_text("")
        result = subprocess.run(
            ["bash", LAUNCH / script],
            cwd=self.home,
            env={
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "HOME": str(self.home),
                "SANDBOX": str(self.folder),
                "REPOSITORY_ROOT": str(ROOT),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return result.returncode, result.stdout + result.stderr, calls


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def named(calls, name):
    return [arguments for called, arguments, _ in calls if called == name]


def trained(calls):
    """The one command that trains, and the folder that it is started in."""
    ((arguments, folder),) = [(a, cwd) for name, a, cwd in calls if name == "python" and a[0] != "-c"]
    return ["python", *arguments], Path(folder)


def test_every_file_is_checked():
    assert {path.name for path in LAUNCH.iterdir()} == {"tpu_vm.sh", "slurm.sbatch", "kubernetes.yaml"}


# --- TPU VM ---


def test_tpu_vm(sandbox):
    code, said, calls = sandbox.run("tpu_vm.sh")
    assert code == 0, said
    verbs = [arguments[3] for arguments in named(calls, "gcloud")]
    assert verbs == ["describe", "create", "ssh"]
    assert "--worker=all" in named(calls, "gcloud")[-1]
    command, folder = trained(calls)
    assert folder == sandbox.home / "vir_jax"
    taken = check(command)
    assert taken["workdir"] == "gs://your-bucket/runs/vir_b"
    # What the data are read from is what was mounted.
    (mount,) = named(calls, "gcsfuse")
    assert mount[-2] == "your-bucket"
    assert taken["data_dir"] == str(sandbox.home / mount[-1])
    assert (Path(taken["data_dir"]) / "mounted").exists()
    installed = [arguments[-1] for arguments in named(calls, "uv") if arguments[:2] == ["pip", "install"]]
    assert installed[0] == "requirements.txt"
    assert installed[1].startswith("jax[tpu]==0.")
    assert ["venv", "--quiet", "--python", "3.11", ".venv"] in named(calls, "uv")


def test_tpu_vm_again_makes_nothing_anew(sandbox):
    first = trained(sandbox.run("tpu_vm.sh")[2])
    code, said, calls = sandbox.run("tpu_vm.sh", TRAINING_ENDS="75")
    assert code == 75, said  # Whoever started it knows that it is to be started again.
    assert [arguments[3] for arguments in named(calls, "gcloud")] == ["describe", "ssh"]
    assert named(calls, "gcsfuse") == []
    assert [arguments[0] for arguments in named(calls, "git")] == ["pull"]
    assert trained(calls) == first


def test_tpu_vm_stops_where_a_command_fails(sandbox):
    (sandbox.bin / "gcsfuse").write_text("#!/bin/sh\nexit 1\n")
    code, _, calls = sandbox.run("tpu_vm.sh")
    assert code == 1
    assert named(calls, "python") == []  # No run without its data.


# --- Slurm ---


@pytest.fixture
def slurm(sandbox):
    """The environment of a job, submitted from a checkout with its environment."""
    submitted = sandbox.folder / "checkout"
    (submitted / ".venv" / "bin").mkdir(parents=True)
    (submitted / ".venv" / "bin" / "activate").write_text("ACTIVATED=1\n")
    (submitted / "train.py").symlink_to(ROOT / "train.py")
    return {"SLURM_SUBMIT_DIR": str(submitted), "SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(("ends", "requeued"), [("0", []), ("75", [["requeue", "7"]]), ("1", [])])
def test_slurm(sandbox, slurm, ends, requeued):
    code, said, calls = sandbox.run("slurm.sbatch", **slurm, TRAINING_ENDS=ends)
    assert code == int(ends), said
    assert named(calls, "scontrol") == requeued
    command, folder = trained(calls)
    assert str(folder) == slurm["SLURM_SUBMIT_DIR"]
    if ends == "0":
        taken = check(command)
        assert taken["threads"] == 12
        assert taken["data_dir"] == str(sandbox.home / "tensorflow_datasets")
        assert taken["workdir"] == str(ROOT / "runs" / "vir_b")  # Of the folder that it is started in.


def test_slurm_without_an_environment(sandbox, slurm):
    (Path(slurm["SLURM_SUBMIT_DIR"]) / ".venv" / "bin" / "activate").unlink()
    code, said, calls = sandbox.run("slurm.sbatch", **slurm)
    assert code != 0
    assert "activate" in said
    assert calls == []


def test_slurm_directives():
    """Slurm reads them only above the first command, and takes no notice of others."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    places = [i for i, line in enumerate(lines) if "#SBATCH" in line]
    assert max(places) < first_command
    options = dict(lines[i].removeprefix("#SBATCH --").partition("=")[::2] for i in places)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # One process a GPU.
    assert options["signal"].startswith("TERM@")  # To the steps, not to the shell.
    assert "requeue" in options
    assert options["open-mode"] == "append"


# --- Kubernetes ---


def test_kubernetes():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "OnFailure"  # Exit code 75 is none that ends the job.
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    taken = []
    for index in (0, spec["completions"] - 1):
        command = [part.replace("$(JOB_COMPLETION_INDEX)", str(index)) for part in container["command"]]
        assert not any("$(" in part for part in command)
        taken.append(check(command))
    assert [process["process_id"] for process in taken] == [0, spec["completions"] - 1]
    for process in taken:
        assert process["num_processes"] == spec["completions"]
        # The first pod's name under the headless service.
        assert (
            process["coordinator_address"].partition(":")[0]
            == f"{job['metadata']['name']}-0.{pod['subdomain']}"
        )
        for place in (process["workdir"], process["data_dir"]):
            assert any(place.startswith(f"{mount}/") for mount in mounted)


# --- Docker ---


def test_the_image_has_what_the_job_runs():
    """What Dockerfile copies is there and not ignored, and is what a job's command needs."""
    instructions = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [line.split()[1:-1] for line in instructions if line.startswith("COPY")]
    files = [name for names in copied for name in names]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in files)
    assert set(files) == allowed
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"WORKDIR {container['workingDir']}" in instructions
    assert f"-t {container['image']} --build-arg ACCELERATOR=cuda13" in (ROOT / "Dockerfile").read_text()
    assert container["command"][1] in files


def test_a_wrong_command_is_found_out(tmp_path):
    """The check above sees what it is there for."""
    good = ["python", "train.py", "--config=configs/vir_b.py", f"--workdir={tmp_path}"]
    assert check(good)["workdir"] == str(tmp_path)
    for wrong in (
        "--config.data.data_dirr=x",
        "--config.data.data_dir=gs://bucket/tfds",
        "--workdir=",
        "--work=x",
    ):
        with pytest.raises(AssertionError):
            check([*good, wrong])
