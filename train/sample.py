"""A short sample at the end of a run."""

from flax import nnx

from mdn_jax import MDNForCausalLM, Sampling, generate
from train.optimizer import Params
from train.tokenizer import DOCUMENT_START, decode, encode


def sample(
    model: MDNForCausalLM,
    params: Params,
    *,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
) -> str:
    """Generates text: one pass over the prompt, then one token at a time.

    Args:
      model: the model; its own parameters are not used.
      params: parameters to use.
      prompt: text to continue, UTF-8; empty means the start of a document.
      length: tokens to generate.
      temperature: of the sampling; 0 takes the likeliest token.
      seed: of the sampling.

    Returns:
      The prompt and its continuation.
    """
    if not length:
        return prompt
    graph, _, *rest = nnx.split(model, nnx.Param, ...)
    piece = generate(
        nnx.merge(graph, params, *rest),
        [encode(prompt.encode()).tolist()],
        max_new_tokens=length,
        sampling=Sampling(vocab_limit=DOCUMENT_START, temperature=temperature),
        seed=seed,
    )
    return prompt + decode(piece.tokens[0])
