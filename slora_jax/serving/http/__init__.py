"""OpenAI's API over HTTP: connections, limits, request bodies, answers, endpoints."""
