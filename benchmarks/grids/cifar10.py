"""ViR-pico/4 on CIFAR-10, 8 epochs, one option at a time; ViT-pico/4 beside it; then what helps, together.

    python -m vir_jax.data.prepare --dataset=cifar10
    python -m benchmarks.ablation benchmarks/grids/cifar10.py

Cost: 8 epochs of a ViR-pico/4 take a quarter of an hour of one CPU core; each row takes that three times. A row is one
line: a name, and the fields that differ from the recipe. All rows have the parameters of "vir", 3 % more or less: where
an option adds some, the MLP gives them back. "vir_h", a pyramid, has 6 % fewer, and as many seconds as "vir", which are
12 epochs.
"""

RECIPE = "configs/vir_cifar10.py:epochs=8"
SEEDS = (0, 1, 2)
COMMON = {"eval_every": 625}  # A fifth of the 3,125 steps.
ROWS = {
    "vit": {"model.name": "vit_pico4", "model.layer_scale": None},
    "vir": {},
    "cvir": {"model.name": "cvir_pico4", "model.mlp_dim": 214},
    "vir_h": {
        "model.name": "vir_h_nano",
        "model.stem_stride": 2,
        "model.position": "none",
        "model.layer_scale": None,
        "epochs": 12,
    },
    "vit+rope_2d": {"model.name": "vit_pico4", "model.layer_scale": None, "model.position": "rope_2d"},
    "vit+conv_stem": {
        "model.name": "vit_pico4",
        "model.layer_scale": None,
        "model.stem": "conv",
        "model.mlp_dim": 216,
    },
    "conv_stem": {"model.stem": "conv", "model.mlp_dim": 216},
    "head_norm": {"model.head_norm": True},
    "token_decays": {"model.decays": "token"},
    "short_conv": {"model.short_conv": 4},
    "gate": {"model.gate": True, "model.mlp_dim": 224},
    "average": {"model.readout": "average"},
    "layer_scale=1": {"model.layer_scale": 1.0},
    "rope_2d": {"model.position": "rope_2d"},
    "qk_norm": {"model.qk_norm": "rms"},
    "flips": {"model.flips": True},
    "retention_2d": {"model.retention": "2d"},
    "layer_scale=1e-5": {"model.layer_scale": 1e-5},
    "no_layer_scale": {"model.layer_scale": None},
    "no_decays": {"model.decays": "none"},
    "learned_decays": {"model.decays": "learned"},
    "retnet_decays": {"model.decays": "retnet"},
}
