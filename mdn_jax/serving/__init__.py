"""An HTTP server with the interface of OpenAI's completions (extra `serve`)."""
