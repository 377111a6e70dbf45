"""Train a model: python train.py --config=configs/vir_b.py --workdir=runs/vir_b; see vir_jax/commands/train.py."""

from vir_jax.commands.train import run

if __name__ == "__main__":
    run()
