"""Text to token ids and back, and chat messages to text: what the artifact's files say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from tokenizers import Tokenizer as TokenizerFile

from .. import errors
from ..artifact.reader import Artifact

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else the model's template knows."""


class Tokenizer:
    """The tokenizer of an artifact. Raises: RUN005, RUN012, ART007."""

    def __init__(self, artifact: Artifact) -> None:
        if not artifact.has_file("tokenizer.json"):
            raise errors.no_tokenizer(str(artifact.path))
        path = artifact.file("tokenizer.json")
        try:
            self._tokenizer = TokenizerFile.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise errors.unusable_tokenizer(str(path), str(error)) from error
        # A prompt that is too long is refused with a code, never cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._artifact = artifact

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to answer. Raises: RUN013."""
        # Imported here: most runs have no chat.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            text = environment.from_string(self._chat_template).render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise errors.chat_impossible(str(self._artifact.path), str(error)) from error
        return self.encode(text, add_special_tokens=False)  # the template wrote them

    @cached_property
    def _config(self) -> dict[str, Any]:
        if not self._artifact.has_file("tokenizer_config.json"):
            return {}
        path = self._artifact.file("tokenizer_config.json")
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise errors.unusable_tokenizer(str(path), str(error)) from error

    @property
    def _chat_template(self) -> str:
        if self._artifact.has_file("chat_template.jinja"):
            return self._artifact.file("chat_template.jinja").read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise errors.chat_impossible(str(self._artifact.path), "it has no chat template")
        return template

    @property
    def _special_tokens(self) -> dict[str, str]:
        """`bos_token` and the like; older files wrap the text in an object."""
        tokens = {key: self._config.get(key) for key in ("bos_token", "eos_token", "unk_token")}
        texts = {k: t["content"] if isinstance(t, dict) else t for k, t in tokens.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}


def _to_json(value: object, indent: int | None = None) -> str:
    """Unlike jinja's own filter, does not escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
