"""The committed notebooks: they run from top to bottom, and were committed with what they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
TRAINING = (
    "config.epochs, config.optim.warmup_epochs, config.batch_size, config.optim.lr = 6.0, 1.0, 32, 2e-3"
)
FIGURES = {"decay_masks.ipynb": 6, "inside_a_trained_vir.ipynb": 7}


def figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def errors(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_every_notebook_is_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_committed_with_figures(name):
    path = FOLDER / name
    assert path.stat().st_size < 1.5 * 2**20
    notebook = nbformat.read(path, as_version=4)
    assert figures(notebook) == FIGURES[name]
    assert not errors(notebook)
    for cell in notebook.cells:
        texts = [output.get("text", "") for output in cell.get("outputs", ())]
        assert not re.search(r"[\s'\"=(]/\w+/", "\n".join([cell.source, *texts])), "a path of a machine"


@pytest.mark.parametrize("name", FIGURES)
def test_installs_the_package_where_it_is_not(name):
    """In Colab there is no checkout; nobody's sys.path is changed."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0]
    assert not any("sys.path" in source for source in code)


@pytest.mark.parametrize("name", FIGURES)
def test_runs_from_top_to_bottom(name, tmp_path):
    """But for the epochs that one of them trains: one is enough to look into a model."""
    text = (FOLDER / name).read_text()
    shorter = text.replace(TRAINING, TRAINING.replace("6.0, 1.0", "1.0, 0.5"))
    assert (shorter != text) == (name == "inside_a_trained_vir.ipynb")
    source, output = tmp_path / f"source_{name}", tmp_path / name
    source.write_text(shorter)
    command = [sys.executable, "-m", "jupyter", "execute", f"--output={output}", str(source)]
    environment = {k: v for k, v in os.environ.items() if k != "WORKDIR"}
    environment["JAX_PLATFORMS"] = "cpu"  # As on a laptop: they are quick there.
    environment["PYTHONPATH"] = str(FOLDER.parent)  # As where the package is installed.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    notebook = nbformat.read(output, as_version=4)
    assert figures(notebook) == FIGURES[name]
    assert not errors(notebook)
