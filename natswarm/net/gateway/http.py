"""Read one HTTP response from a stranger, within bounds: the little of HTTP that UPnP needs.

A synchronous reader: bytes in, a response out. It follows no redirects, keeps no connection and
decompresses nothing, so there is nothing to be led astray by.

Source: RFC 9112, sections 4 to 7. Knows no sockets and nothing of UPnP.
"""

from __future__ import annotations

from dataclasses import dataclass

from natswarm.errors import DecodeError

__all__ = ["HttpResponse", "HttpResponseReader"]

# The fields of a gateway take some 300 bytes, its description 2 to 20 KB; ten times that is a
# different thing.
MAX_HEAD_BYTES = 8 * 1024
MAX_BODY_BYTES = 128 * 1024
MAX_FIELDS = 64
# The size of a chunk, and extensions that nobody uses.
MAX_CHUNK_HEAD_BYTES = 128


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A whole response.

    Attributes:
        status: 100..599.
        fields: Names in lower case; of one that comes twice, the last.
        body: Without transfer coding.
    """

    status: int
    fields: dict[str, str]
    body: bytes


class HttpResponseReader:
    """Takes the bytes of one response as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._status = 0
        self._fields: dict[str, str] | None = None
        self._body = bytearray()
        self._left: int | None = None
        """Bytes of the body, or of the chunk, still to come; None: until the connection ends."""
        self._is_chunked = False
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the response is there as a whole."""
        return self._is_complete

    def receive_untrusted(self, data: bytes | bytearray) -> None:
        """Take bytes from the connection; none mean that it ended.

        Raises:
            DecodeError: Not a response, or beyond a bound, or cut off.
        """
        self._buffer += data
        if self._fields is None and not self._read_head():
            if not data:
                raise DecodeError("the connection ended before the HTTP response began")
            return
        if self._is_chunked:
            self._read_chunks()
        else:
            self._read_plain()
        if not data and not self._is_complete:
            if self._left is not None or self._is_chunked:
                raise DecodeError("the HTTP response is cut off")
            self._is_complete = True

    def response(self) -> HttpResponse:
        """Return the response; call once it is complete."""
        assert self._is_complete
        assert self._fields is not None
        return HttpResponse(self._status, self._fields, bytes(self._body))

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise DecodeError(f"an HTTP head of more than {MAX_HEAD_BYTES} bytes")
            return False
        self._status, self._fields = decode_head_untrusted(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        if "chunked" in self._fields.get("transfer-encoding", "").lower():
            self._is_chunked = True
            self._left = 0
        elif (length := self._fields.get("content-length")) is not None:
            if not length.isascii() or not length.isdigit() or len(length) > 9:
                raise DecodeError(f"{length[:20]!r} is no length of an HTTP body")
            self._left = int(length)
            if self._left > MAX_BODY_BYTES:
                raise DecodeError(f"an HTTP body of {self._left} bytes; {MAX_BODY_BYTES} is a lot")
        return True

    def _read_plain(self) -> None:
        if self._left is None:
            self._take(len(self._buffer))
            return
        self._left -= self._take(self._left)
        self._is_complete = self._left == 0

    def _read_chunks(self) -> None:
        """`<size in hexadecimal>CRLF<data>CRLF`, again and again; size 0 is the last."""
        while True:
            if self._left:
                self._left -= self._take(self._left)
                if self._left:
                    return
                self._left = None  # the line end after the data is still to come
            if self._left is None:
                if len(self._buffer) < 2:
                    return
                if self._buffer[:2] != b"\r\n":
                    raise DecodeError("an HTTP chunk does not end where it says")
                del self._buffer[:2]
                self._left = 0
            end = self._buffer.find(b"\r\n", 0, MAX_CHUNK_HEAD_BYTES)
            if end < 0:
                if len(self._buffer) >= MAX_CHUNK_HEAD_BYTES:
                    raise DecodeError("an HTTP chunk without a size")
                return
            size_text = bytes(self._buffer[:end]).partition(b";")[0].strip().decode("latin-1")
            if (
                not size_text
                or len(size_text) > 6
                or set(size_text) - set("0123456789abcdefABCDEF")
            ):
                raise DecodeError(f"{size_text[:20]!r} is no size of an HTTP chunk")
            del self._buffer[: end + 2]
            self._left = int(size_text, 16)
            if not self._left:
                self._is_complete = True  # trailers are of no interest
                return

    def _take(self, limit: int) -> int:
        taken = min(limit, len(self._buffer))
        if len(self._body) + taken > MAX_BODY_BYTES:
            raise DecodeError(f"an HTTP body of more than {MAX_BODY_BYTES} bytes")
        self._body += self._buffer[:taken]
        del self._buffer[:taken]
        return taken


def decode_head_untrusted(head: bytes) -> tuple[int, dict[str, str]]:
    """Read a status line and the fields after it, as SSDP answers have them, too.

    Raises:
        DecodeError: It is none.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise DecodeError(f"an HTTP head of more than {MAX_HEAD_BYTES} bytes")
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if not version.startswith("HTTP/1.") or not (status.isascii() and status.isdigit()):
        raise DecodeError(f"{first[:40]!r} is no status line of HTTP/1")
    if len(lines) > MAX_FIELDS:
        raise DecodeError(f"an HTTP head with more than {MAX_FIELDS} fields")
    fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:  # else a folded line or garbage, of which gateways produce some
            fields[name.strip().lower()] = value.strip()
    return int(status), fields
