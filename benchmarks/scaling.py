"""`python -m benchmarks scaling`: memory and traffic of training on many GPUs, worked out on paper.

No GPU is needed and nothing is measured: docs/scaling.md has the formulas and these tables.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, NamedTuple

import jax
import tyro
from flax import nnx
from tabulate import tabulate

from configs import CONFIGS
from mdn_jax import MDNConfig, MDNForCausalLM

LENGTH = 4096
CHUNK, FACTORS = 64, 13

GB = 1e9
H100_FLOPS = 989.4e12
NVLINK = 450e9
"""Bytes a second that a GPU sends within a node of eight."""
NETWORK = 50e9
"""Bytes a second that a GPU sends between nodes: 400 Gb/s."""
NODE = 8


@cache
def models() -> dict[str, MDNConfig]:
    """The published models, and one of 7B with heads of the same size."""
    large = CONFIGS["mdn_1_3b"]().model
    return {
        "400M": CONFIGS["mdn_400m"]().model,
        "1.3B": large,
        "7B": MDNConfig(
            **large.to_dict() | {"hidden_size": 4096, "num_hidden_layers": 28, "num_heads": 12}
        ),
    }


class Size(NamedTuple):
    """Parameters of a model.

    Attributes:
      total: all of them.
      matrices: of projections, which every token is multiplied with, the output's apart.
      table: of the embedding, and as many of the output projection.
    """

    total: int
    matrices: int
    table: int


@cache
def size(name: str) -> Size:
    """Parameters, counted from the model itself."""
    from train.metrics.flops import projection_sizes
    from train.step import split_model

    config = models()[name]
    _, params = split_model(nnx.eval_shape(lambda: MDNForCausalLM(config, rngs=nnx.Rngs(0))))
    total = sum(x.size for x in jax.tree.leaves(params))
    return Size(total, projection_sizes(params), config.vocab_size * config.hidden_size)


def activation_bytes(config: MDNConfig, remat: str) -> float:
    """Bytes that an MDN block keeps of a token for the backward pass, in bfloat16.

    Args:
      config: of the model.
      remat: "none", "states" or "block", see `mdn_jax.models.remat`.
    """
    hidden, keys, values = config.hidden_size, config.key_dim, config.value_dim
    if remat == "block":
        return 2.0 * hidden
    # h and its norm, twice; q, k, v before and after the convolution, k in float16; errors,
    # outputs and their gate; gate and up of the MLP
    wide = 4 * hidden + 2 * (2 * keys + values) + keys + 3 * values + 2 * config.mlp_width
    # two matrices and the factors of a chunk; the gates and what their derivatives need, every head
    per_head = 2 * 2 * CHUNK + 4 * FACTORS + 4 * 20
    if remat == "none":  # and two states a chunk
        per_head += 2 * 2 * config.head_dim * config.head_v_dim // CHUNK
    return 2.0 * wide + config.value_heads * per_head


@dataclass(frozen=True)
class Plan:
    """One way to train a model.

    Attributes:
      model: name in `models`.
      data: copies of the parameters.
      fsdp: devices that share a copy's parameters.
      tensor: devices that share the heads and the MLP.
      rows: of a batch.
      micro: rows of a micro-batch on a device (on `tensor` devices together).
      remat: see `mdn_jax.models.remat`.
      context: devices that share the tokens of the same rows.
      length: tokens of a row.
    """

    model: str
    data: int
    fsdp: int
    tensor: int
    rows: int
    micro: int
    remat: str = "states"
    context: int = 1
    length: int = LENGTH

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.context * self.tensor

    @property
    def tokens(self) -> float:
        """Of a micro-batch on a device."""
        return self.micro * self.length / self.context

    @property
    def accumulation(self) -> int:
        """Micro-batches in a step."""
        return self.rows // (self.data * self.fsdp * self.micro)

    def state_bytes(self) -> float:
        """Parameters, two moments and the sum of the gradients in float32, rounded matrices."""
        n = size(self.model)
        copies = 12 + (4 if self.accumulation > 1 else 2)
        return (copies * n.total + 2 * n.matrices) / (self.fsdp * self.tensor)

    def gathered_bytes(self) -> float:
        """What a device has of parameters beside its own part while it computes.

        The rounded matrices, gathered before the loop over micro-batches; the output projection
        and the sum of its gradient, all of it.
        """
        n = size(self.model)
        gathered = 2 * n.matrices / self.tensor if self.fsdp > 1 else 0.0
        return gathered + (2 + 4) * n.table

    def activations(self) -> float:
        """Of the micro-batch on a device: what blocks keep, and logits in float32 and bfloat16.

        The axis `tensor` cuts all but the norms of the residual stream, which are gathered.
        """
        config = models()[self.model]
        norms = 2 * 2 * config.hidden_size
        block = norms + (activation_bytes(config, self.remat) - norms) / self.tensor
        return self.tokens * config.num_hidden_layers * block + 1.5 * 2**30

    def memory(self) -> float:
        """Bytes on a device."""
        return self.state_bytes() + self.gathered_bytes() + self.activations()

    def traffic(self) -> dict[str, float]:
        """Bytes that a device sends in a step, by axis; ring algorithms.

        `fsdp`: rounded matrices gathered once, their gradients scattered for every micro-batch; so
        is the gradient of the output projection, which every device has, in float32. `data`: the
        gradients of a device's part added up, over `context` too, once a step. `tensor`:
        activations `[tokens, hidden]` gathered twice a block and added up twice, forward and
        backward. `context`: the maps of stretches gathered in every
        block, forward and backward, and the last inputs of its convolutions.
        """
        n, config = size(self.model), models()[self.model]
        f, t, d, c = self.fsdp, self.tensor, self.data, self.context
        a, matrices = self.accumulation, 2 * n.matrices / t
        sums = 4 * 2 * 2 * self.tokens * config.hidden_size * config.num_hidden_layers
        head = a * 2 * 4 * n.table
        # of many micro-batches in float32
        each = 4 * n.total if a > 1 else 2 * n.matrices + 4 * (n.total - n.matrices)
        added, over = 2 * each / (f * t), d * c
        keys, values = config.head_dim, config.head_v_dim
        maps = config.value_heads * 8 * keys * (2 * keys + values)
        tails = 2 * config.conv_size * (2 * config.key_dim + config.value_dim)
        exchanged = 2 * a * self.micro * config.num_hidden_layers / t
        return {
            "fsdp": (matrices * (1 + a) + head) * (f - 1) / f,
            "data": added * (over - 1) / over,
            "context": exchanged * ((c - 1) * maps + (c > 1) * tails),
            "tensor": a * sums * (t - 1) / t,
        }

    def link_seconds(self, axis: str, sent: float) -> float:
        """The least time of a device's bytes; tensor lies innermost, then context, fsdp, data.

        Of a ring over several nodes only one in so many as it has members in a node leaves it.
        """
        t, c, f, d = self.tensor, self.context, self.fsdp, self.data
        inner, length = {
            "tensor": (1, t),
            "context": (t, c),
            "fsdp": (t * c, f),
            "data": (t * f, c * d),
        }[axis]
        if inner * length <= NODE:
            return sent / NVLINK
        return max(sent / NVLINK, sent / max(1, NODE // inner) / NETWORK)

    def seconds(self, mfu: float, links: float) -> tuple[float, float]:
        """Of computation and of communication in a step.

        Over `context` each device goes through its stretch twice: forward first for its map, with
        `2 K` more columns in every head, and backward first for the gradient of its states.

        Args:
          mfu: share of the peak that one GPU reaches by itself.
          links: share of their bandwidth that collectives reach.
        """
        n, config = size(self.model), models()[self.model]
        keys, values = config.head_dim, config.head_v_dim
        column = 12 * config.value_heads * keys * config.num_hidden_layers
        per_token = 3 * (2 * (n.matrices + n.table) + column * values)
        if self.context > 1:
            per_token += column * (2 * values + 2 * keys)
        compute = self.rows * self.length * per_token / (self.devices * H100_FLOPS * mfu)
        sent = sum(self.link_seconds(axis, x) for axis, x in self.traffic().items()) / links
        return compute, sent


PLANS = (
    Plan("1.3B", 8, 1, 1, rows=256, micro=4),
    Plan("1.3B", 1, 8, 1, rows=256, micro=4),
    Plan("1.3B", 64, 1, 1, rows=256, micro=4),
    Plan("1.3B", 8, 8, 1, rows=256, micro=4),
    Plan("1.3B", 1024, 1, 1, rows=1024, micro=1),
    Plan("1.3B", 128, 8, 1, rows=1024, micro=1),
    Plan("7B", 1, 8, 1, rows=1024, micro=1),
    Plan("7B", 1, 4, 2, rows=1024, micro=2),
    Plan("7B", 8, 8, 1, rows=1024, micro=1),
    Plan("7B", 1, 64, 1, rows=1024, micro=2),
    Plan("7B", 128, 8, 1, rows=1024, micro=1),
    Plan("7B", 128, 4, 2, rows=1024, micro=2),
)


LONG_PLANS = tuple(
    Plan("400M", 1, 1, 1, rows=8, micro=1, context=context, length=131_072)
    for context in (1, 2, 4, 8)
)


@dataclass(frozen=True)
class ScalingConfig:
    """What the times are worked out with."""

    mfu: float = 0.35
    """Share of 989 TFLOP/s that one GPU is taken to reach by itself."""
    links: float = 0.8
    """Share of their bandwidth that collectives are taken to reach."""


def scaling(config: Annotated[ScalingConfig, tyro.conf.arg(name="")]) -> None:
    """Prints the tables of docs/scaling.md."""
    print("\n\n".join(tables(config)))


def tables(config: ScalingConfig) -> list[str]:
    """Memory, traffic and time of every plan, and of long rows, in Markdown."""
    names = ["model", "GPUs", "data x fsdp x tensor"]
    parts = ["micro-batches", "state", "gathered", "activations", "GB a GPU"]
    links = ["fsdp GB", "data GB", "tensor GB", "compute s", "links s", "efficiency", "tokens/s"]
    memory, times = [], []
    for plan in PLANS:
        memory.append([*_name(plan), plan.accumulation, *_memory(plan)])
        traffic = [f"{plan.traffic()[axis] / GB:.1f}" for axis in ("fsdp", "data", "tensor")]
        times.append([*_name(plan), *traffic, *_times(plan, config)])
    long = [
        [
            plan.context,
            *_memory(plan),
            f"{plan.traffic()['context'] / GB:.2f}",
            f"{plan.traffic()['data'] / GB:.1f}",
            *_times(plan, config),
        ]
        for plan in LONG_PLANS
    ]
    heads = ["context", *parts[1:], "context GB", "sums GB", *links[3:]]
    return [
        tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
        for rows, headers in (
            (memory, [*names, *parts]),
            (times, [*names, *links]),
            (long, heads),
        )
    ]


def _name(plan: Plan) -> list[str]:
    mesh = f"{plan.data} x {plan.fsdp} x {plan.tensor}"
    return [plan.model, f"{plan.devices:,}", mesh]


def _memory(plan: Plan) -> list[str]:
    held = plan.state_bytes(), plan.gathered_bytes(), plan.activations(), plan.memory()
    return [f"{x / GB:.1f}" for x in held]


def _times(plan: Plan, config: ScalingConfig) -> list[str]:
    compute, sent = plan.seconds(config.mfu, config.links)
    speed = plan.rows * plan.length / (compute + sent)
    worst, best = compute / (compute + sent), compute / max(compute, sent)
    return [f"{compute:.2f}", f"{sent:.2f}", f"{worst:.0%} to {best:.0%}", f"{speed:,.0f}"]
