"""The decode kernel in Triton's own language, called through jax-triton.

The same steps as decode.py. It is there for the day when jax drops its Triton backend for Pallas.
"""

import triton
import triton.language as tl

from pallas_kernels.momentum_delta.decode import SHORTER, Decoded, DecodeOptions
from pallas_kernels.momentum_delta.types import Memory, Tokens


def decode(x: Tokens, memory: Memory, options: DecodeOptions) -> Decoded:
    """The kernel on padded arrays; arguments as in decode.py, `interpret` apart."""
    import jax_triton  # which fails where jax has no GPU

    z, tiles = x.sizes, options.tiles
    p = x.k if x.p is None else x.p
    gates = x.log_alpha, x.log_mu, x.beta, x.eta
    o, s, m = jax_triton.triton_call(
        *(x.q, x.k, x.v, p, *gates, memory.s, memory.m),
        kernel=mdn_decode,
        name="mdn_decode_triton",
        out_shape=[
            z.per_head(z.value_dim, x.v.dtype),
            z.memory.s,
            z.memory.m,
        ],
        grid=(z.batch * z.value_heads * (z.value_dim // tiles.block_v),),
        input_output_aliases={8: 1, 9: 2},
        num_warps=tiles.warps,
        num_stages=1,
        scale=options.scale,
        normalize=options.normalize,
        explicit_p=x.p is not None,
        steps=z.length,
        heads=z.heads,
        p_heads=z.p_heads,
        value_heads=z.value_heads,
        key_dim=z.key_dim,
        value_dim=z.value_dim,
        block_v=tiles.block_v,
    )
    return Decoded(o, Memory(s, m))


_SHORTER = tl.constexpr(SHORTER)


@triton.jit
def _normalized(y, normalize: tl.constexpr):
    y = y.to(tl.float32)
    if normalize:
        y *= _SHORTER
        square = tl.sum(y * y, axis=0)
        y *= tl.rsqrt(square + 0.0 * square + 1e-6 * _SHORTER * _SHORTER)
    return y


@triton.jit
def mdn_decode(
    q_ref,
    k_ref,
    v_ref,
    p_ref,
    log_alpha_ref,
    log_mu_ref,
    beta_ref,
    eta_ref,
    s_ref,
    m_ref,
    o_ref,
    s_out_ref,
    m_out_ref,
    scale: tl.constexpr,
    normalize: tl.constexpr,
    explicit_p: tl.constexpr,
    steps: tl.constexpr,
    heads: tl.constexpr,
    p_heads: tl.constexpr,
    value_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_v: tl.constexpr,
):
    """`[key_dim, block_v]` of one head's states, over all steps."""
    blocks: tl.constexpr = value_dim // block_v
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    head = program // blocks  # of all rows
    b, h = head // value_heads, head % value_heads
    rows = tl.arange(0, key_dim)
    columns = block * block_v + tl.arange(0, block_v)
    states = (head * key_dim + rows[:, None]) * value_dim + columns[None, :]
    s = tl.load(s_ref + states)
    m = tl.load(m_ref + states)
    for t in range(steps):
        step = b * steps + t
        keys = (step * heads + h // (value_heads // heads)) * key_dim + rows
        gate = step * value_heads + h
        values = gate * value_dim + columns
        q = _normalized(tl.load(q_ref + keys), normalize)
        k = _normalized(tl.load(k_ref + keys), normalize)
        alpha = tl.exp(tl.load(log_alpha_ref + gate))
        mu = tl.exp(tl.load(log_mu_ref + gate))
        if explicit_p:
            erased = (step * p_heads + h // (value_heads // p_heads)) * key_dim + rows
            p = tl.load(p_ref + erased).to(tl.float32)
        else:
            p = alpha * k
        # a document that starts sees nothing of the states, nan and inf included (isolation.py)
        seen = tl.sum(s * p[:, None], axis=0)
        if alpha + mu == 0:
            seen = tl.where(tl.abs(seen) < float("inf"), seen, 0.0)
        w = seen - tl.load(v_ref + values).to(tl.float32)
        kept = tl.where(mu == 0, 0.0, mu * m)
        m = kept + (tl.load(eta_ref + gate) * k)[:, None] * w[None, :]
        s = tl.where(alpha == 0, 0.0, alpha * s) - tl.load(beta_ref + gate) * m
        o = scale * tl.sum(s * q[:, None], axis=0)
        tl.store(o_ref + values, o.to(o_ref.dtype.element_ty))
    tl.store(s_out_ref + states, s)
    tl.store(m_out_ref + states, m)
