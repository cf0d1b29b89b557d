"""The HTTP service: OpenAI's API over the engine (`slora serve`). Needs the extra `serve`."""
