"""Which kernels a function launches, counted from a trace of the profiler."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData, ProfileOptions

from mdn_jax.models import Decoder, GenerationState, sampling_arrays, stop_array, with_room


class Launches(NamedTuple):
    """What GPUs did.

    Attributes:
      kernels: how often each kernel ran, by name.
      copies: of memory.
    """

    kernels: Counter[str]
    copies: int


class TokenLaunches(NamedTuple):
    """What one token takes.

    Attributes:
      kernels: by name; a kernel may run in some tokens only.
      copies: of memory.
    """

    kernels: dict[str, float]
    copies: float

    @property
    def total(self) -> float:
        """Kernels of all names."""
        return sum(self.kernels.values())


def launches_of(trace: ProfileData) -> Launches:
    """Counts a trace: kernels one by one, those of a CUDA graph too.

    XLA's profiler has a plane for each GPU, in it a line for each stream, in it an event for each
    kernel or copy, with its details. Other lines of a plane show the same kernels by operation.

    Raises:
      ValueError: no kernel of a GPU is in it; the planes and lines that are.
    """
    kernels: Counter[str] = Counter()
    copies, seen = 0, []
    for plane in trace.planes:
        for line in plane.lines:
            seen.append(f"{plane.name} {line.name}")
            if not (plane.name.startswith("/device:GPU:") and line.name.startswith("Stream #")):
                continue
            for event in line.events:
                details = _details(event)
                kernels[event.name] += "kernel_details" in details
                copies += "memcpy_details" in details
    kernels = +kernels
    if not kernels:
        lines = ", ".join(sorted(seen)[:20]) or "none"
        raise ValueError(f"trace: expected kernels on a stream of a GPU, got the lines {lines}")
    return Launches(kernels, copies)


def _details(event: jax.profiler.ProfileEvent) -> set[str]:
    """Names of what is known of an event."""
    with warnings.catch_warnings():  # of Python, about the type of the iterator
        warnings.simplefilter("ignore", DeprecationWarning)
        return {name for name, _ in event.stats}


def trace_of(run: Callable[[], object]) -> ProfileData:
    """The trace of a function, with what it leaves the device to do."""
    options = ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        return ProfileData.from_serialized_xspace(path.read_bytes())


def of_a_token(decoder: Decoder, state: GenerationState, *, block: int) -> TokenLaunches | None:
    """What each further token of all rows takes; None where that cannot be counted.

    That is on a device that is no GPU, and where both traces have the same kernels: it was seen
    once, of a loop that is a CUDA graph.

    Two runs of one compiled block, of few tokens and of twice as many: their difference has nothing
    of what a block does once.

    Args:
      decoder: that takes the tokens.
      state: they go on from.
      block: most tokens in a call of the loop, at least 2.
    """
    if jax.default_backend() != "gpu":
        return None
    most = min(block, 16) // 2 * 2
    rows = state.position.shape[0]
    sampling = sampling_arrays(
        None, rows, vocab_size=decoder.config.vocab_size, dtype=state.logits.dtype
    )
    stop = stop_array([()] * rows)
    state = with_room(decoder.model, state, block, None)

    def run(tokens: int) -> Launches:
        limits = np.full((rows,), tokens, np.int32)

        def block_of_tokens() -> object:
            return decoder.block(state, limits, sampling, stop, size=block)

        jax.block_until_ready(block_of_tokens())  # compiled, and graphs are made
        return launches_of(trace_of(block_of_tokens))

    found = difference(run(most // 2), run(most), most - most // 2)
    return found if found.kernels else None


def difference(few: Launches, many: Launches, tokens: int) -> TokenLaunches:
    """What a token takes, of runs of which one had so many tokens more."""
    names = sorted({*few.kernels, *many.kernels})
    kernels = {name: (many.kernels[name] - few.kernels[name]) / tokens for name in names}
    return TokenLaunches(
        {name: count for name, count in kernels.items() if count},
        (many.copies - few.copies) / tokens,
    )
