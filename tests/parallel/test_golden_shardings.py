"""Where every parameter of every recipe lies on 256 devices, as last looked at.

After a change that is meant: `pytest tests/parallel --update-golden`, and look at the difference.
"""

from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from tests.test_configs import RECIPES, load
from vir_jax.parallel.mesh import AXES
from vir_jax.parallel.sharding import dotted, state_shardings
from vir_jax.runs.model import model_functions

FOLDER = Path(__file__).parents[1] / "golden" / "shardings"
MESH = AbstractMesh((16, 8, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def table(name):
    """Path, shape, axes and shape on one device."""
    config, _ = load(name)
    model = model_functions(config.model, 1000 if config.data.dataset == "imagenet2012" else 10)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shardings = jax.tree.leaves(state_shardings(params, MESH, model.axes))
    lines = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], shardings, strict=True
    ):
        axes = ", ".join(axis or "-" for axis in (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))))
        shape = sharding.shard_shape(leaf.shape)
        lines.append(f"{dotted(path):<40}{leaf.shape!s:<24}({axes:<26}) {shape}\n")
    return "".join(lines)


@pytest.mark.parametrize("name", RECIPES)
def test_shardings(name, request):
    path = FOLDER / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(name))
    assert table(name) == path.read_text()
