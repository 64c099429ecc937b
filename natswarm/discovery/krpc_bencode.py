"""Bencoding, strictly: the encoding of BitTorrent's messages and files.

    5 -> i5e    b"ab" -> 2:ab    [1, 2] -> li1ei2ee    {b"k": 1} -> d1:ki1ee     keys sorted

Own code, since the libraries at hand recurse without a bound, take numbers of any length, or accept
several forms of one value; what comes from strangers must not. Values that have two forms would let
two nodes disagree on what was signed (BEP 44), so `-0`, leading zeros, unsorted and repeated keys
are errors, with one exception: real nodes send dictionaries with unsorted keys, so those pass where
the caller says so.

Source: BEP 3. Knows no messages.
"""

from __future__ import annotations

from natswarm.errors import DecodeError

__all__ = ["Value", "bdecode_untrusted", "bencode"]

Value = int | bytes | list["Value"] | dict[bytes, "Value"]

DEPTH_MAX = 8  # messages nest three deep, files of settings five
DIGITS_MAX = 20  # 2**63 has 19


def bencode(value: Value) -> bytes:
    """Return the one encoding of a value."""
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


def _write(value: Value, parts: list[bytes]) -> None:
    match value:
        case int():
            parts.append(b"i%de" % value)
        case bytes():
            parts.append(b"%d:" % len(value))
            parts.append(value)
        case list():
            parts.append(b"l")
            for each in value:
                _write(each, parts)
            parts.append(b"e")
        case dict():
            parts.append(b"d")
            for key in sorted(value):
                _write(key, parts)
                _write(value[key], parts)
            parts.append(b"e")


def bdecode_untrusted(data: bytes, *, is_order_free: bool = False) -> Value:
    """Read one value that fills `data`.

    Args:
        data: What a stranger sent; the work is proportional to its length.
        is_order_free: Take dictionaries whose keys are not sorted; repeated keys stay errors.

    Raises:
        DecodeError: Not the encoding of a value, or nested deeper than 8.
    """
    reader = _Reader(data, is_order_free)
    value = reader.value(DEPTH_MAX)
    if reader.position != len(data):
        raise DecodeError(f"{len(data) - reader.position} bytes follow the value")
    return value


class _Reader:
    def __init__(self, data: bytes, is_order_free: bool) -> None:
        self._data = data
        self._is_order_free = is_order_free
        self.position = 0

    def value(self, depth: int) -> Value:
        if depth == 0:
            raise DecodeError(f"a value is nested deeper than {DEPTH_MAX}")
        match self._data[self.position : self.position + 1]:
            case b"i":
                self.position += 1
                return self._number(b"e", is_signed=True)
            case b"l":
                self.position += 1
                values = []
                while not self._is_end():
                    values.append(self.value(depth - 1))
                return values
            case b"d":
                self.position += 1
                return self._dictionary(depth)
            case _:
                return self._string()

    def _dictionary(self, depth: int) -> dict[bytes, Value]:
        values: dict[bytes, Value] = {}
        last = None
        while not self._is_end():
            key = self._string()
            is_sorted = last is None or last < key
            if key in values or not (is_sorted or self._is_order_free):
                raise DecodeError("the keys of a dictionary are not sorted, or repeated")
            last = key
            values[key] = self.value(depth - 1)
        return values

    def _is_end(self) -> bool:
        if self._data[self.position : self.position + 1] != b"e":
            return False
        self.position += 1
        return True

    def _string(self) -> bytes:
        length = self._number(b":", is_signed=False)
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            raise DecodeError("a string is cut off")
        return self._data[start : self.position]

    def _number(self, end: bytes, *, is_signed: bool) -> int:
        stop = self._data.find(end, self.position, self.position + DIGITS_MAX + 1)
        if stop < 0:
            raise DecodeError("a number does not end")
        text = self._data[self.position : stop]
        digits = text.removeprefix(b"-") if is_signed else text
        if not digits.isdigit() or (digits[0] == 0x30 and text != b"0"):
            raise DecodeError("a number is not written as numbers are")
        self.position = stop + 1
        return int(text)
