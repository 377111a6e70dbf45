"""Vision X-formers: the exact sizes of every model, and combinations that are refused with a reason."""

import math

import jax
import pytest
from flax import nnx

from tests.models.helpers import GRID, abstract
from vir_jax.models import flops
from vir_jax.models.position import ROPE

SOFTMAX = {"mixer": "softmax", "qkv_bias": False}
PERFORMER = {"mixer": "performer"}
NYSTROM = {"mixer": "nystromformer"}
ONE_HEAD = {"mixer": "linformer", "one_kv_head": True}
LINFORMER = {"mixer": "linformer"}
FNET = {"mixer": "fnet"}
MIXER = {"mixer": "mlp_mixer", "mlp_dim": 128}

# Parameters on CIFAR-10 by (stem, patch), mixer: with learned positions and with rotary ones. Of the MLP-Mixer, which
# needs no positions, without.
COUNTS = [
    ("linear", 1, SOFTMAX, 661_770, 530_570),
    ("linear", 1, PERFORMER, 663_306, 532_106),
    ("linear", 1, NYSTROM, 662_298, 531_098),
    ("linear", 1, ONE_HEAD, 809_482, 678_282),
    ("linear", 1, LINFORMER, 858_634, 727_434),
    ("linear", 1, FNET, 399_114, None),
    ("conv_vix", 1, SOFTMAX, 754_506, 623_306),
    ("conv_vix", 1, PERFORMER, 756_042, 624_842),
    ("conv_vix", 1, NYSTROM, 755_034, 623_834),
    ("conv_vix", 1, ONE_HEAD, 902_218, 771_018),
    ("conv_vix", 1, LINFORMER, 951_370, 820_170),
    ("conv_vix", 1, FNET, 491_850, None),
    ("linear", 1, MIXER, 8_533_002, None),
    ("conv_vix", 2, SOFTMAX, 656_202, 623_306),
    ("conv_vix", 2, PERFORMER, 657_738, 624_842),
    ("conv_vix", 2, NYSTROM, 656_730, 623_834),
    ("conv_vix", 2, LINFORMER, 656_458, 623_562),
    ("conv_vix", 2, FNET, 393_546, None),
    ("conv_vix", 2, MIXER, 755_274, None),
    ("linear", 2, SOFTMAX, 564_618, 531_722),
    ("linear", 2, PERFORMER, 566_154, 533_258),
    ("linear", 2, NYSTROM, 565_146, 532_250),
    ("linear", 2, ONE_HEAD, 515_722, 482_826),
    ("linear", 2, LINFORMER, 564_874, 531_978),
    ("linear", 2, FNET, 301_962, None),
    ("linear", 2, MIXER, 663_690, None),
    ("linear", 4, SOFTMAX, 544_650, 536_330),
    ("linear", 4, PERFORMER, 546_186, 537_866),
    ("linear", 4, NYSTROM, 545_178, 536_858),
    ("linear", 4, ONE_HEAD, 446_602, 438_282),
    ("linear", 4, FNET, 281_994, None),
    ("linear", 4, MIXER, 175_242, None),
]

# What the authors' notebooks printed: no class token, no positions, no compression of Linformer.
PRINTED = [
    ("linear", SOFTMAX, 530_442),
    ("conv_vix", SOFTMAX, 623_178),
    ("linear", NYSTROM, 530_970),
    ("conv_vix", NYSTROM, 623_706),
    ("linear", PERFORMER, 531_978),
    ("conv_vix", PERFORMER, 624_714),
    ("linear", ONE_HEAD, 415_754),
    ("linear", LINFORMER, 464_906),
    ("conv_vix", LINFORMER, 557_642),
]


PROJECTIONS = [f"{name}.kernel" for name in ("qkv", "q", "k", "out")]


def vix(patch=1, size=32, classes=10, **options):
    return abstract(f"vit_vix{patch}", image_size=size, num_classes=classes, **options)


def sizes(model):
    """Numbers of each parameter, by path; what no gradient changes is left out."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): math.prod(leaf.shape) for path, leaf in flat}


def label(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("stem", "patch", "options", "learned", "rotary"), COUNTS, ids=label)
def test_parameters(stem, patch, options, learned, rotary):
    position = "none" if options is MIXER else "learned"
    assert sum(sizes(vix(patch, stem=stem, position=position, **options)).values()) == learned
    if rotary is not None:
        assert sum(sizes(vix(patch, stem=stem, position="rope", **options)).values()) == rotary


@pytest.mark.parametrize(
    ("stem", "patch", "expected"), [("linear", 2, 8_558_664), ("conv_vix", 2, 8_650_248)]
)
def test_parameters_of_the_mlp_mixer_on_tiny_imagenet(stem, patch, expected):
    model = vix(patch, size=64, classes=200, stem=stem, position="none", **MIXER)
    assert sum(sizes(model).values()) == expected


def test_parameters_of_vir_at_this_size():
    """ViT's with biases of q, k and v, two LayerScales in each block, and no position of the class token."""
    vit = 661_770 + 4 * 3 * 128
    assert sum(sizes(vix()).values()) == vit
    model = abstract("vir_vix1", image_size=32, num_classes=10)
    assert sum(sizes(model).values()) == vit + 4 * 2 * 128 - 128


@pytest.mark.parametrize(("stem", "options", "expected"), PRINTED, ids=label)
def test_parameters_as_the_authors_printed_them(stem, options, expected):
    unseen = ("class_token", "position", "compression")
    found = sizes(vix(stem=stem, **options)).items()
    assert sum(size for name, size in found if not any(part in name for part in unseen)) == expected


@pytest.mark.parametrize(
    ("options", "millions"),
    [(SOFTMAX, 269), (PERFORMER, 58), (ONE_HEAD, 21), (LINFORMER, 34), (NYSTROM, 84), (MIXER, 268)],
    ids=label,
)
def test_multiply_adds_of_mixing(options, millions):
    """Of one layer, at 1,025 tokens, without the projections, as published."""
    model = vix(position="none", **options)
    layout = model.layout((32, 32))
    mixer = model.stage.blocks.mixer
    projections = sum(size for name, size in sizes(mixer).items() if name in PROJECTIONS) // 4
    mixing = mixer.multiply_adds(layout, "parallel") - layout.length * projections
    assert round(mixing / 1e6) == millions


def test_cost_counts_the_stem():
    convolutions = 32 * 32 * 9 * (3 * 32 + 32 * 64 + 64 * 128)
    assert flops(vix(stem="conv_vix"), 32) - flops(vix(), 32) == convolutions - 32 * 32 * 3 * 128


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixer": "mlp_mixer", "position": "rope"}, r"'mlp_mixer' has no queries and keys.*nystromformer"),
        ({"mixer": "fnet", "position": "rope_2d"}, r"'fnet' has no queries and keys.*softmax"),
        ({"mixer": "mlp_mixer", "readout": "class_token"}, r"no place for a class token; expected 'average'"),
        (
            {"mixer": "fnet", "qkv_bias": False},
            "qkv_bias=False makes no sense .* 'nystromformer', 'performer'",
        ),
        ({"mixer": "softmax", "landmarks": 8}, "landmarks=8 makes no sense .* an option of 'nystromformer'"),
        ({"mixer": "nystromformer", "landmarks": 0}, "landmarks=0; expected an integer of at least 1"),
        ({"mixer": "nystromformer", "pinv_iterations": -1}, "pinv_iterations=-1; expected an integer"),
        ({"mixer": "linformer", "rank": -1}, "rank=-1; expected an integer of at least 1"),
        ({"mixer": "performer", "features": 0}, "features=0; expected an integer of at least 1"),
        ({"mixer": "mlp_mixer", "token_hidden": 0}, "token_hidden=0; expected an integer of at least 1"),
        ({"mlp_dim": 0}, "mlp_dim=0; expected an integer of at least 1"),
        ({"mixer": "performer_causal", "mode": "diagonal"}, "mode='diagonal'; expected one of .*'chunkwise'"),
        ({"position": "axial"}, "position='axial'; expected one of .*'rope_2d'"),
        ({"stem": "resnet"}, r"stem='resnet'; expected one of \('linear', 'conv', 'conv_vix', 'pixels'\)"),
    ],
    ids=label,
)
def test_what_makes_no_sense_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        abstract("vit_pico1", **options)


@pytest.mark.parametrize("stem", ["conv", "conv_vix"])
def test_convolutions_have_patches_of_powers_of_two(stem):
    with pytest.raises(ValueError, match=f"stem='{stem}' halves the image.*a power of 2, got 3"):
        abstract("vit_pico3", stem=stem, image_size=(6, 9))


@pytest.mark.parametrize(
    "mixer", ["softmax", "performer", "performer_causal", "linformer", "nystromformer", "fnet"]
)
def test_any_mixer_any_stem_any_position(mixer):
    """By shapes alone."""
    for stem, position in (
        ("conv", "rope"),
        ("conv_vix", "rope_2d"),
        ("conv", "none"),
        ("conv_vix", "sincos"),
    ):
        if position in ROPE and mixer == "fnet":
            continue
        graph, state = nnx.split(abstract("vit_pico1", mixer=mixer, stem=stem, position=position))
        images = jax.ShapeDtypeStruct((2, *GRID, 3), "float32")
        logits = jax.eval_shape(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, images)
        assert logits.shape == (2, 5)
