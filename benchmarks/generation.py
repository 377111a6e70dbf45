"""Drawing pixels with ViR and with its causal ViT twin, over the number of pixels: `python -m benchmarks.generation`.

One model, two mixers: retention, whose state has one size, and causal softmax attention, whose cache of keys and
values is as long as the image. Both take every pixel by the same program, whatever its number, so the time of a pixel
is that of any of STEPS pixels, and an image takes N times as long. (A cache that is read only as far as it is filled
would take about half of the twin's time, and a program for each of several lengths.) What would need more than
MEMORY_LIMIT is not run.

    python -m benchmarks.generation                          # all; --model, --pixels and --batches choose

Some minutes of a CPU core. Writes benchmarks/results/generation.{md,json}, docs/figures/generation.png and the tables
in docs/generate.md.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
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
from vir_jax.generation import Sampling
from vir_jax.generation.generate import advance, read_prompt
from vir_jax.generation.pieces import GenerationState
from vir_jax.inspection.figures.style import line, new_figure
from vir_jax.models import VisionModel, create_model

MODEL, PIXELS, BATCHES = "vir_pico1", (64, 256, 1024, 4096, 16384), (1, 64)
MIXERS = {"retention": "ViR", "causal_softmax": "ViT, cached"}
STEPS, ROUNDS, SECONDS = 16, 8, 30.0
MEMORY_LIMIT = 8 * 2**30
DOCS = Path(__file__).parents[1] / "docs"
FIGURE, PAGE = DOCS / "figures" / "generation.png", DOCS / "generate.md"


@dataclasses.dataclass
class Record:
    """One measurement.

    Attributes:
        model: its name.
        mixer: retention or causal softmax attention.
        pixels: of an image.
        batch: images that are drawn at a time.
        ms: time of a pixel of all images of the batch, None where it was not run.
        state_bytes: of the whole batch.
        program_bytes: of all that the compiled loop needs: weights, state, and what it computes.
    """

    model: str
    mixer: str
    pixels: int
    batch: int
    ms: float | None
    state_bytes: int
    program_bytes: int

    @property
    def images_per_second(self) -> float | None:
        """Of whole images."""
        return None if self.ms is None else 1e3 * self.batch / (self.ms * self.pixels)

    def cell(self) -> str:
        """Images a second; the state of one image, and the program, in MB."""
        speed = "not run" if self.images_per_second is None else f"{self.images_per_second:.3g}"
        return f"{speed} ({_megabytes(self.state_bytes / self.batch)}, {_megabytes(self.program_bytes)})"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2g}" if count < 1e7 else f"{count / 1e6:,.0f}"


class Drawing:
    """Draws the next pixels of a batch of images, and goes on from there when called again."""

    def __init__(self, model: VisionModel, batch: int, side: int) -> None:
        graph, self._variables = nnx.split(model)
        self._start = partial(read_prompt, model, np.zeros((batch, 0, 3), np.int32), (side, side))
        self._state: GenerationState | None = None
        state, _ = jax.eval_shape(self._start)

        def draw(variables: nnx.State, state: GenerationState) -> tuple[GenerationState, jax.Array]:
            state, pixels, _ = advance(
                nnx.merge(graph, variables),
                state,
                jax.random.key(0),
                min(STEPS, side**2),
                Sampling(),
                image_size=(side, side),
            )
            return state, pixels

        self._draw = jax.jit(draw, donate_argnums=1).lower(self._variables, state).compile()
        self.state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    @property
    def program_bytes(self) -> int:
        """What the compiled program needs in all."""
        sizes = self._draw.memory_analysis()
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return held + sizes.temp_size_in_bytes

    def __call__(self) -> jax.Array:
        """Return the pixels that were drawn."""
        if self._state is None:
            self._state, _ = self._start()
        self._state, pixels = self._draw(self._variables, self._state)
        return pixels


def make_model(name: str, mixer: str, side: int) -> VisionModel:
    """Return a model of RGB pixels, of random weights."""
    return create_model(
        name,
        num_classes=1,
        rngs=nnx.Rngs(0),
        image_size=side,
        mixer=mixer,
        stem="pixels",
        levels=256,
        channels=3,
        mixtures=10,
        local_context=1,
        position="sincos",
        layer_scale=None,
    )


def measure(model: str, pixels: int, batch: int) -> list[Record]:
    """Measure both mixers at one size, taking turns."""
    side = math.isqrt(pixels)
    calls = {mixer: Drawing(make_model(model, mixer, side), batch, side) for mixer in MIXERS}
    run = {mixer: call for mixer, call in calls.items() if call.program_bytes <= MEMORY_LIMIT}
    times = median_ms(run, rounds=ROUNDS, budget_s=SECONDS)
    return [
        Record(
            model,
            mixer,
            pixels,
            batch,
            times[mixer] / min(STEPS, pixels) if mixer in times else None,
            call.state_bytes,
            call.program_bytes,
        )
        for mixer, call in calls.items()
    ]


def crossing(records: Sequence[Record]) -> str:
    """Return where one batch's lines cross, by interpolation of the logarithms of times and sizes."""
    of = {(r.mixer, r.pixels): r.ms for r in records if r.ms is not None}
    sizes = [n for n in sorted({r.pixels for r in records}) if all((mixer, n) in of for mixer in MIXERS)]
    gains = [math.log(of["causal_softmax", n] / of["retention", n]) for n in sizes]
    if all(gain > 0 for gain in gains):
        first, last = (_ratio(math.exp(gain)) for gain in (gains[0], gains[-1]))
        return (
            f"ViR is faster at all of these sizes: {first} times as fast at N = {sizes[0]:,}, {last} times at "
            f"N = {sizes[-1]:,}"
        )
    if all(gain <= 0 for gain in gains):
        return f"ViR is not faster at any of these sizes, where both were run, up to N = {sizes[-1]:,}"
    at = next(i for i in range(1, len(gains)) if (gains[i - 1] > 0) != (gains[i] > 0))
    share = gains[at - 1] / (gains[at - 1] - gains[at])
    n = math.exp((1 - share) * math.log(sizes[at - 1]) + share * math.log(sizes[at]))
    last = _ratio(math.exp(gains[-1]))
    return f"The lines cross at about N = {n:,.0f}; at N = {sizes[-1]:,} ViR is {last} times as fast"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def report(records: Sequence[Record]) -> str:
    """Return the tables, and where the lines cross."""
    parts = [
        "Images per second and, in parentheses, megabytes: the state of one image, and all that the program needs.\n"
        f"RGB images of N pixels, {records[0].model}, float32; "
        + ", ".join(f"{name} {value}" for name, value in machine().items())
        + f".\nOf {STEPS} pixels, times N. Not run: it would need more than {MEMORY_LIMIT / 2**30:.0f} GiB.\n"
        "Written by `python -m benchmarks.generation`.\n"
    ]
    sizes = sorted({record.pixels for record in records})
    for batch in sorted({record.batch for record in records}):
        of_batch = [record for record in records if record.batch == batch]
        found = {(r.mixer, r.pixels): r for r in of_batch}
        rows = [[label, *(found[mixer, n].cell() for n in sizes)] for mixer, label in MIXERS.items()]
        parts.append(markdown_table([f"batch {batch}", *(f"N = {n:,}" for n in sizes)], rows))
        parts.append(f"{crossing(of_batch)}.\n")
    return "\n".join(parts)


def draw(records: Sequence[Record]) -> Figure:
    """Return time and memory over the number of pixels."""
    figure = new_figure(9.6, 4.2, f"Drawing images pixel by pixel: {records[0].model}, float32")
    speed, memory = figure.subplots(1, 2)
    for index, (mixer, label) in enumerate(MIXERS.items()):
        for batch in sorted({record.batch for record in records}):
            of = sorted((r for r in records if (r.mixer, r.batch) == (mixer, batch)), key=lambda r: r.pixels)
            style = line(index) | {"marker": "os^v"[sorted({r.batch for r in records}).index(batch) % 4]}
            run = [r for r in of if r.images_per_second is not None]
            speed.plot(
                [r.pixels for r in run],
                [r.images_per_second for r in run],
                label=f"{label}, batch {batch}",
                **style,
            )
        memory.plot([r.pixels for r in of], [r.state_bytes / r.batch / 1e6 for r in of], label=label, **style)
    for axes, title in ((speed, "images per second"), (memory, "state of one image, MB")):
        axes.set(xscale="log", yscale="log", xlabel="pixels of an image", title=title)
        axes.set_xticks(
            sorted({r.pixels for r in records}), [f"{n:,}" for n in sorted({r.pixels for r in records})]
        )
        axes.minorticks_off()
        axes.grid(color="0.9")
        axes.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Measure what was chosen, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--pixels", type=int, nargs="+", default=PIXELS, help="squares of whole numbers")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    options = parser.parse_args()
    for pixels in options.pixels:
        if math.isqrt(pixels) ** 2 != pixels:
            parser.error(f"--pixels={pixels}: expected the square of a whole number")
    records = []
    for batch in options.batches:
        for pixels in options.pixels:
            records += measure(options.model, pixels, batch)
            for record in records[-len(MIXERS) :]:
                print(f"{record.mixer:16} batch {batch:4}  N = {pixels:6,}  {record.cell()}", flush=True)
    markdown = report(records)
    print(markdown)
    write_results("generation", markdown, records)
    PAGE.write_text(replace_between_markers(PAGE.read_text(), "generation", markdown))
    draw(records).savefig(FIGURE, dpi=130)


if __name__ == "__main__":
    main()
