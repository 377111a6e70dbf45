"""Drawing pixels with ViR and with its causal ViT twin, over the number of pixels: `python -m benchmarks.generation`.

One model, two mixers: retention, whose state has one size, and causal softmax attention, whose cache of keys and
values is as long as the image. Both take every pixel by the same program, whatever its number, so the time of a pixel
is that of any of STEPS pixels, and an image takes N times as long. What would need more than MEMORY_LIMIT is not run.

    python -m benchmarks.generation                          # all; --model, --pixels and --batches choose

Writes benchmarks/results/generation.{md,json}.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from benchmarks.timing import machine, markdown_table, median_ms, write_results
from vir_jax.generation import Sampling
from vir_jax.generation.generate import advance, read_prompt
from vir_jax.models import VisionModel, create_model

MODEL, PIXELS, BATCHES = "vir_pico1", (256, 1024, 4096, 16384), (1, 64)
MIXERS = {"retention": "ViR", "causal_softmax": "ViT, cached"}
STEPS, ROUNDS = 64, 8
MEMORY_LIMIT = 8 * 2**30
LOOP_COPIES = 2  # Of the state, which the loop holds at most: what it reads, and what it writes.


@dataclasses.dataclass
class Record:
    """One measurement; `ms` is the time of a pixel of all images of the batch, None where it was not run."""

    model: str
    mixer: str
    pixels: int
    batch: int
    ms: float | None
    state_bytes: int

    @property
    def images_per_second(self) -> float | None:
        """Of whole images."""
        return None if self.ms is None else 1e3 * self.batch / (self.ms * self.pixels)

    def cell(self) -> str:
        """Images a second, and the state of one image in MB."""
        speed = "not run" if self.images_per_second is None else f"{self.images_per_second:.3g}"
        return f"{speed} ({self.state_bytes / self.batch / 1e6:.2g})"


class Drawing:
    """Draws the next pixels of a batch of images, and goes on from there when called again."""

    def __init__(self, model: VisionModel, batch: int, steps: int, side: int) -> None:
        self._state, _ = read_prompt(model, np.zeros((batch, 0, 3), np.int32), (side, side))
        self._advance = partial(
            advance, model, key=jax.random.key(0), steps=steps, sampling=Sampling(), image_size=(side, side)
        )

    def __call__(self) -> jax.Array:
        """Return the pixels that were drawn."""
        self._state, pixels, _ = self._advance(state=self._state)
        return pixels


def measure(model: str, pixels: int, batch: int) -> list[Record]:
    """Measure both mixers at one size, taking turns."""
    side = math.isqrt(pixels)
    calls, records = {}, []
    for mixer in MIXERS:
        made = create_model(
            model,
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
        state = jax.eval_shape(partial(read_prompt, made, np.zeros((batch, 0, 3), np.int32), (side, side)))[0]
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        records.append(Record(model, mixer, pixels, batch, None, size))
        if LOOP_COPIES * size <= MEMORY_LIMIT:
            calls[mixer] = Drawing(made, batch, min(STEPS, pixels), side)
            jax.block_until_ready(calls[mixer]())  # Compiled here, not while it is timed.
    times = median_ms(calls, rounds=ROUNDS)
    return [
        dataclasses.replace(
            record, ms=times[record.mixer] / min(STEPS, pixels) if record.mixer in times else None
        )
        for record in records
    ]


def report(records: Sequence[Record]) -> str:
    """Return the tables, and where the lines cross."""
    parts = [
        "Images per second and, in parentheses, the state of one image in MB.\n"
        f"RGB images of N pixels, {records[0].model}, float32; "
        + ", ".join(f"{name} {value}" for name, value in machine().items())
        + f".\nOf {STEPS} pixels, times N. Not run: the loop would need more than {MEMORY_LIMIT / 2**30:.0f} GiB.\n"
        "Written by `python -m benchmarks.generation`.\n"
    ]
    sizes = sorted({record.pixels for record in records})
    for batch in sorted({record.batch for record in records}):
        found = {(r.mixer, r.pixels): r for r in records if r.batch == batch}
        rows = [[label, *(found[mixer, n].cell() for n in sizes)] for mixer, label in MIXERS.items()]
        parts.append(markdown_table([f"batch {batch}", *(f"N = {n:,}" for n in sizes)], rows))
        ahead = [n for n in sizes if _is_faster(found["retention", n], found["causal_softmax", n])]
        where = f"at N = {', '.join(f'{n:,}' for n in ahead)}" if ahead else "nowhere"
        parts.append(f"ViR is faster {where}.\n")
    return "\n".join(parts)


def _is_faster(one: Record, other: Record) -> bool:
    return one.ms is not None and (other.ms is None or one.ms < other.ms)


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


if __name__ == "__main__":
    main()
