"""Put the recipes of `configs/` into the package, as `vir_jax/configs`; all else is said in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vir_jax*"]), "vir_jax.configs"],
    package_dir={"vir_jax.configs": "configs"},
)
