"""vir-bench: what it measures, and where it ends."""

import re

import pytest

from vir_jax import throughput
from vir_jax.commands.bench import described
from vir_jax.runs.config import default_config
from vir_jax.throughput import Throughput, measure


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 0.01)


def options(**changed):
    model = default_config().model
    model.update({"name": "vir_pico4", "image_size": 8, **changed})
    return model


@pytest.mark.parametrize("training", [False, True])
def test_until_it_does_not_fit(training):
    sizes = [found.memory for found in measure(options(), training=training, limit=4)]
    assert len(sizes) == 3
    assert sizes == sorted(sizes)
    found = list(measure(options(), training=training, capacity=sizes[1]))
    assert [each.batch for each in found] == [1, 2, 4]
    assert all(each.images_per_second > 0 for each in found[:2])
    assert found[2].images_per_second is None


def test_training_takes_more_memory():
    (forward,), (backward,) = (
        list(measure(options(), training=training, first=8, limit=8)) for training in (False, True)
    )
    assert backward.memory > forward.memory


def test_models_of_pixels():
    model = options(name="vir_pico1", stem="pixels", levels=4, channels=1, local_context=1)
    assert [found.batch for found in measure(model, limit=2)] == [1, 2]


def test_lines():
    assert re.split(r"\s{2,}", described(Throughput(8, 1234.5, 3 * 2**29)).strip()) == [
        "8",
        "1,234.5",
        "1.50",
    ]
    assert re.split(r"\s{2,}", described(Throughput(16, None, None)).strip()) == ["16", "does not fit"]
