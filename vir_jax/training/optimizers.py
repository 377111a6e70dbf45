"""The optimisers by name, each at a learning rate of 1, with weight decay on kernels alone (`decay_mask`).

What each takes of `config.optim` are its keywords; `vir_jax.runs.validate.OPTIMIZERS` has them, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, muon

from vir_jax.parallel.sharding import dotted
from vir_jax.runs.state import Params


def decay_mask(params: Any) -> Any:
    """Return True for the leaves that weight decay applies to: kernels alone.

    Biases, norms, LayerScale, position embedding and class token are left out.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: dotted(path).endswith("kernel"), params)


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101)."""
    return optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)


def lamb(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Return LAMB (You et al., 2020, arXiv 1904.00962) as timm has it, whose trust ratio is for kernels alone.

    A kernel moves by the learning rate times its own norm. Everything that weight decay leaves out (biases, norms,
    LayerScale, embeddings, class token) moves as under Adam: a ratio would let a LayerScale of 1e-5 or a bias that
    begins at 0 grow by a factor of (1 + lr) a step at most, and the blocks behind it would stay silent.
    `optax.lamb` applies the ratio to every array. As in timm's `Lamb` at its defaults (`always_adapt=False`,
    `trust_clip=False`, `grad_averaging=True`, `bias_correction=True`), the ratio is not clipped, and 1 where parameter
    or update is zero; decay is added to the update before the ratio.

    Ours: a kernel keeps its ratio where `weight_decay` is 0 (timm then drops all ratios, which leaves Adam); and there
    is no clipping in here, while timm's `Lamb` clips gradients to a global norm of 1 on top of what else clips them
    (`max_grad_norm=1.0`): `make_optimizer` clips once, to what is asked for.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.masked(for_each_array(optax.scale_by_trust_ratio()), decay_mask),
        optax.scale_by_learning_rate(1.0),
    )


def lion(*, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return Lion (Chen et al., 2023, arXiv 2302.06675): signs alone, so that it wants a tenth of AdamW's rate."""
    return optax.lion(1.0, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)


def sgd(*, b1: float = 0.9, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum b1; weight decay is added to the gradients, as in PyTorch."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.trace(b1, nesterov=True),
        optax.scale_by_learning_rate(1.0),
    )


def adafactor(*, b1: float = 0.9, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235) with momentum b1, as Zhai et al. (2021) train ViTs.

    The second moment is kept by rows and columns of matrices that are 128 wide both ways, those of MLPs and the head;
    of heads' projections it is kept whole. No scale by the parameter's own norm.
    """
    return optax.adafactor(
        multiply_by_parameter_scale=False,
        momentum=b1 or None,
        weight_decay_rate=weight_decay,
        weight_decay_mask=decay_mask,
    )


def scaled_muon(
    *, b1: float = 0.95, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Return Muon (Jordan, 2024) for the kernels of blocks, and Adam, with Nesterov's momentum, for all else.

    Updates are scaled to the size that AdamW's have (Liu et al., 2025, arXiv 2502.16982: RMS 0.2), so that its learning
    rate and weight decay serve. q, k and v are matrices of their own.
    """
    optimizer = muon(
        1.0,
        beta=b1,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    # The updates are what is added by now.
    return optax.chain(optimizer, optax.add_decayed_weights(-weight_decay, mask=decay_mask))


def _matrices(params: Params) -> Params:
    """Return which axes of a kernel of blocks are a matrix's; None for what is no such kernel.

    All other axes, that of the blocks and that of q, k and v, are of matrices side by side.
    """
    inputs_and_outputs = {
        "conv1.conv.kernel": MuonDimensionNumbers((1, 2, 3), (4,)),  # [l, 3, 3, c, c]
        "conv2.conv.kernel": MuonDimensionNumbers((1, 2, 3), (4,)),
        "mixer.qkv.kernel": MuonDimensionNumbers((1,), (3, 4)),  # [l, c, 3, h, d]
        "mixer.out.kernel": MuonDimensionNumbers((1, 2), (3,)),  # [l, h, d, c]
    }

    def matrix(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        stage, _, name = dotted(path).rpartition("blocks.")
        if not stage or not name.endswith("kernel"):
            return None
        known = inputs_and_outputs.get(name)
        return known or (MuonDimensionNumbers((1,), (2,)) if leaf.ndim == 3 else None)

    return jax.tree_util.tree_map_with_path(matrix, params)


def for_each_array(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a transformation without state to each parameter by itself, and of stacked blocks to each block's."""

    def alone(update: Array, param: Array) -> Array:
        return transform.update(update, transform.init(param), param)[0]

    def apply(path: tuple[Any, ...], update: Array, param: Array) -> Array:
        return (jax.vmap(alone) if "blocks" in dotted(path).split(".") else alone)(update, param)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        return jax.tree_util.tree_map_with_path(apply, updates, params), state

    return optax.GradientTransformation(transform.init, update)


MAKERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "lamb": lamb,
    "lion": lion,
    "muon": scaled_muon,
    "adafactor": adafactor,
    "sgd": sgd,
}
