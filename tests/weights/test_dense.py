"""Weights of models with a class for each pixel: what is made for classes of images refuses them by name."""

import jax
import pytest

from vir_jax.deploy.program import image_shape
from vir_jax.models.variants import model_options
from vir_jax.runs.model import model_functions
from vir_jax.weights.card import Card
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.exchange import PretrainedModel
from vir_jax.weights.layouts.layout import check_plain_vit


@pytest.fixture(scope="module")
def dense():
    """In shapes alone."""
    options = {**model_options(), "name": "vit_pico4", "image_size": 8, "mixer": "softmax"}
    options |= {"readout": "dense_patch", "layer_scale": None}
    functions = model_functions(options, 3)
    card = Card(model=options, num_classes=3, class_names=("a", "b", "c"))
    return PretrainedModel(card, functions, jax.eval_shape(functions.init, jax.random.key(0)))


def test_it_is_no_classifier(dense):
    with pytest.raises(
        WeightsError, match="readout='dense_patch', a class for each pixel and none for an image"
    ):
        dense.classifier()


def test_no_program_is_written_of_it(dense):
    with pytest.raises(
        ValueError, match="readout='dense_patch' gives logits to each pixel; programs are written"
    ):
        image_shape(dense)


def test_other_libraries_have_no_such_head(dense):
    with pytest.raises(
        WeightsError, match=r"no such model as vit_pico4 with readout='dense_patch' \(the layout: one"
    ):
        check_plain_vit(dense.card, "timm")
