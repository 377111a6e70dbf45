"""The package as it is built and installed: what a wheel holds, what each part needs, one version."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import vir_jax
from vir_jax.extras import MissingPackageError, require
from vir_jax.runs.recipes import find_recipe, load_recipe, recipes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = ("vir-train", "vir-eval", "vir-predict", "vir-generate", "vir-compile", "vir-bench")
NAME = re.compile(r"^[A-Za-z0-9_.-]+")


def normal(name):
    return re.sub("[-_.]+", "-", name).lower()


def distributions(requirements):
    return {normal(NAME.match(requirement)[0]) for requirement in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the files that it is made of, and unpacked."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("vir_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", build, str(built)], cwd=source, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (path,) = built.glob("*.whl")
    assert path.name == f"vir_jax-{vir_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(built / "installed")
    return built / "installed"


def run(code, *arguments, path=ROOT, cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_the_package_alone(wheel):
    (information,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"vir_jax", information.name}
    assert (information / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (wheel / "vir_jax" / "py.typed").exists()
    packaged, here = (
        {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*.py")
            if "__pycache__" not in path.parts
        }
        for folder in (wheel / "vir_jax", ROOT / "vir_jax")
    )
    assert packaged == here | {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}


def test_recipes_from_the_wheel(wheel, tmp_path):
    code = """
from pathlib import Path
import vir_jax
from vir_jax.runs.recipes import find_recipe, load_recipe
assert Path(find_recipe("vir_b")).parent == Path(vir_jax.__file__).parent / "configs"
print(vir_jax.__file__, load_recipe("vir_cifar10:epochs=8").epochs, load_recipe("vir_b").model.name)
"""
    result = run(code, path=wheel, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(wheel / "vir_jax" / "__init__.py"), "8.0", "vir_b16"]


def test_every_command_is_tested():
    assert set(PROJECT["scripts"]) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_the_commands(command, wheel, tmp_path):
    """What the entry point of the wheel prints: this project's flags, the required ones first, no library's."""
    module, _, function = PROJECT["scripts"][command].partition(":")
    code = f"import sys; sys.argv[0] = {command!r}; from {module} import {function}; {function}()"
    result = run(code, "--help", path=wheel, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    description, _, listed = result.stdout.partition("\nflags:\n")
    assert command in description
    names = re.findall(r"^  --(?:\[no\])?(\w+): \S", listed, re.MULTILINE)
    assert names[0] in ("config", "workdir", "model")
    assert "traceback" in names
    assert "logtostderr" not in names


# What the base install lacks, as if it were not there.
WITHOUT_EXTRAS = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import jax.numpy as jnp
from flax import nnx
from vir_jax import ops
from vir_jax.models import create_model
model = create_model("vir_pico4", num_classes=3, rngs=nnx.Rngs(0))
assert model(jnp.zeros((1, 8, 8, 3))).shape == (1, 3)
assert ops.retention is not None
for part, extra in (("data", "train"), ("tasks", "train"), ("runs", "train"), ("training", "train"),
                    ("weights", "train"), ("inspection.figures", "inspect")):
    try:
        importlib.import_module("vir_jax." + part)
    except ImportError as error:
        assert f'pip install "vir-jax[{extra}]"' in str(error), (part, error)
    else:
        raise AssertionError(part)
sys.argv[1:] = ["--help"]
from vir_jax.commands import train
train()
"""


def test_the_base_install_has_ops_and_models_and_names_the_extras():
    # Of the packages that extras bring, those that the base does not bring too (Flax needs optax and Orbax).
    without = (
        "cv2,grain,ml_collections,PIL,safetensors,matplotlib,simplejpeg,tensorboard,tifffile,tqdm,sklearn"
    )
    result = run(WITHOUT_EXTRAS, without)
    assert result.returncode == 1
    assert result.stderr.startswith("vir-train: ml_collections is not installed: pip install"), result.stderr


def test_a_module_that_is_run_tells_it_in_a_sentence():
    code = "import sys; sys.argv = ['-m']; sys.modules['safetensors'] = None; import vir_jax.weights"
    result = run(code)
    assert result.returncode == 1
    assert result.stderr.startswith("safetensors is not installed: pip install")


def test_what_is_required_is_what_the_extras_bring():
    """By the name that is imported and the one that is installed."""
    provided = importlib.metadata.packages_distributions()
    extras = PROJECT["optional-dependencies"]
    found = set()
    for path in (ROOT / "vir_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                if not all(isinstance(argument, ast.Constant) for argument in node.args):
                    continue
                extra, *modules = [argument.value for argument in node.args]
                found.add(extra)
                for module in modules:
                    if module in provided:  # Not every optional package is installed where this runs.
                        assert distributions(provided[module]) & distributions(extras[extra]), (path, module)
    assert {"train", "tfds", "inspect"} <= found <= set(extras)


def test_what_is_missing_is_named():
    require("train", "absl", "json")
    with pytest.raises(
        MissingPackageError, match=r'no_such, nor_this are not installed: pip install "vir-jax\[train\]"'
    ):
        require("train", "absl", "no_such", "nor_this")


def test_requirements_pin_what_is_required():
    """`make lock` was run after the last change of pyproject.toml."""
    extras = PROJECT["optional-dependencies"]
    run_alike = [*PROJECT["dependencies"], *extras["train"], *extras["tfds"]]
    for file, names in {
        "requirements.txt": run_alike,
        "requirements-test.txt": [*run_alike, *extras["inspect"], *extras["test"]],
        "requirements-inspect.txt": [*run_alike, *extras["inspect"]],
        "requirements-prepare.txt": [*run_alike, *extras["prepare"]],
    }.items():
        pinned = distributions(
            line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")
        )
        assert distributions(names) - {"vir-jax"} <= pinned, file


def test_hooks_and_workflow_are_those_of_the_gate():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "requirements-test.txt").read_text().splitlines()
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["gate"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    versions = job["strategy"]["matrix"]["python"]
    assert all(
        f"Programming Language :: Python :: {version}" in PROJECT["classifiers"] for version in versions
    )
    assert versions[0] in PROJECT["requires-python"]


def test_one_version():
    assert "version" in PROJECT["dynamic"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vir_jax.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert re.search(
        rf"^## {re.escape(vir_jax.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_recipes_by_name_and_by_path():
    assert "vir_b" in recipes()
    assert "imagenet" not in recipes()  # It is what recipes share.
    assert find_recipe("vir_cifar10:epochs=8") == f"{ROOT / 'configs' / 'vir_cifar10.py'}:epochs=8"
    assert find_recipe("configs/x.py:a=1") == "configs/x.py:a=1"
    assert find_recipe("folder/x") == "folder/x"
    assert load_recipe("vir_cifar10:epochs=8") == load_recipe(f"{ROOT}/configs/vir_cifar10.py:epochs=8")
    assert load_recipe("vir_cifar10").epochs == 10
    with pytest.raises(ValueError, match=r"no recipe is called 'vir_digit'; did you mean 'vir_digits'\?"):
        find_recipe("vir_digit")
