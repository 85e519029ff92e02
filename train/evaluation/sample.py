"""A short sample at the end of a run."""

from flax import nnx

from mdn_jax import MDNForCausalLM, Sampling, generate
from mdn_jax.errors import RunError
from mdn_jax.text.text import ByteText, Text
from train.optimizer import Params


def sample(
    model: MDNForCausalLM,
    params: Params,
    *,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
    text: Text | None = None,
) -> str:
    """Generates text: one pass over the prompt, then one token at a time.

    Args:
      model: the model; its own parameters are not used.
      params: parameters to use.
      prompt: text to continue; empty means the start of a document, which has to be a token.
      length: tokens to generate.
      temperature: of the sampling; 0 takes the likeliest token.
      seed: of the sampling.
      text: its tokens; None: bytes.

    Returns:
      The prompt and its continuation, up to the tokenizer's end token.

    Raises:
      RunError: a prompt without tokens, or parameters with which nothing is likely.
    """
    if not length:
        return prompt
    text = text or ByteText()
    graph, _, *rest = nnx.split(model, nnx.Param, ...)
    tokens = text.encode(prompt, special=True)
    try:
        piece = generate(
            nnx.merge(graph, params, *rest),
            [tokens],
            max_new_tokens=length,
            sampling=Sampling(vocab_limit=text.vocab_limit, temperature=temperature),
            stop_tokens=text.end_tokens,
            seed=seed,
        )
    except ValueError as error:
        raise RunError(f"sample: {error}") from None
    made = piece.tokens[0][:-1] if piece.ended[0] else piece.tokens[0]
    decoder = text.decoder(tokens)
    return prompt + decoder.add(made) + decoder.finish()
