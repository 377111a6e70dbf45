"""Make the golden numbers of tests/models/test_golden_vix.py with the public PyTorch packages.

    python -m venv torch && torch/bin/pip install torch vision-xformer performer-pytorch linformer nystrom-attention
    torch/bin/python tests/golden/vix/make.py

Each file holds, of a module with random weights: its input `x`, output `out`, the cotangent `d_out`, the weights by the
names that they have in vir_jax (`w.NAME`), and the gradients of sum(out * d_out) (`d.NAME`, and `d_x`).
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from linformer.linformer import LinformerSelfAttention
from nystrom_attention import NystromAttention
from performer_pytorch import SelfAttention
from vision_xformer import fnet, vision_linformer, vision_nystromformer, vision_performer

FOLDER = Path(__file__).parent
ROWS, COLS, DIM, HEADS, HIDDEN, DEPTH, RANK, LANDMARKS = 3, 4, 16, 2, 24, 2, 5, 4
TOKENS = ROWS * COLS + 1
LAYER_NORM_EPSILON = 1e-6  # vir_jax's; of these packages 1e-5.


def kernel(weight):
    return weight.T


def to_heads(weight, heads):
    return weight.T.reshape(DIM, heads, -1)


def from_heads(weight, heads):
    return weight.T.reshape(heads, -1, DIM)


def compression(weight):
    return {"class_kernel": weight[:1], "patch_kernel": weight[1:].reshape(1, ROWS, COLS, -1)}


def linformer(module, of):
    """Weights, or their gradients, by name; `of` takes either from a parameter."""
    heads = module.heads
    kv_heads = 1 if module.to_k.weight.shape[0] == module.dim_head else heads
    named = {
        "q.kernel": to_heads(of(module.to_q.weight), heads),
        "k.kernel": to_heads(of(module.to_k.weight), kv_heads),
        "out.kernel": from_heads(of(module.to_out.weight), heads),
        "out.bias": of(module.to_out.bias),
    }
    named |= {f"key_compression.{name}": x for name, x in compression(of(module.proj_k)).items()}
    if not module.share_kv:
        named["v.kernel"] = to_heads(of(module.to_v.weight), kv_heads)
        named |= {f"value_compression.{name}": x for name, x in compression(of(module.proj_v)).items()}
    return named


def performer(module, of):
    heads, projections = module.heads, (module.to_q, module.to_k, module.to_v)
    return {
        "qkv.kernel": np.stack([to_heads(of(p.weight), heads) for p in projections], axis=1),
        "qkv.bias": np.stack([of(p.bias).reshape(heads, -1) for p in projections]),
        "out.kernel": from_heads(of(module.to_out.weight), heads),
        "out.bias": of(module.to_out.bias),
        "projection": of(module.fast_attention.projection_matrix),
    }


def nystromformer(module, of):
    heads, out = module.heads, module.to_out[0]
    return {
        "qkv.kernel": of(module.to_qkv.weight).T.reshape(DIM, 3, heads, -1),
        "out.kernel": from_heads(of(out.weight), heads),
        "out.bias": of(out.bias),
        "local_kernel": of(module.res_conv.weight)[:, 0, :, 0],
    }


def no_weights(module, of):
    return {}


def blocks(weights_of_mixer):
    """Of a stack of pre-norm blocks, each weight with an axis of blocks first."""

    def named(stack, of):
        layers = []
        for mixing, feeding in stack.layers:
            up, down = feeding.fn.net[0], feeding.fn.net[3]
            layers.append(
                {f"mixer.{name}": x for name, x in weights_of_mixer(mixing.fn, of).items()}
                | {"norm1.scale": of(mixing.norm.weight), "norm1.bias": of(mixing.norm.bias)}
                | {"norm2.scale": of(feeding.norm.weight), "norm2.bias": of(feeding.norm.bias)}
                | {"mlp.up.kernel": kernel(of(up.weight)), "mlp.up.bias": of(up.bias)}
                | {"mlp.down.kernel": kernel(of(down.weight)), "mlp.down.bias": of(down.bias)}
            )
        return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}

    return named


def value_of(parameter):
    return parameter.detach().numpy()


def gradient_of(parameter):
    return np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()


def write(name, module, weights, *, batch):
    for submodule in module.modules():
        if isinstance(submodule, torch.nn.LayerNorm):
            submodule.eps = LAYER_NORM_EPSILON
    for parameter in module.parameters():
        if parameter.ndim == 1:  # Biases and norms, which begin as zeros and ones.
            parameter.data += 0.3 * torch.randn_like(parameter)
    module = (
        module.double()
    )  # Exact to all digits of the float32 that is stored, of numbers that float32 can hold.
    x, d_out = (torch.randn(batch, TOKENS, DIM).double() for _ in range(2))
    out = module(x.requires_grad_())
    (out * d_out).sum().backward()
    arrays = {"x": value_of(x), "out": value_of(out), "d_out": d_out.numpy(), "d_x": gradient_of(x)}
    arrays |= {f"w.{key}": array for key, array in weights(module, value_of).items()}
    arrays |= {f"d.{key}": array for key, array in weights(module, gradient_of).items()}
    np.savez_compressed(FOLDER / f"{name}.npz", **{key: a.astype(np.float32) for key, a in arrays.items()})


def max_without_gradient(x, dim=None, keepdim=False, maximum=torch.max):
    """Of `torch.max`. The authors' gradient flows through the largest feature, and cancels but for epsilon: 1e-3."""
    x = x.detach()
    return maximum(x) if dim is None else maximum(x, dim=dim, keepdim=keepdim)


def main():
    torch.manual_seed(0)
    sizes = {"heads": HEADS, "dim_head": DIM // HEADS}
    # The pseudo-inverse of these packages takes its scale from all matrices together, and the authors' features of keys
    # the largest of all examples and heads: of one example and one head they agree with ours.
    one = {"heads": 1, "dim_head": DIM}
    write("linformer", LinformerSelfAttention(DIM, TOKENS, k=RANK, **sizes), linformer, batch=2)
    shared = {"share_kv": True, "one_kv_head": True}
    write(
        "linformer_shared", LinformerSelfAttention(DIM, TOKENS, k=RANK, **sizes, **shared), linformer, batch=2
    )
    write("performer", SelfAttention(DIM, **sizes, qkv_bias=True), performer, batch=2)
    nystrom = {"num_landmarks": LANDMARKS, **one}
    write("nystromformer", NystromAttention(DIM, **nystrom), nystromformer, batch=1)

    stack = (DIM, DEPTH)
    write("vix_fnet", fnet.TokenMixer(*stack, HIDDEN), blocks(no_weights), batch=2)
    vil = vision_linformer.Transformer(*stack, HEADS, DIM // HEADS, HIDDEN, TOKENS, RANK, True, True)
    write("vix_linformer", vil, blocks(linformer), batch=2)
    vip = vision_performer.Transformer(*stack, 1, DIM, HIDDEN)
    with mock.patch.object(torch, "max", max_without_gradient):
        write("vix_performer", vip, blocks(performer), batch=1)
    vin = vision_nystromformer.Transformer(*stack, 1, DIM, HIDDEN, LANDMARKS)
    write("vix_nystromformer", vin, blocks(nystromformer), batch=1)


if __name__ == "__main__":
    main()
