"""Inputs of the gated rules in the form that their implementations share."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class GatedInputs(NamedTuple):
    """Arrays of one call, or of a piece of it, with the value heads grouped by their key head.

    Letters: `B` batch, `T` time, `H` key heads, `G` value heads per key head, `K`, `V` head dims.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H G V"]
    log_alpha: Float[Array, "B T H G *channel"]  # one for the head, or one a key channel
    beta: Float[Array, "B T H G"]
    p: Float[Array, "B T H P K"] | None  # P = 1 (shared by a group) or G; None means alpha * k
    starts: Bool[Array, "B T"]  # the first step of a document, but for a row's first document
    erase: Float[Array, "B T H G K"] | None = None  # reads the decayed state; None means k
    own: Float[Array, "B T H G"] | None = None  # beta as the step's own query sees it; None: beta

    @property
    def by_channel(self) -> bool:
        """Whether every key channel has its own decay."""
        return self.log_alpha.ndim == self.beta.ndim + 1
