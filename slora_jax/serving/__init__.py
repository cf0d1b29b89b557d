"""The HTTP service: an OpenAI-compatible server over one engine, and what an observer sees of it."""
