"""`mdn-generate`: continues text with a checkpoint."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self, TextIO

import tyro

from mdn_jax.cli.common import CheckpointConfig, open_checkpoint, parse, run
from mdn_jax.cli.interrupt import Interrupt
from mdn_jax.errors import RunError
from mdn_jax.models import Decoder as ModelDecoder
from mdn_jax.models import (
    GenerationState,
    MDNForCausalLM,
    Piece,
    Sampling,
    prefill,
    stream,
    with_states,
)
from mdn_jax.models.fields import require
from mdn_jax.models.state_file import load_state, save_state
from mdn_jax.models.steps import StepKind
from mdn_jax.new_file import check_place
from mdn_jax.ops.state import StateDtype
from mdn_jax.text.decoding import Decoder
from mdn_jax.text.text import Text

PROGRAM = "mdn-generate"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CheckpointConfig):
    """Continues text with a checkpoint; the text goes to the terminal as it is made."""

    prompt: tuple[str, ...] = ()
    """Texts to continue, each as if it were alone; none: the start of a document."""

    prompt_file: Path | None = None
    """A file with one text to continue, in place of `prompt`; "-": standard input."""

    max_new_tokens: int = 256
    """Tokens to generate for each text, at most."""

    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Sampling(temperature=0.8)
    )
    """How tokens are drawn."""

    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a text beside the tokenizer's end token; they are not shown. For bytes, 10
    is the end of a line."""

    ignore_end: bool = False
    """Go on behind the tokenizer's end token."""

    special_tokens: bool = True
    """Special tokens that a prompt spells (<|endoftext|>) are those tokens; else they are text."""

    seed: int = 0
    """Seed of the first text; the next ones have the next seeds."""

    max_length: int | None = None
    """Most tokens a text may have, for models with attention without a window; None: any."""

    block: int = 16
    """Tokens in one call of the compiled loop: the steps in which text appears."""

    steps: StepKind | None = None
    """What takes single tokens: the model's own layers, or few, wide GPU kernels for models and
    devices that they support (docs/inference.md); None: what is faster."""

    state_dtype: StateDtype | None = None
    """How states of momentum delta rules are kept while generating; None: as they are, in float32
    or as in the file of `load_state`."""

    piece: int = 8192
    """Most tokens of the prompts in one call of the model, over all of them."""

    logprobs: Path | None = None
    """Write a line of JSON for each token to this file: its row, id, log-probability (nats, of the
    model's own distribution), and the likeliest tokens there with theirs."""

    likeliest: int = 5
    """How many likeliest tokens go into `logprobs`."""

    load_state: Path | None = None
    """Continue from a file of `save_state`; the prompts come after what it has had."""

    save_state: Path | None = None
    """Write the state after the last token to this file."""


@dataclass
class _Timing:
    """Seconds and tokens of a run."""

    began: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    first_tokens: int = 0

    def count(self, piece: Piece) -> None:
        self.last = time.perf_counter()
        new = sum(map(len, piece.tokens))
        self.tokens += new
        if self.first is None:
            self.first, self.first_tokens = self.last, new

    def describe(self) -> str:
        if self.first is None:
            return "no tokens"
        text = f"{self.tokens} tokens, the first after {self.first - self.began:.2f} s "
        text += "(compilation included)"
        later = self.tokens - self.first_tokens
        if later and self.last > self.first:
            text += f", then {later / (self.last - self.first):,.1f} tokens/s"
        return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; None means `sys.argv`.

    Returns:
      The exit status: 0, 1 for an error in what the user asked for, 128 + n after signal n.
    """
    config = parse(PROGRAM, __doc__, GenerateConfig, arguments)
    return run(PROGRAM, lambda: generate_text(config))


def generate_text(config: GenerateConfig) -> int:
    """Prints the texts, and figures on standard error; returns the exit status.

    Raises:
      RunError, ValueError, OSError: something that the user can put right.
    """
    texts = _prompts(config)
    if config.save_state is not None:
        check_place(config.save_state)
    if config.steps == "kernels" and config.state_dtype == "float16_scaled":
        raise RunError(
            f'steps: expected "layers" with state_dtype {config.state_dtype!r}, got "kernels"'
        )
    require("likeliest", config.likeliest, "an int >= 0", config.likeliest >= 0)
    if config.logprobs is not None:
        check_place(config.logprobs)
    model, text = open_checkpoint(config)
    decoder, state = ModelDecoder(model, steps=config.steps), None
    if config.load_state is not None:
        state = load_state(config.load_state.expanduser(), model)
    if state is not None and not texts:
        texts = [""] * state.position.shape[0]
    encode = text.encode if state is None else text.continuation
    prompts = [encode(prompt, special=config.special_tokens) for prompt in texts or [""]]
    sampling = _limited(config.sampling, text)
    timing = _Timing(time.perf_counter())
    with Interrupt() as interrupt, _Logprobs(config.logprobs) as numbers:
        state = prefill(decoder, prompts, state=state, piece=config.piece)
        state = with_states(model, state, state_dtype=config.state_dtype)
        pieces = stream(
            decoder,
            state,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            stop_tokens=config.stop_tokens + (() if config.ignore_end else text.end_tokens),
            seed=config.seed,
            max_length=config.max_length,
            block=config.block,
            logprobs=None if config.logprobs is None else config.likeliest,
        )
        # what a state has had without a prompt is not known
        shown = [prompt if prompt or config.load_state is None else None for prompt in prompts]
        rows = _Rows(texts or [""], [text.decoder(tokens) for tokens in shown])
        for piece in pieces:
            timing.count(piece)
            rows.add(piece)
            numbers.add(piece)
            state = piece.state
            if interrupt.signal is not None:
                break
        rows.finish()
    print(timing.describe(), file=sys.stderr)
    _save(config, state, model)
    if interrupt.signal is not None:
        print(f"{PROGRAM}: stopped by a signal", file=sys.stderr)
        return 128 + interrupt.signal
    return 0


class _Rows:
    """Shows one text as it comes, or several one after another at the end."""

    def __init__(self, prompts: Sequence[str], decoders: Sequence[Decoder]) -> None:
        self._decoders = decoders
        self._texts = list(prompts)
        self._alone = len(prompts) == 1
        if self._alone:
            _show(prompts[0])

    def add(self, piece: Piece) -> None:
        for row, (tokens, ended) in enumerate(zip(piece.tokens, piece.ended, strict=True)):
            shown = tokens[:-1] if ended else tokens  # without the stop token
            self._append(row, self._decoders[row].add(shown))

    def finish(self) -> None:
        for row, decoder in enumerate(self._decoders):
            self._append(row, decoder.finish())
        if self._alone:
            _show("\n")
        else:
            for row, text in enumerate(self._texts):
                _show(f"=== {row} ===\n{text}\n")

    def _append(self, row: int, new: str) -> None:
        self._texts[row] += new
        if self._alone:
            _show(new)


class _Logprobs:
    """A file of log-probabilities, written as they come; or none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._file = self._path.expanduser().open("w")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, piece: Piece) -> None:
        if self._file is None or piece.logprobs is None:
            return
        for row, (tokens, numbers) in enumerate(zip(piece.tokens, piece.logprobs, strict=True)):
            for token, number, likeliest in zip(tokens, *numbers, strict=True):
                line = {"row": row, "token": token, "logprob": number, "likeliest": likeliest}
                self._file.write(json.dumps(line) + "\n")


def _show(text: str) -> None:
    # what is no text, in a prompt from the command line or in the terminal's encoding
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompt_file is None:
        return list(config.prompt)
    if config.prompt:
        raise RunError("prompt: expected none with prompt_file, got both")
    if str(config.prompt_file) == "-":
        data = sys.stdin.buffer.read()
    else:
        data = config.prompt_file.expanduser().read_bytes()
    return [data.decode(errors="surrogateescape")]


def _limited(sampling: Sampling, text: Text) -> Sampling:
    """Draws tokens that are text only."""
    if sampling.vocab_limit is not None:
        return sampling
    return dataclasses.replace(sampling, vocab_limit=text.vocab_limit)


def _save(config: GenerateConfig, state: GenerationState, model: MDNForCausalLM) -> None:
    if config.save_state is not None:
        save_state(config.save_state.expanduser(), state, model)
        print(
            f"state after {int(state.position.max())} tokens in {config.save_state}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
