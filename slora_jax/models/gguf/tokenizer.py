"""Converts the tokenizer of a GGUF file to the `tokenizers` library.

transformers' reader (`AutoTokenizer.from_pretrained(gguf_file=...)`) is a hundred times slower, splits Llama 3's words
like GPT-2's (it ignores `tokenizer.ggml.pre`), and uses BOS as EOS.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models.gguf.header import GgufHeader, read_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # llama.cpp's token types
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = {
    "llama3": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "qwen2": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
}
"""Style -> regular expression that splits text into words."""

_DEFAULT_WORDS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
"""Expressions for a file that names no style; each splits the pieces left by the previous one."""

_STYLES = {
    "default": ("default",),
    "digits": ("codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"),
    "gpt2": (
        "a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "mellum", "mpt", "olmo", "phi-2",
        "trillion",
    ),
    "llama3": (
        "chatglm-bpe", "dbrx", "falcon-h1", "falcon3", "glm4", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0",
        "pixtral", "smaug-bpe",
    ),
    "qwen2": (
        "deepseek-r1-qwen", "f2llmv2", "grok-2", "hunyuan", "kormo", "megrez", "qwen2", "solar-open", "stablelm2",
    ),
    "tekken": ("tekken",),
}  # fmt: skip
"""Style of splitting words -> values of `tokenizer.ggml.pre`, as grouped in llama.cpp."""

_WHOLE_WORDS_FIRST = {
    "falcon-h1", "falcon3", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral", "tekken",
}  # fmt: skip
"""Values of `tokenizer.ggml.pre` that keep a word whole if it is a token, and by default begin a text with BOS."""


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer in a file's metadata; `special_tokens` maps names, e.g. "bos_token", to texts."""

    backend: "Tokenizer"
    chat_template: str | None
    special_tokens: dict[str, str]


def read_gguf_tokenizer(file: Path) -> GgufTokenizer | None:
    """Returns the file's tokenizer, or None if it has none.

    Raises `UnsupportedModelError` for an unsupported tokenizer or pre-tokenizer, `CheckpointError` for missing or
    contradictory metadata.
    """
    header = read_header(file)
    metadata = header.metadata
    kind = str(metadata.get("tokenizer.ggml.model", "none"))
    if kind in ("none", "no_vocab"):
        return None
    if kind not in _BUILDERS:
        raise _refused(header, "tokenizer.ggml.model", kind, f"one of {sorted(_BUILDERS)}")
    tokens = _list(header, "tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise CheckpointError(f"{file}: tokenizer.ggml.tokens: {twice!r} occurs twice")
    ids = {name: metadata.get(f"tokenizer.ggml.{key}", -1) for name, key in _SPECIAL_TOKENS.items()}
    special = {name: tokens[index] for name, index in ids.items() if index in range(len(tokens))}
    tokenizer = _BUILDERS[kind](header, vocabulary)
    _add_special_tokens(tokenizer, header, tokens)
    _add_post_processor(tokenizer, header, vocabulary, special)
    return GgufTokenizer(tokenizer, metadata.get("tokenizer.chat_template"), special)


def _byte_level(header: GgufHeader, vocabulary: dict[str, int]) -> "Tokenizer":
    """Byte-level BPE, used by GPT-2, Llama 3, Qwen and SmolLM."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    style = next((style for style, names in _STYLES.items() if pre in names), None)
    if style is None:
        names = sorted(name for names in _STYLES.values() for name in names)
        raise _refused(header, "tokenizer.ggml.pre", pre, f"one of {names}")
    merges = [_pair(merge) for merge in _list(header, "merges")]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:
        raise CheckpointError(f"{header.file}: tokenizer.ggml.merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as in training; llama.cpp omits it
    tokenizer.pre_tokenizer = _word_splitter(style)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_splitter(style: str) -> Any:
    """A pre-tokenizer that splits text into words and maps their bytes to letters."""
    from tokenizers import Regex, pre_tokenizers

    if style in ("gpt2", "digits"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if style == "gpt2":
            return words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    expressions = _DEFAULT_WORDS if style == "default" else (_WORDS[style],)
    cuts: list[Any] = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(header: GgufHeader, vocabulary: dict[str, int]) -> "Tokenizer":
    """SentencePiece BPE with byte fallback, used by Llama 2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unk_token = next((token for token, index in vocabulary.items() if index == unknown), None)
    merges = _merges(header, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", "\u2581")]
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("\u2581"))  # also after a special token, as llama.cpp does
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(header: GgufHeader, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece's merges: all pairs of tokens whose concatenation is a token, highest score first."""
    scores = np.asarray(_list(header, "scores", len(vocabulary)), np.float32)
    types = _types(header, len(vocabulary))
    merges = []
    for token, index in vocabulary.items():
        if types[index] == _NORMAL:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            merges += [(-scores[index], cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    merges.sort(key=lambda merge: merge[0])  # stable: per token, the shortest left part first
    return [cut for _, cut in merges]


def _add_special_tokens(tokenizer: "Tokenizer", header: GgufHeader, tokens: list[str]) -> None:
    """Adds control tokens as special, so they are omitted from generated text, and user-defined tokens as text."""
    from tokenizers import AddedToken

    types = _types(header, len(tokens))
    for kinds, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        added = [tokens[index] for index in np.flatnonzero(np.isin(types, kinds))]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added if token])


def _add_post_processor(
    tokenizer: "Tokenizer", header: GgufHeader, vocabulary: dict[str, int], special: dict[str, str]
) -> None:
    """Adds BOS before and EOS after a text, where the file asks for them."""
    from tokenizers import processors

    metadata = header.metadata
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    begins = sentencepiece or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", begins),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    if missing := [name for name, add in wanted.items() if add and name not in special]:
        key, needs = _SPECIAL_TOKENS[missing[0]], f"tokenizer.ggml.add_{missing[0]}"
        raise CheckpointError(f"{header.file}: metadata tokenizer.ggml.{key} is missing, and {needs} needs it")
    before, after = ([special[name]] if wanted[name] else [] for name in ("bos_token", "eos_token"))
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, vocabulary[token]) for token in {*before, *after}],
        )


def _pair(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _types(header: GgufHeader, count: int) -> np.ndarray:
    if "tokenizer.ggml.token_type" not in header.metadata:
        return np.full(count, _NORMAL)
    return np.asarray(_list(header, "token_type", count))


def _list(header: GgufHeader, name: str, count: int | None = None) -> Any:
    """Reads `tokenizer.ggml.<name>`, a list of strings or an array of numbers, of `count` items (None: any)."""
    key = f"tokenizer.ggml.{name}"
    values = header.metadata.get(key)
    if not isinstance(values, list | np.ndarray):
        raise CheckpointError(f"{header.file}: metadata {key} is missing or not a list")
    if count is not None and len(values) != count:
        raise CheckpointError(f"{header.file}: metadata {key}: expected {count} values, found {len(values)}")
    return values


def _refused(header: GgufHeader, key: str, value: Any, supported: str) -> UnsupportedModelError:
    remedy = "use the model's Hugging Face directory"
    return UnsupportedModelError(f"{header.file}: {key}={value!r} is not supported; supported: {supported}; {remedy}")


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
