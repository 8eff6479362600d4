"""The textual form of a module, with locations; text -> module -> text gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import StringIO

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.dialects.func import Func
from xdsl.ir import Dialect
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError

from .. import errors
from .dist import DIST
from .nn import NN
from .paged import PAGED
from .quant import QUANT

LazyDialects = Mapping[str, Callable[[], Dialect]]


def make_context(extra_dialects: LazyDialects | None = None) -> Context:
    """A context with our tensor dialects, `builtin` and `func`, and `extra_dialects` by name.

    An extra dialect is loaded when the text first names it.
    """
    context = Context()
    for dialect in (Builtin, Func, NN, PAGED, QUANT, DIST):
        context.load_dialect(dialect)
    for name, load in (extra_dialects or {}).items():
        context.register_dialect(name, load)
    return context


def print_module(module: ModuleOp) -> str:
    """The module as text, every op with its location, ending in a newline."""
    stream = StringIO()
    Printer(stream=stream, print_debuginfo=True).print_op(module)
    return stream.getvalue() + "\n"


def parse_module(
    text: str, filename: str = "<text>", extra_dialects: LazyDialects | None = None
) -> ModuleOp:
    """The module that `text` describes; not verified yet, see `verify_module`.

    A file without `builtin.module` is wrapped in one. Raises: IRV008 with line and column.
    """
    parser: Parser | None = None
    try:
        parser = Parser(make_context(extra_dialects), text, filename)
        return parser.parse_module()
    except ParseError as error:
        at = _place(text, filename, error.span.start)
        raise errors.ir_text_not_parsed(at=at, cause=error.msg.strip()) from None
    except Exception as error:
        # xDSL's parser raises whatever its attribute classes raise (VerifyException, ValueError,
        # struct.error, …); to the user each of them means that the text is wrong.
        at = _place(text, filename, 0 if parser is None else parser.pos)
        raise errors.ir_text_not_parsed(at=at, cause=str(error) or repr(error)) from error


def _place(text: str, filename: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"{filename}:{line}:{column}"
