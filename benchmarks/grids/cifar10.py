"""ViR-pico/4 on CIFAR-10, 8 epochs, one option at a time; ViT-pico/4 beside it.

    python -m vir_jax.data.prepare --dataset=cifar10
    python -m benchmarks.ablation benchmarks/grids/cifar10.py

Cost: 8 epochs of a ViR-pico/4 take about 15 minutes of two CPU cores; each row takes that three times. A row is one
line: a name, and the fields that differ from the recipe.
"""

RECIPE = "configs/vir_cifar10.py:epochs=8"
SEEDS = (0, 1, 2)
COMMON = {"eval_every": 400}  # Of 3,125 steps; about an epoch.
ROWS = {
    "vir": {},
    "vit": {"model.name": "vit_pico4", "model.layer_scale": None},
    "no_layer_scale": {"model.layer_scale": None},
    "layer_scale=0.1": {"model.layer_scale": 0.1},
    "layer_scale=1": {"model.layer_scale": 1.0},
    "retention_2d": {"model.retention": "2d"},
    "average": {"model.readout": "average"},
}
