"""Classify images: python predict.py --workdir=runs/vir_b image.jpg; see vir_jax/commands/predict.py."""

from vir_jax.commands.predict import run

if __name__ == "__main__":
    run()
