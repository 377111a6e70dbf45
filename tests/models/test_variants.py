"""The named models: exact sizes, and options that are refused with a reason."""

import inspect
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.models.helpers import GRID, abstract, create, published
from vir_jax.models import MODEL_NAMES, create_model, parse_name
from vir_jax.models.pyramid_variants import PYRAMID_SIZES

# ViR's s, b and l: docs/method.md, section 3; ViT's: as published. vir_ti16 is vit_ti16 with 2 * 12 LayerScales of
# 192 and without the class token's position embedding. pico is counted by hand below.
PARAMETERS = {
    "vir_ti16": 5_721_832,
    "vir_s16": 22_059_496,
    "vir_b16": 86_585_320,
    "vir_l16": 304_374_760,
    "vir_l14": 304_251_880,
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    # vir's with the embedding of 3 x 3 convolutions, and 4 weights a channel for each block's short one.
    "cvir_ti16": 5_802_472,
    "cvir_s16": 22_656_232,
    "cvir_b16": 89_520_616,
    "cvir_l16": 309_885_928,
}


def count(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("vir_pico2", {}, 10.274416), ("vir_h_nano", {"stem_stride": 1}, 13.188404)],
)
def test_a_seed_goes_on_giving_the_parameters_that_it_gave(name, options, expected):
    """The head's are drawn last: parts that are made in another order would have others."""
    model = create_model(name, num_classes=10, image_size=(8, 8), rngs=nnx.Rngs(0), **options)
    assert float(jnp.sum(jnp.abs(model.readout.head.kernel[...]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_counts(name, expected):
    assert count(published(name)) == expected


def test_parameter_counts_of_the_tiny_models():
    block = (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * (64 + 64)
    patches = (3 * 64 + 64) + 8 * 8 * 64 + 64
    head = 2 * 64 + (64 * 1000 + 1000)
    assert (
        count(abstract("vir_pico1", image_size=8, num_classes=1000)) == patches + 4 * (block + 2 * 64) + head
    )
    assert count(abstract("vit_pico1", image_size=8, num_classes=1000)) == patches + 64 + 4 * block + head
    convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 64) + (16 + 32 + 64) + 2 * (16 + 32)
    positions = 8 * 8 * 64 + 64
    cvir = abstract("cvir_pico4", image_size=32, num_classes=1000)
    assert count(cvir) == convolutions + positions + 4 * (block + 2 * 64 + 4 * 64) + head


def test_every_published_name_is_counted():
    """Those of Vision X-formers on their own images: tests/models/test_vix.py; pyramids: test_pyramid.py."""
    others = {"vir_pico1", "vit_pico1", "cvir_pico4", "vir_vix1", "vit_vix1", *PYRAMID_SIZES}
    assert set(MODEL_NAMES) == {*PARAMETERS, *others}


@pytest.mark.parametrize(
    "options",
    [
        {"retention": "2d"},
        {"bidirectional": True},
        {"readout": "average"},
        {"retention": "2d", "directions": 2},
        {"decays": "retnet", "head_norm": True, "flips": True},
    ],
)
def test_options_of_vir_add_no_parameter(options):
    assert count(abstract("vir_s16", image_size=224, num_classes=1000, **options)) == PARAMETERS["vir_s16"]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_variant_gives_logits_by_eval_shape(name):
    tiny = name not in PARAMETERS
    graph, params = nnx.split(abstract(name, image_size=8, num_classes=1000) if tiny else published(name))
    size = 8 if tiny else 224
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits = jax.eval_shape(lambda params, x: nnx.merge(graph, params)(x), params, x)
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)


def test_what_is_not_given_is_the_familys():
    options = {"stem": "conv", "short_conv": 4}
    assert options.items() <= abstract("cvir_pico4", image_size=32).options.items()
    other = abstract("cvir_pico4", image_size=32, stem="linear", short_conv=2).options
    assert "stem" not in other
    assert other["short_conv"] == 2
    # Its options are those of its mixer, and of no other.
    assert "short_conv" not in abstract("cvir_pico4", image_size=32, mixer="performer_causal").options


def test_any_patch_can_be_named():
    family, size, patch = parse_name("vir_ti4")
    assert (family, size.dim, size.depth, size.heads, patch) == ("vir", 192, 12, 3, 4)
    assert abstract("vir_pico3", image_size=(6, 9)).stem.position.grid == (2, 3)


@pytest.mark.parametrize(
    "name", ["vir_s", "vir_s0", "vir_s016", "vir_x16", "vit-b16", "vir_b16 ", "resnet50", ""]
)
def test_unknown_names_are_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match=r"no model is called .* nearest: c?vi[rt]_\w+, c?vi"):
        parse_name(name)


def test_nearest_name():
    with pytest.raises(ValueError, match="nearest: vir_b16,"):
        abstract("virb16")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "vit_pico1",
            {"retention": "1d"},
            "retention='1d' makes no sense for vit_pico1 with the mixer 'softmax'",
        ),
        ("vit_pico1", {"bidirectional": True}, "bidirectional=True makes no sense for vit_pico1"),
        ("vit_pico1", {"chunk_size": 8}, "chunk_size=8 makes no sense for vit_pico1"),
        ("vir_pico1", {"retention": "2d", "bidirectional": True}, "no sense with retention='2d'"),
        (
            "vir_pico1",
            {"retention": "2d", "chunk_size": 8},
            "chunk_size=8 makes no sense with retention='2d'",
        ),
        ("vit_pico1", {"implementation": "xla"}, "implementation='xla' makes no sense for vit_pico1"),
        (
            "vir_pico1",
            {"retention": "2d", "implementation": "pallas_tpu"},
            "implementation='pallas_tpu' makes no sense with retention='2d'",
        ),
        (
            "vir_pico1",
            {"chunk_size": 8, "implementation": "pallas_tpu"},
            "chunk_size=8 makes no sense with implementation='pallas_tpu'",
        ),
        (
            "vir_pico1",
            {"decays": "token", "retention": "2d"},
            "decays='token' makes no sense with retention='2d'",
        ),
        (
            "vir_pico1",
            {"decays": "token", "implementation": "pallas_tpu"},
            "decays='token' makes no sense with implementation='pallas_tpu'",
        ),
        (
            "vir_pico1",
            {"decays": "fast"},
            r"decays='fast'; expected one of \('vir', 'retnet', 'none', 'learned', 'to",
        ),
        ("vir_pico1", {"qk_norm": "batch"}, r"qk_norm='batch'; expected one of \(None, 'rms', 'layer'\)"),
        ("vir_pico1", {"short_conv": 1}, "short_conv=1; expected a width of 2 or more tokens, or None"),
        ("vit_pico1", {"gate": True}, "gate=True makes no sense for vit_pico1 with the mixer 'softmax'"),
        ("vit_pico1", {"flips": True}, "flips=True makes no sense for vit_pico1 with the mixer 'softmax'"),
        (
            "vir_pico1",
            {"flips": True, "bidirectional": True},
            "flips=True makes no sense with bidirectional=True",
        ),
        ("vir_pico1", {"flips": 2}, "flips=2; expected True or False"),
        ("vir_pico1", {"directions": 3}, r"directions=3; expected one of \(1, 2, 4\)"),
        ("vir_pico1", {"directions": 4}, "directions=4 makes no sense with retention='1d'"),
        ("vir_ti1", {"directions": 4, "retention": "2d"}, "directions=4 makes no sense with 3 heads"),
        ("vir_pico1", {"directions": 2, "flips": True}, "flips=True makes no sense with directions=2"),
        (
            "vir_h_nano",
            {"directions": 2, "retention": "2d", "flips": True},
            "flips=True makes no sense with directions=2",
        ),
        (
            "vir_pico1",
            {"directions": 2, "bidirectional": True},
            "bidirectional=True makes no sense with directions=2",
        ),
        (
            "vit_pico1",
            {"directions": 2},
            "directions=2 makes no sense for vit_pico1 with the mixer 'softmax'",
        ),
        (
            "vir_pico1",
            {"late_attention": True},
            "late_attention=True makes no sense for vir_pico1: it is of pyramids",
        ),
        ("vit_pico1", {"stem_stride": 4}, "stem_stride=4 makes no sense for vit_pico1: it is of pyramids"),
        ("vir_h_nano", {"stem": "conv"}, "stem='conv' makes no sense for vir_h_nano, a pyramid"),
        ("vir_h_nano", {"mlp_dim": 8}, "mlp_dim=8 makes no sense for vir_h_nano, a pyramid"),
        ("vir_h_nano", {"levels": 2}, "levels=2 makes no sense for vir_h_nano, a pyramid"),
        (
            "vir_h_nano",
            {"readout": "class_token"},
            "readout='class_token' makes .* expected None or 'average' or 'dense_upernet'",
        ),
        (
            "vir_pico2",
            {"readout": "dense_upernet"},
            "readout='dense_upernet' makes no sense for vir_pico2: .* 2 pixels",
        ),
        ("vir_h_nano", {"readout_dim": 8}, "readout_dim=8; expected None, but with readout='dense_upernet'"),
        ("vir_pico4", {"readout": "dense_upernet", "readout_dim": 0}, "readout_dim=0; expected an integer"),
        ("vir_h_nano", {"position": "learned"}, "position='learned' makes .* expected None or 'none'"),
        ("vir_h_nano", {"bidirectional": True}, "bidirectional=True makes .* expected False"),
        ("vir_h_nano", {"stem_stride": 3}, r"stem_stride=3; expected one of \(1, 2, 4\), or None"),
        ("vir_h_nano", {"late_attention": 1}, "late_attention=1; expected True or False"),
        (
            "vir_h_nano",
            {"late_attention": True, "mixer": "softmax"},
            "late_attention=True makes no sense with the mixer 'softmax'",
        ),
        (
            "vir_h_nano",
            {"mixer": "softmax", "flips": True},
            "flips=True makes no sense for vir_h_nano with the",
        ),
        ("vir_h_nano", {"channels": 2}, r"channels=2; expected one of \(1, 3, 4\), or None"),
        ("vir_h_nano", {"image_size": 0}, "image_size=0; expected pixels"),
        ("vir_h_nano", {"gates": True}, "no option 'gates'; did you mean 'gate'"),
        ("vir_pico1", {"implementation": "triton"}, "implementation='triton'; expected one of"),
        ("vir_pico1", {"num_classes": 0}, "num_classes=0; expected an integer of at least 1"),
        ("vir_pico1", {"drop_path_rate": 1.0}, r"drop_path_rate=1.0; expected a probability in \[0, 1\)"),
        (
            "vir_pico1",
            {"readout": "first"},
            r"readout='first'; expected one of \('class_token', 'average', 'every_token', 'dense_linear'",
        ),
        ("vir_pico1", {"remat": "dots"}, r"remat='dots'; expected one of \('none', 'elementwise', 'full'\)"),
        ("vir_pico1", {"remat": True}, "remat=True; expected one of"),
        ("vir_pico1", {"mode": "sideways"}, "mode='sideways'; expected one of"),
        (
            "vit_pico1",
            {"mode": "chunkwise"},
            r"mode='chunkwise'; expected one of \('auto', 'parallel'\), which softmax",
        ),
        (
            "vir_pico1",
            {"implementation": "pallas_tpu", "mode": "parallel"},
            "mode='parallel'; expected one of",
        ),
        ("vir_pico1", {"rngs": 0}, r"rngs=0; expected flax.nnx.Rngs, such as nnx.Rngs\(0\)"),
        ("vir_pico1", {"image_size": "abc"}, "image_size='abc'; expected pixels"),
        ("vir_pico1", {"image_size": (8, 8, 8)}, r"image_size=\(8, 8, 8\); expected pixels"),
        ("vir_pico1", {"layer_scale": 0.0}, "layer_scale=0.0; expected a positive number, None"),
        ("vir_pico1", {"dtype": "float64"}, "dtype='float64'; expected"),
        ("vir_pico1", {"mixer": "fnett"}, "mixer='fnett'; expected one of .*'fnet'"),
        ("vir_pico1", {"chunksize": 8}, "no option 'chunksize'; did you mean 'chunk_size'"),
        ("vir_pico1", {"chunk_size": 0}, "chunk_size=0; expected a positive number"),
        ("vir_pico4", {"image_size": (8, 6)}, "8 x 6 pixels does not divide into patches of 4 x 4"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, reason):
    # Of wrong types, too, which the type checker of the tests would refuse first.
    unchecked = inspect.unwrap(create_model)
    given = {"num_classes": 5, "image_size": GRID} | options
    with pytest.raises(ValueError, match=reason):
        nnx.eval_shape(lambda: unchecked(name, **{"rngs": nnx.Rngs(0)} | given))


def test_layer_scale_defaults_by_family_and_can_be_set():
    def has_layer_scale(name, **options):
        return abstract(name, **options).stage.blocks.layer_scale2 is not None

    assert has_layer_scale("vir_pico1")
    assert not has_layer_scale("vir_pico1", layer_scale=None)
    assert not has_layer_scale("vit_pico1")
    scale = jax.jit(lambda: nnx.state(create("vit_pico1", layer_scale=0.5).stage.blocks.layer_scale2))()[
        "scale"
    ]
    assert jnp.all(scale[...] == 0.5)
