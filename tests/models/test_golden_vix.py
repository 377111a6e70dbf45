"""Mixers of Vision X-formers against the public PyTorch packages: outputs and all gradients, of the same weights.

The authors' own, `vision-xformer` 0.2.0, as stacks of two blocks; `performer-pytorch` 1.1.4, `linformer` 0.2.3 and
`nystrom-attention` 0.0.14 as mixers. tests/golden/vix/make.py wrote their numbers,
and says where the packages differ from ours.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import relative_error
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import mixer_type
from vir_jax.models.stage import Block, Stage

FOLDER = Path(__file__).parents[1] / "golden" / "vix"
LAYOUT = Layout(cols=4, patches=12, class_token="first")
DIM, HIDDEN, DEPTH = 16, 24, 2
LINFORMER = {"heads": 2, "rank": 5}
SHARED = LINFORMER | {"one_kv_head": True}
NYSTROM = {"heads": 1, "landmarks": 4}
CASES = {
    "linformer": ("linformer", LINFORMER | {"share_kv": False}),
    "linformer_shared": ("linformer", SHARED),
    "performer": ("performer", {"heads": 2}),
    "nystromformer": ("nystromformer", NYSTROM),
    "vix_fnet": ("fnet", {"heads": 2}),
    "vix_linformer": ("linformer", SHARED),
    "vix_performer": ("performer", {"heads": 1}),
    "vix_nystromformer": ("nystromformer", NYSTROM),
}


def make(name):
    """The mixer, or two blocks with it."""
    mixer, options = CASES[name]

    def make_mixer(rngs):
        return mixer_type(mixer)(DIM, layout=LAYOUT, dtype=jnp.float32, rngs=rngs, **options)

    def make_block(rngs):
        return Block(DIM, make_mixer(rngs), mlp_dim=HIDDEN, layer_scale=None, dtype=jnp.float32, rngs=rngs)

    if not name.startswith("vix_"):
        return make_mixer(nnx.Rngs(0))
    return Stage(make_block, drop_path_rates=[0.0] * DEPTH, remat="none", rngs=nnx.Rngs(0))


def test_every_file_is_read():
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_public_package(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(name)))
    prefix = "blocks." if name.startswith("vix_") else ""
    weights = {f"{prefix}{key[2:]}": jnp.asarray(x) for key, x in golden.items() if key.startswith("w.")}
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    assert flat.keys() == weights.keys()
    assert {key: x.shape for key, x in flat.items()} == {key: x.shape for key, x in weights.items()}

    @jax.jit
    def run(weights, x):
        def output(weights, x):
            paths = nnx.to_flat_state(state)
            filled = [(path, variable.replace(weights[".".join(map(str, path))])) for path, variable in paths]
            return nnx.merge(graph, nnx.from_flat_state(filled))(x, LAYOUT)[0]

        out, pull_back = jax.vjp(output, weights, x)
        return out, *pull_back(jnp.asarray(golden["d_out"]))

    out, d_weights, d_x = run(weights, jnp.asarray(golden["x"]))
    assert relative_error(out, golden["out"]) < 1e-5
    assert relative_error(d_x, golden["d_x"]) < 1e-5
    for key, gradient in d_weights.items():
        expected = golden[f"d.{key.removeprefix(prefix)}"]
        if key.endswith("projection"):
            assert not np.any(gradient)
            assert not np.any(expected)
        else:
            assert relative_error(gradient, expected) < 1e-5, key
