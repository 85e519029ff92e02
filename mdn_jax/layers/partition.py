"""Over which axes of a mesh each parameter is cut."""

from jax.sharding import PartitionSpec

from mdn_jax.layers.sharding import FSDP, TENSOR

_REPLICATED, _PER_HEAD = PartitionSpec(), PartitionSpec(TENSOR)
_TO_HEADS, _FROM_HEADS = PartitionSpec(FSDP, TENSOR), PartitionSpec(TENSOR, FSDP)

# Heads and MLP over `tensor`, the width of the residual stream over `fsdp`. The vocabulary, which
# needs not be divisible by anything, is not cut: the width is, over both.
PARTITION = {
    "embeddings": PartitionSpec(None, (FSDP, TENSOR)),
    "lm_head": PartitionSpec((FSDP, TENSOR), None),
    "scale": _REPLICATED,
    "ns_coeffs": _REPLICATED,  # of Muon's state
    **dict.fromkeys(("a_proj", "b_proj", "m_proj", "e_proj", "w_proj"), _TO_HEADS),
    **dict.fromkeys(("dt_proj", "lam_proj"), _TO_HEADS),
    "angle_proj": PartitionSpec(FSDP, None),
    **dict.fromkeys(("a_log", "dt_bias", "mu_bias", "mu_log", "log_factor", "d_log"), _PER_HEAD),
    **dict.fromkeys(("b_bias", "decay", "d", "q_bias", "k_bias"), _PER_HEAD),
    **dict.fromkeys((f"{name}_proj.kernel" for name in ("q", "k", "v", "g")), _TO_HEADS),
    **dict.fromkeys((f"{name}_proj.bias" for name in ("q", "k", "v")), _PER_HEAD),
    **dict.fromkeys((f"{x}_conv1d.kernel" for x in "qkv"), PartitionSpec(None, TENSOR)),
    **dict.fromkeys((f"{x}_conv1d.bias" for x in "qkv"), _PER_HEAD),
    **dict.fromkeys(("g_proj.0.kernel", "f_proj.0.kernel"), PartitionSpec(FSDP, None)),
    **dict.fromkeys(("g_proj.1.kernel", "f_proj.1.kernel"), PartitionSpec(None, TENSOR)),
    "g_proj.1.bias": _PER_HEAD,
    "o_proj.kernel": _FROM_HEADS,
    **dict.fromkeys(("gate_proj.kernel", "up_proj.kernel"), _TO_HEADS),
    "down_proj.kernel": _FROM_HEADS,
}


def of_parameter(name: str) -> PartitionSpec:
    """How a parameter is cut, by the end of its name.

    Args:
      name: words with dots between them.

    Raises:
      KeyError: a parameter that `PARTITION` does not name.
    """
    words = [word for word in name.split(".") if word != "layers"]  # of the model, of a sequence
    for count in (3, 2, 1):
        spec = PARTITION.get(".".join(words[-count:]))
        if spec is not None:
            return spec
    raise KeyError(f"{name}: expected a parameter named in PARTITION of mdn_jax.layers.partition")
