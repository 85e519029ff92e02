"""What the kernels cost on a GPU, found on a machine without one.

Lowering needs no GPU, and PyPI's Triton compiles what comes out for any compute capability; the
`ptxas` in its wheel reports registers, spills and shared memory. XLA carries a Triton of its own,
so the GPU's numbers may differ: it has spilled registers where this said none.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from pallas_kernels.momentum_delta import Memory, Tokens, momentum_delta
from pallas_kernels.momentum_delta.types import Leaf
from pallas_kernels.target import DEVICES, target_gpu
from pallas_kernels.tiling import KEY_DIMS, SHARED_MEMORY, Tiles, unsupported

_LENGTH, _HEADS, _DECODE_BATCH = 4096, 6, 64


class Case(NamedTuple):
    """A call to compile for.

    Attributes:
      key_dim: K.
      value_dim: V.
      dtype: of q, k, v: "bfloat16", "float16" or "float32".
      capability: compute capability, one of `DEVICES`.
      explicit_p: with an erase key of its own.
      batch: rows of six heads; few of them take other tiles.
      precise: of bfloat16 inputs: float32 between the kernels.
      pieces: that the state passes cut a row in; None: those that ship for 64 chunks.
      stretch: of a row that lies on several devices.
    """

    key_dim: int
    value_dim: int
    dtype: str
    capability: tuple[int, int]
    explicit_p: bool = False
    batch: int = 8
    precise: bool = False
    pieces: int | None = None
    stretch: bool = False


class _Alone:
    """Devices that tell each other nothing."""

    def entering(self, phi: Leaf, u: Leaf, given: Leaf, seams: Leaf) -> Leaf:
        """What is given."""
        return given + 0 * (u + phi @ given)

    def leaving(self, phi: Leaf, own: Leaf, seams: Leaf) -> Leaf:
        """What the stretch itself returns."""
        return phi @ own


_ALONE = _Alone()
ALIASES = "output_operand_aliases"
_DTYPES = ("bfloat16", "float32")

_WHOLE = (
    Case(key_dim, value_dim, dtype, capability, explicit_p, batch, precise)
    for key_dim, value_dim, dtype, capability, explicit_p, batch, precise in (
        *product(KEY_DIMS, (16, 64, 128, 256, 512), _DTYPES, DEVICES, (False,), (8,), (False,)),
        *product((64, 128, 256), (256,), _DTYPES, DEVICES, (True,), (8,), (False,)),
        *product((128, 256), (32, 64, 256), ("bfloat16",), ((9, 0),), (False,), (1,), (False,)),
        *product(KEY_DIMS, (16, 64, 512), ("bfloat16",), ((9, 0),), (False, True), (8,), (True,)),
    )
    if not unsupported(
        key_dim,
        value_dim,
        capability,
        itemsize=jnp.dtype(dtype).itemsize,
        explicit_p=explicit_p,
    )
)
SHIPPED = (
    *_WHOLE,
    *(Case(size, 256, "bfloat16", (9, 0), batch=1, pieces=6) for size in KEY_DIMS),
    Case(256, 512, "bfloat16", (9, 0), batch=1, pieces=5),
    Case(128, 256, "bfloat16", (9, 0), batch=1, pieces=6, stretch=True),
    Case(256, 512, "bfloat16", (9, 0), batch=1, pieces=5, stretch=True),
)
"""Every K and what V takes, both kinds of erase key and of precision, few heads, in pieces."""

CI = (
    *(
        Case(*dims, dtype, capability)
        for dims, dtype, capability in product(
            ((16, 16), (64, 64), (128, 256), (256, 512)), _DTYPES, DEVICES
        )
        # small dims take less of everything: one device is enough, and (64, 64) in float32 has the
        # tiles of (128, 256)
        if min(dims) >= 128 or (capability == (9, 0) and (dims, dtype) != ((64, 64), "float32"))
    ),
    Case(128, 256, "bfloat16", (9, 0), explicit_p=True),
    Case(256, 512, "bfloat16", (9, 0), explicit_p=True, precise=True),
    Case(256, 256, "bfloat16", (9, 0), batch=1),
    Case(128, 256, "bfloat16", (9, 0), batch=1, pieces=6),
    Case(128, 256, "bfloat16", (9, 0), batch=1, pieces=6, stretch=True),
)
"""Part of `SHIPPED` that compiles in a few minutes."""


class Kernel(NamedTuple):
    """A lowered kernel.

    Attributes:
      name: as profilers show it.
      source: Triton IR.
      warps: warps of a program.
      stages: pipeline stages of its loops.
      in_place: results that take the memory of an operand.
      grid: programs along each axis.
    """

    name: str
    source: str
    warps: int
    stages: int
    in_place: int = 0
    grid: tuple[int, ...] = (1, 1, 1)


class KernelReport(NamedTuple):
    """What a compiled kernel needs of a GPU.

    Attributes:
      name: as profilers show it.
      warps: warps of a program.
      stages: pipeline stages of its loops.
      registers: of a thread.
      spilled: bytes of registers that a thread stores to local memory.
      shared: bytes of shared memory of a program.
      shared_limit: bytes of shared memory that a program may use.
      wgmma: warpgroup matrix instructions in the PTX.
      mma: warp matrix instructions in the PTX.
      cp_async: asynchronous copies to shared memory in the PTX.
    """

    name: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    shared_limit: int
    wgmma: int
    mma: int
    cp_async: int

    @property
    def over_limit(self) -> bool:
        """Whether it cannot run for lack of shared memory."""
        return self.shared > self.shared_limit


def lower(
    key_dim: int,
    value_dim: int,
    dtype: str,
    capability: tuple[int, int],
    explicit_p: bool = False,
    batch: int = 8,
    precise: bool = False,
    pieces: int | None = None,
    stretch: bool = False,
    *,
    tiles: Tiles | None = None,
) -> list[Kernel]:
    """The kernels of one forward and backward pass, in the order of the program, and of decoding.

    Args:
      key_dim: K.
      value_dim: V.
      dtype: of q, k, v: "bfloat16", "float16" or "float32".
      capability: compute capability, one of `DEVICES`.
      explicit_p: with an erase key of its own.
      batch: rows of six heads.
      precise: of bfloat16 inputs: float32 between the kernels.
      pieces: that the state passes cut a row in; None: those that ship.
      stretch: of a row that lies on several devices.
      tiles: None: those that ship.
    """

    def tokens(batch: int, length: int) -> Tokens:
        gate = jax.ShapeDtypeStruct((batch, length, _HEADS), jnp.float32)
        keys = jax.ShapeDtypeStruct((*gate.shape, key_dim), dtype)
        values = jax.ShapeDtypeStruct((*gate.shape, value_dim), dtype)
        return Tokens(keys, keys, values, keys if explicit_p else None, gate, gate, gate, gate)

    def entering(batch: int) -> Memory:
        state = jax.ShapeDtypeStruct((batch, _HEADS, key_dim, value_dim), jnp.float32)
        return Memory(state, state)

    def rule(x: Tokens, memory: Memory) -> tuple[jax.Array, Memory]:
        return momentum_delta(
            x,
            memory,
            starts=None,
            scale=key_dim**-0.5,
            normalize=True,
            precise=precise,
            pieces=pieces,
            tiles=tiles,
            capability=capability,
            exchange=_ALONE if stretch else None,
        )

    def both(x: Tokens, memory: Memory, cotangents: tuple[jax.Array, Memory]) -> Any:
        outputs, pullback = jax.vjp(rule, x, memory)
        return outputs, pullback(cotangents)

    x, memory = tokens(batch, _LENGTH), entering(batch)
    chunks = lowered(both, capability, x, memory, (x.v, memory))
    steps = lowered(rule, capability, tokens(_DECODE_BATCH, 1), entering(_DECODE_BATCH))
    return [*chunks, *steps]


def lowered(
    function: Callable[..., Any], capability: tuple[int, int], *arguments: Any
) -> list[Kernel]:
    """The kernels of a function, in the order of the program.

    Args:
      function: of arrays.
      capability: compute capability, one of `DEVICES`.
      *arguments: pytrees of arrays or their shapes.
    """
    with target_gpu(capability):
        traced = jax.jit(function).trace(*arguments)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    with module.context as context:
        dialect.register_dialect(context)
        return list(_kernels(module.operation))


def _kernels(operation: Any) -> Iterator[Kernel]:
    """Every call of a Triton kernel under `operation`."""
    for region in operation.regions:
        for block in region:
            for child in block:
                inner = child.operation
                if inner.name == "stablehlo.custom_call":
                    target = ir.StringAttr(inner.attributes["call_target_name"]).value
                    if target.endswith("triton"):
                        config = inner.attributes["mhlo.backend_config"]
                        yield Kernel(
                            name=ir.StringAttr(config["name"]).value,
                            source=str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)),
                            warps=ir.IntegerAttr(config["num_warps"]).value,
                            stages=ir.IntegerAttr(config["num_stages"]).value,
                            in_place=len(ir.ArrayAttr(inner.attributes[ALIASES])),
                            grid=tuple(
                                ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz"
                            ),
                        )
                yield from _kernels(inner)


def compile_kernel(kernel: Kernel, capability: tuple[int, int]) -> KernelReport:
    """Compiles with PyPI's Triton, which keeps results in its cache on disk.

    Args:
      kernel: from `lower`.
      capability: compute capability to compile for.

    Raises:
      ImportError: Triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError as error:
        raise ImportError(
            "compiling kernels without a GPU needs Triton (x86-64 Linux): "
            "install mdn-jax with the extra 'triton'"
        ) from error
    major, minor = capability
    arch = 10 * major + minor
    target = GPUTarget("cuda", arch, 32)
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder, f"{kernel.name}.ttir"), Path(folder, "kernel.ptx")
        source.write_text(kernel.source)
        source.write_text(_simplified(source, target))
        compiled = triton.compile(
            str(source),
            target=target,
            options={"num_warps": kernel.warps, "num_stages": kernel.stages},
        )
        text = compiled.asm["ptx"]
        ptx.write_text(text)
        # "a": with the instructions of this architecture alone, as Triton compiles
        flag = f"-arch=sm_{arch}{'a' if major >= 9 else ''}"
        log = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", flag, str(ptx), "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"expected {pattern!r} in the report of ptxas, got {log!r}")
        return int(found.group(1))

    return KernelReport(
        name=kernel.name,
        warps=kernel.warps,
        stages=kernel.stages,
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores"),
        shared=compiled.metadata.shared,
        shared_limit=SHARED_MEMORY[capability],
        wgmma=len(re.findall(r"\bwgmma\.mma_async", text)),
        mma=len(re.findall(r"\bmma\.sync", text)),
        cp_async=len(re.findall(r"\bcp\.async\.c[ag]\.", text)),
    )


def _simplified(source: Path, target: Any) -> str:
    """The IR after Triton's first passes, which XLA runs too.

    `triton.compile` skips them for IR in a file. By one of them products add onto accumulators.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ir.parse_mlir_module(str(source), context)
    module.context = context
    return str(backend.make_ttir(module, {}, backend.parse_options({}), target.arch))


def report(
    key_dim: int,
    value_dim: int,
    dtype: str,
    capability: tuple[int, int],
    explicit_p: bool = False,
    batch: int = 8,
    precise: bool = False,
    pieces: int | None = None,
    stretch: bool = False,
) -> list[KernelReport]:
    """Compiles the kernels of one forward and backward pass, and of decoding, as they ship.

    Args:
      key_dim: K.
      value_dim: V.
      dtype: of q, k, v: "bfloat16", "float16" or "float32".
      capability: compute capability, one of `DEVICES`.
      explicit_p: with an erase key of its own.
      batch: rows of six heads.
      precise: of bfloat16 inputs: float32 between the kernels.
      pieces: that the state passes cut a row in; None: those that ship.
      stretch: of a row that lies on several devices.

    Raises:
      ImportError: Triton is not installed.
    """
    case = Case(key_dim, value_dim, dtype, capability, explicit_p, batch, precise, pieces, stretch)
    kernels = lower(*case)
    return [compile_kernel(kernel, capability) for kernel in kernels]


def _report(case: Case) -> list[KernelReport]:
    return report(*case)


def reports(
    cases: Iterable[Case], processes: int | None = None
) -> Iterator[tuple[Case, list[KernelReport]]]:
    """`report` of each case, in order, as they come.

    Args:
      cases: such as `SHIPPED`.
      processes: that compile at once; None: one a core.
    """
    cases = list(cases)
    # not forked: jax runs threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from zip(cases, pool.map(_report, cases), strict=True)
