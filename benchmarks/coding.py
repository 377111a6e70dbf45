"""The digits' test split packed by a model of pixels, and unpacked bit for bit: `python -m benchmarks.coding`.

A likelihood is a file size: an arithmetic coder that is told each pixel's probabilities, as the recurrent form gives
them from the pixels before, writes -log2 p(images) bits and a few more. The decoder has the file and the model alone:
it must compute the very same probabilities from what it has decoded so far. So a file that decodes to the images, and
whose size is what evaluation says, proves that evaluation counted no pixel twice, and looked at none too early.

    python train.py --config=configs/vir_digits_pixels.py --workdir=runs/vir_digits_pixels
    python -m benchmarks.coding --workdir=runs/vir_digits_pixels

Writes benchmarks/results/coding.{md,json}.
"""

import argparse
import dataclasses
import functools
import lzma
import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int, Int64

from benchmarks.completion import read_images
from benchmarks.timing import markdown_table, write_results
from vir_jax.generation import log_likelihood, pieces
from vir_jax.models import VisionModel
from vir_jax.runs.load import load_run
from vir_jax.tasks.pixels import check_predicts_pixels

TOTAL = 2**24  # That frequencies sum to.
BITS, LOWEST = 64, 2**48  # Of the coder's interval, which is widened where it falls below.

Frequencies = Int64[np.ndarray, "b levels"]


class Encoder:
    """An arithmetic coder: intervals within intervals, of exact integers, so that a carry needs no thought."""

    def __init__(self) -> None:
        self._low, self._width, self._bytes = 0, 2**BITS, BITS // 8

    def put(self, start: int, size: int) -> None:
        """Encode the symbol that has `size` of TOTAL, from `start` on."""
        unit = self._width // TOTAL
        self._low, self._width = self._low + unit * start, unit * size
        while self._width < LOWEST:
            self._low, self._width, self._bytes = self._low << 8, self._width << 8, self._bytes + 1

    def finish(self) -> bytes:
        """Return the shortest number in the interval that is left; what follows it is read as zeros."""
        zeros = max(bits for bits in range(0, BITS, 8) if 2**bits <= self._width)
        number = -(-self._low >> zeros)
        return number.to_bytes(self._bytes - zeros // 8, "big")


class Decoder:
    """Reads what `Encoder` wrote."""

    def __init__(self, data: bytes) -> None:
        self._rest = iter(data)
        self._width, self._offset = 2**BITS, 0
        for _ in range(BITS // 8):
            self._next_byte()

    def target(self) -> int:
        """Return a number of TOTAL; the symbol that it belongs to is the next one."""
        return min(self._offset // (self._width // TOTAL), TOTAL - 1)

    def take(self, start: int, size: int) -> None:
        """Go on behind the symbol that has `size` of TOTAL, from `start` on."""
        unit = self._width // TOTAL
        self._offset, self._width = self._offset - unit * start, unit * size
        while self._width < LOWEST:
            self._width <<= 8
            self._next_byte()

    def _next_byte(self) -> None:
        self._offset = self._offset << 8 | next(self._rest, 0)


def frequencies(log_masses: Float32[np.ndarray, "b levels"]) -> Frequencies:
    """Return probabilities as integers from 1 up that sum to TOTAL."""
    masses = np.exp(log_masses.astype(np.float64))
    counts = 1 + np.floor(masses / masses.sum(axis=1, keepdims=True) * (TOTAL - masses.shape[1])).astype(
        np.int64
    )
    counts[np.arange(len(counts)), counts.argmax(axis=1)] += TOTAL - counts.sum(axis=1)
    return counts


class Predictor:
    """Gives the frequencies of the next pixel of each image, and is then told what it was."""

    def __init__(self, model: VisionModel, batch: int) -> None:
        graph, variables = nnx.split(model.apart())
        size = pieces.stem_of(model).image_size
        self._state = pieces.initial_state(nnx.merge(graph, variables), batch, size)

        @jax.jit
        def look(state: pieces.GenerationState) -> jax.Array:
            return pieces.log_masses(nnx.merge(graph, variables), state, size)

        @jax.jit
        def read(state: pieces.GenerationState, pixels: jax.Array) -> pieces.GenerationState:
            return pieces.read(nnx.merge(graph, variables), state, pixels, size)[0]

        self._look, self._read = look, read

    def ends(self) -> Int64[np.ndarray, "b levels"]:
        """Return where each symbol's part of TOTAL ends."""
        return np.cumsum(frequencies(np.asarray(self._look(self._state))), axis=1)

    def tell(self, symbols: Int[np.ndarray, " b"]) -> None:
        """Go on to the next pixel."""
        self._state = self._read(self._state, jnp.asarray(symbols, jnp.int32)[:, None, None])


def encode(model: VisionModel, images: Int[np.ndarray, "b y x 1"]) -> bytes:
    """Return the file of grey images."""
    encoder, predictor = Encoder(), Predictor(model, len(images))
    for symbols in images.reshape(len(images), -1).T:
        for ends, symbol in zip(predictor.ends().tolist(), symbols.tolist(), strict=True):
            start = ends[symbol - 1] if symbol else 0
            encoder.put(start, ends[symbol] - start)
        predictor.tell(symbols)
    return encoder.finish()


def decode(model: VisionModel, data: bytes, count: int) -> Int[np.ndarray, "b y x 1"]:
    """Return the images of a file, whose number is known."""
    decoder, predictor = Decoder(data), Predictor(model, count)
    height, width = pieces.stem_of(model).image_size
    pixels = []
    for _ in range(height * width):
        symbols = []
        for ends in predictor.ends():
            symbol = int(np.searchsorted(ends, decoder.target(), side="right"))
            start = int(ends[symbol - 1]) if symbol else 0
            decoder.take(start, int(ends[symbol]) - start)
            symbols.append(symbol)
        pixels.append(np.array(symbols))
        predictor.tell(pixels[-1])
    return np.stack(pixels, axis=1).reshape(count, height, width, 1)


@dataclasses.dataclass(frozen=True)
class Record:
    """A way to pack the images."""

    packer: str
    size_bytes: int
    bits_per_dim: float


def measure(model: VisionModel, images: Int[np.ndarray, "b y x 1"]) -> tuple[list[Record], float]:
    """Pack the images; and return the bits per dimension that evaluation says.

    Raises:
        ValueError: what was unpacked is something else.
    """
    data = encode(model, images)
    if not np.array_equal(decode(model, data, len(images)), images):
        raise ValueError("the decoded images are not those that were encoded")
    plain = images.astype(np.uint8).tobytes()
    packers: dict[str, Callable[[], bytes]] = {
        "this model": lambda: data,
        "xz, strongest": functools.partial(lzma.compress, plain, preset=9 | lzma.PRESET_EXTREME),
        "zlib, strongest": functools.partial(zlib.compress, plain, 9),
    }
    sizes = {name: len(pack()) for name, pack in packers.items()}
    nats = -np.sum(np.asarray(log_likelihood(model, jnp.asarray(images), "auto"), np.float64))
    records = [Record(name, size, 8 * size / images.size) for name, size in sizes.items()]
    return records, float(nats / (math.log(2) * images.size))


def report(records: Sequence[Record], bits: float, images: int) -> str:
    """Return the page."""
    rows = [[record.packer, f"{record.size_bytes:,}", f"{record.bits_per_dim:.4f}"] for record in records]
    excess = records[0].bits_per_dim / bits - 1
    return (
        f"{images} images, unpacked bit for bit. Evaluation says {bits:.4f} bits/dim; the file has {excess:.3%} more.\n"
        "The model itself is not in the file. Written by `python -m benchmarks.coding`.\n\n"
        + markdown_table(["packed by", "bytes", "bits/dim"], rows)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack, unpack, compare, and write it down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="of a run that predicts grey pixels")
    given = parser.parse_args(arguments)
    try:
        run = load_run(given.workdir, "last")
        check_predicts_pixels(run.task)
        if pieces.stem_of(run.model).likelihood.channels != 1:
            raise ValueError(f"the run in {given.workdir} predicts RGB pixels; expected grey ones")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    images, _ = read_images(run)
    records, bits = measure(run.model, images)
    page = report(records, bits, len(images))
    print(page)
    write_results("coding", page, records)


if __name__ == "__main__":
    main()
