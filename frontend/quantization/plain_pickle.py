"""Read a pickle of numpy arrays and plain containers without unpickling it.

Python's unpickler runs code that the file names, and allocates what the file asks for. This one
interprets the opcodes itself: the only things it can make are None, booleans, numbers, texts,
bytes, tuples, lists, dicts, and numeric arrays whose bytes are in the file. Every other name is
refused, no function of the file's choice is called, and memory stays proportional to the file.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np

DTYPES = frozenset(
    f"{kind}{size}"
    for kind, sizes in {"i": "1248", "u": "1248", "f": "248"}.items()
    for size in sizes
) | {"b1"}
"""Element types that an array may have."""

OBJECT = "O8"
MAX_DIMS = 8
LARGEST_DIM = 1 << 32


class NotPlain(Exception):
    """The pickle holds something else than arrays and plain containers, or is damaged."""


class _Mark:
    """Where the items of the next container begin."""


@dataclass(frozen=True)
class _Name:
    """One of the names that are admitted."""

    name: str


@dataclass
class _Dtype:
    code: str
    order: Literal["<", ">", "|"] = "|"

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass
class _Array:
    """An array; its state follows later in the file."""

    known: bool = False
    value: Any = None


ARRAY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")
NAMES: Mapping[tuple[str, str], _Name] = {
    **{(module, "_reconstruct"): _Name("reconstruct") for module in ARRAY_MODULES},
    **{(module, "scalar"): _Name("scalar") for module in ARRAY_MODULES},
    ("numpy", "ndarray"): _Name("ndarray"),
    ("numpy", "dtype"): _Name("dtype"),
}
"""What a pickled array names."""


def read_plain_pickle(data: bytes) -> Any:
    """The object in `data`. Raises: NotPlain with the first thing that is not admitted."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return _finished(machine.pop())
    except NotPlain:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise NotPlain(f"the pickle is damaged ({type(error).__name__}: {error})") from error


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in PUSHED:
            self.stack.append(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in ACTIONS:
            ACTIONS[opcode](self, argument)
        elif opcode not in IGNORED:
            raise NotPlain(f"the pickle's opcode {opcode} makes other objects")

    def pop(self) -> Any:
        """Raises: IndexError if the stack is empty."""
        return self.stack.pop()

    def pop_items(self) -> list[Any]:
        """What was pushed since the last mark. Raises: IndexError if there is none."""
        items = []
        while not isinstance(item := self.pop(), _Mark):
            items.append(item)
        return items[::-1]


# --- one function an opcode ---


def _mark(machine: _Machine, argument: Any) -> None:
    machine.stack.append(_Mark())


def _new_list(machine: _Machine, argument: Any) -> None:
    machine.stack.append([])


def _new_dict(machine: _Machine, argument: Any) -> None:
    machine.stack.append({})


def _tuple(machine: _Machine, argument: Any) -> None:
    machine.stack.append(tuple(machine.pop_items()))


def _short_tuple(size: int) -> Callable[[_Machine, Any], None]:
    def action(machine: _Machine, argument: Any) -> None:
        items = [machine.pop() for _ in range(size)]
        machine.stack.append(tuple(items[::-1]))

    return action


def _append(machine: _Machine, argument: Any) -> None:
    _extend(machine, [machine.pop()])


def _appends(machine: _Machine, argument: Any) -> None:
    _extend(machine, machine.pop_items())


def _extend(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise NotPlain("the pickle appends to what is no list")
    target.extend(map(_finished, items))


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _update(machine, [key, value])


def _set_items(machine: _Machine, argument: Any) -> None:
    _update(machine, machine.pop_items())


def _update(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
        raise NotPlain("the pickle sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise NotPlain("a dict has a key that is no text")
        target[key] = _finished(value)


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[argument])


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(_admitted(module, name))


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(_admitted(module, name))


def _admitted(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in NAMES:
        raise NotPlain(f"the pickle names {module}.{name}, which is no part of a numpy array")
    return NAMES[module, name]


def _reduce(machine: _Machine, argument: Any) -> None:
    """A call of an admitted name; no Python function is called for it."""
    arguments, function = machine.pop(), machine.pop()
    if function == _Name("reconstruct") and arguments[0] == _Name("ndarray"):
        machine.stack.append(_Array())
    elif function == _Name("dtype"):
        machine.stack.append(_dtype(arguments[0]))
    elif function == _Name("scalar") and isinstance(arguments[0], _Dtype):
        machine.stack.append(_from_bytes((), arguments[0], False, arguments[1])[()])
    else:
        raise NotPlain("the pickle calls something else than what makes an array")


def _dtype(code: Any) -> _Dtype:
    if code not in DTYPES and code != OBJECT:
        raise NotPlain(f"an array has the element type {str(code)[:40]!r}")
    return _Dtype(code)


def _build(machine: _Machine, argument: Any) -> None:
    """The state of an array or of an element type."""
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, _Dtype):
        order = state[1]
        if order not in ("<", ">", "|"):
            raise NotPlain(f"an element type has the byte order {str(order)[:40]!r}")
        target.order = order
    elif isinstance(target, _Array) and not target.known:
        _, shape, dtype, fortran, content = state
        target.known = True
        target.value = _array_value(shape, dtype, bool(fortran), content)
    else:
        raise NotPlain("the pickle sets the state of what is no array")


def _array_value(shape: Any, dtype: Any, fortran: bool, content: Any) -> Any:
    """An array; for a scalar array of objects, which `numpy.save` makes of a dict, its object."""
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise NotPlain("an array has no element type or no shape")
    if dtype.code != OBJECT:
        return _from_bytes(shape, dtype, fortran, content)
    if shape != () or not isinstance(content, list) or len(content) != 1:
        raise NotPlain("an array of several objects")
    return content[0]


def _from_bytes(shape: tuple[Any, ...], dtype: _Dtype, fortran: bool, content: Any) -> Any:
    """A view of bytes of the file: no memory but theirs."""
    if dtype.code == OBJECT or not isinstance(content, bytes):
        raise NotPlain("an array whose elements are not in the file")
    sizes_ok = all(type(size) is int and 0 <= size < LARGEST_DIM for size in shape)
    if not sizes_ok or len(shape) > MAX_DIMS:
        raise NotPlain(f"an array has the shape {str(shape)[:40]}")
    if prod(shape) * dtype.numpy.itemsize != len(content):
        raise NotPlain(f"an array of shape {shape} has {len(content)} bytes")
    flat = np.frombuffer(content, dtype.numpy)
    return flat.reshape(shape, order="F" if fortran else "C")


def _finished(value: Any) -> Any:
    """What stands for a value on the stack: an array instead of its recipe."""
    if isinstance(value, _Array):
        if not value.known:
            raise NotPlain("an array without state")
        return value.value
    if isinstance(value, _Name | _Dtype | _Mark):
        raise NotPlain("a name or an element type where a value should be")
    if isinstance(value, tuple):
        # Tuples are the recipes of arrays, too, so their items are looked at only here.
        if any(isinstance(item, tuple) for item in value):
            raise NotPlain("a tuple in a tuple")
        return tuple(map(_finished, value))
    return value


PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
"""Opcodes whose argument is the value."""

CONSTANTS: Mapping[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}

ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _mark,
    "EMPTY_LIST": _new_list,
    "EMPTY_DICT": _new_dict,
    "TUPLE": _tuple,
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
}

IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
