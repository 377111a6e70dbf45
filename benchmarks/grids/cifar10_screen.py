"""Options on CIFAR-10, 2 epochs and one seed each, by themselves and together: which to look at in earnest.

    python -m benchmarks.ablation benchmarks/grids/cifar10_screen.py

Cost: four minutes of one CPU core a row. What it says is where to look: an option that learns faster at first need not
be ahead in the end, and one seed says nothing of differences below a point or two.
"""

RECIPE = "configs/vir_cifar10.py:epochs=2"
SEEDS = (0,)
COMMON = {"eval_every": 390, "model.position": "learned"}
ROWS = {
    "vir": {},
    "conv_stem": {"model.stem": "conv", "model.mlp_dim": 216},
    "head_norm": {"model.head_norm": True},
    "short_conv": {"model.short_conv": 4},
    "gate": {"model.gate": True, "model.mlp_dim": 224},
    "token_decays": {"model.decays": "token"},
    "conv_stem+short_conv": {"model.stem": "conv", "model.short_conv": 4, "model.mlp_dim": 214},
    "conv_stem+short_conv+head_norm": {
        "model.stem": "conv",
        "model.short_conv": 4,
        "model.head_norm": True,
        "model.mlp_dim": 214,
    },
    "lr=4e-3": {"optim.lr": 4e-3},
    "average": {"model.readout": "average"},
    "qk_norm": {"model.qk_norm": "rms"},
    "layer_scale=1": {"model.layer_scale": 1.0},
    "rope_2d": {"model.position": "rope_2d"},
    "retention_2d": {"model.retention": "2d"},
    "flips": {"model.flips": True},
    "retention_2d+directions": {"model.retention": "2d", "model.directions": 4},
}
