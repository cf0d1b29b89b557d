"""The form that a request's text must have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slora_jax.errors import ConfigError, RequestError
from slora_jax.scheduling import StructuredOutputs
from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.service import GeneratingService


async def form_of(service: GeneratingService, forms: Mapping[str, dict[str, Any]]) -> StructuredOutputs | None:
    """Returns the form of the text, or None. Its grammar is compiled here, in a thread, so that the engine finds it.

    Args:
      forms: at most one, by the client's field: arguments of `StructuredOutputs`.

    Raises:
      ApiError: the form is invalid, there is no tokenizer, or llguidance is not installed. The message names the
        client's field and the reason.
    """
    for field, given in forms.items():
        try:
            form = StructuredOutputs(**given)
            await service.of_text(service.engine.grammars.compile, form)
        except (ConfigError, RequestError) as error:
            message = str(error).removeprefix("SamplingParams.")
            if field != "structured_outputs":
                message = re.sub(r"^structured_outputs(\.\w+)?", field, message)
            raise ApiError(400, message, code="invalid_value", param=field) from None
        return form
    return None
