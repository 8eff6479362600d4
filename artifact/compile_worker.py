"""A process that compiles buckets: `python -m furiosa_llm.artifact.compile_worker`.

It reads pickled messages from stdin, a `Shared` module first and then one bucket after the other,
and answers each bucket with a `CompiledBucket` or with the error. It ends when stdin does, and
needs none of the libraries that import a model.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from xdsl.dialects.builtin import ModuleOp

from ..ir.text import parse_module
from ..models.config_types import Bucket
from .compile import CompiledBucket, CompileOptions, compile_bucket


@dataclass(frozen=True)
class Shared:
    """What all buckets of a build have in common."""

    module: str
    """Text of the imported module, with locations."""
    name: str
    """The model class."""
    options: CompileOptions
    dump_ir: Path | None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    requests = sys.stdin.buffer
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # The parent has gone, perhaps while it wrote or before it read.
    with suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        shared: Shared = pickle.load(requests)
        module = parse_module(shared.module)
        while True:
            bucket: Bucket = pickle.load(requests)
            pickle.dump(_answer(shared, module, bucket), answers)
            answers.flush()


def _answer(shared: Shared, module: ModuleOp, bucket: Bucket) -> CompiledBucket | Exception:
    try:
        return compile_bucket(module, shared.name, bucket, shared.options, shared.dump_ir)
    except Exception as error:
        error.add_note(traceback.format_exc())  # for --debug: tracebacks do not cross processes
        return error


if __name__ == "__main__":
    main()
