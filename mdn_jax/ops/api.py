"""`momentum_delta_rule`: checks its arguments and picks the implementation."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdn_jax.ops.arguments import check_momentum_rule, check_options
from mdn_jax.ops.context import over_context, varying
from mdn_jax.ops.fallback import reverse_mode_alone, warn_without_backend
from mdn_jax.ops.inputs import compute_dtype, entering_state, in_full_precision
from mdn_jax.ops.on_mesh import under_explicit_meshes
from mdn_jax.ops.portable import portable_rule
from mdn_jax.ops.state import CompactState, Kept, MDNState, computed_in_full

if TYPE_CHECKING:
    from pallas_kernels.momentum_delta import Numerics

Implementation = Literal["scan", "xla", "pallas_triton", "triton"]

_KERNELS: tuple[Implementation, ...] = ("pallas_triton", "triton")


@under_explicit_meshes
def momentum_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV"],
    log_mu: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    eta: Float[Array, "B T HV"],
    *,
    p: Float[Array, "B T _ K"] | None = None,
    scale: float | None = None,
    initial_state: Kept | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize_qk: bool = True,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Any]:
    """Momentum delta rule: a memory updated by gradient descent with momentum.

    For every value head, with `alpha = exp(log_alpha)`, `mu = exp(log_mu)` and `k, q` normalised:

        w_t = S_(t-1)^T p_t - v_t           the error of the memory before the write
        M_t = mu_t M_(t-1) + eta_t k_t w_t^T
        S_t = alpha_t S_(t-1) - beta_t M_t
        o_t = scale S_t^T q_t

    (MDN, arXiv 2605.05838, section 3.) `mu = 0, eta = 1` is the gated delta rule. Differentiable in
    every array argument and through the returned state; works under `jit`, `vmap`, `grad`,
    `jax.checkpoint` and `shard_map`; forward mode (`jax.jvp`) with `implementation="scan"` alone.
    Lengths change results by rounding alone: a single step, and on the kernels a long row of few
    heads, are summed in another order. For 16-bit inputs the kernels keep what passes between
    them in 16 bits; under `jax.default_matmul_precision("highest")` (or "float32")
    every implementation computes them as float32.

    Args:
      q: queries, float32, bfloat16, float16 or float64.
      k: keys, same shape and dtype as `q`.
      v: values, same dtype as `q`. `HV` is a multiple of `H`: value head `h` uses key head
        `h // (HV // H)`.
      log_alpha: log of the decay, at most 0 (nats); float32, or float64 for float64 inputs.
      log_mu: log of the momentum, at most 0 (nats); float32, or float64 for float64 inputs.
      beta: step size, at least 0; any float dtype, used in float32 (float64 for float64 inputs).
      eta: write scale, at least 0; as `beta`.
      p: erase key with `H` or `HV` heads, used as it is; None means `alpha` times the key `k` as
        the rule uses it (normalised if `normalize_qk`).
      scale: factor on the output; None means `K ** -0.5`.
      initial_state: state before the first step; None means zeros. With `segment_ids` it continues
        the row's first document. A `CompactState` is computed with in float32 and comes back as
        one; without gradients where one kernel takes it (up to 16 steps).
      segment_ids: document of each step, any integers. A change along `T` starts a document and
        resets both states: packed documents never see each other. What is not finite stays in its
        document (but for one that starts within the same chunk: docs/algorithm.md). The returned
        state is that of the last document.
      normalize_qk: l2-normalise `q` and `k` inside: `x / sqrt(sum(x^2) + 1e-6)`, of any finite
        length. Kernels: up to 1e19, the decode kernels up to 1e25; longer rows give nan. (Gradients
        on the chunk kernels are tested up to 1e15.)
      chunk_size: steps in a chunk ("scan": steps between kept states); None: chosen for the
        implementation.
      implementation: "scan" (the definition, slow), "xla" (chunkwise, everywhere),
        "pallas_triton" (kernels for CUDA GPUs, compute capability 8.0 and above, K <= 256,
        V <= 512, chunks of 64; up to 16 steps are one kernel that updates the states in place),
        "triton" (that last kernel in native Triton, where jax-triton is installed; up to 16 steps),
        or None: the best one that supports the call.
      context_axis: mesh axis of a surrounding `jax.shard_map` over which the tokens of a row are
        cut, into equal stretches in order (docs/long_context.md); None: the rows are whole.
        `initial_state` is that before the first device's stretch. Reverse mode alone.

    Returns:
      The outputs in `v`'s dtype, and the final state, float32 (float64 for float64 inputs). With
      `context_axis` the state is that after the whole row, on every device of the axis.

    Raises:
      ValueError: a shape, a value or an implementation name that does not fit.
      TypeError: a dtype or type that does not fit. Both name the argument, what was expected and
        what came.
    """
    check_momentum_rule(q, k, v, log_alpha, log_mu, beta, eta, p, initial_state, segment_ids)
    check_options(scale, chunk_size, implementation, get_args(Implementation))
    if context_axis is not None:
        over_devices = partial(
            _over_context,
            axis=context_axis,
            scale=scale,
            normalize_qk=normalize_qk,
            chunk_size=chunk_size,
            implementation=implementation,
        )
        named = (q, k, v, log_alpha, log_mu, beta, eta, p)
        return computed_in_full(over_devices, named, initial_state, segment_ids)
    return _run(
        *(q, k, v, log_alpha, log_mu, beta, eta),
        p=p,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        normalize_qk=normalize_qk,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def _run(
    q: Array,
    k: Array,
    v: Array,
    log_alpha: Array,
    log_mu: Array,
    beta: Array,
    eta: Array,
    *,
    p: Array | None,
    scale: float | Array | None,
    initial_state: Kept | None,
    segment_ids: Array | None,
    normalize_qk: bool,
    chunk_size: int | None,
    implementation: Implementation | None,
    **exchanged: Any,
) -> tuple[Array, Any]:
    """What `momentum_delta_rule` does with arguments that fit.

    `exchanged` are the arguments of `kernel_rule` where every device has a stretch of each row.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = _chosen(implementation, q, v, p, scale, chunk_size)
    compute = compute_dtype(q)
    gates = [jnp.asarray(x, compute) for x in (log_alpha, log_mu, beta, eta)]
    state: Kept | None = initial_state
    if initial_state is not None and not isinstance(initial_state, CompactState):
        state = MDNState(*(jnp.asarray(x, compute) for x in initial_state))
    arrays, state, segment_ids = varying(((q, k, v, p, *gates), state, segment_ids))
    with reverse_mode_alone("implementation", "scan", implementation):
        if implementation in _KERNELS:
            return _on_kernels(
                arrays,
                state,
                segment_ids,
                scale=float(scale),
                normalize=normalize_qk,
                native=implementation == "triton",
                **exchanged,
            )
        return computed_in_full(
            partial(
                portable_rule,
                scale=scale,
                normalize=normalize_qk,
                chunk_size=chunk_size,
                definition=implementation == "scan",
            ),
            arrays,
            state,
            segment_ids,
        )


def _over_context(
    arrays: tuple[Any, ...],
    state: MDNState | None,
    segment_ids: Array | None,
    *,
    axis: str,
    **options: Any,
) -> tuple[Array, MDNState]:
    """On rows whose tokens are cut over a mesh axis."""
    names = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta", "p")
    named = dict(zip(names, arrays, strict=True))
    if isinstance(options["scale"], jax.Array):
        named["scale"] = options.pop("scale")
    q, v = arrays[0], arrays[2]
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    s, m = (entering_state(x, shape, compute_dtype(q), v) for x in state or (None, None))
    rule = partial(momentum_delta_rule, **options)
    with reverse_mode_alone("context_axis", None, axis):
        return over_context(
            rule,
            axis,
            named,
            initial_state=MDNState(s, m),
            segment_ids=segment_ids,
            exchanging=partial(_run, **options) if _exchange(named, options) else None,
        )


def _exchange(arrays: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether the chunk kernels run, which find the map of a stretch beside its states."""
    q, v, p = (arrays[name] for name in "qvp")
    scale, chunk_size = (options.get(name) for name in ("scale", "chunk_size"))
    if "scale" in arrays or _chosen(options["implementation"], q, v, p, scale, chunk_size) != (
        "pallas_triton"
    ):
        return False
    from pallas_kernels.momentum_delta import MAX_STEPS  # not imported with the library

    return q.shape[1] > MAX_STEPS


def _chosen(
    implementation: Implementation | None,
    q: Array,
    v: Array,
    p: Array | None,
    scale: float | Array | None,
    chunk_size: int | None,
) -> Implementation:
    """What runs.

    Raises:
      ValueError: kernels that do not support the call.
    """
    if implementation is None:
        lacking = kernels_lack("pallas_triton", q, v, p, scale, chunk_size)
        warn_without_backend(lacking)
        return "xla" if lacking else "pallas_triton"
    if implementation in _KERNELS:
        lacking = kernels_lack(implementation, q, v, p, scale, chunk_size)
        if lacking:
            raise ValueError(
                f'implementation: "{implementation}" expects {lacking}; '
                'use implementation="xla", or None for the best one that supports the call'
            )
    return implementation


def _capability() -> tuple[int, int] | None:
    """Compute capability of `target_gpu` or the default device; None if it is no CUDA GPU."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        from pallas_kernels.target import targeted  # not imported with the library

        if capability := targeted():
            return capability
    if jax.default_backend() != "gpu":
        return None
    version = getattr(jax.devices()[0], "compute_capability", "")
    major, _, minor = str(version).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _numerics(dtype: jnp.dtype) -> "Numerics":
    """What the kernels compute in, for q of `dtype`, under `jax.default_matmul_precision`."""
    from pallas_kernels.momentum_delta import Numerics  # not imported with the library

    return Numerics.choose(dtype, full_precision=in_full_precision(), capability=_capability())


def kernels_lack(
    implementation: Implementation,
    q: Array,
    v: Array,
    p: Array | None,
    scale: float | Array | None,
    chunk_size: int | None,
) -> str | None:
    """What the GPU kernels would need that this call lacks; None if they can run it."""
    capability = _capability()
    if capability is None:
        return "a CUDA GPU as the default device (or mdn_jax.ops.target_gpu), got none"
    from pallas_kernels.backends import jax_triton_lacks, triton_lacks
    from pallas_kernels.momentum_delta import CHUNK, MAX_STEPS
    from pallas_kernels.tiling import unsupported

    if q.dtype == jnp.float64:
        return "float32, bfloat16 or float16 inputs, got float64"
    if any(map(jax.export.is_symbolic_dim, (*q.shape, *v.shape))):
        return f"sizes known when the call is traced, got q {q.shape}, v {v.shape}"
    if chunk_size not in (None, CHUNK):
        return f"chunk_size {CHUNK} or None, got {chunk_size}"
    if isinstance(scale, jax.core.Tracer):
        return "a scale known when the call is traced, got a traced value"
    if implementation == "triton":
        if q.shape[1] > MAX_STEPS:
            return f"at most {MAX_STEPS} steps, got T = {q.shape[1]}"
        if missing := jax_triton_lacks():
            return missing
    lacking = unsupported(
        q.shape[-1],
        v.shape[-1],
        capability,
        itemsize=_numerics(q.dtype).dtype.itemsize,
        explicit_p=p is not None,
    )
    if lacking is None and implementation == "pallas_triton":
        return triton_lacks()
    return lacking


def _on_kernels(
    arrays: tuple[Any, ...],
    state: Kept | None,
    segment_ids: Array | None,
    *,
    scale: float,
    normalize: bool,
    native: bool,
    **exchanged: Any,
) -> tuple[Array, Any]:
    from mdn_jax.ops.kernels import kernel_rule  # not imported with the library
    from pallas_kernels.momentum_delta import MAX_STEPS

    dtype = arrays[0].dtype
    numerics = _numerics(dtype)

    def converted(y: Any) -> Any:
        return None if y is None else jnp.asarray(y, numerics.dtype)

    def rule(arrays: tuple[Any, ...], state: Any, segment_ids: Array | None) -> tuple[Array, Any]:
        q, k, v, p, log_alpha, log_mu, beta, eta = arrays
        return kernel_rule(
            q=q,
            k=k,
            v=v,
            p=p,
            log_alpha=log_alpha,
            log_mu=log_mu,
            beta=beta,
            eta=eta,
            initial_state=state,
            segment_ids=segment_ids,
            scale=scale,
            normalize_qk=normalize,
            precise=numerics.precise,
            capability=_capability() or (9, 0),
            native=native,
            **exchanged,
        )

    inputs = (*map(converted, arrays[:4]), *arrays[4:])
    if arrays[0].shape[1] <= MAX_STEPS and not native:  # one kernel, which takes any state
        o, state = rule(inputs, state, segment_ids)
    else:
        o, state = computed_in_full(rule, inputs, state, segment_ids)
    return o.astype(dtype), state
