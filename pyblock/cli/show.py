"""What the commands print: a table for people, JSON for programs, a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from pyblock.device import BlockDevice

COLUMNS = ("device_id", "driver", "index", "predicted_name", "guest_match", "serial", "attach_count", "phase", "host_path")


def record(device: BlockDevice) -> dict[str, Any]:
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
        "device_id": device.id,
        "drive_id": drive.id if drive else None,
        "host_path": device.info.path,
        "attach_count": device.attach_count,
        "phase": device.phase.value,
        **{key: getattr(drive, key) if drive else None for key in keys},
    }


def devices(found: Iterable[BlockDevice], *, as_json: bool) -> None:
    """Prints devices."""
    records = [record(device) for device in found]
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    if not records:
        click.echo("nothing is attached", err=True)
        return
    table(list(COLUMNS), [["" if row[column] is None else str(row[column]) for column in COLUMNS] for row in records])


def table(columns: list[str], rows: list[list[str]], *, title: str | None = None) -> None:
    """Prints a table; without a terminal it is as wide as its text, so that nothing is cut."""
    from rich.console import Console  # noqa: PLC0415 - a quarter of the start-up time, and only needed here
    from rich.table import Table  # noqa: PLC0415

    console = Console(width=None if sys.stdout.isatty() else 240)
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
