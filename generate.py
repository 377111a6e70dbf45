"""Draw images: python generate.py --workdir=runs/digits --out=grid.png; see vir_jax/commands/generate.py."""

from vir_jax.commands.generate import run

if __name__ == "__main__":
    run()
