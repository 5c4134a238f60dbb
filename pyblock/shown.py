"""Text that came from elsewhere (a VMM, a file's name, a tenant), made fit to be shown: in an error, a log, on a terminal.

Control characters and escape sequences would drive the terminal, marks of writing direction would reorder it, and a megabyte would bury
the rest.
"""

from __future__ import annotations

SHOWN_MAX = 500  # characters


def shown(text: str, limit: int = SHOWN_MAX) -> str:
    """The text in one line, with what is not printable written as its escape (`\\x1b`), cut to so many characters.

    A text that is cut ends in "…". What can be shown as it is, is.
    """
    cut = len(text) > limit
    text = text[: limit - 1] if cut else text
    if not text.isprintable():
        text = "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)
        if len(text) > limit:
            cut, text = True, text[: limit - 1]
    return text + "…" if cut else text
