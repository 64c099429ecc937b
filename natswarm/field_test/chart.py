"""Small charts as SVG inside a page: histograms that follow the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["histogram", "port_histogram"]

WIDTH, HEIGHT, BASE = 640, 150, 22
PORT_BINS = 128
BINS = 24


def histogram(values: Sequence[float], unit: str) -> str:
    """Return a histogram with a logarithmic axis; values below a hundredth count as that."""
    if not values:
        return "<p class=none>nothing measured</p>"
    logs = [math.log10(max(value, 0.01)) for value in values]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    counts = [0] * BINS
    for value in logs:
        counts[min(BINS - 1, int((value - low) / (high - low) * BINS))] += 1
    titles = [
        f"{_short(10 ** (low + (high - low) * index / BINS))} to "
        f"{_short(10 ** (low + (high - low) * (index + 1) / BINS))} {unit}: {count}"
        for index, count in enumerate(counts)
    ]
    marks = [
        ((exponent - low) / (high - low), f"{_short(10.0**exponent)} {unit}")
        for exponent in range(low, high + 1)
    ]
    return _bars(counts, titles, marks, f"histogram of {len(values)} values, {unit}")


def port_histogram(ports: Sequence[int]) -> str:
    """Return how often ports were seen, over all 65,536."""
    counts = [0] * PORT_BINS
    size = 65_536 // PORT_BINS
    for port in ports:
        if 0 <= port < 65_536:
            counts[port // size] += 1
    titles = [
        f"ports {index * size} to {(index + 1) * size - 1}: {count}"
        for index, count in enumerate(counts)
    ]
    marks = [(port / 65_536, f"{port:,}") for port in (0, 16_384, 32_768, 49_152, 65_536)]
    return _bars(counts, titles, marks, f"histogram of {len(ports)} ports")


def _bars(
    counts: Sequence[int], titles: Sequence[str], marks: Sequence[tuple[float, str]], label: str
) -> str:
    step = WIDTH / len(counts)
    highest = max([*counts, 1])
    parts = [
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT + BASE}">',
        f"<line class=axis x1=0 y1={HEIGHT} x2={WIDTH} y2={HEIGHT} />",
        f"<text class=tick x=0 y=10>{highest}</text>",
    ]
    for index, (count, title) in enumerate(zip(counts, titles, strict=True)):
        if count:
            height = max(2.0, (HEIGHT - 14) * count / highest)
            parts.append(
                f"<rect class=bar x={index * step + 0.5:.1f} y={HEIGHT - height:.1f} "
                f"width={max(1.0, step - 1):.1f} height={height:.1f}>"
                f"<title>{escape(title)}</title></rect>"
            )
    for place, text in marks:
        anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
        parts.append(
            f"<text class=tick x={place * WIDTH:.1f} y={HEIGHT + 16} text-anchor={anchor}>"
            f"{escape(text)}</text>"
        )
    parts.append("</svg>")
    return "".join(parts)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
