"""Settings of the server: files, precedence, and errors that name the field."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from slora_jax import ConfigError
from slora_jax.serving.http.app import create_app
from slora_jax.serving.settings import ApiKey, Limits, ServerSettings


def settings(**data: object) -> ServerSettings:
    return ServerSettings.from_mapping({"model_dir": "models/llama-7b", **data})


def test_command_line_takes_precedence_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    file = tmp_path / "server.yaml"
    file.write_text(
        f"""
        adapters: {tmp_path}/adapters
        port: 9000
        engine: {{dtype: float32, max_num_seqs: 8, num_pages: 100}}
        limits: {{waiting: 5, body_seconds: 3}}
        policy: {{name: vtc, weights: {{acme: 2.0}}}}
        api_keys:
        - {{name: one, key: secret, rights: [serve, manage]}}
        """
    )
    made = ServerSettings.from_file(
        file, model_dir=Path("models/llama-7b"), port=None, host="::1", engine={"num_pages": 200}
    )
    assert (made.port, made.host, made.base_name) == (9000, "::1", "llama-7b") and made.is_loopback
    assert (made.engine.dtype, made.engine.max_num_seqs, made.engine.num_pages) == ("float32", 8, 200)
    assert made.limits.waiting == 5 and made.limits.body_seconds == 3.0
    assert made.roots == (tmp_path / "adapters",)
    assert type(made.make_policy()).__name__ == "Vtc"
    assert made.api_keys[0].rights == {"serve", "manage"} and "secret" not in repr(made)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prot": 1}, "prot is unknown (did you mean 'port'?)"),
        ({"port": "80"}, "port='80': must be an integer"),
        ({"train": {"max_adapter": 2}}, "train.max_adapter is unknown (did you mean 'max_adapters'?)"),
        ({"train": {}, "replicas": 2}, "replicas=2: must be 1 with train"),
        ({"replica_requests": 0}, "replica_requests=0: must be an integer of at least 1"),
        ({"port": 70000}, "port=70000: must be an integer in [0, 65535]"),
        ({"engine": {"max_seq": 8}}, "engine.max_seq is unknown (did you mean 'max_num_seqs'?)"),
        ({"engine": {"page_size": 7}}, "page_size=7"),
        ({"engine": {"max_seqs": 8}}, "engine.max_seqs is called max_num_seqs now"),
        ({"engine": 3}, "engine=3: must be a mapping"),
        ({"limits": {"waiting": 0}}, "limits.waiting=0: must be an integer of at least 1"),
        ({"limits": 3}, "limits=3: must be a mapping"),
        ({"limits": {"wait": 1}}, "limits.wait is unknown"),
        ({"adapters": "no/such/place"}, "adapters='no/such/place': not a directory"),
        ({"policy": {"name": "fcsf"}}, "did you mean 'fcfs'"),
        ({"policy": {"weights": {}}}, "has no 'name'"),
        ({"tenants": "all"}, "tenants='all': must be 'adapter' or 'client'"),
        ({"stall_seconds": 0}, "stall_seconds=0.0: must be a number above 0"),
        ({"drain_seconds": -1}, "drain_seconds=-1.0: must be a number of at least 0"),
        ({"drain_seconds": float("nan")}, "drain_seconds=nan: must be a number of at least 0"),
        ({"api_keys": {"a": 1}}, "api_keys"),
        ({"api_keys": [{"key": "x"}]}, "api_keys[0].name=None"),
        ({"api_keys": [{"name": "a"}]}, "give one of key, key_env and key_sha256, found none"),
        ({"api_keys": [{"name": "a", "key": "x", "key_env": "Y"}]}, "found key, key_env"),
        (
            {"api_keys": [{"name": "a", "key": "x", "rights": ["rule"]}]},
            "api_keys[0].rights[0]='rule': must be",
        ),
        ({"api_keys": [{"name": "a", "key_env": "SLORA_NO_SUCH_KEY"}]}, "SLORA_NO_SUCH_KEY"),
        ({"api_keys": [{"name": "a", "key_sha256": "xyz"}]}, "64 hexadecimal digits"),
        ({"api_keys": [{"name": "a", "key": "x"}, {"name": "a", "key": "y"}]}, "the names must differ"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_field_is_named(data: dict, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(**data)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "keys",
    ["sk-secret", ["sk-secret"], {"key": "sk-secret"}, [{"name": "a", "key": "sk-secret", "rights": ["rule"]}]],
    ids=["text", "list of text", "mapping", "wrong rights"],
)
def test_an_error_never_shows_a_key(keys: object) -> None:
    with pytest.raises(ConfigError, match="api_keys") as raised:
        settings(api_keys=keys)
    assert "sk-secret" not in str(raised.value)


def test_three_forms_of_a_key_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_TEST_KEY", "sk-1")
    forms = {"key": "sk-1", "key_env": "SLORA_TEST_KEY", "key_sha256": sha256(b"sk-1").hexdigest()}
    keys = [ApiKey.from_mapping({"name": "a", form: value}, "api_keys[0]") for form, value in forms.items()]
    assert len({key.digest for key in keys}) == 1 and {key.rights for key in keys} == {frozenset({"serve"})}


def test_settings_created_in_code_are_checked() -> None:
    with pytest.raises(ConfigError, match="replicas=0: must be an integer of at least 1"):
        ServerSettings(Path(), replicas=0)
    with pytest.raises(ConfigError, match=r"limits\.waiting='5': must be an integer"):
        Limits(waiting="5")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\t"])
def test_file_that_is_not_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="server.yaml"):
        ServerSettings.from_file(file, model_dir=Path("x"))
    with pytest.raises(ConfigError, match="missing.yaml"):
        ServerSettings.from_file(tmp_path / "missing.yaml", model_dir=Path("x"))


def test_preflight_is_answered_for_configured_origins() -> None:
    def build() -> Any:
        raise AssertionError("nothing is served")

    app = create_app(settings(cors_origins=["https://notebook.example"]), build)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    client = TestClient(app)  # without its lifespan: a preflight never reaches the service
    named = client.options("/v1/chat/completions", headers=asks | {"Origin": "https://notebook.example"})
    assert named.status_code == 200 and named.headers["access-control-allow-origin"] == "https://notebook.example"
    assert "POST" in named.headers["access-control-allow-methods"]
    other = client.options("/v1/chat/completions", headers=asks | {"Origin": "https://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
