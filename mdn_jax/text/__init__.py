"""Text: files to documents, and documents to tokens and back."""
