"""The kernels of a token's step, lowered and compiled on a machine without a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from tabulate import tabulate

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.fused import fused_structure, fused_weights_shape
from pallas_kernels.decoding import Stream, layer, logits
from pallas_kernels.offline_compile import Kernel, compile_kernel, lowered


def lowered_step(
    config: MDNConfig, dtype: str, batch: int, capability: tuple[int, int] = (9, 0)
) -> list[Kernel]:
    """The kernels of a layer and of the head, in the order of the program.

    Args:
      config: of the model.
      dtype: of parameters and computation.
      batch: rows.
      capability: compute capability of the GPU.
    """
    config = dataclasses.replace(config, num_hidden_layers=1)
    model = nnx.eval_shape(
        lambda: MDNForCausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    weights = fused_weights_shape(model)
    structure = fused_structure(model)
    memory = jax.eval_shape(lambda: structure.steps(weights).enter(model.init_cache(batch)))
    h = jax.ShapeDtypeStruct((batch, config.hidden_size), dtype)
    stream = Stream(h, jax.ShapeDtypeStruct((batch, 1), jnp.float32))

    def step(stream: Stream, weights: Any, memory: Any, active: Array) -> tuple[Array, Any]:
        own, plan = weights.layers[0], structure.plan
        stream, after = layer(stream, own, memory.layers[0], memory.slot, active, plan)
        return logits(stream, weights.head, plan), after

    return lowered(step, capability, stream, weights, memory, memory.slot)


def report(config: MDNConfig, dtype: str, batches: tuple[int, ...]) -> str:
    """Registers, spills and shared memory at each number of rows. Needs Triton.

    Args:
      config: of the model.
      dtype: of parameters and computation.
      batches: rows.
    """
    lines = []
    for batch in batches:
        for kernel in lowered_step(config, dtype, batch):
            found = compile_kernel(kernel, (9, 0))
            lines.append([batch, kernel.grid[0], *found[:6], *found[7:]])
    headers = ["batch", "programs", "kernel", "warps", "stages", "registers", "spilled B"]
    headers += ["shared B", "wgmma", "mma", "cp.async"]
    return tabulate(lines, headers=headers, tablefmt="github")
