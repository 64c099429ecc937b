"""How an answer looks while it comes: progress on stderr, text on stdout, so that it can be piped.

Knows nothing of where the text comes from.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.text import Text

__all__ = ["AnswerScreen"]


class AnswerScreen:
    """Shows an answer while it comes: a line of progress on stderr, then text on stdout.

    Args:
        remarks: Console on stderr.
        quiet: Only collect the text.
    """

    def __init__(self, remarks: Console, *, quiet: bool) -> None:
        self.text = ""
        self._remarks = remarks
        self._quiet = quiet
        self._news = ""
        self._spinner = Spinner("dots")
        # Its wish to redirect stdout would put the text on stderr, where the progress is.
        self._progress = Live(
            self._spinner,
            console=remarks,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> AnswerScreen:
        if self._remarks.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()
        if self.text and not self._quiet:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def tell(self, progress: str) -> None:
        """Show what is going on, if there is a terminal to show it on."""
        self._spinner.update(text=Text(progress))  # not markup: there are peers' names in it

    def tell_change(self, news: str) -> None:
        """Tell what has changed; once the answer has begun, in a line of its own."""
        self.tell(news)
        if self.text and news != self._news:
            self.remark(news)
        self._news = news

    def add(self, piece: str) -> None:
        """Show the next piece of the answer."""
        self.text += piece
        if self._quiet:
            return
        if sys.stdout.isatty():
            self._progress.stop()  # from here on the line belongs to the text
            # The last stage chooses the tokens; it must not get at the terminal with them.
            piece = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Say something about the answer as a whole."""
        if not self._quiet:
            self._remarks.print(f"[dim]{escape(text)}[/]")
