"""The public `openai` client gets embeddings of any input, of the base model and of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from live_server import SERVE_KEY, LiveServer

from slora_jax import Engine, EngineConfig
from slora_jax.serving.http.bodies import EmbeddingBody
from slora_jax.serving.http.embeddings import check_served
from slora_jax.serving.http.errors import ApiError


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=SERVE_KEY, max_retries=0) as client:
        yield client


def test_embeddings_of_texts_and_token_ids_are_the_same_in_both_encodings(client, engine: Engine) -> None:
    texts = ["The quick brown fox", "Un œuf"]
    ids = [engine.tokenizer(text)["input_ids"] for text in texts]
    answer = client.embeddings.create(model="base", input=texts)  # base64
    assert [one.index for one in answer.data] == [0, 1] and answer.usage.prompt_tokens == sum(map(len, ids))
    found = np.array([one.embedding for one in answer.data])
    assert found.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    for given, expected in ((ids, found), (ids[0], found[:1]), (texts[1], found[1:])):
        same = client.embeddings.create(model="base", input=given, encoding_format="float")
        np.testing.assert_allclose([one.embedding for one in same.data], expected, atol=1e-6)


def test_adapter_pooling_and_normalization_change_the_embedding(client) -> None:
    def embedding(model: str = "base", **extra: object) -> np.ndarray:
        return np.array(client.embeddings.create(model=model, input="Hello there", extra_body=extra).data[0].embedding)

    base, raw = embedding(), embedding(normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), base, atol=1e-6)
    assert np.abs(embedding("adapter-1") - base).max() > 1e-3
    assert np.abs(embedding(pooling="mean") - base).max() > 1e-3
    np.testing.assert_allclose(embedding("base:adapter-1"), embedding("adapter-1"), atol=1e-6)


def test_wrong_fields_are_named(client) -> None:
    for changes, param in (({"dimensions": 5}, "dimensions"), ({"input": ""}, "prompt"), ({"input": [[]]}, "input.0")):
        with pytest.raises(openai.BadRequestError) as raised:
            client.embeddings.create(**{"model": "base", "input": "x"} | changes)
        assert raised.value.param == param, raised.value
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="absent", input="x")


def test_server_without_embeddings_answers_404_and_names_the_option() -> None:
    service = SimpleNamespace(engine=SimpleNamespace(config=EngineConfig()))
    with pytest.raises(ApiError, match="start the server with --embeddings") as raised:
        check_served(service, EmbeddingBody(input="x"))
    assert raised.value.status_code == 404
