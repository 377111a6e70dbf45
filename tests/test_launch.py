"""The files of launch/ parse, and name commands, flags and recipes that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ["tpu_vm.sh", "slurm.sbatch"]


def test_every_file_is_checked():
    assert {path.name for path in LAUNCH.iterdir()} == {*SCRIPTS, "kubernetes.yaml"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_syntax(name):
    result = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_slurm_directives():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in directives)
    # Slurm reads directives only above the first command.
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines.index(directives[-1]) < first_command


def test_kubernetes_manifest():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    (container,) = pod["containers"]
    assert f"--num_processes={job['spec']['completions']}" in container["command"]
    name, port = job["metadata"]["name"], 5000
    assert f"--coordinator_address={name}-0.{name}:{port}" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("name", [*SCRIPTS, "kubernetes.yaml"])
def test_commands_exist(name):
    text = (LAUNCH / name).read_text()
    (recipe,) = set(re.findall(r"--config=(\S+\.py)", text))
    assert (ROOT / recipe).is_file()
    assert "train.py" in text
