"""One token of every row in few, wide GPU kernels, in place of the model's layers.

The matrices of a layer are joined once, with a row for each output, and kept beside the model's
own: as many bytes again as the layers have, and the output projection unless it is the embedding.
Caches are the model's own before and after; in between convolutions keep theirs as a ring.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mdn_jax.layers.gates import MomentumGates
from mdn_jax.layers.momentum_deltanet import MDNCache, MomentumDeltaNet
from mdn_jax.layers.norm import RMSNorm
from mdn_jax.layers.stable_gates import LEAST_DECAY
from mdn_jax.models.causal_lm import Block, MDNForCausalLM, ModelCache
from mdn_jax.ops import api
from mdn_jax.ops.state import CompactState, MDNState


class FusedWeights(NamedTuple):
    """What the kernels read; a pytree.

    Attributes:
      embeddings: the model's own, `[vocab, hidden]`.
      layers: of every layer, `pallas_kernels.decoding.LayerWeights`.
      head: output projection times the scale of the norm before it, `[vocab, hidden]`, in the
        compute dtype.
    """

    embeddings: Float[Array, "vocab hidden"]
    layers: tuple[Any, ...]
    head: Float[Array, "vocab hidden"]


class FusedMemory(NamedTuple):
    """What rows keep of the tokens before, while the kernels run; a pytree.

    Attributes:
      layers: of every layer, `pallas_kernels.decoding.LayerMemory`.
      slot: where each row's rings have their oldest input.
    """

    layers: tuple[Any, ...]
    slot: Int[Array, " B"]


class FusedStructure(NamedTuple):
    """What is static of the kernels' steps in a compiled program.

    Attributes:
      plan: `pallas_kernels.decoding.Plan`.
      dtype: name of the compute dtype.
    """

    plan: Any
    dtype: str

    def steps(self, weights: FusedWeights) -> "FusedSteps":
        """The steps with these weights."""
        return FusedSteps(self.plan, self.dtype, weights)


class FusedSteps(NamedTuple):
    """Steps of single tokens by the kernels.

    Attributes:
      plan: `pallas_kernels.decoding.Plan`.
      dtype: name of the compute dtype.
      weights: of `fused_weights`.
    """

    plan: Any
    dtype: str
    weights: FusedWeights

    def enter(self, cache: ModelCache) -> FusedMemory:
        """The memory of a model's cache."""
        from pallas_kernels.decoding import LayerMemory  # not with the library

        def own(entry: Any) -> Any:
            tail = jnp.concatenate([entry.q_tail, entry.k_tail, entry.v_tail], axis=-1)
            return LayerMemory(entry.state.s, entry.state.m, tail.astype(self.dtype))

        rows = cache[0].q_tail.shape[0]  # type: ignore[union-attr]
        return FusedMemory(tuple(map(own, cache)), jnp.zeros((rows,), jnp.int32))

    def step(
        self, memory: FusedMemory, tokens: Int[Array, " B"], active: Array | None = None
    ) -> tuple[Float[Array, "B vocab"], FusedMemory]:
        """Logits after one more token of every row.

        Args:
          memory: before the tokens.
          tokens: ids; one outside the vocabulary gives nan there and in what follows.
          active: `[B]`, rows that take their token; the memory of others stays as it is, and their
            logits mean nothing. None: all.

        Returns:
          The logits, float32, and the memory after the tokens.
        """
        from pallas_kernels.decoding import Stream, logits  # not with the library

        weights, plan = self.weights, self.plan
        rows = tokens.shape[0]
        own = jnp.ones((rows,), jnp.int32) if active is None else active.astype(jnp.int32)
        inside = (tokens >= 0) & (tokens < weights.embeddings.shape[0])
        ids = jnp.where(inside, tokens, 0).astype(jnp.int32)
        h = jnp.take(weights.embeddings, ids, axis=0).astype(self.dtype)
        h = jnp.where(inside[:, None], h, jnp.nan)
        squares = jnp.sum(jnp.square(h.astype(jnp.float32)), axis=1, keepdims=True)
        stream, layers = Stream(h, squares), []
        for layer, before in zip(weights.layers, memory.layers, strict=True):
            stream, after = _layer(stream, layer, before, memory.slot, own, plan)
            layers.append(after)
        after = FusedMemory(tuple(layers), (memory.slot + own) % plan.conv_size)
        return logits(stream, weights.head, plan), after

    def leave(self, memory: FusedMemory) -> ModelCache:
        """The model's cache of a memory."""
        size, keys = self.plan.conv_size, self.plan.keys
        places = (memory.slot[:, None] + jnp.arange(size)) % size

        def own(layer: Any) -> MDNCache:
            tail = jnp.take_along_axis(layer.tail, places[:, :, None], axis=1)
            wide = layer.s.dtype == jnp.float32
            state = MDNState(layer.s, layer.m) if wide else CompactState(layer.s, layer.m, None)
            return MDNCache(state, *jnp.split(tail, (keys, 2 * keys), axis=-1))

        return tuple(map(own, memory.layers))


@partial(jax.jit, static_argnums=5)  # layers are traced and lowered once
def _layer(*arguments: Any) -> Any:
    from pallas_kernels.decoding import layer  # not with the library

    return layer(*arguments)


def fused_lacks(model: MDNForCausalLM, *, interpret: bool = False) -> str | None:
    """What the kernels expect of a model that is not so; None if they can run.

    Args:
      model: the model.
      interpret: in Pallas' interpreter, on any device.
    """
    from pallas_kernels.decoding import unsupported  # not with the library

    config = model.config
    for i, block in enumerate(model.layers):
        if type(block.mixer) is not MomentumDeltaNet:
            return f"Momentum DeltaNet in every layer, got {config.mixer_of(i)} in layer {i}"
        if block.mixer.implementation not in (None, "pallas_triton"):
            return f'implementation "pallas_triton" or None, got {block.mixer.implementation!r}'
    if not model.layers:
        return "at least one layer, got none"
    if not config.use_short_conv:
        return "short convolutions (use_short_conv), got none"
    if config.use_gate and config.use_lora_gate:
        return "an output gate of one projection (use_lora_gate = False), got two"
    if model.context_axis is not None:
        return f"context_axis None, got {model.context_axis!r}"
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    if any(isinstance(x, jax.core.Tracer) for x in parameters):
        return "a model whose parameters are known, got traced ones"
    devices = set().union(*(x.devices() for x in parameters))
    if len(devices) > 1:
        return f"parameters on one device, got {len(devices)}"
    capability = (9, 0) if interpret else api._capability()
    if not interpret and next(iter(devices)).platform != "gpu":
        capability = None
    hidden, width = config.hidden_size, config.mlp_width
    return unsupported(
        dtype=model.dtype,
        capability=capability,
        key_dim=config.head_dim,
        value_dim=config.head_v_dim,
        conv_size=config.conv_size,
        widths={"hidden_size": hidden, "HV * V": config.value_dim, "width of the MLP": width},
        largest=hidden * max(config.vocab_size, 2 * width, 2 * (config.key_dim + config.value_dim)),
    )


def fused_cache_lacks(cache: ModelCache) -> str | None:
    """What the kernels expect of a cache that is not so; None if they can go on from it."""
    for i, entry in enumerate(cache):
        if not isinstance(entry, MDNCache):
            return f"a cache of Momentum DeltaNet in layer {i}, got {type(entry).__name__}"
        if isinstance(entry.state, CompactState):
            if entry.state.state_dtype != "bfloat16":
                return f"states in float32 or bfloat16, got {entry.state.state_dtype}"
            continue
        dtypes = {x.dtype.name for x in entry.state}
        if dtypes != {"float32"}:
            return f"float32 states, got {', '.join(sorted(dtypes))}"
    return None


def fused_structure(model: MDNForCausalLM, *, interpret: bool = False) -> FusedStructure:
    """The kernels' steps for a model that lacks nothing.

    Args:
      model: the model.
      interpret: in Pallas' interpreter, on any device.
    """
    from pallas_kernels.decoding import Plan  # not with the library

    config = model.config
    gates = _gates_of(model.layers[0])
    plan = Plan(
        heads=config.num_heads,
        value_heads=config.value_heads,
        key_dim=config.head_dim,
        value_dim=config.head_v_dim,
        conv_size=config.conv_size,
        gated=config.use_gate,
        eps=config.norm_eps,
        tau=gates.tau,
        min_log_mu=config.min_log_mu,
        bound=config.bound,
        margin=gates.margin,
        least_decay=LEAST_DECAY,
        erase_by_alpha=config.use_p_times_alpha,
        interpret=interpret,
    )
    return FusedStructure(plan, jnp.dtype(model.dtype).name)


def fused_weights(model: MDNForCausalLM) -> FusedWeights:
    """The joined weights of a model that lacks nothing, as its parameters are now."""
    weights: FusedWeights = _join(*nnx.split(model))
    return weights._replace(embeddings=model.embeddings[...])


def fused_weights_shape(model: MDNForCausalLM) -> FusedWeights:
    """Shapes of the joined weights, all but the embeddings', of a model that may be of shapes."""
    graph, state = nnx.split(model)
    shapes: FusedWeights = jax.eval_shape(partial(_join, graph), state)
    return shapes


@partial(jax.jit, static_argnums=0)
def _join(graph: Any, state: Any) -> FusedWeights:
    model: MDNForCausalLM = nnx.merge(graph, state)
    dtype = model.dtype
    return FusedWeights(
        embeddings=jnp.zeros(()),  # the model's own
        layers=tuple(_of_layer(block, dtype) for block in model.layers),
        head=_rows([model.output_kernel()], dtype, model.norm),
    )


def _rows(kernels: list[Array], dtype: Any, norm: RMSNorm | None = None) -> Array:
    """Matrices `[inputs, outputs]` with a row for each output, one below the other.

    Args:
      kernels: matrices.
      dtype: of the result.
      norm: before them, whose scale goes into them; None: none.
    """
    if norm is not None:
        scale = norm.scale[...].astype(jnp.float32)[:, None]
        kernels = [scale * kernel.astype(jnp.float32) for kernel in kernels]
    return jnp.concatenate([kernel.astype(dtype).T for kernel in kernels], axis=0)


def _of_layer(block: Block, dtype: Any) -> Any:
    from pallas_kernels.decoding import GATES, Gates, LayerWeights  # not with the library

    mixer: Any = block.mixer
    gates = _gates_of(block)
    wide = jnp.float32
    columns = [y.kernel[...] for y in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    if mixer.g_proj is not None:
        columns.append(mixer.g_proj.kernel[...])
    projections = [getattr(gates, f"{name}_proj") for name in GATES]
    columns += [kernel[...] for kernel in projections if kernel is not None]
    convs = (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d)

    def factor(parameter: Any) -> Array | None:
        return None if parameter is None else jnp.exp(parameter[...].astype(wide))

    def bias(parameter: Any) -> Array | None:
        return None if parameter is None else parameter[...].astype(wide)

    mlp = block.mlp
    return LayerWeights(
        projections=_rows(columns, dtype, block.mixer_norm),
        taps=jnp.concatenate([conv.kernel[...].astype(wide) for conv in convs], axis=1),
        bias=None
        if convs[0].bias is None
        else jnp.concatenate([conv.bias[...].astype(wide) for conv in convs]),
        gates=Gates(
            rate=factor(gates.a_log),
            rate_bias=bias(gates.dt_bias),
            momentum_rate=factor(gates.mu_log),
            momentum_bias=bias(gates.mu_bias),
            factor=factor(gates.log_factor),
            step_bias=bias(gates.b_bias),
            correction=factor(mixer.d_log),
        ),
        output_norm=mixer.o_norm.scale[...],
        output=_rows([mixer.o_proj.kernel[...]], dtype),
        up=None
        if mlp is None
        else _rows([mlp.gate_proj.kernel[...], mlp.up_proj.kernel[...]], dtype, block.mlp_norm),
        down=None if mlp is None else _rows([mlp.down_proj.kernel[...]], dtype),
    )


def _gates_of(block: Block) -> MomentumGates:
    gates = block.mixer.gates  # type: ignore[union-attr]
    assert isinstance(gates, MomentumGates)
    return gates
