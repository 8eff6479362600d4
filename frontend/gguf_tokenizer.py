"""The tokenizer inside a GGUF file, rebuilt as the files of a Hugging Face directory.

A GGUF file names its pre-tokenizer instead of spelling it out. `smollm` is: every digit alone,
then GPT-2's byte-level rule. (transformers' own GGUF conversion leaves the digits out, which
shows in runs of spaces before a digit.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from .. import errors
from .gguf_config import token_ids
from .gguf_file import GgufFile

NO_TOKENIZER = (None, "none", "no_vocab")
CONTROL, USER_DEFINED = 3, 4
"""Token types whose text is matched whole, before any splitting."""


def tokenizer_files(file: GgufFile, context_length: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`; empty if the file has no tokenizer.

    Raises: GGF003 if the tokenizer's model or pre-tokenizer is not known or its lists are broken.
    """
    model = file.metadata.get("tokenizer.ggml.model")
    if model in NO_TOKENIZER:
        return {}
    settings = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    try:
        tokenizer = _tokenizer(settings)
        config = _config(file.metadata, settings["tokens"], context_length)
    except _Unsupported as error:
        raise errors.unsupported_gguf_tokenizer(str(file.path), str(error)) from error
    except Exception as error:  # `tokenizers` raises bare Exceptions for a broken vocabulary
        reason = f"{type(error).__name__}: {error}"
        raise errors.unsupported_gguf_tokenizer(str(file.path), reason) from error
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`generation_config.json`: greedy decoding and the ids that end a text."""
    ids = {key: value for key, value in token_ids(metadata).items() if value is not None}
    return {"_from_model_config": True, **ids}


class _Unsupported(Exception):
    """Why there is no tokenizer; becomes GGF003."""


def _tokenizer(settings: Mapping[str, Any]) -> Tokenizer:
    if settings["model"] != "gpt2":
        raise _Unsupported(f"tokenizer model `{settings['model']}`; supported is `gpt2` (BPE)")
    tokens: list[str] = settings["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _Unsupported(f"{len(tokens) - len(vocabulary)} tokens occur twice")
    pre_tokenizer = _pre_tokenizer(settings)

    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(settings["merges"], vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if settings.get("add_bos_token", False):
        bos = tokens[settings["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, settings["bos_token_id"])]
        )
    _add_whole_tokens(tokenizer, tokens, settings.get("token_type", []))
    return tokenizer


def _merges(texts: list[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens; checked here, because the library aborts on a pair that it cannot join."""
    merges = []
    for text in texts:
        left, _, right = text.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise _Unsupported(f"the merge `{text}` is not of known tokens")
        merges.append((left, right))
    return merges


def _pre_tokenizer(settings: Mapping[str, Any]) -> PreTokenizer:
    pre = settings.get("pre")
    if pre != "smollm":
        raise _Unsupported(f"pre-tokenizer `{pre}`; supported is `smollm`")
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=settings.get("add_space_prefix", False), use_regex=True
    )
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """In the order of the ids, so that `tokenizers` gives each the id it has in the vocabulary."""
    for token, kind in zip(tokens, types, strict=False):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _config(metadata: Mapping[str, Any], tokens: list[str], context_length: int) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for kind, key in kinds.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{kind}_token"] = tokens[index]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
