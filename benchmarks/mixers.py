"""Every token mixer, over the number of tokens: `python -m benchmarks.mixers`, about ten minutes of a CPU core.

One layer's mixer by itself, projections included, in the size of Vision X-formers (128 channels, 4 heads), float32:
forward, and value and gradient by tokens and parameters. Retention in each of its modes beside them. Memory is the
compiled program's temporary memory, all but its arguments and results. What would take more than MEMORY_LIMIT is
compiled, for its memory, and not run.

Besides: the whole training step's loss and gradient of the models of Vision X-formers on CIFAR-10, at their own 1,025
tokens and the batch that their authors gave ViT, 64; compiled for its memory alone. `remat` is "none" there, as every
product is kept in the authors' code, and "elementwise", as it is here by default.

Writes benchmarks/results/mixers.{md,json}, docs/figures/mixers.png and the tables in docs/speed.md.
"""

import argparse
import dataclasses
import math
import unittest.mock
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from benchmarks.timing import (
    machine,
    markdown_table,
    median_ms,
    replace_between_markers,
    write_results,
)
from vir_jax.inspection.figures.style import line, new_figure
from vir_jax.models import create_model
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import mixer_names, mixer_type
from vir_jax.ops import MODES

DIM, HEADS, MOST = 128, 4, 64  # MOST: landmarks, and rank.
SIDES = (8, 16, 32, 64, 128)  # Of the grid of patches; a class token besides.
BATCHES = {8: 16, 16: 16, 32: 4, 64: 1, 128: 1}
PASSES = ("forward", "forward and backward")
MEMORY_LIMIT = 6 * 2**30
VIX_BATCH = 64
REMAT = ("none", "elementwise")
STORED = "softmax, scores stored"
DRAWN = ("softmax", "linformer", "nystromformer", "performer", "fnet", "retention, chunkwise")
DOCS = Path(__file__).parents[1] / "docs"
FIGURE, PAGE = DOCS / "figures" / "mixers.png", DOCS / "speed.md"


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement: a mixer at one length, in one pass. `ms` is None where it was not run."""

    mixer: str
    tokens: int
    batch: int
    which: str
    ms: float | None
    temp_bytes: int

    def cell(self) -> str:
        """Milliseconds an image, and MiB an image in parentheses."""
        mib = self.temp_bytes / self.batch / 2**20
        if self.ms is None:
            return f"not run ({mib:,.0f})"
        ms = self.ms / self.batch
        return f"{ms:.2f} ({mib:.1f})" if ms < 100 else f"{ms:.0f} ({mib:,.0f})"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Compiled temporary memory of a model's loss and gradient."""

    mixer: str
    remat: str
    temp_bytes: int


def forms() -> dict[str, tuple[str, str]]:
    """Return (mixer, mode) by the name of a row: retention in every mode, the others in the one that "auto" takes."""
    rows = {name: (name, "auto") for name in mixer_names() if name != "retention"}
    return rows | {f"retention, {mode}": ("retention", mode) for mode in MODES}


def options_of(mixer: str, patches: int) -> dict[str, Any]:
    """Return what configs/vix.py gives the mixer for so many patches."""
    return {
        "softmax": {"qkv_bias": False},
        "linformer": {"rank": min(MOST, patches // 4)},
        "nystromformer": {"landmarks": min(MOST, patches // 4)},
    }.get(mixer, {})


def measure(side: int, batch: int) -> list[Record]:
    """Measure all mixers on a square grid of patches; they take turns."""
    records = []
    for which in PASSES:
        runs, temporary = {}, {}
        for row, (name, mode) in forms().items():
            program, arguments = _program(name, mode, side, batch, which)
            compiled = program.lower(*arguments).compile()
            temporary[row] = compiled.memory_analysis().temp_size_in_bytes
            if temporary[row] <= MEMORY_LIMIT and _bytes(arguments) <= MEMORY_LIMIT:
                runs[row] = partial(compiled, *_filled(arguments))
        ms = median_ms(runs)
        tokens = side * side + 1
        records += [Record(row, tokens, batch, which, ms.get(row), temporary[row]) for row in forms()]
    return records


def _program(name: str, mode: str, side: int, batch: int, which: str) -> tuple[Any, tuple[Any, ...]]:
    """Return a jitted function of (parameters, tokens), and what they look like."""
    kind = mixer_type(name)
    place: Any = None if not kind.takes_class_token else "last" if kind.causal else "first"
    layout = Layout(cols=side, patches=side * side, class_token=place)

    def make() -> Any:
        return kind(DIM, HEADS, layout, dtype=jnp.float32, rngs=nnx.Rngs(0), **options_of(name, side * side))

    graph, params = nnx.split(nnx.eval_shape(make))

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x, layout, mode=mode)[0]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(forward(params, x) ** 2)

    function: Callable[..., Any] = (
        forward if which == PASSES[0] else jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)
    )
    return jax.jit(function), (params, jax.ShapeDtypeStruct((batch, layout.length, DIM), jnp.float32))


def _bytes(arguments: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))


def _filled(arguments: Any) -> Any:
    """Return random numbers of these shapes: weights of one over the root of the rows, tokens of deviation 1."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 1.0
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(fill, arguments)


def memory_of_training(mixer: str, remat: str) -> Memory:
    """Compile loss and gradient of the Vision X-former with this mixer, a pixel a token."""
    family = "vir" if mixer == "retention" else "vit"
    options = {"mlp_dim": DIM, "position": "none"} if mixer == "mlp_mixer" else {}

    def make() -> Any:
        return create_model(
            f"{family}_vix1",
            num_classes=10,
            image_size=32,
            mixer=mixer,
            remat=remat,
            mode="chunkwise" if mixer == "retention" else "auto",
            rngs=nnx.Rngs(0),
            **options,
            **options_of(mixer, 1024),
        )

    graph, params = nnx.split(nnx.eval_shape(make))

    def loss(params: Any, images: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(images) ** 2)

    images = jax.ShapeDtypeStruct((VIX_BATCH, 32, 32, 3), jnp.float32)
    compiled = jax.jit(jax.grad(loss, allow_int=True)).lower(params, images).compile()
    return Memory(mixer, remat, compiled.memory_analysis().temp_size_in_bytes)


def stored_scores(remat: str) -> Memory:
    """Compile softmax attention in the form that stores its scores, as it was when the paper was written."""
    jax.clear_caches()  # Traces that JAX keeps know nothing of the change: none may come in, none go out.
    with unittest.mock.patch("vir_jax.ops.attention.BLOCKWISE_FROM", math.inf):
        stored = dataclasses.replace(memory_of_training("softmax", remat), mixer=STORED)
    jax.clear_caches()
    return stored


def page(records: Sequence[Record], memory: Sequence[Memory]) -> str:
    """Return the tables as Markdown."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        "Milliseconds an image, and in parentheses temporary memory, MiB an image.\n"
        f"`python -m benchmarks.mixers`; with projections, {DIM} channels, {HEADS} heads, float32; {where}.\n",
    ]
    tokens = list(dict.fromkeys(record.tokens for record in records))
    found = {(record.mixer, record.tokens, record.which): record for record in records}
    for which in PASSES:
        rows = [[row, *(found[row, n, which].cell() for n in tokens)] for row in forms()]
        parts.append(markdown_table([which, *(f"{n:,} tokens" for n in tokens)], rows))
    parts.append(
        f"Loss and gradient of the models of Vision X-formers, 1,025 tokens, a batch of {VIX_BATCH}: temporary memory,"
        " GiB, and how many times less than that of attention that stores its scores.\n"
    )
    by = {(m.mixer, m.remat): m.temp_bytes for m in memory}
    rows = [
        [mixer, *(f"{by[mixer, r] / 2**30:.2f} ({by[STORED, r] / by[mixer, r]:.1f})" for r in REMAT)]
        for mixer in dict.fromkeys(m.mixer for m in memory)
    ]
    parts.append(markdown_table(["model's mixer", *(f"remat {remat!r}" for remat in REMAT)], rows))
    return "\n".join(parts)


def draw(records: Sequence[Record]) -> Figure:
    """Draw time and memory of forward and backward pass over the number of tokens."""
    figure = new_figure(
        9.6, 4.2, "One layer's mixer, forward and backward, an image: 128 channels, 4 heads, float32"
    )
    speed, memory = figure.subplots(1, 2)
    for index, name in enumerate(DRAWN):
        of = [record for record in records if (record.mixer, record.which) == (name, PASSES[1])]
        run = [record for record in of if record.ms is not None]
        style = line(index) | {"marker": "os^vDx"[index], "markersize": 4}
        speed.plot([r.tokens for r in run], [(r.ms or 0) / r.batch for r in run], label=name, **style)
        memory.plot([r.tokens for r in of], [r.temp_bytes / r.batch / 2**20 for r in of], label=name, **style)
    for axes, label in ((speed, "milliseconds"), (memory, "temporary memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixers", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sides", nargs="+", type=int, default=SIDES, choices=SIDES, help="of the grids of patches"
    )
    given = parser.parse_args(arguments)
    records = [record for side in given.sides for record in measure(side, BATCHES[side])]
    memory = [stored_scores(remat) for remat in REMAT]
    memory += [
        memory_of_training(mixer, remat)
        for mixer in sorted(mixer_names(), key=lambda name: name != "softmax")
        for remat in REMAT
    ]
    markdown = page(records, memory)
    write_results("mixers", f"# Mixers\n\n{markdown}", [*records, *memory])
    PAGE.write_text(replace_between_markers(PAGE.read_text(), "mixers", markdown))
    draw(records).savefig(FIGURE, dpi=130)
    print(markdown)


if __name__ == "__main__":
    main()
