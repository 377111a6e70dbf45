"""Multiply-adds: the paper's table, and what the compiler counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.models.helpers import abstract, published
from vir_jax.models import flops
from vir_jax.models.layout import Layout

LAYOUT = Layout(cols=7, patches=98, class_token="last")


@pytest.mark.parametrize(
    ("name", "giga"), [("vir_s16", 4.60), ("vir_b16", 17.56), ("vir_l16", 61.55), ("vir_l14", 81.01)]
)
def test_table_of_the_paper(name, giga):
    assert round(flops(published(name)) / 1e9, 2) == giga


def test_a_name_stands_for_the_model_with_default_options():
    assert flops("vit_ti16", (64, 32)) == flops(published("vit_ti16"), (64, 32))


@pytest.mark.parametrize("name", ["vit_ti16", "vir_ti16"])
def test_compiler_counts_the_same_and_the_elementwise_rest(name):
    graph, params = nnx.split(published(name))
    x = jax.ShapeDtypeStruct((1, 224, 112, 3), jnp.float32)

    def operations(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    def block(params, x):
        return nnx.merge(graph, params).block(0)(x, LAYOUT, mode="parallel")[0]

    tokens = jax.ShapeDtypeStruct((1, 99, 192), jnp.float32)
    # The compiler counts the body of a loop once.
    rest = operations(lambda params, x: nnx.merge(graph, params)(x, mode="parallel"), params, x)
    operations = rest + 11 * operations(block, params, tokens)
    # The compiler counts norms, GELU, masks and softmax besides.
    assert 1 < operations / (2 * flops(published(name), (224, 112))) < 1.07


def test_modes_are_counted_as_in_section_6():
    # 4x4 patches of one pixel and a class token: n = 17, c = 64, d = 16, 4 blocks, 5 classes.
    n, c, d = 17, 64, 16
    rest = 16 * 3 * c + 4 * 12 * n * c * c + 5 * c
    model = abstract(image_size=4, chunk_size=5)
    assert flops(model, 4) == rest + 4 * 2 * n * n * c
    assert flops(model, 4, mode="chunkwise") == rest + 4 * 2 * n * c * (5 + d)
    assert flops(model, 4, mode="recurrent") == rest + 4 * (5 * n * d * c) // 2
    assert flops(model, 4, mode="auto") == flops(model, 4, mode="chunkwise")
    assert flops(abstract(image_size=4), (4, 4), mode="chunkwise") == rest + 4 * 2 * n * c * (n + d)
    assert (
        flops(abstract(image_size=4, retention="2d"), 4) == flops(abstract("vit_pico1"), 4) == flops(model, 4)
    )


@pytest.mark.parametrize(
    ("name", "options", "mode", "reason"),
    [
        ("vit_pico1", {}, "recurrent", "softmax has no 'recurrent' mode; expected one of 'auto', 'parallel'"),
        (
            "vir_pico1",
            {"retention": "2d"},
            "chunkwise",
            "2-D retention is counted in mode 'parallel' alone; got 'chunkwise'",
        ),
        ("vir_pico1", {}, "sideways", "retention has no 'sideways' mode"),
    ],
)
def test_what_is_not_counted_is_refused(name, options, mode, reason):
    with pytest.raises(ValueError, match=reason):
        flops(abstract(name, **options), 4, mode=mode)
