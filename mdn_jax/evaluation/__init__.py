"""What a model makes of text: losses of tokens, multiple choice, lm-evaluation-harness."""
