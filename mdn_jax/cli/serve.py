"""`mdn-serve`: a checkpoint behind an HTTP server with OpenAI's interface."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro
from jax.sharding import AxisType, Mesh

from mdn_jax.cli.common import CheckpointConfig, parse, run
from mdn_jax.errors import RunError
from mdn_jax.models import shard_model
from mdn_jax.models.steps import StepKind
from mdn_jax.saved.anywhere import find_model, load_found
from mdn_jax.saved.tokens import load_text, tokenizer_beside
from mdn_jax.serving.app import Service
from mdn_jax.serving.device import Device
from mdn_jax.serving.engine import Engine
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.prefixes import PrefixCache
from mdn_jax.serving.protocol import MOST_LOGPROBS
from mdn_jax.serving.server import Server, is_private, listen, run_server
from mdn_jax.serving.texts import Texts
from mdn_jax.text.chat import ChatTemplate, find_template

PROGRAM = "mdn-serve"
KEY = "MDN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(CheckpointConfig):
    """Serves a checkpoint: /v1/completions, /v1/chat/completions, and a page to try it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: everybody who reaches this machine."""

    port: int = 8000
    """Port to listen on; 0: any free one."""

    name: str | None = None
    """Name of the model; None: that of the checkpoint's directory."""

    api_key: str | None = None
    """What requests have to send as `Authorization: Bearer KEY`; None: the environment variable
    MDN_API_KEY, or none. What is on a command line can be read by others on the machine."""

    chat_template: Path | None = None
    """A file with a Jinja template of chats; None: that beside the tokenizer, if there is one."""

    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    """What the server takes on."""

    block: int = 16
    """Tokens in one call of the compiled loop: the steps in which text appears."""

    piece: int = 512
    """Tokens of a prompt in one call: running texts wait this long for a new one at most."""

    steps: StepKind = "layers"
    """What takes single tokens: the model's own layers, or few, wide GPU kernels for models and
    devices that they support (docs/inference.md)."""

    prefix_mb: float = 1024.0
    """Megabytes for states of prompts that were read; 0: none are kept."""

    prefix_dir: Path | None = None
    """Directory where these states are kept from one run to the next; None: nowhere."""

    max_length: int = 4096
    """Most tokens of a text with its prompt, for models with attention without a window."""

    data: int = 1
    """Devices that share the slots: each has a part of the texts."""

    tensor: int = 1
    """Devices that share the heads and the MLP of the same texts."""

    open_prompts: bool = False
    """Prompts that come as token ids get the tokens that open a document, unless they begin with
    them: as lm-evaluation-harness leaves them out."""

    def __post_init__(self) -> None:
        for name in ("block", "piece", "max_length", "data", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {getattr(self, name)!r}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: expected an int from 0 to 65535, got {self.port!r}")
        if not 0 <= self.prefix_mb < float("inf"):
            raise ValueError(f"prefix_mb: expected a number >= 0, got {self.prefix_mb!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; None means `sys.argv`.

    Returns:
      The exit status: 0 after SIGTERM, 1 for an error in what the user asked for, 130 after Ctrl-C.
    """
    config = parse(PROGRAM, __doc__, ServeConfig, arguments)
    return run(PROGRAM, lambda: serve(config))


def serve(config: ServeConfig) -> int:
    """Serves until a signal comes; returns the exit status.

    Raises:
      RunError, ValueError, OSError: something that the user can put right.
    """
    with _shown_log(), listen(config.host, config.port) as sock:
        port = sock.getsockname()[1]
        engine, service = build(config)
        address = f"[{config.host}]" if ":" in config.host else config.host
        _say(f"http://{address}:{port} compiles now; /health says when it is ready")
        if not is_private(config.host) and _key(config) is None:
            _say("everybody who reaches this machine can use it: there is no API key")
        server = Server(service.app(), engine, drain_seconds=config.limits.drain_seconds)
        return run_server(server, engine, sock)


def build(config: ServeConfig) -> tuple[Engine, Service]:
    """The engine, which has not been started, and what answers requests with it.

    Raises:
      RunError, ValueError, OSError: something that the user can put right.
    """
    key = _key(config)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError("api_key: expected printable ASCII without blanks around it, got another")
    saved = find_model(config.checkpoint, config.step, ema=config.ema)
    text = load_text(config.tokenizer, config.checkpoint, saved)
    model = load_found(saved, dtype=config.dtype, implementation=config.implementation)
    if config.data * config.tensor > 1:
        model = shard_model(model, _mesh(config))
    template = _template(config, saved_tokenizer=tokenizer_beside(config.checkpoint, saved))
    device = Device(
        model,
        slots=config.limits.slots,
        piece=config.piece,
        block=config.block,
        max_length=config.max_length,
        end_tokens=len(text.end_tokens),
        top=MOST_LOGPROBS,
        steps=config.steps,
    )
    prefixes = PrefixCache(int(config.prefix_mb * 1e6))
    engine = Engine(device, config.limits, prefixes, prefix_dir=config.prefix_dir)
    service = Service(
        engine,
        Texts(text, template),
        name=config.name or config.checkpoint.resolve().name,
        limits=config.limits,
        max_length=config.max_length if device.limited else None,
        api_key=key,
        open_prompts=config.open_prompts,
    )
    return engine, service


def _mesh(config: ServeConfig) -> Mesh:
    there, needed = jax.devices(), config.data * config.tensor
    if len(there) < needed or config.limits.slots % config.data:
        raise ValueError(
            f"data, tensor: expected at most {len(there)} devices, and data to divide "
            f"{config.limits.slots} slots, got {config.data} x {config.tensor}"
        )
    auto = (AxisType.Auto,) * 2
    shape = (config.data, config.tensor)
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=auto, devices=there[:needed])


def _key(config: ServeConfig) -> str | None:
    return config.api_key if config.api_key is not None else os.environ.get(KEY)


def _template(config: ServeConfig, *, saved_tokenizer: Path | None) -> ChatTemplate | None:
    """The template of a file, or that beside the tokenizer; None: there is none."""
    choice = None if config.chat_template is None else str(config.chat_template)
    tokenizer = saved_tokenizer
    if config.tokenizer is not None:
        tokenizer = None if config.tokenizer == "bytes" else Path(config.tokenizer)
    beside = str(tokenizer) if tokenizer is not None else str(config.checkpoint)
    try:
        return find_template(choice, beside)
    except RunError as error:
        if choice is not None:
            raise
        _say(f"no chats: {str(error).removeprefix('data.')}")
        return None


@contextmanager
def _shown_log() -> Iterator[None]:
    """What the server's own modules say goes to standard error, without what else logs."""
    log, handler = logging.getLogger("mdn_jax.serving"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    level, log.propagate = log.level, False
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True


def _say(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
