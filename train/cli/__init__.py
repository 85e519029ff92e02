"""The commands of `python -m train`: training itself, `tokenize` before it, `plot` after it."""

COMMANDS = {
    "tokenize": "files to shards of tokens, which training maps instead of reading",
    "plot": "the curves of one or several runs in one picture",
}
