"""Evaluate a checkpoint: python eval.py --workdir=runs/vir_b; see vir_jax/commands/eval.py."""

from vir_jax.commands.eval import run

if __name__ == "__main__":
    run()
