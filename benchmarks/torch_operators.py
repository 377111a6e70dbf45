"""What a torch user has on a CPU in place of retention here: the same in plain torch, chunk by chunk, and attention.

Tensors are [b, n, h, d], as in `vir_jax.ops.retention`. torch is imported where it is used: benchmarks run without.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

CHUNK = 64
Tensor = Any


def installed() -> bool:
    """Whether torch is there."""
    return importlib.util.find_spec("torch") is not None


def chunkwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Retention with all chunks of tokens at once but for a loop over their states, as plain torch is fastest.

    The masked product within each chunk, what each adds to the state, the states one after another, and what each token
    reads of the state before its chunk. Tokens that fill the last chunk are zero.
    """
    import torch

    n, d = q.shape[1], q.shape[-1]
    fill = -n % chunk
    # [b, h, chunks, tokens of a chunk, d]
    q, k, v = (
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, fill)).transpose(1, 2).unflatten(2, (-1, chunk))
        for x in (q, k, v)
    )
    q = q * d**-0.5
    time = torch.arange(chunk, dtype=torch.float32)
    log_decay = log_decay[:, None, None, None]
    elapsed = time[:, None] - time
    mask = torch.where(elapsed >= 0, torch.exp(log_decay * elapsed.clamp(min=0)), 0.0)
    within = ((q @ k.transpose(-1, -2)) * mask) @ v
    added = (k * torch.exp(log_decay * (chunk - 1 - time[:, None]))).transpose(-1, -2) @ v
    across = torch.exp(log_decay[:, 0] * chunk)
    state, before = torch.zeros_like(added[:, :, 0]), []
    for of_chunk in added.unbind(2):
        before.append(state)
        state = across * state + of_chunk
    read = (q * torch.exp(log_decay * (time[:, None] + 1))) @ torch.stack(before, dim=2)
    return (within + read).flatten(2, 3)[:, :, :n].transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention that stores no scores."""
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def calls(inputs: list[jax.Array], log_decay: jax.Array, *, gradient: bool) -> dict[str, Callable[[], None]]:
    """By name, what runs an operator once; with `gradient` the sum of its squares and their gradient by q, k and v."""
    import torch

    tensors = [torch.tensor(np.asarray(x), requires_grad=gradient) for x in inputs]
    decays = torch.tensor(np.asarray(log_decay))

    def call(operator: Callable[..., Tensor], *more: Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(gradient):
                out = operator(*tensors, *more)
                if gradient:
                    torch.autograd.grad((out**2).sum(), tensors)

        return run

    return {
        f"torch, chunks of {CHUNK}": call(chunkwise, decays),
        "torch, attention": call(attention),
    }
