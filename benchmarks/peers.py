"""Random weights in timm and transformers and here, both ways: relative differences of the logits, in float32.

    python -m benchmarks.peers      # needs torch, timm and transformers besides

Of vit_ti16 and vit_b16, at 224 pixels and at 288 x 192, where positions are resampled.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file

from vir_jax.weights import load, save

SIZE, OTHER_SIZE, CLASSES = 224, (288, 192), 10
MODELS = {"vit_ti16": (192, 12, 3), "vit_b16": (768, 12, 12)}


def main():
    """Print a line for each library, model, size and direction."""
    jax.config.update("jax_default_matmul_precision", "highest")
    for name, sizes in MODELS.items():
        for library, (make, forward, read) in LIBRARIES.items():
            with tempfile.TemporaryDirectory() as folder:
                check(name, library, make(*sizes), forward, read, Path(folder))


def check(name, library, peer, forward, read, folder):
    """Compare a peer's logits with those of our model of its weights, and of its model of ours; return differences."""
    torch.manual_seed(0)
    peer.eval()
    for tensor in peer.parameters():  # Those that begin at zero would hide what they do.
        torch.nn.init.normal_(tensor, mean=float(tensor.ndim == 1), std=0.05)
    (folder / "theirs").mkdir()
    if library == "timm":
        save_file(peer.state_dict(), folder / "theirs" / "model.safetensors")
    else:
        peer.save_pretrained(folder / "theirs")
    differences = []
    for size in ((SIZE, SIZE), OTHER_SIZE):
        images = np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        with torch.no_grad():
            expected = forward(peer, pixels).numpy()
        found = load(folder / "theirs", image_size=size)
        assert found.card.model["name"] == name
        differences.append(report(name, library, size, "in", found.model(jnp.asarray(images)), expected))
    ours = load(folder / "theirs")
    save(folder / "ours", ours, layout="timm" if library == "timm" else "hf")
    images = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3), np.float32)
    with torch.no_grad():
        theirs = forward(read(folder / "ours").eval(), torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    difference = report(name, library, (SIZE, SIZE), "out", theirs, ours.model(jnp.asarray(images)))
    return [*differences, difference]


def report(name, library, size, direction, actual, expected):
    """Print a relative RMS difference, and return it."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    difference = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    print(f"{library:<13}{name:<10}{size[0]} x {size[1]}  {direction:<4}{difference:.1e}", flush=True)
    return difference


def timm_vit(dim, depth, heads):
    """timm's ViT, which takes images of any size."""
    return timm.models.VisionTransformer(
        embed_dim=dim, depth=depth, num_heads=heads, num_classes=CLASSES, dynamic_img_size=True
    )


def transformers_vit(dim, depth, heads):
    """transformers' ViT."""
    config = transformers.ViTConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def transformers_logits(model, x):
    """Return its logits, at its own size or another."""
    return model(x, interpolate_pos_encoding=tuple(x.shape[2:]) != (SIZE, SIZE)).logits


LIBRARIES = {
    "timm": (
        timm_vit,
        lambda model, x: model(x),
        lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    ),
    "transformers": (
        transformers_vit,
        transformers_logits,
        transformers.ViTForImageClassification.from_pretrained,
    ),
}

if __name__ == "__main__":
    main()
