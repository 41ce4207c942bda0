"""Text to token ids and back: over `tokenizers`, keeping user text harmless and UTF-8 whole."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from isthmus.protocol.errors import ModelFileError, RequestError, UnsupportedModelError

# Added tokens of this form steer the model even where the file does not mark them special
# (`<think>`, `<tool_call>`, `[INST]`), so user text may not produce them either.
_CONTROL_FORM = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2's `bytes_to_unicode`, inverted)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in plain}
    shifted = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(256 + i): byte for i, byte in enumerate(shifted)}


class Tokenizer:
    """A tokeniser read from the contents of a `tokenizer.json`. Thread-safe.

    Byte-level BPE and sentencepiece-like BPE with byte fallback are known; any other decoder is
    refused (`UnsupportedModelError`), damaged contents are a `ModelFileError`.
    """

    def __init__(self, data: bytes | str, *, bos_id: int | None = None, eos_ids: Iterable[int] = ()) -> None:
        import tokenizers

        try:
            text = data.decode("utf-8", "strict") if isinstance(data, bytes) else data
            parsed = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ModelFileError(
                f"tokenizer.json is damaged: {error}", hint="pull the model again"
            ) from error
        # Left on by some exporters; they would cut or pad prompts behind our back.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Where the caller doesn't know the begin token, the post-processor does.
        self.bos_id = next(iter(self._tokenizer.encode("").ids), None) if bos_id is None else bos_id
        self.eos_ids = tuple(eos_ids)
        self._byte_level, self._strips_first_space = _decoder_kind(parsed.get("decoder"))
        self._byte_fallback = bool(parsed["model"].get("byte_fallback"))
        added = parsed.get("added_tokens") or []
        self._skipped = frozenset(token["id"] for token in added if token["special"])
        self.special_tokens: dict[str, int] = {
            token["content"]: token["id"]
            for token in added
            if token["special"] or _CONTROL_FORM.fullmatch(token["content"])
        }
        self._control_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_bytes(cls, data: bytes, *, bos_id: int | None = None, eos_ids: Iterable[int] = ()) -> Tokenizer:
        """From the contents of a `tokenizer.json`."""
        return cls(data, bos_id=bos_id, eos_ids=eos_ids)

    @classmethod
    def from_file(
        cls, path: str | Path, *, bos_id: int | None = None, eos_ids: Iterable[int] = ()
    ) -> Tokenizer:
        """From a `tokenizer.json` on disk."""
        try:
            return cls(Path(path).read_bytes(), bos_id=bos_id, eos_ids=eos_ids)
        except OSError as error:
            raise ModelFileError(f"cannot read {path}: {error.strerror}") from error

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id. The model's own vocabulary may be padded beyond it."""
        return 1 + max(self._vocab.values(), default=-1)

    @cached_property
    def _vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocab

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a text of this model begins with the begin token (the file's post-processor says so)."""
        return self.bos_id is not None and self._tokenizer.encode("").ids[:1] == [self.bos_id]

    @property
    def template_tokens(self) -> dict[str, str]:
        """`bos_token` and `eos_token` as chat templates want them; empty where the model has none."""
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {name: "" if token is None else self.token_text(token) for name, token in ids.items()}

    def token_text(self, token: int) -> str:
        """How the vocabulary spells a token, `""` for an id outside it."""
        return (self._tokenizer.id_to_token(token) or "") if 0 <= token < 1 << 32 else ""

    def encode(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. With `special=False`, control tokens spelled in it stay plain text.

        `add_bos` starts the sequence as the tokeniser itself would: with the begin token if the model
        wants one (`adds_bos`), else with nothing.
        """
        ids = self.encode_segments([(text, special)])
        return [self.bos_id, *ids] if add_bos and self.adds_bos and self.bos_id is not None else ids

    def encode_segments(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of the joined (text, trusted) segments.

        The text is tokenised as one piece, so that the result is that of the joined string, except
        that a control token which any untrusted character takes part in is read as plain text.
        """
        text = "".join(part for part, _ in segments)
        trusted = bytearray()
        for part, allowed in segments:
            trusted += (b"\1" if allowed else b"\0") * len(part)
        cuts = self._cuts(text, trusted)
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._encode_piece(text[start:end], trusted[start:end])
        return ids

    def _cuts(self, text: str, trusted: bytearray) -> list[int]:
        """Where to cut so that no spelled control token with an untrusted character stays whole."""
        if all(trusted):
            return []
        cuts: set[int] = set()
        for content in self.special_tokens:
            at = text.find(content)
            while at >= 0:
                if not all(trusted[at : at + len(content)]):
                    cuts.add(at + 1)
                at = text.find(content, at + 1)
        return sorted(cuts - {len(text)})

    def _encode_piece(self, text: str, trusted: bytearray) -> list[int]:
        try:
            # Of the library's ways this one lets other threads run meanwhile: a megabyte takes seconds.
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(
                "the text holds a lone surrogate, which is no valid Unicode", code="invalid_unicode"
            ) from error
        if all(trusted) or self._control_ids.isdisjoint(encoding.ids):
            return list(encoding.ids)
        # Reached where a normaliser or the merges themselves spell a control token (`＜s＞` under NFKC):
        # its characters are then taken one by one.
        encoding = self._tokenizer.encode(text, add_special_tokens=False)  # with offsets
        ids: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in self._control_ids or all(trusted[start:end]):
                ids.append(token)
                continue
            for char in text[start:end]:
                pieces = self._tokenizer.encode(char, add_special_tokens=False).ids
                ids += (piece for piece in pieces if piece not in self._control_ids)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that form no valid UTF-8 become U+FFFD; unknown ids are skipped."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*(stream.push(token) for token in ids), stream.flush()])

    def stream(self, *, skip_special: bool = True) -> DetokenizeStream:
        """A detokeniser to feed token by token; its pieces joined are `decode` of all."""
        return DetokenizeStream(self, skip_special=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, `b""` for an id outside the vocabulary."""
        content = self.token_text(token)
        if self._byte_level:
            table = _ALPHABET
            if all(char in table for char in content):
                return bytes(table[char] for char in content)
            return content.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(content)):
            return bytes([int(match[1], 16)])
        return content.replace("▁", " ").encode()

    @cached_property
    def canonical_hash(self) -> str:
        """sha256 hex over what every token id stands for, in bytes.

        Equal for two files of one vocabulary however each spells it (`tokenizer.json` or GGUF).
        How text is cut into tokens stays out: only the edge does that; what both ends of a session
        must agree on is the meaning of an id.
        """
        digest = hashlib.sha256()
        for token in sorted(set(self._vocab.values())):
            content = self.token_bytes(token)
            digest.update(f"{token}:{len(content)}:".encode() + content)
        return digest.hexdigest()

    def is_skipped(self, token: int) -> bool:
        """Whether `token` is a control token that `decode` leaves out by default."""
        return token in self._skipped

    @property
    def strips_first_space(self) -> bool:
        """Sentencepiece vocabularies put a space before the first word; decoding takes it off again."""
        return self._strips_first_space


_ALPHABET = byte_alphabet()


class DetokenizeStream:
    """Tokens in, whole characters out: bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_first_space

    def push(self, token: int) -> str:
        """The text this token completes, often but not always its own."""
        if self._skip_special and self._tokenizer.is_skipped(token):
            return ""
        return self._trim(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never got complete, else nothing."""
        text = self._trim(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._at_start = self._tokenizer.strips_first_space
        return text

    def _trim(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def _decoder_kind(decoder: Any) -> tuple[bool, bool]:
    """(byte-level?, strips the first space?) of the `decoder` entry of a tokenizer.json."""
    parts = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": None}]
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds == ["Metaspace"]:
        part = parts[0]
        # Files before tokenizers 0.16 say `add_prefix_space`.
        return False, part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True)
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        replace, strip = parts[0], parts[3] if len(parts) == 4 else None
        if replace["pattern"] == {"String": "▁"} and replace["content"] == " ":
            if strip is None:
                return False, False
            if (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0):
                return False, True
    raise UnsupportedModelError(
        f"tokenizer.json: decoder {kinds} is not supported",
        hint="supported: ByteLevel, Metaspace, Replace+ByteFallback+Fuse(+Strip)",
    )
