"""Gemma 3 of text and images, of which the text model is served."""

from dataclasses import replace

from slora_jax.models.families import gemma3_text

FAMILY = replace(gemma3_text.FAMILY, name="gemma3", architecture="Gemma3ForConditionalGeneration", text_config=True)
