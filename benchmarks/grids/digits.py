"""ViR, ViT and our own families on scikit-learn's digits: a grid of minutes, to see how one works.

python -m benchmarks.ablation benchmarks/grids/digits.py
"""

RECIPE = "configs/vir_digits.py"
SEEDS = (0, 1, 2)
# 506 steps; their curve, and enough readings of the time.
COMMON = {"eval_every": 50, "log_every": 25, "checkpoint_every": 1000}
SHIFTS = {"augment.crop": "pad", "augment.crop_padding": 1}  # By a pixel at most.
VIR_H = {  # More than twice as large.
    "model.name": "vir_h_micro",
    "model.stem_stride": 1,
    "model.position": "none",
    "model.layer_scale": None,
}
ROWS = {
    "vir": {},
    "vit": {"model.name": "vit_pico2", "model.layer_scale": None},
    "layer_scale=0.1": {"model.layer_scale": 0.1},
    "cvir": {"model.name": "cvir_pico2", "model.layer_scale": 0.1, "model.mlp_dim": 212},
    "shifts": SHIFTS,
    "vir_h": VIR_H,
    "vir_h+shifts": VIR_H | SHIFTS,
}
