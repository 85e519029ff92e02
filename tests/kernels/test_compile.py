"""Every kernel lowers for the GPUs it ships for and, compiled, fits into their shared memory."""

import platform
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks import inspect as command
from pallas_kernels import offline_compile
from pallas_kernels.momentum_delta import Memory, Tokens, momentum_delta
from pallas_kernels.offline_compile import CI, Case, Kernel, KernelReport
from pallas_kernels.target import target_gpu
from tests.kernels import compiled

KERNELS = {
    "mdn_intra_chunk_fwd",
    "mdn_state_fwd",
    "mdn_state_fwd_again",
    "mdn_output_fwd",
    "mdn_dv_local_bwd",
    "mdn_state_bwd",
    "mdn_inter_chunk_bwd",
    "mdn_recompute_gamma",
    "mdn_intra_chunk_bwd",
    "mdn_gate_bwd",
}
IN_PIECES = {
    "mdn_state_fwd_ends",
    "mdn_state_fwd_ends_again",
    "mdn_piece_link",
    "mdn_state_bwd_starts",
    "mdn_piece_link_back",
}
"""Those of rows in pieces alone."""


def describe(case):
    major, minor = case.capability
    p = "_p" * case.explicit_p + f"_B{case.batch}" * (case.batch != 8)
    p += "_precise" * case.precise + f"_pieces{case.pieces}" * (case.pieces is not None)
    p += "_stretch" * case.stretch
    return f"K{case.key_dim}_V{case.value_dim}_{case.dtype}_sm{major}{minor}{p}"


HAS_TRITON = sys.platform == "linux" and platform.machine() == "x86_64"
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="the development version of Triton is for x86-64 Linux"
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CI, ids=describe)
def test_kernels_lower_compile_and_fit(case):
    """Compiling needs Triton and is left out where that does not install; see `compiled`."""
    kernels = offline_compile.lower(*case)
    in_place = {name: [0] for name in KERNELS} | {"mdn_decode": [2]}
    in_place["mdn_intra_chunk_bwd"] = [3 if case.explicit_p else 2]
    # d_v alone, or with walks in halves also the memory, and what launches before have written:
    # values, both states, and the units of either
    in_halves = case[:4] == (128, 256, "bfloat16", (9, 0)) and not case.pieces
    in_place["mdn_state_bwd"] = [3, 7, 7] if in_halves else [1]
    if in_halves:
        in_place["mdn_state_fwd"] = [2, 7, 7]
    if case.pieces:  # the states at the ends of pieces, and what the first launch has written
        in_place |= {"mdn_state_fwd": [6], "mdn_state_bwd": [6]}
        in_place |= {"mdn_state_fwd_ends": [0], "mdn_state_bwd_starts": [2]}
        in_place |= dict.fromkeys(("mdn_piece_link", "mdn_piece_link_back"), [1] * 4)
    if case.stretch:  # all pieces in both launches, the first of which stores ends alone
        in_place |= {"mdn_state_fwd": [1], "mdn_state_fwd_ends_again": [2]}
        in_place |= {"mdn_state_bwd": [2], "mdn_state_bwd_starts": [1]}
        in_place |= dict.fromkeys(("mdn_piece_link", "mdn_piece_link_back"), [1] * 5)
    in_place["mdn_state_fwd_again"] = [5 if case.precise or case.dtype == "float32" else 7]
    found = {name: [k.in_place for k in kernels if k.name == name] for name in in_place}
    assert found == in_place
    assert len(kernels) == sum(map(len, in_place.values()))
    for kernel in kernels:
        assert "tt.func" in kernel.source, kernel.name
        of_products = kernel.name in KERNELS | IN_PIECES
        assert ("tt.dot" in kernel.source) == of_products, kernel.name
    if not HAS_TRITON:
        return
    reports = [compiled.report(kernel, case.capability) for kernel in compiled.different(kernels)]
    assert not [report for report in reports if report.over_limit]
    for report in reports:
        assert (report.wgmma + report.mma > 0) == (report.name in KERNELS | IN_PIECES), report
        # the loop of the one and the loads before the loop of the other have registers to spare
        timed = case.dtype == "bfloat16" and case.capability == (9, 0) and not case.explicit_p
        if report.name == "mdn_decode" or (timed and report.name == "mdn_inter_chunk_bwd"):
            assert report.spilled == 0, report


@pytest.mark.slow
@needs_triton
def test_the_record_is_what_the_compiler_says():
    case = next(case for case in CI if case[:4] == (16, 16, "bfloat16", (9, 0)))
    for kernel in compiled.different(offline_compile.lower(*case)):
        if kernel.name in ("mdn_output_fwd", "mdn_gate_bwd"):
            report = compiled.report(kernel, case.capability)
            assert report == offline_compile.compile_kernel(kernel, case.capability)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("explicit_p", [False, True])
def test_native_decode_compiles(architecture, explicit_p):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.momentum_delta.decode_triton import mdn_decode

    sizes = {"heads": 2, "p_heads": 1, "value_heads": 4, "key_dim": 128, "value_dim": 256}
    constants = {"scale": 0.1, "normalize": True, "explicit_p": explicit_p, "steps": 3, **sizes}
    constants |= {"block_v": 32}
    names = [name for name in mdn_decode.arg_names if name not in constants]
    narrow = ("q_ref", "k_ref", "v_ref", "p_ref", "o_ref")
    signature = {name: "*bf16" if name in narrow else "*fp32" for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(mdn_decode, signature, constants)
    program = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert f".target sm_{architecture}" in program.asm["ptx"]
    assert "mdn_decode" in program.asm["ptx"]


def test_odd_dims_and_vmap_lower():
    """A fourth grid axis, which no GPU has, is folded."""
    per_step = jax.ShapeDtypeStruct((2, 1, 70, 3), jnp.float32)
    keys, values = (jax.ShapeDtypeStruct((2, 1, 70, 3, size), jnp.float16) for size in (24, 40))
    state = jax.ShapeDtypeStruct((2, 1, 3, 24, 40), jnp.float32)
    x = Tokens(keys, keys, values, None, per_step, per_step, per_step, per_step)
    with target_gpu((9, 0)):
        traced = jax.jit(jax.vmap(gradient)).trace(x, Memory(state, state))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(name in text for name in KERNELS)


def test_shard_map_lowers():
    """With `check_vma`, which the interpreter lacks."""
    per_step = jax.ShapeDtypeStruct((2, 64, 1), jnp.float32)
    keys = jax.ShapeDtypeStruct((2, 64, 1, 16), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((2, 1, 16, 16), jnp.float32)
    x = Tokens(keys, keys, keys, None, per_step, per_step, per_step, per_step)
    data = PartitionSpec("data")
    with target_gpu((9, 0), {"data": 2}):
        sharded = jax.shard_map(gradient, in_specs=(data, data), out_specs=data)
        traced = jax.jit(sharded).trace(x, Memory(state, state))
        traced.lower(lowering_platforms=("cuda",))


def gradient(x, state):
    def rule(x, state):
        return momentum_delta(x, state, starts=None, scale=1.0, normalize=True)

    outputs, pullback = jax.vjp(rule, x, state)
    return outputs, pullback(outputs)


def test_an_unknown_capability():
    with pytest.raises(ValueError, match=r"capability: expected one of .* got \(7, 5\)"):
        offline_compile.lower(16, 16, "bfloat16", (7, 5))


def test_triton_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="the extra 'triton'"):
        offline_compile.compile_kernel(Kernel("name", "module {}", 4, 1), (9, 0))


@pytest.mark.parametrize("shared", [232_448, 232_449])
def test_command_fails_over_the_limit(shared, monkeypatch, capsys):
    report = KernelReport("mdn_gate_bwd", 4, 1, 255, 8, shared, 232_448, 16, 0, 0)
    monkeypatch.setattr(command, "reports", lambda cases, _: ((case, [report]) for case in cases))
    config = command.InspectConfig(
        shapes=((16, 32),), dtypes=("bfloat16",), capabilities=("9.0",), explicit_p=True
    )
    assert command._cases(config) == [Case(16, 32, "bfloat16", (9, 0), explicit_p=True)]
    if report.over_limit:
        with pytest.raises(SystemExit, match="1 kernel"):
            command.inspect(config)
    else:
        command.inspect(config)
    out = capsys.readouterr().out
    assert "mdn_gate_bwd" in out
    assert "spills" in out
    assert ("OVER" in out) == report.over_limit
