"""Vision X-formers (arXiv 2107.02239) on CIFAR-10, and ViR beside them: any mixer, stem and position, one recipe.

    python -m vir_jax.data.prepare --dataset=cifar10
    python train.py --config=configs/vix.py --workdir=runs/vix
    python train.py --config=configs/vix.py:mixer=performer,stem=conv_vix,position=rope --workdir=runs/vip
    python train.py --config=configs/vix.py:mixer=retention,tokens=65,epochs=8 --workdir=runs/vix_vir

Arguments: `mixer`, softmax by default, `stem`, linear, and `position`, learned, as `create_model` has them; `tokens`,
1025, of a pixel each, as the authors have it, or 257 or 65, of patches of 2 and 4 pixels, which two CPU cores can
train; `epochs`, 40.

The recipe is the authors': constant AdamW, no augmentation, no dropout. Theirs decays biases, norms and embeddings,
too, draws positions and class token with a deviation of 1, and its batches are as large as 16 GB hold: 64 (softmax) to
512 (FNet). MLP-Mixer has no position; it and FNet were not run on CIFAR-10 by them, in what they published.

Cost: 661,770 parameters, 1613.6 M multiply-adds per image, 40 epochs: not measured. Result: not run.
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments

PATCHES = {1025: 1, 257: 2, 65: 4}


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    arguments = parse_arguments(
        argument, mixer="softmax", stem="linear", position="learned", tokens=1025, epochs=40.0
    )
    mixer, stem, position, tokens = arguments.mixer, arguments.stem, arguments.position, arguments.tokens
    if tokens not in PATCHES:
        raise ValueError(f"tokens={tokens}; expected one of {', '.join(map(str, PATCHES))}")

    config = default_config()
    config.epochs = arguments.epochs  # 390.6 steps each.
    config.batch_size = 128

    vir = mixer == "retention"
    config.model.name = f"{'vir' if vir else 'vit'}_vix{PATCHES[tokens]}"
    config.model.image_size = (32, 32)
    config.model.mixer = mixer
    config.model.stem = stem
    config.model.position = position
    config.model.layer_scale = 0.1 if vir else None  # The release's 1e-5 costs points in runs this short.
    config.model.dtype = "float32"
    if mixer == "softmax":
        config.model.qkv_bias = False
    if mixer == "linformer":
        config.model.rank = min(64, tokens // 4)
        config.model.one_kv_head = (stem, position) == (
            "linear",
            "learned",
        )  # Of their ViL, not of its relatives.
    if mixer == "nystromformer":
        config.model.landmarks = min(64, tokens // 4)
    if mixer == "mlp_mixer":
        config.model.mlp_dim = 128  # Theirs has an expansion factor of 1, over the tokens too.
        config.model.position = "none" if position == "learned" else position

    config.data.dataset = "cifar10"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.threads = 2
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)

    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.final_lr = 1e-3
    config.optim.weight_decay = 0.01
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8

    config.log_every = 100
    config.eval_every = 391  # Every epoch, of which their notebooks tell.
    config.eval_batch_size = 500
    config.checkpoint_every = 1000
    return config
