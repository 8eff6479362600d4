"""`qparam.npy` of Furiosa's quantiser: a pickled dict in a scalar array of objects.

Quantizer path -> twelve fields, of which symmetric quantizers fill `amax` and asymmetric ones `max`
and `min`; the rest is None.
"""

from __future__ import annotations

import ast
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import errors
from .plain_pickle import NotPlain, read_plain_pickle

MAGIC = b"\x93NUMPY"
LARGEST_BYTES = 1 << 28
"""256 MiB; the scales of a 70B model are 30 MB."""
LARGEST_HEADER_BYTES = 1 << 12

Quantizer = Mapping[str, Any]
Quantizers = Mapping[str, Quantizer]


def read_qparam(file: Path) -> Quantizers:
    """Executes nothing that the file names. Raises: QNT007 with what is wrong."""
    try:
        size_bytes = file.stat().st_size
        if size_bytes > LARGEST_BYTES:
            raise NotPlain(f"it has {size_bytes} bytes, more than {LARGEST_BYTES}")
        return quantizers_in(file.read_bytes())
    except OSError as error:
        raise errors.unsafe_qparam(str(file), errors.in_words(error)) from error
    except NotPlain as error:
        raise errors.unsafe_qparam(str(file), str(error)) from error


def quantizers_in(data: bytes) -> Quantizers:
    """What a file with these bytes holds. Raises: NotPlain."""
    return _quantizers(read_plain_pickle(_pickle_in(data)))


def _pickle_in(data: bytes) -> bytes:
    """What follows the header of a scalar array of objects. Raises: NotPlain."""
    if data[:6] != MAGIC or len(data) < 12:
        raise NotPlain("it is no .npy file")
    width = 2 if data[6] == 1 else 4
    (length,) = struct.unpack_from("<H" if width == 2 else "<I", data, 8)
    begin = 8 + width
    if length > LARGEST_HEADER_BYTES:
        raise NotPlain(f"its header has {length} bytes")
    try:
        header = ast.literal_eval(data[begin : begin + length].decode("latin-1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise NotPlain("its header is damaged") from error
    if not isinstance(header, dict) or header.get("descr") != "|O" or header.get("shape") != ():
        raise NotPlain("it is no scalar array of objects")
    return data[begin + length :]


def _quantizers(content: Any) -> Quantizers:
    """Raises: NotPlain if it is not a dict of dicts."""
    if not isinstance(content, dict) or not content:
        raise NotPlain("it holds no dict of quantizers")
    for path, quantizer in content.items():
        if not isinstance(quantizer, dict):
            raise NotPlain(f"`{path}` is no dict of fields")
    return content
