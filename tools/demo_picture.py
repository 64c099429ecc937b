"""Draw docs/demo.svg: run the demo and save its last screen.

python tools/demo_picture.py [--seed N] [--out docs/demo.svg]
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import trio
from rich.console import Console

from llmload.demo import DEFAULT_PROMPT, run_demo
from llmload.demo_report import DemoReport
from llmload.demo_screen import DemoScreen


def main() -> None:
    """Run the demo once and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/demo.svg"))
    arguments = parser.parse_args()
    report = DemoReport(seed=arguments.seed, prompt=DEFAULT_PROMPT)
    trio.run(run_demo, report)
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(DemoScreen(report).render())
    svg = console.export_svg(title="natswarm demo")
    # Without the fonts that rich would have a browser fetch from elsewhere.
    arguments.out.write_text(re.sub(r"\s*@font-face \{.*?\}\n", "\n", svg, flags=re.DOTALL))
    print(report.status)


if __name__ == "__main__":
    main()
