"""Tokenisers as files of every kind, made for the tests, and transformers as what they are held against."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from isthmus.splitter.gguf_reader import GGUFFile
from isthmus.splitter.gguf_tokenizer import tokenizer_json_from_gguf
from isthmus.splitter.tokenizer import Tokenizer

CORPUS = [
    "",
    " ",
    "The capital of France is Paris.",
    "  two  spaces, a\ttab,\ttrailing  ",
    "def f(x: int) -> str:\n    return f'{x!r:>8}'  # comment\n\n\nclass A(B):\n\tpass\n",
    'for (int i=0; i<10; ++i) { printf("%d\\n", a[i] & 0xFF); }\r\n',
    "SELECT * FROM t WHERE x >= 3.14e-10 AND y != 'it''s';",
    "I'm sure they'll say we've WON'T they'd — “quoted” … 100% €5",
    "Zürich, naïve façade, œuvre, Ærøskøbing, İstanbul, đẹp",
    "你好，世界！今天的天气很好。繁體字與简体字",
    "こんにちは世界。カタカナとひらがな、漢字。",
    "안녕하세요 세계",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "مرحبا بالعالم ١٢٣ שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "emoji: 😀👍🏽👨‍👩‍👧‍👦🇩🇪 ❤️ \U0001f9ea end",
    "zero\u200bwidth\u200djoin\ufeffbom nbsp\u00a0\u2003em",
    "1234567890 3.14159 1,000,000 2024-01-31 v1.2.3",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|><|endoftext|> b",
    "mixed 中文 and English и русский 123 😀.",
    "null\x00byte and \x1b[31mescape\x7f",
    "https://example.org/path?q=a%20b&c=d#e user@example.org C:\\dir\\file.txt",
]


def metadata_gguf(path: Path, arch: str, **tokenizer: Any) -> Path:
    """A GGUF file that holds a tokeniser and just enough of a model for transformers to open it."""
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("t")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer["tokens"]))
    writer.add_tokenizer_model(tokenizer["model"])
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["types"])
    if "pre" in tokenizer:
        writer.add_tokenizer_pre(tokenizer["pre"])
        writer.add_token_merges(tokenizer["merges"])
    else:
        writer.add_token_scores(tokenizer["scores"])
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(tokenizer.get("bos", 0))
    writer.add_eos_token_id(2)
    if "add_bos" in tokenizer:
        writer.add_add_bos_token(tokenizer["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level_vocab(pre: str) -> tuple[list[str], list[str]]:
    """Tokens and merges learned from the corpus under the split of `pre`."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import models, pre_tokenizers, trainers

    seed = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": []}
    data = json.loads(tokenizer_json_from_gguf({**seed, "tokenizer.ggml.tokens": ["a"]}))
    raw = Raw(models.BPE())
    raw.pre_tokenizer = Raw.from_str(json.dumps(data)).pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=CONTROLS,
    )
    raw.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(raw.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def byte_level_gguf(path: Path, pre: str, *, arch: str = "llama", user_defined: tuple[str, ...] = ()) -> Path:
    tokens, merges = byte_level_vocab(pre)
    types = [3, 3, 3, *[1] * (len(tokens) - 3), *[4] * len(user_defined), 5, 5]
    tokens = [*tokens, *user_defined, "[PAD0]", "[PAD1]"]
    return metadata_gguf(
        path,
        arch,
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        add_bos=pre == "llama-bpe",
    )


@cache
def sentencepiece_vocab() -> tuple[list[str], list[float], list[int]]:
    from tokenizers import Tokenizer as Raw
    from tokenizers import models, pre_tokenizers, trainers

    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    raw.train_from_iterator(CORPUS[:9] * 3, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learned = [token for token, _ in sorted(raw.get_vocab().items(), key=lambda item: item[1])]
    letters = [token for token in learned if len(token) == 1]
    pieces = [token for token in learned if len(token) > 1]
    # Sentencepiece's own layout: controls, bytes, pieces best first, letters last.
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    return tokens, scores, [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]


def sentencepiece_gguf(path: Path) -> Path:
    tokens, scores, types = sentencepiece_vocab()
    return metadata_gguf(path, "llama", model="llama", tokens=tokens, types=types, scores=scores, bos=1)


def from_gguf(path: Path, **ids: Any) -> Tokenizer:
    file = GGUFFile(path)
    data = tokenizer_json_from_gguf(file.metadata)
    file.close()
    return Tokenizer.from_bytes(data, **ids)


def oracle(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
