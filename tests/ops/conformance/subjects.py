"""Every implementation here, and what is asked of it."""

import importlib.util
from functools import partial

import jax

from benchmarks.check import suite
from mdn_jax import momentum_delta_rule
from mdn_jax.ops.kernels import kernel_rule
from mdn_jax.testing import Limits, conformance_checks
from pallas_kernels.backends import jax_triton_lacks
from tests.kernels.helpers import SMALL

WIDE = {"float64": Limits(1e-12, 1e-12, same=1e-12), "float32": Limits(2e-5, 2e-5, same=1e-5)}
# 16-bit inputs: float32 arithmetic, so that only what has 16 bits is rounded
NARROW = {
    "bfloat16": Limits(5e-3, 5e-3, states=2e-5, gates=2e-5, same=5e-3),
    "float16": Limits(1e-3, 1e-3, states=2e-5, gates=2e-5, same=1e-3),
}
# a reset is a log gate of -110, so float32 sums of log gates lose two digits to it
KERNELS = {
    "float32": Limits(2e-5, 5e-5, same=5e-5),
    "bfloat16": Limits(5e-3, 1e-2, same=1e-2),
    "float16": Limits(5e-3, 1e-2, same=1e-2),
}
DECODE = {
    "float32": Limits(1e-6, 0, same=1e-6),
    "bfloat16": Limits(4e-3, 0, states=1e-6, same=4e-3),
    "float16": Limits(4e-3, 0, states=1e-6, same=4e-3),
}
# Triton's interpreter cuts float32 to bfloat16 where GPUs round: a number is up to 2^-7 off
NATIVE = DECODE | {"bfloat16": Limits(5e-3, 0, states=1e-6, same=5e-3)}
# few: the interpreters run one program after another
STEPS = {"chunk": 1, "lengths": (1, 2, 4), "gradients": False, "limits": DECODE}


def scan_and_xla():
    # as small as they may be: what is compiled is slow, for the compiler does not optimise here
    yield (
        "scan",
        conformance_checks(
            partial(momentum_delta_rule, implementation="scan"),
            key_dim=8,
            value_dim=12,
            dtypes=("float64", "bfloat16", "float16"),
            limits=WIDE | NARROW | {"float64": Limits(1e-13, 1e-12, same=1e-13)},
        ),
    )
    yield (
        "xla",
        conformance_checks(
            partial(momentum_delta_rule, implementation="xla"),
            key_dim=16,
            value_dim=12,
            dtypes=("float64", "float32", "bfloat16", "float16"),
            limits=WIDE | NARROW,
        ),
    )
    # chunks that no power of two divides, and more of them
    names = ("every_regime", "packed_and_grouped")
    for chunk in (16, 50):
        rule = partial(momentum_delta_rule, implementation="xla", chunk_size=chunk)
        checks = conformance_checks(rule, dtypes=("float64",), limits=WIDE, key_dim=8, value_dim=12)
        yield (
            f"xla_{chunk}",
            [x for x in checks if x.name in names],
        )


def interpreted():
    """The kernels in the interpreter, with tiles of several blocks."""
    chunks = partial(kernel_rule, interpret=True, tiles=SMALL)
    dtypes = ("float32", "bfloat16", "float16")
    # these two compile functions of their own, so that another subject costs nothing
    unpacked = ("every_regime", "no_state_and_odd_dims")
    packed = conformance_checks(chunks, dtypes=dtypes, limits=KERNELS)
    alone = conformance_checks(
        chunks, dtypes=dtypes, limits=KERNELS | {"float32": Limits(2e-5, 2e-5)}
    )
    yield (
        "kernels",
        [*(x for x in alone if x.name in unpacked), *(x for x in packed if x.name not in unpacked)],
    )
    # four pieces of 2, 2, 1 and 1 chunks; every regime: tests/kernels/test_pieces.py
    cut = partial(kernel_rule, interpret=True, tiles=SMALL._replace(pieces=4))
    names = ("packed_and_grouped", "no_leak", "bad_values", "bad_cotangents")
    checks = conformance_checks(cut, limits=KERNELS, lengths=(1, 64, 322))
    yield "kernels_in_pieces", [x for x in checks if x.name in names]
    # 16 bits between the kernels would be off by 1e-2 where gradients of gates nearly cancel
    precise = {"bfloat16": Limits(2.5e-3, 5e-3, states=2e-4, gates=2e-4)}
    names = ("every_regime", "packed_and_grouped")
    checks = conformance_checks(partial(chunks, precise=True), dtypes=("bfloat16",), limits=precise)
    yield "kernels_precise", [x for x in checks if x.name in names]
    yield "decode", conformance_checks(partial(kernel_rule, interpret=True), dtypes=dtypes, **STEPS)
    if importlib.util.find_spec("triton") is not None:
        # Triton's interpreter takes a second where Pallas' takes a hundredth; of blocks of V
        # there are several at the odd sizes
        rule = partial(kernel_rule, native=True)
        options = STEPS | {"limits": NATIVE, "value_dim": 16}
        checks = conformance_checks(rule, dtypes=dtypes, **options)
        names = (*names, "idle_steps")
        chosen = [x for x in checks if x.dtype == "float32" or x.name in names]
        yield "decode_triton", chosen


def compiled():
    """The kernels on the GPU that is there."""
    if jax.default_backend() == "gpu":
        native = jax_triton_lacks() is None
        yield "gpu", list(suite(momentum_delta_rule, native=native).values())


SUBJECTS = dict((*scan_and_xla(), *interpreted(), *compiled()))
