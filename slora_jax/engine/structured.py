"""Edits of the logits on behalf of requests: the tokens that a grammar allows (by llguidance), and biases."""

from __future__ import annotations

import json
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pallas_kernels.lora.layout import ceil_div
from slora_jax.errors import ConfigError, RequestError
from slora_jax.scheduling import MAX_LOGIT_BIAS, ScheduledSequence, StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE = 1 << 16
"""Characters of a schema, expression or grammar, which bounds the time to compile it."""
MAX_COMPILED = 128
"""Compiled grammars that are kept for later requests with the same source."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 5_000,
    "max_items_in_row": 500,
    "max_lexer_states": 50_000,
}
"""llguidance's `LLParserLimits`. The first one bounds `Grammars.compile`, and suffices for every schema of `MAX_SOURCE`
characters that we tried. The others bound the work of one token, to tens of milliseconds, and its memory."""
LEXER_FUEL = "too many expressions constructed"
"""llguidance's message if either fuel is spent, which names no limit."""


class LogitEdits(NamedTuple):
    """Edits of a step's logits, for the program "constrain".

    Attributes:
      allowed: one bit per token, int32 `[S, words]`.
      bias_token: tokens with a bias; the vocabulary's size pads the rest; int32 `[S, MAX_LOGIT_BIAS]`.
      bias: float32 `[S, MAX_LOGIT_BIAS]`.
    """

    allowed: np.ndarray
    bias_token: np.ndarray
    bias: np.ndarray


def logit_edits(sequences: Sequence[ScheduledSequence], seqs: int, words: int) -> LogitEdits:
    """Returns the edits of a step, for the state of its grammars now. Rows without any allow every token.

    Args:
      sequences: the step's sequences in batch order.
      seqs: number of sequences of the step's bucket.
      words: see `sampling.mask_words`.
    """
    allowed = np.full((seqs, words), -1, np.int32)
    bias_token = np.full((seqs, MAX_LOGIT_BIAS), 32 * words, np.int32)
    bias = np.zeros((seqs, MAX_LOGIT_BIAS), np.float32)
    for row, sequence in enumerate(sequences):
        request = sequence.request
        if not sequence.samples or request.finish_reason is not None:
            continue
        if request.grammar is not None:
            request.grammar.fill(allowed[row])
        if pairs := request.params.logit_bias:
            bias_token[row, : len(pairs)], bias[row, : len(pairs)] = zip(*pairs, strict=True)
    return LogitEdits(allowed, bias_token, bias)


class Grammar:
    """The grammar of one request (a `TokenGrammar`). Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    def accept(self, token: int) -> str | None:
        if self._matcher.consume_token(token):
            return None
        return f"structured_outputs: the grammar cannot continue: {_reason(self._matcher.get_error())}"

    def fill(self, row: np.ndarray) -> None:
        """Writes the tokens that may come next into `row`, int32 `[words]`, one bit each. If the grammar is too complex
        at this point for llguidance's limits, `accept` reports it."""
        row[:] = 0  # `words` may include padding of several shards
        own = row[: ceil_div(self._vocab_size, 32)]
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        if self._matcher.is_error():
            row[:] = -1  # the token is dropped

    def copy(self) -> Grammar:
        """Returns a grammar in the same state."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Loads nothing yet.

        Args:
          tokenizer: as in `Engine`; None refuses every grammar.
          vocab_size: of the model.
          eos_token_ids: tokens that end a text where the grammar allows it.
        """
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._loaded: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()  # of `_compiled`; not held while a grammar is compiled
        self._loading = threading.Lock()

    def compile(self, form: StructuredOutputs) -> Grammar:
        """Returns the grammar of a new request. The first call takes about a second, the first of a grammar up to one;
        later ones take microseconds.

        Raises:
          RequestError: there is no tokenizer, or llguidance is not installed.
          ConfigError: the schema, expression or grammar is invalid, not supported or too large; the message says why.
        """
        source = form.source
        with self._lock:
            grammar = self._compiled.get(source)
            if grammar is not None:
                self._compiled.move_to_end(source)
                return grammar.copy()
        grammar = self._compile(*source)
        with self._lock:
            self._compiled[source] = grammar
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return grammar.copy()

    def _compile(self, kind: str, text: str) -> Grammar:
        where = f"SamplingParams.structured_outputs.{kind}={reprlib.repr(text)}"
        if len(text) > MAX_SOURCE:
            raise ConfigError(f"{where}: has {len(text)} characters; must have at most {MAX_SOURCE}")
        tokenizer = self._load()
        from llguidance import LLMatcher, LLParserLimits

        try:
            limits = LLParserLimits(**LIMITS)
            matcher = LLMatcher(tokenizer, _grammar_of(kind, text), log_level=0, limits=limits)
        except ValueError as error:
            raise ConfigError(f"{where}: {_reason(str(error))}") from None
        if message := matcher.get_error() or _error_of_start(matcher):
            raise ConfigError(f"{where}: {_reason(message)}")
        return Grammar(matcher, self._vocab_size)

    def _load(self) -> LLTokenizer:
        with self._loading:
            if self._loaded is None:
                if self._tokenizer is None:
                    raise RequestError("structured_outputs: needs a tokenizer, and the model directory has none")
                try:
                    from llguidance import LLTokenizer
                except ImportError:
                    raise RequestError(
                        "structured_outputs: needs the package llguidance; install the extra that has it, "
                        "make install EXTRAS=serve"
                    ) from None
                source = self._tokenizer.backend_tokenizer.to_str()
                try:
                    self._loaded = LLTokenizer(source, n_vocab=self._vocab_size, eos_token=self._eos or None)
                except ValueError as error:
                    raise RequestError(f"structured_outputs: llguidance rejects the tokenizer: {error}") from None
            return self._loaded


def _grammar_of(kind: str, text: str) -> str:
    """Returns llguidance's form of a grammar. Raises ValueError."""
    from llguidance import grammar_from

    if kind == "choice":  # one lexeme: as a rule, each choice would be an item of a row
        text = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(one) for one in json.loads(text))
        kind = "lark"
    return grammar_from(kind, text)  # type: ignore[arg-type]


def _error_of_start(matcher: LLMatcher) -> str:
    """Computes the first tokens, which spends initial_lexer_fuel here rather than in a step. Returns an error or ""."""
    allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    trial = matcher.deep_copy()
    trial.consume_token(int(np.unpackbits(allowed, bitorder="little").argmax()))
    return trial.get_error()


def _reason(message: str) -> str:
    """Returns llguidance's message on one line, without the parser's state. It names the limit that is exceeded."""
    fuel = f"{LEXER_FUEL} (limits: {', '.join(f'{name}={LIMITS[name]}' for name in LIMITS if name.endswith('fuel'))})"
    return " ".join(message.partition("<state>")[0].split()).replace(LEXER_FUEL, fuel)
