"""Arrays of more than 2^31 elements: no index on the way to an address overflows."""

import numpy as np
import pytest

from pallas_kernels import offline_compile
from pallas_kernels.offline_compile import Kernel
from pallas_kernels.tiling import choose_tiles
from tests.kernels.addresses import offsets

BATCH = 512
"""3.2e9 values and 6.4e9 numbers of chunk states at T 4096, H 6, K 128, V 256."""
LARGE = {
    "mdn_state_fwd",
    "mdn_state_fwd_again",
    "mdn_output_fwd",
    "mdn_dv_local_bwd",
    "mdn_state_bwd",
    "mdn_inter_chunk_bwd",
}
LARGE |= {"mdn_intra_chunk_bwd", "mdn_decode"}
"""Kernels that read or write values or states."""


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
def test_no_index_overflows(halves, monkeypatch):
    monkeypatch.setattr(offline_compile, "_DECODE_BATCH", 2**14)
    tiles = choose_tiles(128, 256, 2, (9, 0), heads=6 * BATCH)
    if halves:  # 24,576 walks, in three launches
        tiles = tiles._replace(state_fwd_resident=2**14, state_bwd_resident=2**14)
    kernels = offline_compile.lower(128, 256, "bfloat16", (9, 0), batch=BATCH, tiles=tiles)
    walks = [kernel for kernel in kernels if kernel.name in ("mdn_state_fwd", "mdn_state_bwd")]
    assert (len(kernels), len(walks)) == ((15, 6) if halves else (11, 2))
    for kernel in walks if halves else kernels:
        greatest = max(int(offset.max()) for offset in offsets(kernel))
        assert (greatest >= 2**31) == (kernel.name in LARGE), (kernel.name, greatest)


@pytest.mark.slow
def test_no_index_overflows_in_pieces():
    kernels = offline_compile.lower(128, 256, "bfloat16", (9, 0), batch=BATCH, pieces=3)
    walks = {"mdn_state_fwd", "mdn_state_fwd_ends", "mdn_state_bwd", "mdn_state_bwd_starts"}
    walks = [kernel for kernel in kernels if kernel.name in walks]
    assert len(walks) == 4
    for kernel in walks:
        assert max(int(offset.max()) for offset in offsets(kernel)) >= 2**31, kernel.name


def test_an_overflow_is_seen():
    source = """
    tt.func @kernel(%x: !tt.ptr<f32>) {
      %program = tt.get_program_id y : i32
      %width = arith.constant 65536 : i32
      %at = arith.muli %program, %width : i32
      %place = tt.addptr %x, %at : !tt.ptr<f32>, i32
      tt.return
    }
    """
    fits, too_many = (Kernel("kernel", source, 4, 1, grid=(1, n, 1)) for n in (2**15, 2**15 + 1))
    assert all(np.array_equal(offset, (2**15 - 1) * 2**16) for offset in offsets(fits))
    with pytest.raises(OverflowError, match="kernel: 2147483648 does not fit into i32"):
        list(offsets(too_many))
