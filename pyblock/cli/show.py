"""What the commands print: a table for people, JSON for programs, a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from pyblock.device import BlockDevice
from pyblock.recovery import Finding

COLUMNS = ("device_id", "driver", "index", "predicted_name", "guest_match", "serial", "attach_count", "phase", "host_path")


def record(sandbox_id: str, device: BlockDevice) -> dict[str, Any]:
    """A device as a JSON object."""
    drive = device.drive
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
    )
    return {
        "sandbox": sandbox_id,
        "device_id": device.id,
        "drive_id": drive.id if drive else None,
        "host_path": device.info.path,
        "attach_count": device.attach_count,
        "phase": device.phase.value,
        **{key: getattr(drive, key) if drive else None for key in keys},
    }


def devices(records: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    """Prints devices. The table names their sandboxes where there are several."""
    records = list(records)
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    if not records:
        click.echo("nothing is attached", err=True)
        return
    columns = [*(["sandbox"] if len({row["sandbox"] for row in records}) > 1 else []), *COLUMNS]
    table(columns, [["" if row[column] is None else str(row[column]) for column in columns] for row in records])


def findings(found: Mapping[str, list[Finding]], failed: Mapping[str, str], *, as_json: bool) -> None:
    """Prints what differed in each sandbox, and why others could not be asked."""
    rows = [
        {
            "sandbox": sandbox_id,
            "found": one.found.value,
            "outcome": one.outcome.value,
            "device_id": one.device_id or None,
            "drive_id": one.drive_id,
            "host_path": one.path or None,
            "note": one.note or None,
        }
        for sandbox_id, each in found.items()
        for one in each
    ]
    if as_json:
        asked = [{"sandbox": each, "error": failed.get(each)} for each in sorted([*found, *failed])]
        click.echo(json.dumps({"sandboxes": asked, "findings": rows}, indent=2))
        return
    if rows:
        table([*rows[0]], [["" if value is None else value for value in row.values()] for row in rows])
    errors(failed)
    if not rows:
        click.echo(f"{len(found)} sandboxes asked, nothing differs", err=True)


def errors(failed: Mapping[str, str]) -> None:
    """Says of each sandbox why it could not be read or asked, in a line of its own."""
    for sandbox_id, error in failed.items():
        click.echo(f"pyblock: sandbox {sandbox_id}: {' '.join(error.split())}", err=True)


def table(columns: list[str], rows: list[list[str]], *, title: str | None = None) -> None:
    """Prints a table; without a terminal it is as wide as its text, so that nothing is cut."""
    from rich.console import Console  # noqa: PLC0415 - a quarter of the start-up time, and only needed here
    from rich.table import Table  # noqa: PLC0415

    widths = (max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True))
    console = Console(width=None if sys.stdout.isatty() else max(240, sum(widths) + 3 * len(columns) + 1))
    body = Table(*columns, title=title, title_justify="left")
    for row in rows:
        body.add_row(*row)
    console.print(body)


@contextmanager
def progress(total: int) -> Iterator[Callable[[object], None]]:
    """A bar on standard error if that is a terminal; the function it gives counts one device."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("attaching"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("attaching", total=total)
        yield lambda _: bar.advance(task)
