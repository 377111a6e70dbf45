import jax
import pytest
from jax.sharding import PartitionSpec as P

from vir_jax.parallel.mesh import make_mesh
from vir_jax.parallel.sharding import dotted, partition_spec, state_shardings, unsplit
from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import create_train_state
from vir_jax.training.optimizer import make_optimizer

AXES = {
    "blocks.qkv.kernel": ("embed", None, "heads", None),
    "blocks.up.kernel": ("embed", "hidden"),
    "up.bias": ("hidden",),
    "head.kernel": ("embed", "classes"),
    "norm.scale": (),
    "overhead.kernel": (),
}


def spec(path, shape, mesh=(2, 2, 2)):
    return partition_spec(path, jax.ShapeDtypeStruct(shape, "float32"), make_mesh(*mesh), AXES)


def test_the_last_dimensions_are_split_as_the_parameter_names_them():
    assert spec("blocks.qkv.kernel", (4, 64, 3, 4, 16)) == P(None, "fsdp", None, "tensor", None)
    assert spec("opt_state.1.0.mu.blocks.up.kernel", (4, 64, 256)) == P(None, "fsdp", "tensor")
    assert spec("up.bias", (2, 4)) == P(None, "tensor")
    assert spec("norm.scale", (4, 64)) == P(None, None)
    assert spec("overhead.kernel", (64, 64)) == P(None, None)  # Not head.kernel.
    assert spec("opt_state.count", ()) == P()
    assert spec("opt_state.nu.blocks.up.kernel", ()) == P()  # A reduced form of the parameter.


def test_axes_that_do_not_divide_are_left_out_and_named():
    assert spec("head.kernel", (64, 1001)) == P("fsdp", None)
    params = {
        "head": {"kernel": jax.ShapeDtypeStruct((64, 1001), "float32")},
        "blocks": {"up": {"bias": jax.ShapeDtypeStruct((2, 5), "float32")}},
    }
    assert sorted(unsplit(params, make_mesh(2, 2, 2), AXES)) == [
        "blocks.up.bias: dimension of 5 over tensor=2",
        "head.kernel: dimension of 1001 over tensor=2",
    ]


def test_a_large_array_that_nothing_splits_is_an_error():
    with pytest.raises(
        ValueError, match=r"overhead\.kernel \(1024, 512\) is larger than 1 MB and does not say how"
    ):
        spec("overhead.kernel", (1024, 512))
    with pytest.raises(
        ValueError, match=r"up\.kernel \(515, 1023\) is larger .* no mesh axis divides it: fsdp=2"
    ):
        spec("blocks.up.kernel", (515, 1023))
    assert spec("blocks.up.kernel", (515, 1023), mesh=(8, 1, 1)) == P("fsdp", "tensor")


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [("adamw", 2), ("lamb", 2), ("lion", 1), ("muon", 1), ("adafactor", 1), ("sgd", 1)],
)
def test_every_leaf_of_the_state_that_mirrors_a_parameter_is_placed_like_it(optimizer, moments):
    config = default_config()
    config.model.name, config.model.image_size, config.optim.name = "vir_pico2", (8, 8), optimizer
    model = model_functions(config.model, 10)
    state = jax.eval_shape(
        lambda key: create_train_state(model.init(key), make_optimizer(optimizer), ema=True),
        jax.random.key(0),
    )
    shardings = state_shardings(state, make_mesh(2, 2, 2), model.axes)
    params = {dotted(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings.params)}
    assert params["stage.blocks.mixer.out.kernel"] == P(None, "tensor", None, "fsdp")
    assert params["stem.embedding.conv.kernel"] == P(None, None, None, "fsdp")
    shapes = {dotted(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    copies = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shardings):
        for name, spec in params.items():
            mirrors = dotted(path).endswith("." + name) and not dotted(path).endswith(f"class_{name}")
            if mirrors and shapes[dotted(path)] == shapes[f"params.{name}"]:  # Adafactor's may be reduced.
                assert leaf.spec == spec
                copies += 1
    assert copies >= (2 + moments) * len(params)  # Parameters, their average, and the moments.
