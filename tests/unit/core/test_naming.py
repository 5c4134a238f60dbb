"""Names, SCSI addresses and IDs: every number up to 2^20 against the oracle, and every text that is
not quite one."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import oracle

from pyblock.core import naming
from pyblock.core.naming import (
    drive_index,
    drive_name,
    drive_names,
    make_name_id,
    scsi_address,
    scsi_index,
)
from pyblock.errors import InvalidAddress, InvalidID, InvalidIndex, InvalidName, InvalidValue

ALL = 2**20
INT64_MAX = 2**63 - 1
HUGE = pytest.param(10**5000, id="10^5000")  # too long for Python to print

# --- drive names
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "prefix", "name"),
    [
        (0, "vd", "vda"),
        (25, "vd", "vdz"),
        (26, "vd", "vdaa"),
        (701, "vd", "vdzz"),
        (702, "vd", "vdaaa"),
        (703, "vd", "vdaab"),
        (18277, "vd", "vdzzz"),
        (1, "sd", "sdb"),
        (1023, "xvd", "xvdamj"),
        (1024, "sd", "sdamk"),
        (INT64_MAX, "vd", "vdcrpxnlskvljfhh"),
        (0, "", "a"),
        (26, "é", "éaa"),
    ],
)
def test_drive_name_examples(number: int, prefix: str, name: str) -> None:
    assert drive_name(number, prefix) == name
    assert drive_index(name, prefix) == number


def naive_names(prefix: str) -> list[str]:
    """All names below ALL in order, without the arithmetic that could be wrong on both sides."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    rows = (itertools.product(alphabet, repeat=length) for length in itertools.count(1))
    return [
        prefix + "".join(row) for row in itertools.islice(itertools.chain.from_iterable(rows), ALL)
    ]


def test_every_name_and_its_inverse() -> None:
    names = naive_names("vd")
    assert drive_names(0, ALL) == names
    assert [drive_name(number) for number in range(ALL)] == names
    assert [drive_index(name) for name in names] == list(range(ALL))
    assert all(oracle.drive_name(number) == names[number] for number in range(0, ALL, 997))


@given(st.integers(0, INT64_MAX), st.text(max_size=4))
def test_drive_name_inverse(number: int, prefix: str) -> None:
    name = drive_name(number, prefix)
    assert name == oracle.drive_name(number, prefix)
    assert drive_index(name, prefix) == number


@given(st.integers(0, INT64_MAX - 100), st.integers(0, 100))
@example(25, 2)
@example(701, 2)
@example(1020, 8)
@example(0, 0)
def test_drive_names_are_single_names(first: int, count: int) -> None:
    assert drive_names(first, count, "sd") == [
        oracle.drive_name(number, "sd") for number in range(first, first + count)
    ]


@pytest.mark.parametrize("number", [-1, -(2**63), INT64_MAX + 1, 2**64, -(2**64), HUGE])
def test_drive_name_out_of_range(number: int) -> None:
    with pytest.raises(InvalidIndex, match=str(INT64_MAX)):
        drive_name(number)
    with pytest.raises(InvalidIndex, match=str(INT64_MAX)):
        drive_names(number, 1)


def test_drive_names_out_of_range() -> None:
    assert drive_names(INT64_MAX, 1) == [drive_name(INT64_MAX)]
    assert drive_names(5, 0) == []
    for first, count in [(INT64_MAX, 2), (0, -1), (0, 2**63), (0, 2**80), (5, -(2**80))]:
        with pytest.raises(InvalidIndex):
            drive_names(first, count)


def test_drive_name_fills_31_bytes_and_no_more() -> None:
    prefix = "p" * 30
    assert drive_name(25, prefix) == prefix + "z"
    assert drive_index(prefix + "z", prefix) == 25
    assert drive_names(24, 2, prefix) == [prefix + "y", prefix + "z"]
    for attempt in (
        lambda: drive_name(26, prefix),
        lambda: drive_names(25, 2, prefix),
        lambda: drive_name(0, prefix + "p"),
    ):
        with pytest.raises(InvalidName, match="31 bytes"):
            attempt()
    with pytest.raises(InvalidName):
        drive_name(26, "é" * 15)  # 30 bytes, though 15 characters
    with pytest.raises(InvalidName):
        drive_index(prefix + "aa", prefix)


@pytest.mark.parametrize(
    "name",
    [
        "", "v", "vd", "sda", "vdA", "vd1", "vda1", "vdé", "vd\uff41", "vd\u0661", "vda\n", "\nvda",
        "vd\na", "vda\0", "vd\0a", "vda ",
        " vda", "+vda", "vd-a", "/dev/vda", "vd" + "a" * 30, "vdcrpxnlskvljfhi", "vdzzzzzzzzzzzzzz",
        "vd" + "z" * 29,
        "vd\ud800", "x" * 10**6,
    ],
)  # fmt: skip
def test_malformed_drive_names(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        drive_index(name)
    assert len(str(caught.value)) < 400


@given(st.text(alphabet=st.sampled_from("vdaz\0\n é\u0661-+09A"), max_size=8))
def test_drive_index_takes_only_what_drive_name_writes(text: str) -> None:
    try:
        number = drive_index(text)
    except InvalidName:
        assert not (
            text.startswith("vd")
            and text[2:].isascii()
            and text[2:].islower()
            and text[2:].isalpha()
        )
    else:
        assert drive_name(number) == text


def test_prefix_with_newline() -> None:
    assert drive_name(0, "a\nb") == "a\nba"
    with pytest.raises(InvalidName, match="newline"):
        drive_names(0, 2, "a\nb")


@pytest.mark.parametrize("prefix", ["\ud800", "\udfff"])
def test_prefix_that_is_no_utf8(prefix: str) -> None:
    for attempt in (
        lambda: drive_name(0, prefix),
        lambda: drive_names(0, 1, prefix),
        lambda: drive_index("vda", prefix),
    ):
        with pytest.raises(InvalidName, match="surrogate"):
            attempt()


@pytest.mark.parametrize("number", [None, "1", 1.0, 5000.0, b"1", [1]])
def test_numbers_of_another_type(number: Any) -> None:
    for function in (drive_name, scsi_address):
        with pytest.raises(TypeError):
            function(number)


@pytest.mark.parametrize("text", [None, 1, b"vda", ["vda"]])
def test_texts_of_another_type(text: Any) -> None:
    for function in (
        drive_index,
        scsi_index,
        lambda each: make_name_id("drive", each),
        lambda each: drive_name(0, each),
    ):
        with pytest.raises(TypeError):
            function(text)


def test_bool_is_an_int() -> None:
    assert drive_name(True) == "vdb"
    assert scsi_address(True) == "0:1"


def test_only_known_prefixes_are_kept() -> None:
    for number in range(50):
        drive_name(0, f"p{number}")
    assert set(naming._ready_names) <= {"vd", "sd"}


def test_first_use_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_ready_names", {})
    monkeypatch.setattr(naming, "_ready_addresses", ())
    with ThreadPoolExecutor(8) as pool:
        got = list(
            pool.map(
                lambda number: (drive_name(number), drive_name(number, "sd"), scsi_address(number)),
                range(1100),
            )
        )
    assert got == [
        (oracle.drive_name(n), oracle.drive_name(n, "sd"), oracle.scsi_address(n))
        for n in range(1100)
    ]


# --- SCSI addresses
# --------------------------------------------------------------------------------------------------


def test_every_scsi_address_and_its_inverse() -> None:
    addresses = [oracle.scsi_address(index) for index in range(65536)]
    assert [scsi_address(index) for index in range(65536)] == addresses
    assert [scsi_index(address) for address in addresses] == list(range(65536))
    assert scsi_address(703) == "2:191"
    assert addresses[-1] == "255:255"


@pytest.mark.parametrize("index", [-1, 65536, -(2**63), 2**63, 2**64, -(2**80)])
def test_scsi_address_out_of_range(index: int) -> None:
    with pytest.raises(InvalidIndex, match="65535"):
        scsi_address(index)


@pytest.mark.parametrize(
    "address",
    [
        "", ":", "1", "1:", ":1", "01:1", "1:01", "00:0", "+1:1", "-1:1", "1:-1", " 1:1", "1:1 ",
        "1:1\n", "1\n:1", "1:1\0", "1:1:1",
        "\u0661:0", "\u00b2:0", "\uff11:0", "0x1:0", "1_0:0", "1.0:0", "256:0", "0:256", "1000:0",
        f"{2**64}:0", f"0:{2**64 + 1}",
        "9" * 10**5 + ":0", "0:\ud800",
    ],
)  # fmt: skip
def test_malformed_scsi_addresses(address: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        scsi_index(address)
    assert len(str(caught.value)) < 400


@given(st.text(alphabet=st.sampled_from("0125:+- \0\n\u0661\u00b2"), max_size=8))
def test_scsi_index_takes_only_what_scsi_address_writes(text: str) -> None:
    try:
        index = scsi_index(text)
    except InvalidAddress:
        parts = text.split(":")
        assert len(parts) != 2 or not all(part in {str(n) for n in range(256)} for part in parts)
    else:
        assert scsi_address(index) == text


# --- drive IDs
# --------------------------------------------------------------------------------------------------


def test_the_oracle_knows_siphash() -> None:
    """The test vector of the paper: key 00 … 0f, text 00 … 0e."""
    assert oracle.siphash(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


@given(
    st.text(min_size=1, max_size=12),
    st.text(min_size=1, max_size=80),
    st.integers(0, 64),
    st.integers(0, INT64_MAX),
)
@example("drive", "1" * 25, 31, 0)
@example("drive", "1" * 26, 31, 0)
@example("drive", "é" * 13, 31, 0)
@example("drive", "1" * 15, 20, 5)
@example("drive", "😀" * 8, 31, 1)
def test_make_name_id(kind: str, device_id: str, limit: int, salt: int) -> None:
    size, least = len(f"{kind}-{device_id}".encode()), len(kind.encode()) + 15
    if size > limit and least > limit:
        with pytest.raises(InvalidID if limit else InvalidValue):
            make_name_id(kind, device_id, limit=limit, salt=salt)
        return
    made = make_name_id(kind, device_id, limit=limit, salt=salt)
    assert made == oracle.make_name_id(kind, device_id, limit, salt)
    assert len(made.encode()) <= limit


def test_ids_with_one_beginning_stay_apart() -> None:
    beginning = "1" * 25
    ids = {make_name_id("drive", f"{beginning}{number}") for number in range(10_000)}
    assert len(ids) == 10_000
    assert all(len(each) == 31 and each.startswith("drive-11111111111.") for each in ids)


def test_salts_give_other_ids() -> None:
    assert (
        len({make_name_id("drive", "1" * 64, salt=salt) for salt in [*range(1000), INT64_MAX]})
        == 1001
    )
    assert make_name_id("drive", "1", salt=7) == "drive-1"


def test_ids_are_the_same_for_ever() -> None:
    assert make_name_id("drive", "b" * 40) == "drive-bbbbbbbbbbb.midxenbbwxn4d"
    assert make_name_id("drive", "x" * 50, limit=20) == "drive-.bbn72txu2wlol"


def test_id_limit_counts_bytes() -> None:
    assert make_name_id("drive", "é" * 12 + "1") == "drive-" + "é" * 12 + "1"  # 31 bytes
    assert make_name_id("drive", "é" * 13) != "drive-" + "é" * 13  # 32 bytes, though 19 characters
    assert make_name_id("é", "1", limit=4) == "é-1"
    with pytest.raises(InvalidID):
        make_name_id("é", "1", limit=3)


def test_id_limit_edges() -> None:
    assert make_name_id("drive", "1", limit=7) == "drive-1"
    assert make_name_id("drive", "1" * 100, limit=2**80) == "drive-" + "1" * 100
    assert len(make_name_id("drive", "1" * 100, limit=20)) == 20
    with pytest.raises(InvalidID, match=">= 20"):
        make_name_id("drive", "1" * 100, limit=19)
    for limit in (0, -1, -(2**80)):
        with pytest.raises(InvalidValue, match="limit"):
            make_name_id("drive", "1", limit=limit)
    for salt in (-1, 2**63, -(2**80)):
        for device_id in ("1", "1" * 100):
            with pytest.raises(InvalidValue, match="salt"):
                make_name_id("drive", device_id, salt=salt)


@pytest.mark.parametrize(
    ("kind", "device_id"),
    [("", "1"), ("drive", ""), ("", ""), ("drive", "\ud800"), ("\ud800", "1"), ("k" * 40, "1")],
)
def test_ids_that_cannot_be_made(kind: str, device_id: str) -> None:
    with pytest.raises(InvalidID):
        make_name_id(kind, device_id)
