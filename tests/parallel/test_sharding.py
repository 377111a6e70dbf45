import jax
import pytest
from jax.sharding import PartitionSpec as P

from vir_jax.parallel.mesh import make_mesh
from vir_jax.parallel.sharding import dotted, partition_spec, state_shardings, unsplit
from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import create_train_state
from vir_jax.training.optimizer import make_optimizer


def test_first_matching_rule_applies():
    mesh = make_mesh(2, 2, 2)
    assert partition_spec("blocks.mixer.qkv.kernel", (4, 64, 3, 4, 16), mesh) == P(
        None, "fsdp", None, "tensor", None
    )
    up = partition_spec("opt_state.1.0.mu.blocks.mlp.up.kernel", (4, 64, 256), mesh)
    assert up == P(None, "fsdp", "tensor")
    assert partition_spec("overhead.kernel", (64, 64), mesh) == P()
    assert partition_spec("blocks.norm1.scale", (4, 64), mesh) == P()


def test_axes_that_do_not_divide_are_left_out_and_named():
    mesh = make_mesh(2, 2, 2)
    assert partition_spec("head.kernel", (64, 1001), mesh) == P("fsdp", None)
    params = {
        "head": {"kernel": jax.ShapeDtypeStruct((64, 1001), "float32")},
        "blocks": {"mlp": {"up": {"bias": jax.ShapeDtypeStruct((2, 5), "float32")}}},
    }
    assert sorted(unsplit(params, mesh)) == [
        "blocks.mlp.up.bias: dimension of 5 over tensor=2",
        "head.kernel: dimension of 1001 over tensor=2",
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_every_leaf_of_the_state_that_mirrors_a_parameter_is_placed_like_it(optimizer):
    config = default_config()
    config.model.name, config.model.image_size, config.optim.name = "vir_mu2", (8, 8), optimizer
    model = model_functions(config.model, 10)
    state = jax.eval_shape(
        lambda key: create_train_state(model.init(key), make_optimizer(optimizer), ema=True),
        jax.random.key(0),
    )
    shardings = state_shardings(state, make_mesh(2, 2, 2))
    params = {dotted(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings.params)}
    assert params["blocks.mixer.out.kernel"] == P(None, "tensor", None, "fsdp")
    assert params["patch_embedding.kernel"] == P(None, None, None, "fsdp")
    copies = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shardings):
        for name, spec in params.items():
            if dotted(path).endswith("." + name) and not dotted(path).endswith(f"class_{name}"):
                assert leaf.spec == spec
                copies += 1
    assert copies == 4 * len(params)  # Parameters, their average, and two moments.
