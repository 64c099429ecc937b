"""The success matrix as a PNG, for slides and mails: pixels and zlib, no library.

Letters are the 5 by 7 dots of character displays, a byte a column with the top in its lowest bit.
Labels are reduced to ASCII. Source: PNG (ISO/IEC 15948), chunks IHDR, IDAT, IEND.
"""

from __future__ import annotations

import struct
import unicodedata
import zlib

from natswarm.field_test.tally import Tally, median

__all__ = ["matrix_png"]

_FONT = bytes.fromhex(
    """
    0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649562050 0008070300
    001c224100 0041221c00 2a1c7f1c2a 08083e0808 0080703000 0808080808 0000606000 2010080402
    3e5149453e 00427f4000 7249494946 2141494d33 1814127f10 2745454539 3c4a494931 4121110907
    3649494936 464949291e 0000140000 0040340000 0008142241 1414141414 0041221408 0201590906
    3e415d594e 7c1211127c 7f49494936 3e41414122 7f4141413e 7f49494941 7f09090901 3e41415173
    7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f021c027f 7f0408107f 3e4141413e
    7f09090906 3e4151215e 7f09192946 2649494932 03017f0103 3f4040403f 1f2040201f 3f4038403f
    6314081463 0304780403 6159494d43 007f414141 0204081020 004141417f 0402010204 4040404040
    0003070800 2054547840 7f28444438 3844444428 384444287f 3854545418 00087e0902 18a4a49c78
    7f08040478 00447d4000 2040403d00 7f10284400 00417f4000 7c04780478 7c08040478 3844444438
    fc18242418 18242418fc 7c08040408 4854545424 04043f4424 3c4040207c 1c2040201c 3c4030403c
    4428102844 4c9090907c 4464544c44 0008364100 0000770000 0041360800 0201020402
    """
)
GLYPH_WIDTH, GLYPH_HEIGHT = 5, 8

Colour = tuple[int, int, int]
WHITE, BLACK, GREY = (255, 255, 255), (25, 28, 33), (232, 234, 237)
BAD, MIDDLE, GOOD = (243, 178, 170), (247, 226, 160), (163, 219, 175)

SCALE = 2
ADVANCE = (GLYPH_WIDTH + 1) * SCALE
LINE = (GLYPH_HEIGHT + 4) * SCALE
PADDING = 16
CELL_WIDTH = 17 * ADVANCE
LABEL_CHARACTERS_MAX = 15


class _Canvas:
    """Pixels; what lies outside is left out."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._rows = [bytearray(bytes(WHITE) * width) for _ in range(height)]

    def fill(self, left: int, top: int, width: int, height: int, colour: Colour) -> None:
        right = min(left + width, self.width)
        for y in range(top, min(top + height, self.height)):
            self._rows[y][3 * left : 3 * right] = bytes(colour) * (right - left)

    def write(self, left: int, top: int, text: str) -> None:
        for number, character in enumerate(_ascii(text)):
            start = 5 * (ord(character) - 32)
            for column, bits in enumerate(_FONT[start : start + GLYPH_WIDTH]):
                for row in range(GLYPH_HEIGHT):
                    if bits >> row & 1:
                        x = left + number * ADVANCE + column * SCALE
                        self.fill(x, top + row * SCALE, SCALE, SCALE, BLACK)

    def encode(self) -> bytes:
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        body = zlib.compress(b"".join(b"\0" + row for row in self._rows), 9)
        chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )


def matrix_png(tally: Tally) -> bytes:
    """Return the matrix: rows asked, columns were asked."""
    carriers, cells = tally.carriers, tally.cells()
    label_width = (max([4, *map(_length, carriers)]) + 1) * ADVANCE
    cell_height = 3 * LINE + 10
    canvas = _Canvas(
        2 * PADDING + label_width + CELL_WIDTH * max(1, len(carriers)),
        2 * PADDING + 3 * LINE + cell_height * len(carriers),
    )
    canvas.write(PADDING, PADDING, "natswarm field test: paths found / tries")
    canvas.write(PADDING, PADDING + LINE, "rows asked, columns were asked; 95 % Wilson")
    top = PADDING + 3 * LINE
    for index, carrier in enumerate(carriers):
        x = PADDING + label_width + index * CELL_WIDTH
        canvas.write(x + 8, top - LINE, carrier[:LABEL_CHARACTERS_MAX])
        canvas.write(PADDING, top + index * cell_height + LINE, carrier[:LABEL_CHARACTERS_MAX])
    for row, asker in enumerate(carriers):
        for column, asked in enumerate(carriers):
            x, y = PADDING + label_width + column * CELL_WIDTH, top + row * cell_height
            cell = cells.get((asker, asked))
            lines, colour = ["-"], GREY
            if cell is not None:
                share = len(cell.ok) / cell.count
                colour = _blend(share)
                low, high = cell.interval
                lines = [f"{len(cell.ok)}/{cell.count} = {share:.0%}", f"{low:.0%} to {high:.0%}"]
                if (hole_s := median(cell.hole_s)) is not None:
                    lines.append(f"{hole_s:.2f} s")
            canvas.fill(x, y, CELL_WIDTH - 4, cell_height - 4, colour)
            for number, text in enumerate(lines):
                canvas.write(x + 8, y + 6 + number * LINE, text)
    return canvas.encode()


def _blend(share: float) -> Colour:
    start, end = (BAD, MIDDLE) if share < 0.5 else (MIDDLE, GOOD)
    part = 2 * share if share < 0.5 else 2 * share - 1
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _length(label: str) -> int:
    return min(LABEL_CHARACTERS_MAX, len(_ascii(label)))


def _ascii(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(each for each in plain if not unicodedata.combining(each))
    return "".join(each if 32 <= ord(each) < 127 else "?" for each in plain)
