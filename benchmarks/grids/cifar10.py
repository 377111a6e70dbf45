"""ViR-pico/4 and ViT-pico/4 on CIFAR-10, 8 epochs; what helps, together; and one option at a time.

    python -m vir_jax.data.prepare --dataset=cifar10
    python -m benchmarks.ablation benchmarks/grids/cifar10.py

Cost: 8 epochs of a ViR-pico/4 take a quarter of an hour of one CPU core; each row takes that three times. A row is one
line: a name, and the fields that differ from the recipe. The recipe has rotary positions; from
"vit+learned_positions" on rows have learned ones, and from "conv_stem" on they change one thing in the paper's model,
which is "learned_positions". All rows have the parameters of "vir", 3 % more or less: where an option adds some, the
MLP gives them back. "vir_h", a pyramid, has 4 % fewer, and as many seconds as "vir", which are 12 epochs.
"""

RECIPE = "configs/vir_cifar10.py:epochs=8"
SEEDS = (0, 1, 2)
COMMON = {"eval_every": 625}  # A fifth of the 3,125 steps.

VIT = {"model.name": "vit_pico4", "model.layer_scale": None}
CVIR = {"model.name": "cvir_pico4", "model.mlp_dim": 214}
LEARNED = {"model.position": "learned"}
CONV_STEM = {"model.stem": "conv", "model.mlp_dim": 216}
ROWS = {
    "vit": VIT,
    "vir": {},
    "cvir": CVIR,
    "vir_h": {
        "model.name": "vir_h_nano",
        "model.stem_stride": 2,
        "model.position": "none",
        "model.layer_scale": None,
        "epochs": 12,
    },
    "vit+learned_positions": VIT | LEARNED,
    "learned_positions": LEARNED,
    "cvir+learned_positions": CVIR | LEARNED,
    "vit+conv_stem": VIT | CONV_STEM | LEARNED,
    "conv_stem": CONV_STEM | LEARNED,
    "short_conv": {"model.short_conv": 4} | LEARNED,
    "head_norm": {"model.head_norm": True} | LEARNED,
    "qk_norm": {"model.qk_norm": "rms"} | LEARNED,
    "gate": {"model.gate": True, "model.mlp_dim": 224} | LEARNED,
    "flips": {"model.flips": True} | LEARNED,
    "layer_scale=1": {"model.layer_scale": 1.0} | LEARNED,
    "layer_scale=1e-5": {"model.layer_scale": 1e-5} | LEARNED,
    "no_layer_scale": {"model.layer_scale": None} | LEARNED,
    "no_decays": {"model.decays": "none"} | LEARNED,
    "token_decays": {"model.decays": "token"} | LEARNED,
    "learned_decays": {"model.decays": "learned"} | LEARNED,
    "retnet_decays": {"model.decays": "retnet"} | LEARNED,
}
