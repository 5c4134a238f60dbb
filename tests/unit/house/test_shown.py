"""What others wrote, as it may be shown: nothing of it moves a cursor, hides, or turns the line
around."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pyblock.errors import shown

LEFT_ALONE = [
    "",
    "/srv/vm-1/data disk.img",
    "x[/nope].img",
    ":smile:",
    "Müllers Abbild.img",
    "数据.img",
    "e\u0301.img",
    r"a\b",
    "'quoted'",
]


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_plain_text_is_left_alone(text: str) -> None:
    assert shown(text, 99) == text


ESCAPED = {
    "escape sequence": ("\x1b[2Ja", r"\x1b[2Ja"),
    "sequence of one C1 character": ("\x9b2Ja", r"\x9b2Ja"),
    "window title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "line": ("a\nb\rc\td", r"a\nb\rc\td"),
    "delete": ("a\x7fb", r"a\x7fb"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "right to left": ("gpj\u202egmi", r"gpj\u202egmi"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "zero width": ("a\u200bb\ufeffc\u2060d", r"a\u200bb\ufeffc\u2060d"),
    "joiner": ("a\u034fb", r"a\u034fb"),
    "filler": ("a\u3164b\u115fc\uffa0", r"a\u3164b\u115fc\uffa0"),
    "variation selector": ("a\ufe0fb\U000e0101", r"a\ufe0fb\U000e0101"),
    "tag": ("a\U000e0041", r"a\U000e0041"),
    "no-break space": ("a\u00a0b", r"a\xa0b"),
    "byte that is no UTF-8": ("a\udcff", r"a\udcff"),
    "NUL": ("a\0", r"a\x00"),
}


@pytest.mark.parametrize("name", ESCAPED)
def test_the_rest_is_escaped(name: str) -> None:
    text, expected = ESCAPED[name]
    assert shown(text, 99) == expected


def test_every_character_shows() -> None:
    """Of those left alone, each takes room, or is a mark on the letter before it, or the rest of a
    Korean syllable or of an emoji."""
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if (text := shown(char, 99)) == char:
            assert char.isprintable()
            rest = unicodedata.name(char, "").startswith(
                ("HANGUL JUNGSEONG", "HANGUL JONGSEONG", "EMOJI MODIFIER")
            )
            assert cell_len(char) or rest or unicodedata.category(char) in ("Mn", "Me", "Mc"), hex(
                code
            )
        else:
            assert text.startswith("\\") and text.isascii() and text.isprintable()
            assert text.encode().decode("unicode_escape") == char


@given(st.text(max_size=60), st.integers(0, 80))
def test_cut_where_it_is_too_long(text: str, limit: int) -> None:
    whole = shown(text, 10 * len(text))
    assert shown(whole, 10 * len(text)) == whole
    cut = shown(text, limit)
    if len(whole) <= limit:
        assert cut == whole
        return
    kept, mark, rest = cut.rpartition("… (+")
    assert mark and len(kept) <= limit
    left_out = int(rest.removesuffix(")"))
    assert shown(text[: len(text) - left_out], 10 * len(text)) == kept  # so no escape is cut in two
    assert 0 < left_out <= len(text)


def test_a_flood_costs_no_more_than_its_limit() -> None:
    class Counted(str):
        looked_at = 0

        def isprintable(self) -> bool:
            Counted.looked_at += len(self)
            return str.isprintable(self)

        def __getitem__(self, key: object) -> Counted:
            return Counted(str.__getitem__(self, key))  # type: ignore[index]

    flood = Counted("\x1b" * 10_000_000)
    assert shown(flood, 40) == r"\x1b" * 10 + "… (+9999990)"
    assert Counted.looked_at <= 80
