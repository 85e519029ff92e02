"""What each part of a training step must do at least, from the shapes."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from benchmarks.costs import Cost, operator_cost
from mdn_jax import MDNConfig
from pallas_kernels.momentum_delta.types import Sizes

_WIDE = 4
_OF_A_PARAMETER = 28
"""Bytes: the gradient is read, the parameter and two moments are read and written, in float32."""


def part_costs(
    model: MDNConfig, parameters: int, *, rows: int, length: int, dtype: Any, accumulation: int = 1
) -> dict[str, Cost]:
    """The cost of each part of one step on one device, over all layers, both passes.

    Operations are those of the products. Bytes are every array that goes into a part or comes out
    of it, once, and with it its gradient: what a part hands on inside itself is not counted.

    Args:
      model: the model.
      parameters: their number.
      rows: of a micro-batch.
      length: tokens in a row.
      dtype: of the computation.
      accumulation: micro-batches.
    """
    tokens, size = rows * length, jnp.dtype(dtype).itemsize
    layers = model.num_hidden_layers
    attention = sum(map(model.is_attention, range(layers)))
    mixers = layers - attention if set(model.mixers) <= {"mdn", "attention"} else 0

    def products(count: int, inputs: int, outputs: Iterable[int]) -> Cost:
        """Of `count` layers: weights from these inputs to each of these outputs."""
        widths = list(outputs)
        entries = inputs * sum(widths)
        arrays = tokens * (inputs + sum(widths)) + entries
        return _times(count, Cost(6 * tokens * entries, 2 * size * arrays))

    def moved(count: int, arrays: int, width: int, extra: int = 0) -> Cost:
        """Of `count` layers: `arrays` of this width a token, and other bytes."""
        return Cost(0, count * (tokens * arrays * width * size + extra))

    hidden, key, value = model.hidden_size, model.key_dim, model.value_dim
    sizes = (rows, length, *_head_counts(model), model.head_dim, model.head_v_dim)
    gate_columns = 4 * model.value_heads
    inner = [key, key, value, *([value] if model.use_gate else [])]
    rule = operator_cost(Sizes(*sizes), dtype, backward=True)
    gates = Cost(
        6 * tokens * hidden * gate_columns,
        tokens * (3 * hidden * size + 3 * gate_columns * _WIDE),
    )
    # x, y; x, dy, the gradient past the norm, dx. Gated: x, gate, y; x, gate, dy, dx, dgate
    residual, gated = moved(2 * layers, 6, hidden), moved(mixers, 8 if model.use_gate else 5, value)
    mlp = products(layers, hidden, [model.mlp_width] * 2)
    down = products(layers, model.mlp_width, [hidden])
    vocabulary = model.vocab_size * hidden
    costs = {
        "MLP": Cost(mlp.flops + down.flops, 2 * size * layers * tokens * 2 * hidden),
        "norms": Cost(0, residual.bytes + gated.bytes),
        "projections": _sum(products(mixers, hidden, inner), products(mixers, value, [hidden])),
        "gates": _times(mixers, gates),
        "convolutions": moved(mixers, 5, 2 * key + value),  # x, y; x, dy, dx
        "kernel": _times(mixers, rule),
        "embeddings": Cost(0, tokens * hidden * 2 * (_WIDE + size) + vocabulary * _WIDE),
        "loss": Cost(6 * tokens * vocabulary, 2 * tokens * hidden * size + 2 * vocabulary * _WIDE),
    }
    costs = {name: _times(accumulation, cost) for name, cost in costs.items()}
    costs["optimizer"] = Cost(0, _OF_A_PARAMETER * parameters)
    return {name: cost for name, cost in costs.items() if cost.flops or cost.bytes}


def _head_counts(model: MDNConfig) -> tuple[int, int, int]:
    """Of queries and keys, of erase keys and of values."""
    heads = model.num_heads
    return heads, heads, model.value_heads


def _times(count: int, cost: Cost) -> Cost:
    return Cost(count * cost.flops, count * cost.bytes)


def _sum(*costs: Cost) -> Cost:
    return Cost(sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs))
