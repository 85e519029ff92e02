"""Models of every mixer, and MDN without its parts, trained on the same text."""
