"""The models that are looked into."""

import functools

from tests.models.helpers import images, lively, run

OPTIONS = {
    "1d": {},
    "2d": {"retention": "2d"},
    "bidirectional": {"bidirectional": True},
    "bfloat16": {"dtype": "bfloat16", "layer_scale": None},
    "gained": {"decays": "learned", "qk_norm": "rms", "head_norm": True, "gate": True},
    "convolved": {"retention": "2d", "short_conv": 3, "gate": True},
    "flips": {"flips": True},
}
GRID = (3, 4)


@functools.cache
def model(kind):
    return lively("vir_pico2", image_size=(6, 8), **OPTIONS[kind])


@functools.cache
def batch():
    return images((2, 6, 8, 3))


@functools.cache
def forward(kind):
    """Every intermediate of the model by name, the logits among them."""
    return run(model(kind), batch(), "intermediates", names=model(kind).intermediate_names)
