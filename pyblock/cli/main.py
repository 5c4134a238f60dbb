"""The commands and their options. Errors are one line on standard error and exit status 1; wrong
usage is 2, Ctrl-C 130."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pyblock import stored
from pyblock.cli import session, show
from pyblock.cli.demo import demo
from pyblock.cli.pending import STATUS as INTERRUPTED
from pyblock.cli.pending import Interrupted
from pyblock.cli.pick import pick, plugged
from pyblock.cli.session import Target
from pyblock.cli.survey import Survey
from pyblock.core.naming import drive_index, drive_name
from pyblock.disk.drivers import DRIVERS
from pyblock.errors import PyblockError
from pyblock.life.recorded import record_of
from pyblock.overview import host
from pyblock.sandbox import TIMEOUT
from pyblock.store import host_store
from pyblock.store.record import Record
from pyblock.tasks import deadline_after

Function = TypeVar("Function", bound=Callable[..., Any])


def _name(context: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None:
        # one for the program and its command, where either may name it
        context.ensure_object(dict)[option.name] = value


def names_target(function: Function) -> Function:
    """Adds the two options that say what a command is about."""
    vm = "The machine, for example qemu:/run/vm1/qmp.sock or memory: [env: PYBLOCK_VM]"
    sandbox = (
        "The sandbox, where the store knows its machine or --vm names it. [env: PYBLOCK_SANDBOX]"
    )
    function = click.option(
        "--sandbox", metavar="ID", help=sandbox, expose_value=False, callback=_name
    )(function)
    return click.option("--vm", metavar="ADDRESS", help=vm, expose_value=False, callback=_name)(
        function
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@names_target
@click.version_option(package_name="pyblock-hotplug", prog_name="pyblock")
def cli() -> None:
    """Plug block devices into a running virtual machine, and know where each one appears in the
    guest.

    --vm and --sandbox may stand before the command or behind it. Where neither is given, PYBLOCK_VM
    and PYBLOCK_SANDBOX of the environment stand in for them.
    """


def _named(context: click.Context) -> dict[str, str]:
    """`vm` and `sandbox`, as far as they were given. The environment counts only where the command
    line names neither: half of the one and half of the other would be a third thing."""
    environment = {"vm": os.environ.get("PYBLOCK_VM"), "sandbox": os.environ.get("PYBLOCK_SANDBOX")}
    return context.obj or {name: value for name, value in environment.items() if value}


async def _target(context: click.Context, deadline: float | None = None) -> Target:
    named = _named(context)
    if "vm" in named:
        return await session.by_vm(named["vm"], named.get("sandbox"), deadline)
    if "sandbox" not in named:
        raise click.UsageError(
            "this command needs --vm ADDRESS or --sandbox ID (or PYBLOCK_VM or PYBLOCK_SANDBOX): "
            f"pyblock {context.info_name} --vm qemu:/run/vm1/qmp.sock …"
        )
    return await session.by_sandbox(named["sandbox"], deadline)


@cli.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE…")
@click.option("--driver", help=f"One of {', '.join(DRIVERS)}; virtio-scsi unless given.")
@click.option("--read-only", is_flag=True, help="The guest may not write.")
@click.option("--serial", help="What the guest reads as serial (one image only).")
@click.option(
    "--share", is_flag=True, help="Others may write the image too, if they say so as well."
)
@click.option(
    "--format",
    type=click.Choice(["raw"]),
    help="Plug the image in as raw even if it begins like qcow2, vmdk, LUKS…",
)
@click.option(
    "--timeout",
    type=float,
    default=TIMEOUT,
    show_default=True,
    help="Seconds; what was begun is then undone, in 5 more at most.",
)
@json_option
@names_target
@click.pass_context
@session.command
async def attach(
    context: click.Context,
    images: tuple[str, ...],
    driver: str | None,
    read_only: bool,
    serial: str | None,
    share: bool,
    format: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Attach disk images or block devices: all of them or none."""
    if serial is not None and len(images) > 1:
        raise click.UsageError("--serial belongs to one image; attach them one by one")
    deadline = deadline_after(timeout)
    async with session.opened(await _target(context, deadline), deadline) as sandbox:
        await session.recover(sandbox, deadline)
        left = session.left(deadline)
        if len(images) == 1:
            plugged = await sandbox.attach(
                images[0],
                driver=driver,
                read_only=read_only,
                serial=serial,
                share=share,
                format=format,
                timeout=left,
            )
            devices = [plugged]
        else:
            with show.progress(len(images)) as step:
                devices = await sandbox.attach_many(
                    images,
                    driver=driver,
                    read_only=read_only,
                    share=share,
                    format=format,
                    timeout=left,
                    progress=step,
                )
        # While the sandbox is open: whoever interrupts the closing has been told what is attached.
        show.devices(
            [show.record(sandbox.id, record_of(device)) for device in dict.fromkeys(devices)],
            as_json=as_json,
        )


@cli.command(name="list")
@json_option
@names_target
@click.pass_context
@session.command
async def list_(context: click.Context, as_json: bool) -> None:
    """List what is attached, to one machine or to all, as the store knows it. Does not touch the
    VM.

    --json prints a list whatever happens; it is whole when the exit status is 0.
    """
    try:
        found = await _known(context)
    except PyblockError:
        if as_json:
            show.as_document([])
        raise
    rows = [
        show.record(sandbox_id, record)
        for sandbox_id, records in found.items()
        if not isinstance(records, PyblockError)
        for record in records
        if record.holds
    ]
    errors = {
        sandbox_id: show.words(error)
        for sandbox_id, error in found.items()
        if isinstance(error, PyblockError)
    }
    if rows or as_json or not errors:
        show.devices(rows, as_json=as_json)
    show.errors(errors)
    if errors:
        context.exit(1)


async def _known(context: click.Context) -> dict[str, list[Record] | PyblockError]:
    named = _named(context)
    if named.keys() == {"sandbox"}:  # also one whose machine only its own process can reach
        return {named["sandbox"]: (await host_store().read(named["sandbox"])).records()}
    if not named:
        store = host_store()
        return await session.known(store, await store.sandboxes())
    target = await _target(context)
    return (
        await session.known(target.store, [target.sandbox_id]) if target.store is not None else {}
    )


@cli.command()
@click.argument("devices", nargs=-1, metavar="DEVICE…")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every device of the sandbox, as if each was named once.",
)
@click.option(
    "--released",
    is_flag=True,
    help="The guest has let go of them; a VM that cannot tell wants to hear it.",
)
@click.option(
    "--timeout", type=float, default=10.0, show_default=True, help="Seconds for the whole command."
)
@names_target
@click.pass_context
@session.command
async def detach(
    context: click.Context,
    devices: tuple[str, ...],
    everything: bool,
    released: bool,
    timeout: float,
) -> None:
    """Detach devices; returns when the VM says that they are gone.

    DEVICE is a device ID, a beginning that only one has, or the path of an image. A device that was
    attached several times is unplugged by its last detach. Nothing is detached unless each DEVICE
    is found; then all are tried.
    """
    if everything == bool(devices):
        raise click.UsageError(
            "say which devices: by ID, a beginning of one, the path of an image; or --all"
        )
    deadline = deadline_after(timeout)
    async with session.opened(await _target(context, deadline), deadline) as sandbox:
        # Before recovery: one that it finds lost, or whose detach it finishes, was there to be
        # detached.
        chosen = plugged(sandbox) if everything else pick(sandbox, devices)
        counts = {device: device.attach_count for device in chosen}
        if chosen:
            await session.recover(sandbox, deadline)
        try:
            await sandbox.detach_many(
                [device.id for device in chosen], timeout=session.left(deadline), released=released
            )
        finally:
            for device, count in counts.items():
                if 0 < device.attach_count < count:
                    show.say(
                        f"device {device.id} is still attached {_times(device.attach_count)}: "
                        "every attach needs a detach of its own"
                    )
    if not chosen:
        show.say("nothing is attached")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


@cli.command()
@click.option("--dry-run", is_flag=True, help="Say what differs, and change nothing.")
@click.option(
    "--orphans", is_flag=True, help="Also remove what is named as ours and is known to nobody."
)
@click.option(
    "--timeout", type=float, default=10.0, show_default=True, help="Seconds for each sandbox."
)
@json_option
@names_target
@click.pass_context
@session.command
async def reconcile(
    context: click.Context, dry_run: bool, orphans: bool, timeout: float, as_json: bool
) -> None:
    """Ask one machine, or all that the store knows, what is really plugged in, and settle what
    differs.

    Of all, those that another process has open are not asked: it asks them itself. The exit status
    is 1 when a machine could not be asked, or something is still pending.
    """
    survey = Survey(dry_run, orphans, timeout)
    if _named(context):
        answers = [await survey.one(await _target(context, deadline_after(timeout)))]
    else:
        answers = await survey.all()
    show.answers(answers, as_json=as_json)
    if not all(answer.settled for answer in answers):
        context.exit(1)


@cli.command()
@json_option
@session.command
async def sandboxes(as_json: bool) -> None:
    """List the sandboxes that the store knows: their machines, who has them open, how many devices
    they have. Asks no machine."""
    show.sandboxes(await host().sandboxes(), as_json=as_json)


@cli.command()
@click.argument("image", metavar="IMAGE")
@json_option
@session.command
async def holders(image: str, as_json: bool) -> None:
    """Say who has claimed an image, what lies under it, or what lies on it. Asks no machine.

    IMAGE is the path of a file or block device; one that is gone is looked for by its path.
    """
    show.holders(image, await host().holders(image), as_json=as_json)


@cli.command()
@click.argument("sandbox_id", metavar="SANDBOX")
@session.command
async def forget(sandbox_id: str) -> None:
    """Give up what belongs to a machine that no longer exists: its devices, indexes and claims.
    Refused while the VM answers."""
    given_up = await stored.forget(host_store(), sandbox_id)
    show.say(f"forgotten: {len(given_up)} devices of sandbox {sandbox_id}")


@cli.command(name="import")
@click.argument("file")
@click.option(
    "--share", is_flag=True, help="Others may write its images too, if they say so as well."
)
@names_target
@click.pass_context
@session.command
async def import_(context: click.Context, file: str, share: bool) -> None:
    """Take a sandbox over from Kata's state file (Devices, HypervisorState.BlockIndexMap), or from
    one of ours. Does not touch the VM."""
    target = await _target(context)
    session.needs_store(target)
    async with session.opened(target, None) as sandbox:
        await sandbox.load(file, share=share)


@cli.command()
@click.argument("file")
@names_target
@click.pass_context
@session.command
async def export(context: click.Context, file: str) -> None:
    """Write a sandbox as Kata's state file, with every key that was imported. Does not touch the
    VM."""
    target = await _target(context)
    await stored.export(session.needs_store(target), target.sandbox_id, file)


@cli.command()
@click.argument("number", type=int)
@click.option("--prefix", default="vd", show_default=True)
def name(number: int, prefix: str) -> None:
    """Print the drive name of a number."""
    show.out(drive_name(number, prefix=prefix))


@cli.command()
@click.argument("name")
@click.option("--prefix", default="vd", show_default=True)
def index(name: str, prefix: str) -> None:
    """Print the number of a drive name."""
    show.out(str(drive_index(name, prefix=prefix)))


cli.add_command(demo)


def main() -> None:
    """The program `pyblock`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # whoever started it has closed that; a store's file would be opened under its number
            # as long as the program runs
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal without Unicode
    # What is left of a connection that was given up is logged there; the command's own error is the
    # one line to be read.
    logging.getLogger("asyncio").addHandler(logging.NullHandler())
    try:
        status = cli.main(standalone_mode=False)  # what context.exit was given, for one
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except Interrupted as error:
        show.say(f"pyblock: {error}")
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        for line in text.getvalue().rstrip("\n").split("\n"):
            show.say(line)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (PyblockError, OSError) as error:
        show.say(f"pyblock: {show.words(error)}")
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
