"""Generated tasks that tell mixers apart: recall, copying, state tracking, retrieval."""
