"""ViR that predicts the pixels of scikit-learn's digits, and its twin with causal softmax attention: bits/dim.

python -m benchmarks.ablation benchmarks/grids/digits_pixels.py

About a minute and a half of one CPU core a run. What a regression on nine neighbours has on the same images:
`python -m benchmarks.pixel_floor`. The recipe's epochs and regularisation were chosen with ViR, not with its twin.
"""

RECIPE = "configs/vir_digits_pixels.py"
SEEDS = (0, 1, 2)
# Of 405 steps; the metrics' times are enough for a median.
COMMON = {"eval_every": 81, "log_every": 27, "checkpoint_every": 1000}
ROWS = {
    "vir": {},
    "vit": {"model.mixer": "causal_softmax"},
    "vir_no_context": {"model.local_context": 0},
}
