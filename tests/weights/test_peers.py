"""timm and transformers themselves, where they are installed: pip install torch timm transformers."""

import importlib.util

import pytest

if not all(importlib.util.find_spec(name) for name in ("torch", "timm", "transformers")):
    pytest.skip("needs torch, timm and transformers", allow_module_level=True)

import jax

from benchmarks.peers import LIBRARIES, MODELS, check


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_logits_are_those_of_the_library_both_ways(tmp_path, name, library):
    make, forward, read = LIBRARIES[library]
    with jax.default_matmul_precision("highest"):
        differences = check(name, library, make(*MODELS[name]), forward, read, tmp_path)
    assert len(differences) == 3  # In at two sizes, and out.
    assert max(differences) < 1e-5
