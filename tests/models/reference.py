"""docs/method.md, section 3, written out in NumPy and float64: what the models are compared with."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def layer_norm(p, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}.scale"] + p[f"{name}.bias"]


def mask_1d(heads, n):
    gamma = 1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads))
    elapsed = np.arange(n)[:, None] - np.arange(n)
    return np.where(elapsed >= 0, gamma[:, None, None] ** np.maximum(elapsed, 0), 0)


def mask_2d(heads, grid):
    gamma = 1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads))
    rows, cols = grid
    places = [(y, x) for y in range(rows) for x in range(cols)] + [(rows, cols - 1)]
    mask = np.zeros((heads, len(places), len(places)))
    for n, (y, x) in enumerate(places):
        for m, (y_key, x_key) in enumerate(places):
            if y_key <= y and x_key <= x:
                mask[:, n, m] = gamma ** (y - y_key + x - x_key)
    return mask


def logits(p, images, *, patch, family, retention="1d", readout, bidirectional=False, depth):
    p = {path: np.asarray(value, np.float64) for path, value in p.items()}
    images = np.asarray(images, np.float64)
    b, height, width, _ = images.shape
    rows, cols = height // patch, width // patch
    x = images.reshape(b, rows, patch, cols, patch, 3)
    x = np.einsum("byixjk,ijkc->byxc", x, p["stem.embedding.conv.kernel"]) + p["stem.embedding.conv.bias"]
    x = (x + p["stem.position.embedding"]).reshape(b, rows * cols, -1)
    if bidirectional:
        x = np.concatenate([x, x[:, ::-1]], axis=1)
    token = np.broadcast_to(p["stem.class_token"], (b, 1, x.shape[-1]))
    if family == "vir":
        x = np.concatenate([x, token], axis=1)
    else:
        x = np.concatenate([token + p["stem.class_position_embedding"], x], axis=1)

    layers = {path: value for path, value in p.items() if path.startswith("stage.blocks.")}
    for i in range(depth):
        p, name = p | {path: value[i] for path, value in layers.items()}, "stage.blocks"
        qkv = np.einsum("bnc,cthd->tbhnd", layer_norm(p, f"{name}.norm1", x), p[f"{name}.mixer.qkv.kernel"])
        q, k, v = qkv + p[f"{name}.mixer.qkv.bias"][:, None, :, None, :]
        heads, n, d = q.shape[1:]
        scores = np.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(d)
        if family == "vit":
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
        else:
            scores *= mask_2d(heads, (rows, cols)) if retention == "2d" else mask_1d(heads, n)
        mixed = np.einsum("bhnm,bhmd,hdc->bnc", scores, v, p[f"{name}.mixer.out.kernel"], optimize=True)
        x = x + (mixed + p[f"{name}.mixer.out.bias"]) * p.get(f"{name}.layer_scale1.scale", 1)
        hidden = layer_norm(p, f"{name}.norm2", x) @ p[f"{name}.mlp.up.kernel"] + p[f"{name}.mlp.up.bias"]
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        mlp = hidden @ p[f"{name}.mlp.down.kernel"] + p[f"{name}.mlp.down.bias"]
        x = x + mlp * p.get(f"{name}.layer_scale2.scale", 1)

    patches = x[:, :-1] if family == "vir" else x[:, 1:]
    class_token = x[:, -1] if family == "vir" else x[:, 0]
    token = patches.mean(1) if readout == "average" else class_token
    return layer_norm(p, "readout.norm", token) @ p["readout.head.kernel"] + p["readout.head.bias"]
