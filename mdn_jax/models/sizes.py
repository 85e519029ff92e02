"""How large a model is, from its configuration alone, and whether a machine can hold it."""

import contextlib
import os
from pathlib import Path

import jax

from mdn_jax.models.config import MDNConfig, Mixer

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parameter_count(config: MDNConfig) -> int:
    """Parameters of the model, exactly; nothing is built, however large it would be."""
    hidden = config.hidden_size
    counts: dict[Mixer, int] = {kind: _mixer(config, kind) for kind in set(config.mixers)}
    mlp = 3 * hidden * config.mlp_width + hidden if config.mlp_width else 0  # with its norm
    layers = sum(counts[kind] + hidden + mlp for kind in config.mixers)
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * hidden + layers + hidden


def check_fits(
    config: MDNConfig, *, bytes_each: int, device: jax.Device | None = None, pieces: int = 1
) -> None:
    """Raises if the parameters are more than the memory that they are meant for.

    To be called before anything is built. What fits here can still be too much for a computation.

    Args:
      config: of the model.
      bytes_each: least bytes that a parameter takes, with all that is held for it.
      device: that holds them; None: the host.
      pieces: devices over which they are cut.

    Raises:
      ValueError: names what was asked for and what there is.
    """
    memory = _host_memory() if device is None or device.platform == "cpu" else _limit(device)
    count = parameter_count(config)
    if memory is None or count * bytes_each <= memory * pieces:
        return
    where = "this machine" if device is None or device.platform == "cpu" else device.device_kind
    several = f" for each of {pieces} pieces" if pieces > 1 else ""
    raise ValueError(
        f"model: expected at most {_shown(memory)}{several} (the memory of {where}), got {count:,} "
        f"parameters, {_shown(count * bytes_each)} with {bytes_each} bytes each "
        f"(num_hidden_layers = {config.num_hidden_layers}, hidden_size = {config.hidden_size}, "
        f"mlp_width = {config.mlp_width}, vocab_size = {config.vocab_size})"
    )


def _mixer(config: MDNConfig, kind: Mixer) -> int:
    """Parameters of one layer's mixer."""
    hidden = config.hidden_size
    if kind == "attention":
        attention = config.attention
        kv_heads = attention.num_kv_heads or attention.num_heads
        kv = kv_heads * (hidden // attention.num_heads)
        biases = hidden + 2 * kv if attention.qkv_bias else 0
        return 2 * hidden * hidden + 2 * hidden * kv + biases
    channels = 2 * config.key_dim + config.value_dim
    convolved = config.use_short_conv and kind != "mamba3"
    taps = (config.conv_size + config.conv_bias) * channels if convolved else 0
    norms: dict[Mixer, int] = {"mamba2": config.value_dim, "mamba3": 2 * config.head_dim}
    norm = norms.get(kind, config.head_v_dim)
    output = norm + config.value_dim * hidden
    return hidden * channels + taps + _gates(config, kind) + _output_gate(config) + output


def _gates(config: MDNConfig, kind: Mixer) -> int:
    """Parameters of the gates, and of the corrections of queries."""
    hidden, heads = config.hidden_size, config.value_heads
    if kind == "mdn":
        momentum = (hidden + 2) * heads if config.use_momentum else 0
        correction = heads if config.use_output_correction else 0
        return (3 * hidden + 3) * heads + momentum + correction
    if kind == "titans":
        return (3 * hidden + 4) * heads
    if kind in ("kda", "gdn2"):
        through = config.head_v_dim * (hidden + config.key_dim)
        strengths = config.num_heads if kind == "kda" else config.key_dim + config.value_dim
        return through + hidden * strengths + config.num_heads + config.key_dim
    if kind == "mamba2":
        return (hidden + 3) * heads
    if kind == "mamba3":
        biases = 2 * (config.head_dim + 1) * heads
        return 3 * hidden * heads + hidden * (config.head_dim // 4) + biases
    feedback = (1 + config.use_output_correction) * config.num_heads if kind == "comba" else 0
    return (2 * hidden + 2) * heads + feedback


def _output_gate(config: MDNConfig) -> int:
    if not config.use_gate:
        return 0
    if not config.use_lora_gate:
        return config.hidden_size * config.value_dim
    return config.gate_rank * (config.hidden_size + config.value_dim) + config.value_dim


def _host_memory() -> int | None:
    """Bytes of the machine, or of the container; None where it does not say."""
    if not hasattr(os, "sysconf"):
        return None
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            sizes.append(int(Path(path).read_text()))
    return min(sizes)


def _limit(device: jax.Device) -> int | None:
    """Bytes that JAX may use of a device; None where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
