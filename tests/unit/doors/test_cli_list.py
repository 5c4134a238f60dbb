"""What `pyblock list` prints: whole, and nothing that a tenant's name could do to a terminal."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.shell import Shell, on_terminal
from support.snapshot import MakeImage

HOSTILE = {
    "closing markup": "x[/nope].img",
    "markup": "x[bold]y[/bold].img",
    "link": "[link=http://e.org]click[/link].img",
    "emoji code": "x:smile:.img",
    "path that looks like a number": "0x12 1.2.3.4 True.img",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_name_with_markup(
    shell: Shell, make_image: MakeImage, tmp_path: Path, name: str, terminal: bool
) -> None:
    # a slash closes markup, and a folder's name ends there
    (tmp_path / HOSTILE[name]).parent.mkdir(parents=True, exist_ok=True)
    image = make_image(HOSTILE[name])
    shell.fine("attach", image)
    status, text = on_terminal(shell, "list", columns=1000) if terminal else (0, shell.fine("list"))
    assert status == 0
    assert str(image) in text


@pytest.mark.parametrize("command", ["attach", "list", "list --json"])
def test_a_name_that_moves_the_cursor(shell: Shell, make_image: MakeImage, command: str) -> None:
    image = make_image("a\x1b[2J\x07\u202eb\x7f\u200b\x9bc.img")
    if command != "attach":
        shell.fine("attach", image)
    status, text = on_terminal(
        shell, *command.split(), *([image] if command == "attach" else []), columns=1000
    )
    assert status == 0
    assert not {char for char in text if not char.isprintable()} - {"\n"} - set("\x1b")
    plain = text.replace("\x1b[1m", "").replace("\x1b[0m", "")  # the head of the table is bold
    assert "\x1b" not in plain and "\u200b" not in plain
    if "--json" in command:
        assert json.loads(text)[0]["host_path"] == str(image)
    else:
        assert r"a\x1b[2J\x07\u202eb\x7f\u200b\x9bc.img" in plain


def test_an_error_that_moves_the_cursor(shell: Shell, tmp_path: Path) -> None:
    for arguments in (
        ["attach", tmp_path / "no\x1b[2Jt\u3164here"],
        ["attach", "--\x1b[2J", "x"],
        ["plu\x1bg"],
    ):
        done = shell(*arguments)
        assert done.returncode in (1, 2) and r"\x1b" in done.stderr
        assert (
            not {char for char in done.stderr if not char.isprintable()} - {"\n"}
            and "\u3164" not in done.stderr
        )


def test_a_terminal_without_unicode(shell: Shell, make_image: MakeImage) -> None:
    image = make_image("Müller.img")
    shell.environment |= {"PYTHONIOENCODING": "ascii:strict"}
    shell.fine("attach", image)
    assert r"M\xfcller.img" in shell.fine("list")
    assert "absent-" in shell.refused("attach", image.parent / "absent-ü")


def many(shell: Shell, make_image: MakeImage, tmp_path: Path) -> list[dict[str, object]]:
    """Some devices, one with a path that no terminal has in one line."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    images = [make_image("a.img"), make_image("b.img"), make_image(f"{deep.name}/c.img")]
    rows: list[dict[str, object]] = shell.json("attach", *images)
    return rows


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 132, 400])
def test_nothing_is_cut_on_a_terminal(
    shell: Shell, make_image: MakeImage, tmp_path: Path, columns: int
) -> None:
    rows = many(shell, make_image, tmp_path)
    status, text = on_terminal(shell, "list", columns=columns)
    assert status == 0 and "…" not in text
    for row in rows:
        for key in ("device_id", "predicted_name", "phase", "host_path"):
            # whole, in one piece; several that came at once have no predicted name
            assert str(row[key] or "?") in text, key


def test_eighty_columns_have_a_table(shell: Shell) -> None:
    short = Path("/tmp") / f"pyblock-{os.getpid()}.img"
    with short.open("xb") as file:
        file.truncate(4096)
    try:
        [row] = shell.json("attach", short)
        status, text = on_terminal(shell, "list", columns=80)
    finally:
        short.unlink()
    assert status == 0
    [line] = [line for line in text.splitlines() if row["device_id"] in line]
    assert str(short) in line and "/dev/sda" in line and "attached" in line
    *table, left_out = text.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert all(len(line) <= 80 for line in table)
    assert "guest_match" in left_out and "--json" in left_out


def test_several_sandboxes_on_a_terminal(shell: Shell, make_image: MakeImage) -> None:
    rows = [
        shell.json("attach", make_image(f"{number}.img"), vm=shell.machine(f"vm{number}"))[0]
        for number in range(3)
    ]
    for columns in (80, 1000):
        status, text = on_terminal(shell, "list", vm=None, columns=columns)
        assert status == 0
        for row in rows:
            assert row["sandbox"] in text and row["device_id"] in text and row["host_path"] in text


def test_json_always(shell: Shell, make_image: MakeImage) -> None:
    """A list on standard output, whatever happened; what could not be read stands on standard
    error, and makes the status 1."""
    [row] = shell.json("attach", make_image("image"))
    assert shell.json("list", vm=None) == [row]
    done = shell("--sandbox", "nothing", "list", "--json", vm=None)
    assert (done.returncode, json.loads(done.stdout)) == (1, []) and "'nothing'" in done.stderr
    spoil(shell, "UPDATE device SET state = x'00'")
    for vm in (None, shell.vm):
        done = shell("list", "--json", vm=vm)
        assert (done.returncode, json.loads(done.stdout)) == (1, []) and row[
            "sandbox"
        ] in done.stderr
    state = shell.folder / "state.db"
    state.write_bytes(state.read_bytes()[:-4096])
    for vm in (None, shell.vm):
        done = shell("list", "--json", vm=vm)
        assert (done.returncode, json.loads(done.stdout)) == (1, []) and str(state) in done.stderr


def test_json_of_what_can_be_read(shell: Shell, make_image: MakeImage) -> None:
    [row] = shell.json("attach", make_image("one"))
    [other] = shell.json("attach", make_image("two"), vm=shell.machine("vm2"))
    spoil(shell, f"UPDATE device SET state = x'00' WHERE id = '{other['device_id']}'")
    done = shell("list", "--json", vm=None)
    assert (done.returncode, json.loads(done.stdout)) == (1, [row])
    assert other["sandbox"] in done.stderr


def spoil(shell: Shell, sql: str) -> None:
    with closing(sqlite3.connect(shell.folder / "state.db")) as db, db:
        db.execute(sql)
