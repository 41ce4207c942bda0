"""Rebuilds a `tokenizer.json` from the tokeniser that GGUF keeps in its metadata.

GGUF stores vocabulary, merges or scores, and a *name* for the way text is split before merging; the
names are llama.cpp's (`llama-vocab.cpp`), each with one meaning. Unknown names are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


# `smollm` splits digits one by one first: llama.cpp's definition (ggml-org/llama.cpp#8609) and the model's
# own tokenizer.json. transformers' GGUF reader knows no such name and leaves that step out, so it cuts
# "\n\n1", two spaces before a digit, and a space before a non-ASCII digit otherwise.
_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
}
_PRE: dict[str, dict[str, Any]] = {
    "gpt-2": _byte_level(True),
    "smollm": _DIGITS,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split(_LLAMA3_SPLIT)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split(_QWEN2_SPLIT)),
    "tekken": _split(_TEKKEN_SPLIT),
}
# These vocabularies come from tiktoken: a word that is a token as a whole is taken as such, merges or not.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def tokenizer_json_from_gguf(metadata: Mapping[str, Any]) -> bytes:
    """The `tokenizer.json` equal to the tokeniser in GGUF `metadata`.

    Raises `UnsupportedModelError` for a kind or split not known here, `ModelFileError` for lists
    that are missing or of different lengths.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise UnsupportedModelError(
            f"GGUF: tokenizer.ggml.model = {kind!r} is not supported",
            hint=f"supported: {', '.join(builders)}",
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelFileError(f"GGUF: {len(tokens)} tokens but {len(types)} token types")
    # Unused entries only pad the vocabulary up to the embedding's rows; the original has none of them.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    if len(vocab) != sum(kind != _UNUSED for kind in types):
        raise ModelFileError("GGUF: tokenizer.ggml.tokens lists a token twice")
    data = builders[kind](metadata, tokens, types, vocab)
    data |= {"version": "1.0", "truncation": None, "padding": None}
    data["added_tokens"] = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] != _USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if token and (types[i] in (_CONTROL, _USER_DEFINED) or (types[i] == _UNKNOWN and kind == "llama"))
    ]
    data["post_processor"] = _begin_token(metadata, tokens, kind)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ModelFileError(f"GGUF: {key} is missing or not a list of strings")
    return values


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int]
) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        raise UnsupportedModelError(
            f"GGUF: tokenizer.ggml.pre = {pre!r} is not supported", hint=f"supported: {', '.join(_PRE)}"
        )
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if (
            not space
            or not left
            or not right
            or left not in vocab
            or right not in vocab
            or left + right not in vocab
        ):
            raise ModelFileError(f"GGUF: merge {merge!r} does not join two tokens into a third")
        merges.append([left, right])
    return {
        "normalizer": {"type": "NFC"} if pre in ("qwen2", "deepseek-r1-qwen") else None,
        "pre_tokenizer": _PRE[pre],
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _IGNORE_MERGES,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int]
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelFileError(f"GGUF: tokenizer.ggml.scores does not hold {len(tokens)} numbers")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in types or "<0x00>" in vocab,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges_from_scores(tokens, types, scores),
        },
    }


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Sentencepiece joins the neighbours whose union scores best; listed best first that is a merge table.

    Control, unknown and byte tokens are no products of merging: text that spells `</s>` must not become it.
    """
    usable = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER_DEFINED) and token}
    merges: list[tuple[float, str, str]] = []
    for token, i in usable.items():
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in usable and right in usable]
        pairs.sort(key=lambda pair: (usable[pair[0]], usable[pair[1]]))
        merges += [(scores[i], left, right) for left, right in pairs]
    # The order transformers uses among equal scores; sorting is stable.
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in merges]


def _begin_token(metadata: Mapping[str, Any], tokens: list[str], kind: str) -> dict[str, Any] | None:
    """The post-processor that puts the begin token first, if the file asks for it.

    Files without the flag: sentencepiece and tiktoken vocabularies begin with it, the others don't
    (llama.cpp's rule; Llama 3 files often lack the flag).
    """
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _IGNORE_MERGES
    if not metadata.get("tokenizer.ggml.add_bos_token", default) or bos is None:
        return None
    if type(bos) is not int or not 0 <= bos < len(tokens):
        raise ModelFileError(f"GGUF: bos_token_id {bos!r} outside the vocabulary of {len(tokens)}")
    token = tokens[bos]
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }
