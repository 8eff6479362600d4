"""What a refused request says: for tests that take refusals at their word."""

from __future__ import annotations

import re
from collections.abc import Callable

from furiosa_llm.errors import FuriosaLLMError

_QUOTED = re.compile(r"`([^`]*)`")


def refused(request: Callable[[], object]) -> FuriosaLLMError | None:
    """The error that `request` raises, None if it is granted."""
    try:
        request()
    except FuriosaLLMError as error:
        return error
    return None


def suggestions(error: FuriosaLLMError) -> list[str]:
    """The values that the error's next step names."""
    return _QUOTED.findall(error.next_step)
