"""Where lines go: a terminal or a pipe, without the 30 ms that rich takes to load (``estimate`` must answer at once)."""

from __future__ import annotations

import os
import shutil
import sys
from typing import IO

_CODES = {"bold": "1", "green": "32", "red": "31", "yellow": "33", "dim": "2"}


class Screen:
    """Writes lines as they are, styled where the output is a terminal that shows colour (NO_COLOR and dumb ones do not)."""

    def __init__(self, file: IO[str] | None = None, *, width: int | None = None, colour: bool | None = None) -> None:
        self._file = file or sys.stdout
        self.width = width or shutil.get_terminal_size((80, 24)).columns
        shows = self._file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._colour = shows if colour is None else colour

    @property
    def draws_blocks(self) -> bool:
        """Whether the encoding has block characters."""
        return (getattr(self._file, "encoding", None) or "utf-8").lower().startswith("utf")

    def line(self, text: str, style: str = "") -> None:
        """One line; ``style`` is words of bold, dim, green, red, yellow."""
        if style and self._colour and text:
            codes = ";".join(_CODES[word] for word in style.split())
            text = f"\x1b[{codes}m{text}\x1b[0m"
        self._file.write(text + "\n")
