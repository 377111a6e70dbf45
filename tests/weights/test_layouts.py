"""What other libraries compute of the same tensors, and that each layout is a bijection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.weights.make import OTHER_SIZE, SIZE, images
from tests.weights.helpers import golden, relative, tensors_of, write
from vir_jax.models import MODEL_NAMES
from vir_jax.models.pyramid_variants import PYRAMID_SIZES
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.model import model_functions
from vir_jax.weights import LAYOUTS, Card, WeightsError, load
from vir_jax.weights.rules import join_blocks, split_blocks


def params_of(card):
    """Random bytes as parameters by dotted name; of each another stretch of the same million."""
    functions = model_functions(card.model, card.num_classes)
    shapes = jax.eval_shape(functions.init, jax.random.key(0))
    drawn = np.random.RandomState(0).randint(0, 255, 1_000_003, np.uint8)
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    return {
        dotted(path): np.resize(np.roll(drawn, 1000 * i), leaf.shape) for i, (path, leaf) in enumerate(leaves)
    }


def card_of(name, **options):
    scale = 1e-5 if name.startswith("vir") else None
    model = {"name": name, "image_size": 224, "readout": "class_token", "layer_scale": scale, **options}
    return Card(model=model, num_classes=10)


@pytest.mark.parametrize("case", ["timm", "timm_layer_scale", "timm_average", "hf", "release"])
def test_the_logits_are_those_of_the_library_that_wrote_the_weights(tmp_path, case):
    expected = golden(case)
    folder = write(tmp_path / "x", tensors_of(expected))
    own = load(folder)
    assert relative(own.model(jnp.asarray(images((SIZE, SIZE)))), expected["logits"]) < 1e-5
    if expected["other_logits"] is not None:
        other = load(folder, image_size=OTHER_SIZE)
        assert relative(other.model(jnp.asarray(images(OTHER_SIZE))), expected["other_logits"]) < 1e-5


def test_both_sets_of_names_of_transformers_are_the_same_model(tmp_path):
    case = golden("hf")
    modules = load(write(tmp_path / "modules", tensors_of(case)))
    files = load(write(tmp_path / "files", tensors_of(case, of_files=True)))
    jax.tree.map(np.testing.assert_array_equal, modules.params, files.params)
    assert modules.card == files.card
    assert files.card.model["norm_epsilon"] == case["epsilon"] == 1e-12


def test_a_model_without_a_head_gets_one(tmp_path):
    tensors = tensors_of(golden("hf"), of_files=True)
    bare = {name.removeprefix("vit."): x for name, x in tensors.items() if not name.startswith("classifier")}
    bare["pooler.dense.weight"], bare["pooler.dense.bias"] = (
        np.ones((64, 64), np.float32),
        np.ones(64, np.float32),
    )
    folder = write(tmp_path / "bare", bare)
    with pytest.raises(WeightsError, match="has no head; say which classes"):
        load(folder)
    own = load(folder, class_names=["ant", "bee"])
    assert own.model(jnp.asarray(images((SIZE, SIZE)))).shape == (2, 2)
    np.testing.assert_array_equal(own.params["readout"]["norm"]["scale"], tensors["vit.layernorm.weight"])


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_there_and_back_is_the_same_bit_for_bit(name):
    others = {"vir": ["release"], "vit": ["timm", "hf"], "cvir": []}
    pyramid = name in PYRAMID_SIZES
    layouts = ["vir", *([] if pyramid else others[name.split("_")[0]])]
    card = card_of(name, **({"readout": "average"} if pyramid else {}))
    params = params_of(card)
    for layout in map(LAYOUTS.get, layouts):
        tensors = layout.export(params, card)
        assert layout.is_of(tensors)
        # A bijection: as many numbers, and the shapes alone say what goes where.
        assert sum(x.size for x in tensors.values()) == sum(x.size for x in params.values())
        back = layout.take(tensors, card, shapes={k: x.shape for k, x in params.items()}, where="x")
        assert back.keys() == params.keys()
        for parameter in params:
            assert back[parameter].dtype == np.uint8
            assert np.array_equal(back[parameter], params[parameter])


@pytest.mark.parametrize(
    ("options", "layouts"),
    [
        ({"readout": "average"}, ["timm"]),
        ({"layer_scale": 1e-5, "image_size": [224, 160]}, ["timm"]),
        ({"image_size": [32, 96]}, ["timm", "hf"]),
    ],
)
def test_options_go_there_and_back(options, layouts):
    card = card_of("vit_pico16", **options)
    params = params_of(card)
    for layout in map(LAYOUTS.get, layouts):
        tensors = layout.export(params, card)
        back = layout.take(tensors, card, shapes={k: x.shape for k, x in params.items()}, where="x")
        jax.tree.map(np.testing.assert_array_equal, back, params)
        # What the JSON for other libraries and the shapes say is the card again.
        found = layout.card({k: x.shape for k, x in tensors.items()}, layout.config(card), where="x")
        assert found.model | {"norm_epsilon": 1e-6} == card.model | {"norm_epsilon": 1e-6}


@pytest.mark.parametrize(
    ("layout", "name", "options", "message"),
    [
        ("timm", "vir_pico16", {"mixer": "retention"}, "mixer='retention'"),
        ("release", "vit_pico16", {"mixer": "softmax"}, "mixer='softmax'"),
        ("release", "vir_pico16", {"retention": "2d"}, "retention='2d'"),
        ("release", "vir_pico16", {"bidirectional": True}, "bidirectional=True"),
        ("timm", "vit_pico16", {"position": "sincos"}, "position='sincos'"),
        (
            "timm",
            "vir_h_pico",
            {"mixer": "retention", "position": "none"},
            "no such model as vir_h_pico with",
        ),
        ("hf", "vir_h_pico", {"mixer": "retention", "position": "none"}, "no such model as vir_h_pico with"),
        (
            "release",
            "vir_h_pico",
            {"mixer": "retention", "position": "none"},
            "no such model as vir_h_pico with",
        ),
        ("hf", "vit_pico16", {"readout": "average"}, "neither an average readout nor LayerScale"),
        ("hf", "vit_pico16", {"layer_scale": 1e-5}, "neither an average readout nor LayerScale"),
    ],
)
def test_a_model_that_a_layout_has_not_is_refused(layout, name, options, message):
    with pytest.raises(WeightsError, match=message):
        LAYOUTS[layout].config(card_of(name, **options))


def without(name):
    return lambda tensors: tensors.pop(name)


def instead(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (without("blocks.2.mlp.fc1.bias"), [r"missing: blocks.2.mlp.fc1.bias \(256,\)"]),
        (instead("reg_token", np.zeros((1, 4, 64))), [r"left over: reg_token \(1, 4, 64\)"]),
        (
            lambda tensors: tensors.update({f"blocks.{i}.attn.q_norm.weight": np.ones(16) for i in range(4)}),
            [r"left over: blocks.\*.attn.q_norm.weight \(16,\) in 4 blocks"],
        ),
        (
            lambda tensors: tensors.update(
                {"head.weights": tensors.pop("head.weight"), "norm.weight": np.ones(3)}
            ),
            [
                r"left over: head.weights \(7, 64\)",
                r"of another shape: norm.weight \(3,\); expected \(64,\)",
            ],
        ),
        (
            lambda tensors: tensors.update({"blocks.0.norm_1.weight": tensors.pop("blocks.0.norm1.weight")}),
            [
                r"left over: blocks.0.norm_1.weight \(64,\) \(nearest: blocks.0.norm1.weight\)",
                r"missing: blocks.0.norm1.weight \(64,\) \(nearest: blocks.0.norm_1.weight\)",
            ],
        ),
    ],
)
def test_every_tensor_is_used_and_every_parameter_filled_or_all_are_named(tmp_path, change, messages):
    tensors = tensors_of(golden("timm"))
    change(tensors)
    with pytest.raises(WeightsError) as error:
        load(write(tmp_path / "x", tensors))
    for message in messages:
        assert error.match(message)


@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        ("hf", {"model_type": "deit"}, "model_type is 'deit', here 'vit'"),
        ("hf", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', here 'gelu'"),
        ("hf", {"num_attention_heads": 8}, "64 wide with 4 blocks of 8 heads; there are"),
        ("timm", {"model_args": {"qk_norm": True}}, "qk_norm is True, here False"),
        (
            "timm",
            {"model_args": {"act_layer": "quickgelu"}},
            "model_args has act_layer, which no model of ours has",
        ),
        ("timm", {"global_pool": "avg"}, "global_pool is 'avg' after the norm"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(tmp_path, case, config, message):
    folder = write(tmp_path / "x", tensors_of(golden(case)), config=config)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_the_release_is_read_with_a_warning(tmp_path, caplog):
    load(write(tmp_path / "x", tensors_of(golden("release"))))
    assert "its parallel form, which its training uses, has a softmax besides" in caplog.text


def test_a_grid_that_is_no_square_is_told_by_the_configuration(tmp_path):
    tensors = tensors_of(golden("timm"))
    tensors["pos_embed"] = np.zeros((1, 1 + 2 * 6, 64), np.float32)
    with pytest.raises(WeightsError, match="are no square grid"):
        load(write(tmp_path / "x", tensors))
    folder = write(tmp_path / "y", tensors, config={"pretrained_cfg": {"input_size": [3, 8, 24]}})
    assert load(folder).card.model["image_size"] == [8, 24]


def test_blocks_apart_and_together():
    stacked = {"stage.blocks.norm1.scale": np.arange(24.0).reshape(12, 2), "stem.x": np.ones(3)}
    apart = split_blocks(stacked)
    assert len(apart) == 13
    assert apart["stage.blocks.11.norm1.scale"].tolist() == [22.0, 23.0]
    jax.tree.map(np.testing.assert_array_equal, join_blocks(apart), stacked)
