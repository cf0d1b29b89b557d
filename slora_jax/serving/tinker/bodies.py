"""JSON bodies of Tinker's client 0.38. A field that would change the result and is not supported is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from slora_jax.adapters import LoraConfig
from slora_jax.scheduling import SamplingParams
from slora_jax.scheduling.sampling_params import MAX_LOGPROBS
from slora_jax.serving.http.body import MAX_PROMPTS, Body, Only, Text, Token, at_most

ALPHA = 32
"""`lora_alpha` of every adapter, Tinker's convention; the update's scale is `ALPHA / rank`."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Id = Annotated[str, Field(min_length=1, max_length=256)]
Path = Annotated[str, Field(min_length=1, max_length=1024)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Metadata = Annotated[dict[str, Any] | None, at_most(64)]
Type = Annotated[str | None, Field(max_length=64)]


class SessionBody(Body):
    """Body of /create_session. Everything in it is only a description."""

    tags: Annotated[list[Text], Field(fail_fast=True, max_length=64)] | None = None
    user_metadata: Metadata = None
    sdk_version: Text
    project_id: Text | None = None
    display_name: Text | None = None
    type: Type = None


class HeartbeatBody(Body):
    """Body of /session_heartbeat."""

    session_id: Id
    type: Type = None


class FutureBody(Body):
    """Body of /retrieve_future."""

    request_id: Annotated[str, Field(min_length=1, max_length=512)]
    allow_metadata_only: bool = False
    model_id: Id | None = None


class LoraBody(Body):
    """An adapter to create.

    Attributes:
      seed: of the initial weights; None: 0.
      train_unembed: must be False: adapters of the output head are not supported. The client's default is True.
    """

    rank: Annotated[int, Field(ge=1, le=256)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def config(self) -> LoraConfig:
        """Returns the adapter in PEFT's terms."""
        modules = ATTENTION * self.train_attn + MLP * self.train_mlp
        return LoraConfig(r=self.rank, lora_alpha=ALPHA, target_modules=modules)


class OptimizerBody(Body):
    """The optimizer of a model."""

    type: Literal["adamw"] = "adamw"


class CreateModelBody(Body):
    """Body of /create_model."""

    session_id: Id
    model_seq_id: Natural
    base_model: Text
    user_metadata: Metadata = None
    lora_config: LoraBody
    optimizer_config: OptimizerBody = OptimizerBody()
    type: Type = None


class InfoBody(Body):
    """Body of /get_info."""

    model_id: Id
    type: Type = None


class AdamBody(Body):
    """AdamW's parameters of one step."""

    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class OptimStepBody(Body):
    """Body of /optim_step."""

    adam_params: AdamBody
    model_id: Id
    seq_id: Natural
    type: Type = None


class SaveStateBody(Body):
    """Body of /save_weights. Saved states do not expire: `ttl_seconds` has no effect."""

    model_id: Id
    path: Path
    seq_id: Natural
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Metadata = None
    type: Type = None


class LoadStateBody(Body):
    """Body of /load_weights: into a model (`model_id`, `seq_id`), or into a new one (`session_id`, `model_seq_id`)."""

    model_id: Id | None = None
    seq_id: Natural | None = None
    session_id: Id | None = None
    model_seq_id: Natural | None = None
    base_model: Text | None = None
    user_metadata: Metadata = None
    path: Path
    optimizer: bool
    optimizer_config: OptimizerBody | None = None
    weights_access_token: Annotated[Any, Only(None)] = None
    type: Type = None


class SaveSamplerBody(Body):
    """Body of /save_weights_for_sampler: named weights (`path`), or a sampler of unnamed ones
    (`sampling_session_seq_id`)."""

    model_id: Id
    path: Path | None = None
    sampling_session_seq_id: Natural | None = None
    kind: Annotated[Any, Only("snapshot")] = "snapshot"
    seq_id: Natural
    ttl_seconds: int | None = None
    user_metadata: Metadata = None
    type: Type = None


class SamplerBody(Body):
    """Body of /create_sampling_session."""

    session_id: Id
    sampling_session_seq_id: Natural
    base_model: Text | None = None
    model_path: Path | None = None
    type: Type = None


class TextChunk(Body):
    """Token ids of a prompt."""

    tokens: Annotated[list[Token], Field(fail_fast=True)]
    type: Literal["encoded_text"] = "encoded_text"


class ModelInput(Body):
    """A prompt."""

    chunks: Annotated[list[TextChunk], Field(fail_fast=True), at_most(MAX_PROMPTS)]

    @property
    def token_ids(self) -> list[int]:
        """All tokens."""
        return [token for chunk in self.chunks for token in chunk.tokens]


Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class SamplingBody(Body):
    """Tinker's sampling parameters.

    Attributes:
      stop: strings or token ids; None stops at the model's end-of-sequence tokens, and [] at nothing.
    """

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Stop
        | Annotated[list[Stop], Field(fail_fast=True, max_length=16)]
        | Annotated[list[Token], Field(fail_fast=True, max_length=256)]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=1e4)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class SampleBody(Body):
    """Body of /asample."""

    sampling_session_id: Id
    seq_id: Annotated[int, Field(ge=0, lt=2**63)]
    num_samples: Annotated[int, Field(ge=1, le=128)] = 1
    prompt: ModelInput
    sampling_params: SamplingBody
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    target_prompt_logprobs: Annotated[Any, Only(None)] = None
    prompt_alt_tokens_k: Annotated[Any, Only(0)] = 0
    record_stability_info: Annotated[Any, Only(None, False)] = None
    base_model: Annotated[Any, Only(None)] = None
    model_path: Annotated[Any, Only(None)] = None
    type: Type = None

    def sampling(self, index: int, room: int) -> SamplingParams:
        """Returns the parameters of a sample. Raises ConfigError.

        Args:
          room: most tokens that fit after the prompt.
        """
        given = self.sampling_params
        stop = [given.stop] if isinstance(given.stop, str) else given.stop or []
        wants_prompt = self.prompt_logprobs or self.topk_prompt_logprobs
        return SamplingParams(
            max_tokens=given.max_tokens and min(given.max_tokens, room),
            temperature=given.temperature,
            top_k=max(0, given.top_k),
            top_p=given.top_p,
            seed=None if given.seed is None else (given.seed + index) % 2**32,
            stop=[one for one in stop if isinstance(one, str)],
            stop_token_ids=[one for one in stop if isinstance(one, int)],
            ignore_eos=given.stop == [],
            logprobs=self.topk_sample_logprobs,
            prompt_logprobs=self.topk_prompt_logprobs if wants_prompt and index == 0 else None,
        )

    def scored(self, length: int) -> np.ndarray:
        """Returns bool `[length]`: the prompt's tokens whose log-probabilities were asked for."""
        return np.arange(length) >= length - (self.prompt_logprobs_last_n or length)
