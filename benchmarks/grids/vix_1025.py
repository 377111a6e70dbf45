"""Vision X-formers with a token for each pixel, and ViR beside them: every mixer on CIFAR-10, one recipe, on a GPU.

    python -m vir_jax.data.prepare --dataset=cifar10
    python -m benchmarks.ablation benchmarks/grids/vix_1025.py --seeds 0

The authors' size: 1,025 tokens, linear stem, learned positions; four epochs in place of their 40. A row's fields are
those in which its recipe differs from that of softmax attention. Not run.
"""

from benchmarks.grids import vix

PRESET = "epochs=4"
RECIPE = f"configs/vix.py:{PRESET}"
SEEDS = (0, 1, 2)
COMMON = {"log_every": 50}
ROWS = {mixer: vix.changes(mixer, "linear", "learned", PRESET) for mixer in (*vix.WITH_QUERIES, *vix.WITHOUT)}
