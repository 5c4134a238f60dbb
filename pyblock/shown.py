"""What a tenant, a guest or a VMM wrote, as it may stand on a terminal and in a log.

A file name may hold anything but NUL and "/", and a VMM's error repeats it. Whatever would move a cursor, hide, or turn the line around
is shown as the escape that Python writes for it, and what is too long is cut, with a mark.
"""

from __future__ import annotations

import re

SHOWN_MAX = 500  # characters, where nobody says otherwise

# str.isprintable() is False for controls, format characters (bidi, zero-width), lone surrogates (a byte that is no UTF-8), unassigned and
# private ones, and separators but the space. These it lets through, and they show as nothing: joiner, fillers, variation selectors, the
# vowels and free selectors of Khmer and Mongolian, the empty Braille cell.
_NOTHING = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def shown(text: str, limit: int = SHOWN_MAX) -> str:
    """The text, at most `limit` characters of it after escaping, and where more was there a mark that says how many are left out.

    A backslash stays one backslash, so that text which was escaped before (by `!r`) stays readable; no escape is cut in two.
    """
    beginning = text[:limit]
    if len(beginning) == len(text) and _is_plain(beginning):
        return text
    kept: list[str] = []
    room = limit
    for char in beginning:
        piece = char if _is_plain(char) else char.encode("unicode_escape").decode()
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    left_out = len(text) - len(kept)
    return "".join(kept) + (f"… (+{left_out})" if left_out else "")


def _is_plain(text: str) -> bool:
    return text.isprintable() and _NOTHING.search(text) is None
