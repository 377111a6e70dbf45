"""All figures of one trained model and one image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vir_jax.extras import require

require("inspect", "matplotlib")

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float32, UInt8
from matplotlib.figure import Figure

from vir_jax.inspection import figures
from vir_jax.inspection.contributions import layer_contributions, logit_contributions
from vir_jax.inspection.figures.style import evenly_spaced
from vir_jax.inspection.model import layout_of, mixer_of, retention_kind
from vir_jax.inspection.modes import errors_by_token, retention_costs, tokens_by_mode
from vir_jax.inspection.reading import logits_as_read
from vir_jax.inspection.state import state_bytes, states_as_read
from vir_jax.inspection.workdir import TrainedModel, read_curves

LAYERS = 4  # Whose contributions are shown, at most.
SIDE = 12  # Patches along a side of the image on which modes are compared, at least.
MOST_PATCHES = 4096  # In the largest image whose cost is measured.


def draw_report(
    trained: TrainedModel, image: UInt8[np.ndarray, "H W 3"], workdirs: Sequence[str | Path]
) -> Iterator[tuple[str, Figure]]:
    """Draw every figure that the model allows, by name, one after the other.

    Args:
        trained: the model.
        image: of `load_image`.
        workdirs: whose training curves are drawn together, the model's own first.
    """
    if mixer_of(trained.model).retention is None:
        logging.warning(
            "%s mixes tokens by %s, not by retention with a decay per head: masks, contributions, states and modes are "
            "left out",
            trained.config.model.name,
            mixer_of(trained.model).described,
        )
    else:
        yield from _of_retention(trained, image)
    yield "curves", figures.draw_curves({Path(workdir).name: read_curves(workdir) for workdir in workdirs})


def _of_retention(trained: TrainedModel, image: UInt8[np.ndarray, "H W 3"]) -> Iterator[tuple[str, Figure]]:
    model, images = trained.model, trained.normalize(image[None])
    mixer, grid = mixer_of(model), layout_of(model, images).grid
    kind = retention_kind(mixer)
    layers = evenly_spaced(model.depth, LAYERS)
    decays = np.stack([model.block(layer).mixer.log_decay for layer in range(model.depth)])
    learned = bool((decays != decays[0]).any())
    for layer in layers if learned else layers[:1]:
        for name, figure in _of_decays(jnp.asarray(decays[layer]), grid):
            yield f"{name}_layer_{layer}" if learned else name, figure

    contributions = layer_contributions(model, images, layers)
    shares = {layer: contributions[layer].shares()[0] for layer in layers}
    yield "layer_contributions", figures.draw_layer_shares(shares, image, grid)
    winner = int(jnp.argmax(trained.logits(images)[0]))
    terms = logit_contributions(model, images, jnp.array([winner], jnp.int32))
    yield (
        "logit_contributions",
        figures.draw_logit(terms, image, grid, class_name=trained.class_names[winner]),
    )

    if model.stage.flips:
        logging.warning("every second block reads backwards: states and reading are left out")
    else:
        states = states_as_read(model, images)
        memory = state_bytes(model, grid)
        yield "states", figures.draw_states(states, decays, state_bytes=memory, kind=kind)
        if mixer.short_conv is None:
            read = logits_as_read(model, images)
            yield "reading", figures.draw_reading(read[0], image, grid, class_names=trained.class_names)
        else:
            logging.warning(
                "a short convolution ties the class token to the patches before: reading is left out"
            )

    name = trained.config.model.name
    times = max(1, -(-SIDE // min(grid)))  # More tokens than chunkwise retention takes in one chunk.
    larger = jnp.repeat(jnp.repeat(images, times, axis=1), times, axis=2)
    errors = errors_by_token(tokens_by_mode(model, larger))
    size = f"{larger.shape[1]} x {larger.shape[2]} pixels"
    yield "mode_errors", figures.draw_mode_errors(errors, what=f"{name}, after all layers, {size}")

    sides = [min(grid) * 4**i for i in range(3)]
    grids = [(side, side) for side in sides if side**2 <= MOST_PATCHES]
    costs = retention_costs(mixer.heads, mixer.head_dim, grids, kind)
    what = f"{mixer.heads} heads of {mixer.head_dim}, float32"
    yield "mode_costs", figures.draw_mode_costs(costs, patch=model.patch, what=what)


def _of_decays(log_decay: Float32[Array, " h"], grid: tuple[int, int]) -> Iterator[tuple[str, Figure]]:
    """Draw what the decays of one layer make of an image."""
    yield "masks", figures.draw_masks(log_decay, grid)
    yield "seen_from_patch", figures.draw_seen_from(log_decay, grid, (grid[0] // 2, grid[1] // 2))
    yield "seen_from_class_token", figures.draw_seen_from(log_decay, grid)
    widths = sorted({8, 16, 32} | ({grid[1]} if 8 <= grid[1] <= 64 else set()))
    yield "widths", figures.draw_widths(log_decay, widths)
    if (log_decay < 0).all():  # Else something is remembered for ever.
        yield "half_lives", figures.draw_half_lives(log_decay, widths)
