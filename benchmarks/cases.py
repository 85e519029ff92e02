"""The calls of `python -m benchmarks check`: every tile choice once, every feature often."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import jax.numpy as jnp

from mdn_jax import testing
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import GATE_REGIMES
from pallas_kernels.tiling import KEY_DIMS, Tiles, choose_tiles, unsupported

VALUE_DIMS = (16, 32, 64, 128, 256, 384, 512)
FEW_HEADS = 1
"""Value heads that take the tiles for few walks. One, for nothing then hides an error."""
MANY_HEADS = 67
"""Value heads that take the tiles for many walks, whatever V (from 32 on)."""


@dataclass(frozen=True)
class Case(testing.Case):
    """One call of the operator, and on what.

    Attributes:
      implementation: of the operator.
      precise: under `jax.default_matmul_precision("highest")`.
      pieces: that the state passes cut a row in; None: those that ship.
    """

    implementation: Implementation = "pallas_triton"
    precise: bool = False
    pieces: int | None = None

    @property
    def name(self) -> str:
        """Everything that is not the default, readable."""
        parts = [super().name]
        parts += [self.implementation] * (self.implementation != "pallas_triton")
        parts += ["precise"] * self.precise
        parts += [f"pieces{self.pieces}"] * (self.pieces is not None)
        return "_".join(parts)

    def with_heads(self, heads: int) -> "Case":
        """With rows enough for `heads` value heads."""
        return replace(self, rows=-(-heads // (self.heads * self.groups)))


CHOSEN = (
    # the largest states, where sums of many products cancel
    *(Case(256, 512, dtype, explicit_p=p) for dtype, p in (("bfloat16", True), ("float16", False))),
    # with heads enough for the tiles of many walks
    Case(256, 512, "bfloat16", regime="wide", heads=6),
    Case(256, 512, "float32", regime="ballistic"),
    # tiles of float32 that nothing else has run at full width
    *(Case(size, 256, "float32", regime="wide", length=200) for size in (32, 64, 96)),
    *(Case(size, 128, "float32", explicit_p=True, groups=2) for size in (32, 64, 96)),
    # sizes that are padded
    Case(24, 40, "bfloat16", explicit_p=True, documents=3, groups=2),
    Case(24, 200, "float32", regime="momentum_lost"),
    Case(96, 96, "bfloat16", regime="half_beta_zero", keys="zero"),
    # one or two steps more than a chunk, less than one, many chunks
    Case(64, 64, "bfloat16", length=20, initial_state=False),
    Case(128, 128, "float32", length=65, documents=4),
    Case(128, 256, "bfloat16", length=1024, regime="ballistic", documents=5, heads=2),
    # 320 walks over the chunks each way, taken in halves by three launches
    Case(128, 256, "bfloat16", length=200, heads=20, groups=2, documents=3),
    # the momentum forgets within a step, and its gradient is tiny
    *(Case(128, 256, dtype, regime="momentum_lost") for dtype in ("bfloat16", "float32")),
    # the inverse of nearly parallel keys
    *(Case(128, 256, dtype, keys="parallel") for dtype in ("bfloat16", "float32")),
)
"""Cases with a reason of their own."""

PRECISE = tuple(
    Case(*sizes, "bfloat16", p, regime, length, documents=3, keys=keys, precise=True)
    for sizes, p, regime, length, keys in (
        ((16, 16), True, "half_beta_zero", 130, "zero"),
        ((32, 32), False, "momentum_lost", 200, "zero"),
        ((64, 64), False, "ballistic", 200, "parallel"),
        ((128, 256), True, "momentum_lost", 130, "random"),
        ((256, 16), True, "wide", 130, "random"),
        ((256, 16), False, "layer", 200, "zero"),
        ((256, 32), True, "momentum_quarter", 200, "parallel"),
        ((256, 32), False, "half_beta_zero", 200, "parallel"),
        ((256, 512), True, "momentum_half", 200, "random"),
        ((256, 512), False, "wide", 130, "random"),
    )
)
"""Under full precision: every tile choice of its own."""


PIECES = (
    *(
        Case(128, 256, "bfloat16", regime=regime, length=1041, heads=2, keys=keys, pieces=count)
        for regime, keys, count in (
            ("layer", "random", 2),
            ("ballistic", "random", 3),
            ("momentum_lost", "random", 4),
            ("momentum_half", "parallel", 6),
            ("momentum_quarter", "random", 8),
            ("wide", "random", 12),
            ("half_beta_zero", "zero", 16),
        )
    ),
    Case(128, 256, "bfloat16", length=2048, documents=5, groups=2, pieces=6, initial_state=False),
    # pieces of many chunks
    Case(128, 256, "bfloat16", length=16_384, pieces=6),
    Case(128, 256, "bfloat16", regime="wide", length=16_384, documents=2, pieces=16),
    # as many chunks as pieces
    Case(128, 256, "float16", length=1000, documents=3, groups=2, pieces=16),
    Case(256, 512, "bfloat16", regime="layer", length=1041, documents=3, pieces=5),
    Case(256, 256, "bfloat16", regime="ballistic", length=1041, heads=2, pieces=4),
    *(
        Case(size, size, "bfloat16", length=1041, documents=3, groups=2, pieces=5)
        for size in (16, 32, 64)
    ),
    Case(24, 200, "bfloat16", regime="layer", length=1000, pieces=7),
    # tiles that the rule gives one piece, but for those who ask
    Case(128, 256, "bfloat16", explicit_p=True, length=1041, documents=3, heads=2, pieces=4),
    Case(128, 256, "float32", length=1041, documents=3, pieces=4),
    Case(256, 512, "bfloat16", explicit_p=True, length=600, precise=True, pieces=3),
)
"""Rows in pieces: every K that the rule cuts, each number of pieces in another regime."""


def _decode_cases() -> Iterator[Case]:
    """Up to 16 steps without gradients: each set of tiles of the decode kernel."""
    regimes = tuple(GATE_REGIMES)
    for i, (key_dim, many_heads) in enumerate(product(KEY_DIMS, (False, True))):
        length = (1, 16, 2, 7)[i % 4]
        one = Case(
            key_dim,
            256 if many_heads else (512, 40, 16, 128, 256)[i // 2],
            ("bfloat16", "float32", "float16")[i % 3],
            explicit_p=i % 3 == 1,
            regime=regimes[i % len(regimes)],
            length=length,
            heads=32 if many_heads else 1,
            groups=2,
            documents=min(3, length) if i % 5 > 2 else 1,
            keys=("random", "parallel", "random", "zero")[i // 2 % 4],
            initial_state=i % 4 != 3,
            backward=False,
        )
        yield one
        yield replace(one, implementation="triton")


def shipped_cases(capability: tuple[int, int]) -> list[Case]:
    """One case for each set of tiles that ships for the capability, then `CHOSEN`.

    Regimes, keys, lengths and the rest are dealt out evenly, the same way at each call. The decode
    kernel comes last, each case in both of its languages.
    """
    shapes = _tile_choices(capability)
    dealt = random.Random(0)

    def deal(options: Sequence) -> list:
        values = [options[i % len(options)] for i in range(len(shapes))]
        dealt.shuffle(values)
        return values

    features = zip(
        deal(tuple(GATE_REGIMES)),
        deal((130, 200)),
        deal((1, 1, 2)),
        deal((1, 2)),
        deal((1, 1, 3)),
        deal(("random", "random", "random", "parallel", "zero")),
        deal((True, True, False)),
        strict=True,
    )
    half = deal(("bfloat16", "bfloat16", "bfloat16", "float16"))
    cases = []
    for (key_dim, value_dim, itemsize, p, heads), sixteen, chosen in zip(
        shapes, half, features, strict=True
    ):
        # float16 holds no gradient that goes through a momentum of e^-30 (it ends at 6e-8), and
        # none of a zero key, which the normalisation multiplies by 1,000 (it ends at 65,504)
        beyond_float16 = chosen[0] == "momentum_lost" or chosen[5] == "zero"
        narrow = "bfloat16" if beyond_float16 else sixteen
        case = Case(key_dim, value_dim, "float32" if itemsize == 4 else narrow, p, *chosen)
        cases.append(case.with_heads(heads))
    cases += [x for x in CHOSEN if _runs(x, capability)]
    if capability >= (9, 0):
        cases += (*PRECISE, *PIECES)
    return list(dict.fromkeys((*cases, *_decode_cases())))


def _runs(case: Case, capability: tuple[int, int]) -> bool:
    itemsize = jnp.dtype(case.dtype).itemsize
    return not unsupported(
        case.key_dim, case.value_dim, capability, itemsize=itemsize, explicit_p=case.explicit_p
    )


def _tile_choices(capability: tuple[int, int]) -> list[tuple[int, int, int, bool, int]]:
    """K, V, bytes of an element, explicit p, heads: one for each K and set of tiles, V in turn."""
    chosen: list[tuple[int, int, int, bool, int]] = []
    for itemsize in (2, 4):
        for explicit_p in (False, True):
            for key_dim in KEY_DIMS:
                by_tiles: dict[Tiles, list[tuple[int, int]]] = {}
                for value_dim, heads in product(VALUE_DIMS, (FEW_HEADS, MANY_HEADS)):
                    if unsupported(
                        key_dim, value_dim, capability, itemsize=itemsize, explicit_p=explicit_p
                    ):
                        continue
                    tiles = choose_tiles(
                        key_dim, value_dim, itemsize, capability, explicit_p, heads=heads
                    )
                    sizes = by_tiles.setdefault(tiles, [])
                    # the fewest heads that take these tiles
                    if value_dim not in (v for v, _ in sizes):
                        sizes.append((value_dim, heads))
                for sizes in by_tiles.values():
                    value_dim, heads = sizes[len(chosen) // 3 % len(sizes)]
                    chosen.append((key_dim, value_dim, itemsize, explicit_p, heads))
    return chosen
