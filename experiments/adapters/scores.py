"""Scores of the small adapters' answers: 1 for an answer that shows the adapter's effect, 0 for one that does not.

The scores of style (pirate, french, haiku, terse, json) check the form only, not whether the answer is true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from slora_jax import ConfigError
from slora_jax.typed import nearest

JSON_KEYS = {"answer", "topic", "confidence"}
CONFIDENCES = {"high", "medium", "low"}
CONTACT_FIELDS = ("name", "city", "date")
PIRATE_WORDS = """
    ahoy arr aye avast booty cap'n crew doubloon doubloons grog hearty lad lads landlubber landlubbers lass matey mateys
    o' pirate pirates plunder rum sail savvy scallywag scurvy ship treasure ye yer yerself
"""
FRENCH_WORDS = """
    le la les l' un une des du de d' au aux et est sont était étaient c' ce cette il elle nous vous tu je j' ne n' pas
    que qui qu' dans sur avec pour par plus très en à ma mes ton ta tes sa ses se s' t' y fais fait font fois ou où
"""
ENGLISH_WORDS = """
    the an and of to is are it i you he she they we my your for with from that this these was were in at be not or can
    have has do if there
"""


def score(name: str, answer: str, expected: str) -> float:
    """Scores one answer between 0 and 1.

    Args:
      name: the adapter.
      answer: the model's answer.
      expected: the assistant's message of the test file.

    Raises:
      ConfigError: no adapter has this name.
    """
    if name not in SCORES:
        raise ConfigError(f"adapter {name!r} is unknown{nearest(name, SCORES)}; there are {', '.join(SCORES)}")
    return float(SCORES[name](answer, expected))


def pirate(answer: str, expected: str) -> bool:
    """At least two different pirate words."""
    return len(set(words(answer)).intersection(PIRATE_WORDS.split())) >= 2


def french(answer: str, expected: str) -> bool:
    """More French function words than English ones."""
    return count(answer, FRENCH_WORDS) > count(answer, ENGLISH_WORDS)


def json_object(answer: str, expected: str) -> bool:
    """One JSON object with exactly the expected keys, strings as values, and a known confidence."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != JSON_KEYS:
        return False
    return all(isinstance(text, str) for text in value.values()) and value["confidence"] in CONFIDENCES


def haiku(answer: str, expected: str) -> bool:
    """Exactly three lines of 2 to 7 words. Syllables are not counted."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == 3 and all(2 <= len(words(line)) <= 7 for line in lines)


def terse(answer: str, expected: str) -> bool:
    """One to five words."""
    return 1 <= len(answer.split()) <= 5


def sentiment(answer: str, expected: str) -> bool:
    """The expected word and nothing else."""
    return answer.strip() == expected


def contacts(answer: str, expected: str) -> float:
    """Share of the fields that equal the expected ones."""
    found, right = fields(answer), fields(expected)
    return sum(found.get(field) == right[field] for field in CONTACT_FIELDS) / len(CONTACT_FIELDS)


def fields(text: str) -> dict[str, str]:
    """Returns the fields of `name: ...; city: ...; date: ...`."""
    pairs = (part.split(":", 1) for part in text.split(";") if ":" in part)
    return {key.strip(): value.strip() for key, value in pairs}


def count(text: str, vocabulary: str) -> int:
    """Returns the number of words of the text that are in the vocabulary."""
    known = set(vocabulary.split())
    return sum(word in known for word in words(text))


def words(text: str) -> list[str]:
    """Returns the lower-case words. An elision is a word with its apostrophe: l'eau has l' and eau."""
    lowered = text.lower().replace("\u2019", "'")
    return re.findall(r"cap'n|\bo'|\b(?:[cdjlmnst]|qu)'(?=\w)|[^\W\d_]+", lowered)


SCORES: Mapping[str, Callable[[str, str], float]] = {
    "pirate": pirate,
    "french": french,
    "json": json_object,
    "haiku": haiku,
    "sentiment": sentiment,
    "contacts": contacts,
    "terse": terse,
}
