"""The commands and their options. Errors are one line on standard error and exit status 1; wrong usage is 2."""

from __future__ import annotations

import sys

import click

import pyblock
from pyblock.cli import session, show
from pyblock.cli.demo import demo
from pyblock.cli.session import Target
from pyblock.device import BlockDevice
from pyblock.errors import PyblockError
from pyblock.hypervisors.memory import MemoryHypervisor
from pyblock.recovery import Finding, Outcome
from pyblock.sandbox import TIMEOUT, Sandbox
from pyblock.stores import host_store

vm_option = click.option("--vm", metavar="ADDRESS", help="The machine, for example qemu:/run/vm1/qmp.sock or memory:")
sandbox_option = click.option("--sandbox", metavar="ID", help="The sandbox, where the store knows its machine or --vm names it.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@vm_option
@sandbox_option
@click.version_option(pyblock.__version__, prog_name="pyblock")
@click.pass_context
def cli(context: click.Context, vm: str | None, sandbox: str | None) -> None:
    """Plug block devices into a running virtual machine, and know where each one appears in the guest."""
    context.obj = (vm, sandbox)


def _target(context: click.Context) -> Target:
    vm, sandbox_id = context.obj
    if vm is not None:
        return session.by_vm(vm, sandbox_id)
    if sandbox_id is None:
        raise click.UsageError("this command needs --vm ADDRESS or --sandbox ID before it: pyblock --vm qemu:/run/vm1/qmp.sock …")
    return session.by_sandbox(sandbox_id)


def _all_or_one(context: click.Context) -> list[str] | Target:
    """The sandbox that was named, or the IDs of all that the store knows."""
    return _target(context) if any(text is not None for text in context.obj) else session.run(host_store().sandboxes())


@cli.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE…")
@click.option("--driver", help=f"One of {', '.join(pyblock.DRIVERS)}; virtio-scsi unless given.")
@click.option("--read-only", is_flag=True, help="The guest may not write.")
@click.option("--serial", help="What the guest reads as serial (one image only).")
@click.option("--share", is_flag=True, help="Others may write the image too, if they say so as well.")
@click.option("--format", type=click.Choice(["raw"]), help="Plug the image in as raw even if it begins like qcow2, vmdk, LUKS…")
@click.option("--timeout", type=float, default=TIMEOUT, show_default=True, help="Seconds.")
@json_option
@click.pass_context
def attach(
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
    with session.opened(_target(context), timeout=timeout) as sandbox:
        if len(images) == 1:
            plugged = sandbox.attach(
                images[0], driver=driver, read_only=read_only, serial=serial, share=share, format=format, timeout=timeout
            )
            devices = [plugged]
        else:
            with show.progress(len(images)) as step:
                devices = sandbox.attach_many(
                    images, driver=driver, read_only=read_only, share=share, format=format, timeout=timeout, progress=step
                )
        rows = [show.record(sandbox.id, device) for device in dict.fromkeys(devices)]
    show.devices(rows, as_json=as_json)


@cli.command(name="list")
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List what is attached, to one machine or to all, as the store knows it. Does not touch the VM."""
    which = _all_or_one(context)
    if isinstance(which, Target):
        store, ids = which.store, [which.sandbox_id]
    else:
        store, ids = host_store(), which
    found = session.run(session.known(store, ids)) if store is not None else {}
    rows = [
        show.record(sandbox.id, device)
        for sandbox in found.values()
        if isinstance(sandbox, Sandbox)
        for device in sandbox.devices
        if isinstance(device, BlockDevice) and device.drive is not None
    ]
    errors = {sandbox_id: str(error) for sandbox_id, error in found.items() if isinstance(error, PyblockError)}
    if rows or not errors:
        show.devices(rows, as_json=as_json)
    show.errors(errors)
    if errors:
        context.exit(1)


@cli.command()
@click.argument("device_ids", nargs=-1, required=True, metavar="DEVICE_ID…")
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds.")
@click.pass_context
def detach(context: click.Context, device_ids: tuple[str, ...], timeout: float) -> None:
    """Detach devices; returns when the VM says that they are gone."""
    with session.opened(_target(context), timeout=timeout) as sandbox:
        sandbox.detach_many(device_ids, timeout=timeout)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Say what differs, and change nothing.")
@click.option("--orphans", is_flag=True, help="Also remove what is named as ours and is known to nobody.")
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for removals, for each sandbox.")
@json_option
@click.pass_context
def reconcile(context: click.Context, dry_run: bool, orphans: bool, timeout: float, as_json: bool) -> None:
    """Ask one machine, or all that the store knows, what is really plugged in, and settle what differs.

    The exit status is 1 when a machine could not be asked, or something is still pending.
    """
    which = _all_or_one(context)
    ids = [which.sandbox_id] if isinstance(which, Target) else which
    findings: dict[str, list[Finding]] = {}
    errors: dict[str, str] = {}
    for sandbox_id in ids:
        try:
            target = which if isinstance(which, Target) else session.by_sandbox(sandbox_id)
            with session.opened(target, recover=False, timeout=timeout) as sandbox:
                findings[sandbox_id] = sandbox.reconcile(dry_run=dry_run, orphans=orphans, timeout=timeout)
        except PyblockError as error:
            errors[sandbox_id] = str(error)
    show.findings(findings, errors, as_json=as_json)
    if errors or any(one.outcome is Outcome.PENDING for each in findings.values() for one in each):
        context.exit(1)


@cli.command()
@click.argument("sandbox_id", metavar="SANDBOX")
def forget(sandbox_id: str) -> None:
    """Give up what belongs to a machine that no longer exists: its devices, indexes and claims. Refused while the VM answers."""
    in_memory = session.machine_of_the_dead(sandbox_id)
    dead = MemoryHypervisor(sandbox_id)
    dead.dead = True  # whoever could take its sandbox over has outlived it
    with session.opened(
        in_memory or session.by_sandbox(sandbox_id), recover=False, timeout=0, vm=dead if in_memory is not None else None
    ) as sandbox:
        given_up = sandbox.forget()
    click.echo(f"forgotten: {len(given_up)} devices of sandbox {sandbox_id}", err=True)


@cli.command(name="import")
@click.argument("file")
@click.option("--share", is_flag=True, help="Others may write its images too, if they say so as well.")
@click.pass_context
def import_(context: click.Context, file: str, share: bool) -> None:
    """Take a sandbox over from Kata's state file (Devices, HypervisorState.BlockIndexMap), or from one of ours. Does not touch the VM."""
    target = _target(context)
    session.needs_store(target)
    with session.opened(target, recover=False) as sandbox:
        sandbox.load(file, share=share)


@cli.command()
@click.argument("file")
@click.pass_context
def export(context: click.Context, file: str) -> None:
    """Write a sandbox as Kata's state file, with every key that was imported. Does not touch the VM."""
    target = _target(context)
    session.run(Sandbox.export(session.needs_store(target), target.sandbox_id, file))


@cli.command()
@click.argument("number", type=int)
@click.option("--prefix", default="vd", show_default=True)
def name(number: int, prefix: str) -> None:
    """Print the drive name of a number."""
    click.echo(pyblock.drive_name(number, prefix=prefix))


@cli.command()
@click.argument("name")
@click.option("--prefix", default="vd", show_default=True)
def index(name: str, prefix: str) -> None:
    """Print the number of a drive name."""
    click.echo(pyblock.drive_index(name, prefix=prefix))


cli.add_command(demo)


def main() -> None:
    """The program `pyblock`."""
    try:
        status = cli.main(standalone_mode=False)  # what context.exit was given, for one
    except click.exceptions.Abort:
        sys.exit(130)  # as a shell reports a SIGINT
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (PyblockError, OSError) as error:
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
        click.echo("pyblock: " + " ".join(text.split()), err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
