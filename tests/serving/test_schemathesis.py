"""Schemathesis derives requests from the server's OpenAPI schema; every answer must conform to the schema."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import schemathesis
from live_server import MANAGE_KEY, LiveServer
from schemathesis.specs.openapi import checks

from slora_jax.serving.http.app import create_app
from slora_jax.serving.settings import ApiKey, ServerSettings

EXAMPLES, SEED = 12, 7
KEY = {"Authorization": f"Bearer {MANAGE_KEY}"}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.missing_required_header,
]
SMALL = {"max_tokens": 3, "max_completion_tokens": 3, "n": 2, "best_of": 2, "prompt": "a prompt", "model": "adapter-3"}
"""Values that replace those of well-formed requests, so that they are served and end soon."""


@cache
def described() -> dict[str, Any]:
    """Returns the schema of a server with keys."""
    settings = ServerSettings(Path(), api_keys=(ApiKey.from_mapping({"name": "a", "key": "b"}, ""),))

    def build() -> Any:
        raise AssertionError("nothing is served")

    return create_app(settings, build).openapi()


schema = schemathesis.openapi.from_dict(
    described(),
    config=schemathesis.Config.from_dict(
        {
            "seed": SEED,
            "headers": KEY,
            "generation": {"max-examples": EXAMPLES, "deterministic": True, "no-shrink": True},
        }
    ),
)


def test_server_publishes_this_schema(server: LiveServer) -> None:
    status, body = server.get("/openapi.json")
    assert status == 200 and json.loads(body) == described()


def test_schema_has_no_422_and_names_where_a_key_is_needed() -> None:
    for path, operations in described()["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert ("security" in operation) == (path not in ("/health", "/ready")), path


def conforming(path: str, method: str) -> Any:
    """Returns the test that every answer of an operation conforms to the schema."""

    @schema.include(path=path, method=method.upper()).parametrize()
    def answers_conform(case: Any, server: LiveServer) -> None:
        if isinstance(case.body, dict) and case.meta.generation.mode.is_positive:
            case.body |= {name: value for name, value in SMALL.items() if case.body.get(name)}
        case.call_and_validate(base_url=server.url, headers=KEY, checks=CHECKS, timeout=30)
        assert server.process.poll() is None

    return answers_conform


for _path, _operations in described()["paths"].items():
    for _method in _operations:  # a function each: schemathesis gives all operations of one function the same id
        _name = f"{_method}{re.sub(r'[^a-z0-9]+', '_', _path)}"
        globals()[f"test_answers_conform_to_the_schema_{_name}"] = conforming(_path, _method)


ASK = {"max_tokens": 4, "prompt": "List all", "model": "adapter-5"}
CHAT = {"max_tokens": 4, "messages": [{"role": "user", "content": "Who?"}]}
REAL = [
    ("/v1/completions", ASK, 200),
    ("/v1/completions", ASK | {"logprobs": 3, "return_token_ids": True, "n": 2}, 200),
    ("/v1/completions", ASK | {"stream": True, "stream_options": {"include_usage": True}}, 200),
    ("/v1/completions", ASK | {"model": "nobody"}, 404),
    ("/v1/completions", ASK | {"user": "x" * (1 << 20)}, 413),
    ("/v1/chat/completions", CHAT, 200),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2}, 200),
    ("/v1/chat/completions", CHAT | {"stream": True, "logprobs": True}, 200),
    ("/v1/load_lora_adapter", {"lora_name": "schema", "lora_path": "adapter-2"}, 200),
    ("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "/etc"}, 403),
    ("/v1/unload_lora_adapter", {"lora_name": "schema"}, 200),
    ("/v1/models", None, 200),
    ("/v1/models/{name}", None, 200),
    ("/v1/adapters", None, 200),
    ("/metrics", None, 200),
    ("/health", None, 200),
    ("/ready", None, 200),
]


def test_real_answers_conform_to_the_schema(server: LiveServer) -> None:
    for path, body, status in REAL:
        operation = schema[path]["GET" if body is None else "POST"]
        case = operation.Case(path_parameters={"name": "adapter-1"}, **({} if body is None else {"body": body}))
        answer = case.call(base_url=server.url, headers=KEY, timeout=30)
        assert answer.status_code == status, answer.text
        operation.validate_response(answer)
