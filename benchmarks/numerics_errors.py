"""What `python -m benchmarks numerics` measures and draws."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Errors(NamedTuple):
    """Relative errors of every head (Frobenius norm), nan where something is not finite.

    Attributes:
      regime: of the gates.
      dtype: of q, k and v.
      form: of the coefficients.
      nats: largest sum of log alpha - log mu over a chunk, of every head.
      errors: by quantity.
    """

    regime: str
    dtype: str
    form: str
    nats: NDArray[np.float64]
    errors: dict[str, NDArray[np.float64]]
