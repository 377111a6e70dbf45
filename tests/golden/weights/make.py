"""Writes what timm and transformers compute of tiny models: python tests/golden/weights/make.py, where they are.

The weights are drawn by the names of the tensors, by a generator of NumPy's that never changes: the files hold names,
shapes and logits alone, and `filled` draws the same weights again where there is no torch.
"""

import json
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SIZE, OTHER_SIZE, PATCH, CLASSES = 16, (24, 20), 4, 7
WIDTH, DEPTH, HEADS = 64, 4, 4  # Those of pico.


def filled(name, shape):
    """The weights of a tensor: scales of norms and LayerScales near 1, everything else near 0."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    near_one = len(shape) == 1 and name.endswith(("weight", "gamma"))
    return (1 + 0.1 * drawn if near_one else 0.1 * drawn).astype(np.float32)


def images(size):
    """Two normalised images [b, H, W, 3]."""
    return np.random.RandomState(0).standard_normal((2, *size, 3)).astype(np.float32)


def main():
    """Write a file for each case."""
    import torch

    cases = {
        "timm": timm_model(),
        "timm_layer_scale": timm_model(init_values=1e-5, no_embed_class=True),
        "timm_average": timm_model(global_pool="avg"),
        "hf": hf_model(),
        "release": release_model(),
    }
    for name, (model, stored, forward) in cases.items():
        model.load_state_dict(
            {k: torch.tensor(filled(k, tuple(v.shape))) for k, v in model.state_dict().items()}
        )
        model.eval()
        found = {"shapes": {k: list(v.shape) for k, v in model.state_dict().items()}, **stored(model)}
        with torch.no_grad():
            for key, size in (("logits", (SIZE, SIZE)), ("other_logits", OTHER_SIZE)):
                logits = forward(model, torch.tensor(images(size)).permute(0, 3, 1, 2))
                found[key] = None if logits is None else logits.double().numpy().tolist()
        write(name, found)
    write("patches", patches())


def timm_model(**arguments):
    """timm's ViT."""
    import timm

    model = timm.models.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES,
        dynamic_img_size=True, **arguments,
    )  # fmt: skip
    return model, lambda model: {}, lambda model, x: model(x)


def hf_model():
    """transformers' ViT: names of its modules, and of the file that it writes."""
    import tempfile

    import transformers
    from safetensors import safe_open

    config = transformers.ViTConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_labels=CLASSES,
    )  # fmt: skip

    def stored(model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with safe_open(f"{folder}/model.safetensors", "np") as file:
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        drawn = {k: filled(k, tuple(v.shape)) for k, v in model.state_dict().items()}
        # The same tensors, found by what is in them.
        names = {
            other: next(name for name, x in drawn.items() if x.shape == y.shape and np.array_equal(x, y))
            for other, y in tensors.items()
        }
        return {"names_in_files": names, "epsilon": config.layer_norm_eps}

    def forward(model, x):
        return model(x, interpolate_pos_encoding=tuple(x.shape[2:]) != (SIZE, SIZE)).logits

    return transformers.ViTForImageClassification(config), stored, forward


def release_model():
    """The reviewer release's parameters, as its recurrent form uses them, token by token; written anew."""
    import torch
    from torch import nn

    gammas = 1 - torch.exp(torch.linspace(np.log(1 / 32), np.log(1 / 512), HEADS))

    class Retention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).unbind(2)
            state, rows = torch.zeros(b, HEADS, q.shape[-1], q.shape[-1]), []
            for i in range(n):
                state = gammas[None, :, None, None] * state + k[:, i, :, :, None] * v[:, i, :, None]
                rows.append(torch.einsum("bhd,bhde->bhe", q[:, i] * q.shape[-1] ** -0.5, state).flatten(1))
            return self.out_proj(torch.stack(rows, 1))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x):
            return self.fc2(nn.functional.gelu(self.fc1(x)))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(WIDTH))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
            self.retention, self.mlp, self.ls1, self.ls2 = Retention(), Mlp(), Scale(), Scale()

        def forward(self, x):
            x = x + self.ls1.gamma * self.retention(self.norm1(x))
            return x + self.ls2.gamma * self.mlp(self.norm2(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, WIDTH))
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
            self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
            self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
            x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1)
            return self.head(self.norm(self.blocks(x))[:, -1])

    # It resamples no positions.
    return Model(), lambda model: {}, lambda model, x: model(x) if x.shape[2] == x.shape[3] else None


def patches():
    """timm's resampling of a patch embedding [c, channels, y, x]."""
    import timm
    import torch

    kernel = torch.tensor(filled("kernel", (2, 3, 4, 4)))
    resample = timm.layers.resample_patch_embed
    return {str(p): resample(kernel, [p, p]).double().numpy().tolist() for p in (2, 3, 4, 6, 8)}


def write(name, content):
    """Write a file, with the digits that a float32 has."""
    text = json.dumps(content, default=str)
    rounded = json.dumps(json.loads(text, parse_float=lambda x: float(f"{float(x):.8g}")))
    (FOLDER / f"{name}.json").write_text(rounded + "\n")


if __name__ == "__main__":
    main()
