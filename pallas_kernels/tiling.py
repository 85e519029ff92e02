"""Block shapes, warps and stages: a small deterministic table, no autotuning at run time.

The choices for bfloat16 at (128, 256) and (256, 512) were measured on an H100 or H200
(docs/kernels.md); the others follow from what fits into shared memory without spilling registers.
"""

from typing import NamedTuple

KEY_DIMS = (16, 32, 64, 128, 256)
"""Key dims that kernels run at; others are padded to the next."""
MAX_KEY_DIM, MAX_VALUE_DIM = 256, 512

SHARED_MEMORY = {
    (8, 0): 166_912,
    (8, 7): 166_912,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
}
"""Bytes of shared memory a block may use, by compute capability. Others have less than 102,400."""

_CORES = 132
"""Multiprocessors of an H100 or H200."""


class Tiles(NamedTuple):
    """Tile choices of every kernel; blocks in elements, the rest in warps and pipeline stages.

    `pieces` are those that the state passes cut a row in (`choose_pieces`).
    `dv_local_bwd` takes the blocks and warps of `output_fwd`. `state_fwd_resident` and
    `state_bwd_resident` are how many programs of those passes the device runs at once, where that
    was measured (None: not known).
    """

    intra_chunk_fwd_warps: int = 4
    state_fwd_block_v: int = 32
    state_fwd_warps: int = 4
    state_fwd_stages: int = 3
    state_fwd_resident: int | None = None
    output_fwd_block_v: int = 128
    output_fwd_warps: int = 4
    state_bwd_block_v: int = 32
    state_bwd_warps: int = 4
    state_bwd_stages: int = 2
    state_bwd_resident: int | None = None
    inter_chunk_bwd_block_k: int = 32
    inter_chunk_bwd_block_v: int = 64
    inter_chunk_bwd_warps: int = 4
    inter_chunk_bwd_stages: int = 2
    intra_chunk_bwd_block_k: int = 256
    intra_chunk_bwd_block_v: int = 64
    intra_chunk_bwd_warps: int = 4
    intra_chunk_bwd_stages: int = 2
    gate_bwd_warps: int = 2
    pieces: int = 1


class DecodeTiles(NamedTuple):
    """Block of V in elements and warps of the decode kernel."""

    block_v: int
    warps: int


def decode_tiles(key_dim: int, value_dim: int, heads: int) -> DecodeTiles:
    """The tiles of the decode kernel for padded dims.

    Args:
      key_dim: K, one of `KEY_DIMS`.
      value_dim: V, as `padded_value_dim` gives it.
      heads: value heads of all rows, `B * HV`.
    """
    # 128 bytes of a row of the state, unless the device would be left with idle cores
    block_v = 32 if value_dim >= 32 and heads * value_dim // 32 >= 512 else 16
    # 32 elements of each state to a thread
    return DecodeTiles(block_v, max(1, key_dim * block_v // 1024))


def padded_key_dim(key_dim: int) -> int:
    """The key dim that kernels run at."""
    return next(size for size in KEY_DIMS if size >= key_dim)


def padded_value_dim(value_dim: int) -> int:
    """The value dim that kernels run at: a power of two, or a multiple of 128."""
    if value_dim > 128:
        return -(-value_dim // 128) * 128
    return max(16, 1 << (value_dim - 1).bit_length())


def unsupported(
    key_dim: int,
    value_dim: int,
    capability: tuple[int, int] | None,
    *,
    itemsize: int = 2,
    explicit_p: bool = False,
) -> str | None:
    """Why a call cannot run on the kernels; None if it can.

    Args:
      key_dim: K.
      value_dim: V.
      capability: compute capability of the device; None for a device that is no CUDA GPU.
      itemsize: bytes of an element of q.
      explicit_p: with an erase key of its own.
    """
    if key_dim > MAX_KEY_DIM:
        return f"K at most {MAX_KEY_DIM}, got {key_dim}"
    if value_dim > MAX_VALUE_DIM:
        return f"V at most {MAX_VALUE_DIM}, got {value_dim}"
    if capability is None:
        return "a CUDA GPU, got none"
    if explicit_p and itemsize == 4 and key_dim > 128 and capability < (9, 0):
        # q, k and p of a chunk do not fit into shared memory together
        return f"K at most 128 with p given and float32 inputs, got {key_dim}"
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_MEMORY)
        return f"compute capability {known}, got {capability[0]}.{capability[1]}"
    return None


def choose_tiles(
    key_dim: int,
    value_dim: int,
    itemsize: int,
    capability: tuple[int, int],
    explicit_p: bool = False,
    precise: bool = False,
    *,
    heads: int,
    chunks: int = 1,
    pieces: int | None = None,
    stretches: bool = False,
) -> Tiles:
    """The tiles for padded dims.

    Args:
      key_dim: K, one of `KEY_DIMS`.
      value_dim: V, as `padded_value_dim` gives it.
      itemsize: bytes of an element of q: 2 or 4.
      capability: compute capability of the device, one of `SHARED_MEMORY`.
      explicit_p: with an erase key of its own, one more array to walk over.
      precise: 16-bit inputs, float32 between the kernels; from capability 9.0 on.
      heads: value heads of all rows, `B * HV`, each a walk for every block of V.
      chunks: of a row.
      pieces: that the state passes cut a row in; None: `choose_pieces`, where times are known.
      stretches: whether rows are stretches of longer ones (stretch.py).
    """
    if pieces is None:
        timed = itemsize == 2 and not precise and not explicit_p and capability >= (9, 0)
        pieces = 1
        if timed:
            pieces = choose_pieces(key_dim, value_dim, heads, chunks, stretches=stretches)
    # every piece is a row of its own: so many walks
    heads *= pieces
    if precise:
        tiles = _precise_tiles(key_dim, explicit_p)
    elif itemsize == 4:
        tiles = _float32_tiles(key_dim, capability, explicit_p)
    elif capability >= (9, 0):
        tiles = _hopper_tiles(key_dim, value_dim, explicit_p, heads)
    else:
        tiles = _ampere_tiles(key_dim)
    if itemsize == 2:
        tiles = tiles._replace(intra_chunk_fwd_warps=4 if key_dim == 256 else 2, gate_bwd_warps=1)
    clipped = {
        name: min(size, value_dim)
        for name, size in tiles._asdict().items()
        if name.endswith("_block_v")
    }
    return tiles._replace(**clipped, pieces=pieces)


def _precise_tiles(key_dim: int, explicit_p: bool) -> Tiles:
    """Of 16-bit inputs with float32 between the kernels."""
    three_large = explicit_p and key_dim == 256
    return Tiles(
        state_fwd_block_v=16,
        state_fwd_stages=2 if three_large else 3,
        output_fwd_block_v=32 if key_dim == 256 else 64,
        state_bwd_block_v=16,
        state_bwd_stages=1 if three_large else 2,
        inter_chunk_bwd_block_v=32,
        inter_chunk_bwd_stages=3,
        intra_chunk_bwd_warps=8 if key_dim == 256 else 4,
        intra_chunk_bwd_stages=3,
    )


def _hopper_tiles(key_dim: int, value_dim: int, explicit_p: bool, heads: int) -> Tiles:
    """Of 16-bit inputs, from capability 9.0 on."""
    tiles = Tiles(state_fwd_stages=2 if explicit_p else 3, inter_chunk_bwd_stages=3)
    if key_dim == 256:
        tiles = tiles._replace(
            output_fwd_block_v=64,
            state_bwd_warps=8,
            state_bwd_stages=1 if explicit_p else 2,
            intra_chunk_bwd_block_v=128,
            intra_chunk_bwd_warps=8,
        )
    elif key_dim == 128:
        # two programs on each of 132 cores
        tiles = tiles._replace(
            intra_chunk_bwd_block_v=128, state_fwd_resident=264, state_bwd_resident=264
        )
    if key_dim >= 128 and value_dim >= 32 and not explicit_p and heads * value_dim <= 16 * _CORES:
        # a core for each walk: narrow ones take shorter steps
        tiles = tiles._replace(state_fwd_block_v=16, state_fwd_stages=4, state_bwd_block_v=16)
    return tiles


def _ampere_tiles(key_dim: int) -> Tiles:
    """Of 16-bit inputs, below capability 9.0."""
    tiles = Tiles(
        state_fwd_stages=1,
        output_fwd_block_v=64,
        state_bwd_stages=1,
        inter_chunk_bwd_block_v=32,
        inter_chunk_bwd_stages=1,
        intra_chunk_bwd_block_v=32,
        intra_chunk_bwd_warps=8,
        intra_chunk_bwd_stages=1,
    )
    if key_dim == 256:
        return tiles._replace(state_fwd_warps=8, state_bwd_block_v=16, state_bwd_warps=8)
    if key_dim == 128:
        return tiles._replace(state_bwd_warps=8)
    return tiles


def _float32_tiles(key_dim: int, capability: tuple[int, int], explicit_p: bool) -> Tiles:
    tiles = Tiles(
        state_fwd_block_v=16,
        state_fwd_stages=1,
        output_fwd_block_v=32,
        state_bwd_block_v=16,
        state_bwd_stages=1,
        inter_chunk_bwd_block_v=32,
        inter_chunk_bwd_stages=1,
        intra_chunk_bwd_block_v=16,
        intra_chunk_bwd_warps=8,
        intra_chunk_bwd_stages=1,
    )
    if capability < (9, 0):
        # with 32 columns ptxas leaves a thread 32 registers and spills 6 KB
        tiles = tiles._replace(inter_chunk_bwd_block_v=16, inter_chunk_bwd_stages=2)
        if key_dim == 256:
            return tiles._replace(
                state_fwd_warps=8,
                output_fwd_block_v=16,
                state_bwd_warps=8,
                intra_chunk_bwd_block_v=32,
            )
        return tiles._replace(intra_chunk_bwd_block_v=32, intra_chunk_bwd_warps=4)
    if key_dim == 256:
        return tiles._replace(
            intra_chunk_bwd_block_k=64 if explicit_p else 128,
            intra_chunk_bwd_warps=8 if explicit_p else 4,
        )
    return tiles


class _StepTimes(NamedTuple):
    """Microseconds of a step of the state passes, one and two programs a multiprocessor.

    Attributes:
      narrow: of 16 columns, one program: forward, backward.
      forward: of 32 columns.
      ends: of 32 columns, forward, nothing stored.
      backward: of 32 columns.
    """

    narrow: tuple[float, float]
    forward: tuple[float, ...]
    ends: tuple[float, ...]
    backward: tuple[float, ...]


_TIMES = _StepTimes((1.65, 3.0), (2.0, 3.1), (1.8, 2.4), (3.0, 4.3))
_TIMES_256 = _StepTimes((2.2, 4.0), (2.7,), (2.3,), (5.1,))
_LINK, _LAUNCHES = 7.0, 20.0
"""Microseconds of a product between two pieces, and of a launch more with what is around it."""
_MOST_PIECES = 16
_WORTH = 0.85
"""Of the time of whole rows that rows in pieces take at most, to be cut."""


def choose_pieces(
    key_dim: int, value_dim: int, heads: int, chunks: int, *, stretches: bool = False
) -> int:
    """How many pieces the state passes cut a row in: those that take the least time, by a model.

    The first piece is walked once forward, and the last; those between also give how they map
    states (`2 K` columns) and from zero. All but the last are walked twice backward.
    docs/notebook/2026-11-pieces.md has the model, with what was measured.

    Args:
      key_dim: K, as the kernels have it.
      value_dim: V, the same.
      heads: value heads of all rows.
      chunks: of a row.
      stretches: of longer rows: then all pieces are walked twice, and have their map forward.
    """
    times = _TIMES_256 if key_dim == 256 else _TIMES
    block = min(32, value_dim)
    walks, maps = heads * value_dim // block, heads * 2 * key_dim // block

    def lasts(programs: int, steps: float, step: tuple[float, ...]) -> float:
        rounds, rest = divmod(programs, len(step) * _CORES)
        return steps * (rounds * step[-1] + (step[(rest - 1) // _CORES] if rest else 0.0))

    def whole(step: tuple[float, ...]) -> float:
        # or in halves (launches.py)
        return min(lasts(walks, chunks, step), lasts(2 * walks, chunks / 2, step))

    def cut(pieces: int) -> float:
        steps, inner, others = -(-chunks // pieces), pieces - 2, (pieces - 1) * walks
        if stretches:
            others = pieces * walks
            first = lasts(pieces * (walks + maps), steps, times.ends)
            back = 2 * lasts(others, steps, times.backward) + 2 * _LINK * (pieces - 1)
            return first + lasts(others, steps, times.forward) + back
        forward = lasts(walks + inner * (walks + maps), steps, times.ends)
        forward += lasts(others, steps, times.forward)
        return forward + 2 * lasts(others, steps, times.backward) + 2 * (_LINK * inner + _LAUNCHES)

    if key_dim >= 128 and value_dim >= 32 and heads * value_dim <= 16 * _CORES:
        one = chunks * sum(times.narrow)
    else:
        one = whole(times.forward) + whole(times.backward)
    most = min(_MOST_PIECES, chunks)
    if stretches:
        one = cut(1)
    best = min(range(2 if stretches else 3, most + 1), key=cut, default=1)
    return best if best > 1 and cut(best) < _WORTH * one else 1
