"""Loops write 16-bit floats as integers on a CPU, where XLA would convert the whole array at every step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.ops import retention, retention_2d
from vir_jax.ops.attention import attention
from vir_jax.ops.storage import from_bits, to_bits

LOG_DECAY = jnp.log(jnp.array([0.9, 0.8]))
LOOPS = {
    "chunkwise": lambda x: retention(x, x, x, LOG_DECAY, mode="chunkwise", chunk_size=64),
    "recurrent": lambda x: retention(x, x, x, LOG_DECAY, mode="recurrent"),
    "chunkwise, 2-D": lambda x: retention_2d(x, x, x, LOG_DECAY, grid=(16, 16), mode="chunkwise"),
    "recurrent, 2-D": lambda x: retention_2d(x, x, x, LOG_DECAY, grid=(16, 16), mode="recurrent"),
    "attention": lambda x: attention(x, x, x),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_all_floats_come_back_bit_for_bit(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    bits = to_bits(jnp.asarray(every))
    assert bits.dtype == jnp.uint16
    np.testing.assert_array_equal(np.asarray(from_bits(bits, dtype)).view(np.uint16), every.view(np.uint16))


def test_wider_floats_stay_as_they_are():
    x = jnp.ones(3)
    assert to_bits(x) is x
    assert from_bits(x, jnp.float32) is x


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LOOPS)
def test_no_loop_writes_into_16_bit_floats(name, dtype):
    x = jax.ShapeDtypeStruct((1, 256, 2, 8), dtype)

    def loss(x):
        return jnp.sum(jax.tree.leaves(LOOPS[name](x))[0].astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    written = re.findall(r"dynamic_update_slice.*-> tensor<[\dx]+x(\w+)>", text)
    assert "ui16" in written
    assert not {"bf16", "f16"} & set(written)
