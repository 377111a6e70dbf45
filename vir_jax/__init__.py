"""Vision Retention Networks (ViR) in JAX and Flax."""
