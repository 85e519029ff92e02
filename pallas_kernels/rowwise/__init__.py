"""Kernels that walk along rows: cross entropy, root mean square norms backward, SwiGLU backward."""

from pallas_kernels.rowwise.cross_entropy import cross_entropy_fwd
from pallas_kernels.rowwise.rms_norm import MAX_WIDTH, Norm, rms_norm_bwd
from pallas_kernels.rowwise.support import unsupported
from pallas_kernels.rowwise.swiglu import swiglu_bwd

__all__ = ["MAX_WIDTH", "Norm", "cross_entropy_fwd", "rms_norm_bwd", "swiglu_bwd", "unsupported"]
