"""Vision X-formers with 65 tokens, and ViR beside them: every mixer x stem x position on CIFAR-10, one recipe.

    python -m vir_jax.data.prepare --dataset=cifar10
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.ablation benchmarks/grids/vix.py --seeds 0

Rows are MIXER,STEM,POSITION of configs/vix.py, two epochs each: some minutes of one CPU core. FNet and MLP-Mixer have
no queries to turn, so that there is no rotary row of theirs. A row's fields are those in which its recipe differs from
that of softmax attention.
"""

from configs.vix import get_config
from vir_jax.runs.config import flatten

PRESET = "tokens=65,epochs=2"
RECIPE = f"configs/vix.py:{PRESET}"
SEEDS = (0, 1, 2)
COMMON = {
    "eval_every": 195,  # A quarter of the 781 steps.
    "log_every": 50,
    "accumulation_steps": 4,  # 32 images at a time stay in a core's caches.
}

WITH_QUERIES = (
    "softmax",
    "retention",
    "performer",
    "nystromformer",
    "linformer",
    "retnet",
    "performer_causal",
)
WITHOUT = ("fnet", "mlp_mixer")


def changes(mixer: str, stem: str, position: str, preset: str = PRESET) -> dict[str, object]:
    """Return the fields in which a recipe differs from that of softmax attention."""
    common, recipe = (
        flatten(get_config(preset)),
        flatten(get_config(f"mixer={mixer},stem={stem},position={position},{preset}")),
    )
    return {name: value for name, value in recipe.items() if value != common[name]}


ROWS = {
    f"{mixer},{stem},{position}": changes(mixer, stem, position)
    for stem in ("linear", "conv_vix")
    for position in ("learned", "rope")
    for mixer in (*WITH_QUERIES, *(WITHOUT if position == "learned" else ()))
}
