"""What the commands print: a table for people, JSON for programs, a progress bar on a terminal.

Everything that is printed goes through here, and what others wrote (names of files, a VMM's words)
through `shown`: it reaches no terminal as it is. Nothing that names a thing is cut: what does not
fit on a terminal is left out as a whole column, or stands on lines of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pyblock.errors import shown

if TYPE_CHECKING:
    from rich.console import Console

    from pyblock.cli.survey import Answer
    from pyblock.overview import Holder, KnownSandbox
    from pyblock.store.record import Record

COLUMNS = (
    "device_id",
    "driver",
    "index",
    "predicted_name",
    "guest_match",
    "serial",
    "attach_count",
    "phase",
    "host_path",
)
# What a narrow terminal goes without, and in this order: a serial is the device ID unless another
# was asked for, and so on.
DISPENSABLE = ("serial", "guest_match", "index", "driver", "attach_count")
CELL_MAX = 40960  # characters: a path of PATH_MAX bytes, each of them escaped
LINE_MAX = 16384
# columns of a terminal that each column of a table takes for its border and padding, and the table
# one more
_BORDER = 3


def out(text: str) -> None:
    """Prints one line of a command's result."""
    click.echo(shown(text, LINE_MAX))


def say(text: str) -> None:
    """Prints one line to standard error."""
    click.echo(shown(text, LINE_MAX), err=True)


def words(error: BaseException) -> str:
    """An error and its notes."""
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


def as_document(value: Any) -> None:
    """Prints JSON, which escapes what is not printable ASCII by itself."""
    click.echo(json.dumps(value, indent=2))


UNNAMED = (
    "?: it came together with others, and the guest may have named them in any order; guest_match "
    "and serial find it"
)


def record(sandbox_id: str, device: Record) -> dict[str, Any]:
    """A device as a JSON object."""
    drive = device.drive(device.info())
    keys = (
        "index",
        "driver",
        "read_only",
        "scsi_addr",
        "pci_path",
        "nvdimm_id",
        "dev_no",
        "virt_path",
        "predicted_name",
        "guest_match",
        "serial",
        "verified",
    )
    return {
        "sandbox": sandbox_id,
        "device_id": device.id,
        "drive_id": drive.id if drive else None,
        "host_path": device.path,
        "attach_count": device.attach_count,
        "phase": device.phase,
        **{key: getattr(drive, key) if drive else None for key in keys},
    }


def devices(records: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    """Prints devices. The table names their sandboxes where there are several."""
    records = list(records)
    if as_json:
        as_document(records)
    elif not records:
        say("nothing is attached")
    else:
        columns = [*(["sandbox"] if len({row["sandbox"] for row in records}) > 1 else []), *COLUMNS]
        table(
            columns,
            [[_cell(column, row[column]) for column in columns] for row in records],
            DISPENSABLE,
        )
        if sys.stdout.isatty() and any(
            row["predicted_name"] is None and row["index"] is not None for row in records
        ):
            say(UNNAMED)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "?" if column == "predicted_name" else ""
    return str(value)


def sandboxes(found: Sequence[KnownSandbox], *, as_json: bool) -> None:
    """Prints the sandboxes of a host."""
    rows = [
        {"sandbox": one.id, "vm": one.vm, "owner": one.owner, "devices": one.devices}
        for one in found
    ]
    if as_json:
        as_document(
            [{name: value if value != "" else None for name, value in row.items()} for row in rows]
        )
    elif rows:
        table([*rows[0]], [[str(value) for value in row.values()] for row in rows], ("owner",))
    else:
        say("no sandbox has anything plugged in")


def holders(path: str, found: Sequence[Holder], *, as_json: bool) -> None:
    """Prints who has claimed an image."""
    rows = [
        {
            "sandbox": one.device.sandbox,
            "device_id": one.device.id,
            "access": "read" if one.read_only else "write",
            "share": one.share,
            "relation": one.relation,
            "phase": one.device.phase.value,
            "attach_count": one.device.attach_count,
            "owner": one.owner or None,
            "host_path": one.device.info.path,
        }
        for one in found
    ]
    if as_json:
        as_document(rows)
    elif rows:
        cells = [
            [
                _cell(name, "shared" if value is True else "" if value is False else value)
                for name, value in row.items()
            ]
            for row in rows
        ]
        table([*rows[0]], cells, ("relation", "attach_count", "phase", "owner"))
    else:
        say(f"nobody has claimed {path!r}")


def answers(given: Sequence[Answer], *, as_json: bool) -> None:
    """Prints what differed in each sandbox, and why others could not be asked; the last line
    counts."""
    rows = [
        {
            "sandbox": answer.sandbox_id,
            "found": one.found.value,
            "outcome": one.outcome.value,
            "device_id": one.device_id or None,
            "drive_id": one.drive_id,
            "host_path": one.path or None,
            "note": one.note or None,
        }
        for answer in given
        for one in answer.findings
    ]
    failed = {
        answer.sandbox_id: words(answer.error) for answer in given if answer.error is not None
    }
    if as_json:
        asked = [
            {
                "sandbox": one.sandbox_id,
                "error": failed.get(one.sandbox_id),
                "failure": one.error.to_dict() if one.error is not None else None,
                "in_use": one.in_use,
            }
            for one in given
        ]
        as_document({"sandboxes": asked, "findings": rows})
        return
    if rows:
        table(
            [*rows[0]], [["" if value is None else value for value in row.values()] for row in rows]
        )
    errors(failed)
    differ, in_use = (
        sum(bool(answer.findings) for answer in given),
        sum(answer.in_use for answer in given),
    )
    differing = f"{differ} differ{'s' if differ == 1 else ''}" if differ else "nothing differs"
    say(
        f"{_sandboxes(len(given) - in_use - len(failed))} asked, {differing}, {in_use} in use "
        f"(not asked), {len(failed)} failed"
    )


def _sandboxes(count: int) -> str:
    return f"{count} sandbox{'' if count == 1 else 'es'}"


def errors(failed: Mapping[str, str]) -> None:
    """Says of each sandbox why it could not be read or asked, in a line of its own."""
    for sandbox_id, text in failed.items():
        say(f"pyblock: sandbox {sandbox_id}: {text}")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], dispensable: Sequence[str] = ()
) -> None:
    """Prints a table. Without a terminal it is as wide as its text; on one that is too narrow it
    goes without the dispensable columns, in their order, as far as is needed, and if that is not
    enough each row becomes lines of its own."""
    # rich is a quarter of the start-up time, and only needed here
    from rich.cells import cell_len  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    cells = [[shown(cell, CELL_MAX) for cell in row] for row in rows]
    widths = {
        name: max(map(cell_len, column))
        for name, *column in zip(columns, columns, *cells, strict=True)
    }

    def needed(names: Iterable[str]) -> int:
        return sum(widths[name] + _BORDER for name in names) + 1

    terminal = sys.stdout.isatty()
    room = Console().width if terminal else max(240, needed(columns))
    left_out: list[str] = []
    for name in dispensable:
        if needed(widths.keys() - left_out) > room:
            left_out.append(name)
    kept = [name for name in columns if name not in left_out]
    if needed(kept) > room:
        _lines(columns, cells)
        return
    _table(
        Console(width=room),
        kept,
        [[cell for name, cell in zip(columns, row, strict=True) if name in kept] for row in cells],
    )
    if left_out:
        say(f"left out for want of width: {', '.join(left_out)}; --json has all")


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    body = Table(*columns)
    for row in rows:
        body.add_row(*(Text(cell) for cell in row))  # a str would be read as markup
    console.print(body)


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width = max(map(len, columns))
    click.echo(
        "\n\n".join(
            "\n".join(
                f"{name:{width}}  {cell}" for name, cell in zip(columns, row, strict=True) if cell
            )
            for row in rows
        )
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[object], None]]:
    """A bar on standard error if that is a terminal; the function it gives counts one device."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("attaching"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("attaching", total=total)
        yield lambda _: bar.advance(task)
