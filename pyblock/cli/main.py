"""The commands and their options. Errors are one line on standard error and exit status 1; wrong usage is 2."""

from __future__ import annotations

import sys

import click

import pyblock
from pyblock.cli import show
from pyblock.cli.demo import demo
from pyblock.cli.session import Session
from pyblock.device import BlockDevice
from pyblock.errors import PyblockError
from pyblock.sandbox import TIMEOUT

vm_option = click.option("--vm", metavar="ADDRESS", help="The machine, for example qemu:/run/vm1/qmp.sock or memory:")
state_option = click.option("--state", metavar="FILE", help="State file; by default one for each VM in the state folder.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@vm_option
@state_option
@click.version_option(pyblock.__version__, prog_name="pyblock")
@click.pass_context
def cli(context: click.Context, vm: str | None, state: str | None) -> None:
    """Plug block devices into a running virtual machine, and know where each one appears in the guest."""
    context.obj = (vm, state)


def _session(context: click.Context, *, changes: bool, timeout: float = TIMEOUT) -> Session:
    vm, state = context.obj
    if vm is None:
        raise click.UsageError("this command needs --vm ADDRESS before it, for example: pyblock --vm qemu:/run/vm1/qmp.sock list")
    return Session(vm, state, changes=changes, timeout=timeout)


@cli.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE…")
@click.option("--driver", help=f"One of {', '.join(pyblock.DRIVERS)}; virtio-scsi unless given.")
@click.option("--read-only", is_flag=True, help="The guest may not write.")
@click.option("--serial", help="What the guest reads as serial (one image only).")
@click.option("--timeout", type=float, default=TIMEOUT, show_default=True, help="Seconds.")
@json_option
@click.pass_context
def attach(
    context: click.Context, images: tuple[str, ...], driver: str | None, read_only: bool, serial: str | None, timeout: float, as_json: bool
) -> None:
    """Attach disk images or block devices: all of them or none."""
    if serial is not None and len(images) > 1:
        raise click.UsageError("--serial belongs to one image; attach them one by one")
    with _session(context, changes=True, timeout=timeout) as session:
        if len(images) == 1:
            devices = [session.sandbox.attach(images[0], driver=driver, read_only=read_only, serial=serial, timeout=timeout)]
        else:
            with show.progress(len(images)) as step:
                devices = session.sandbox.attach_many(images, driver=driver, read_only=read_only, timeout=timeout, progress=step)
    show.devices(list(dict.fromkeys(devices)), as_json=as_json)


@cli.command(name="list")
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List what is attached, as the state knows it. Does not touch the VM."""
    with _session(context, changes=False) as session:
        devices = [device for device in session.sandbox.devices if isinstance(device, BlockDevice)]
    show.devices(devices, as_json=as_json)


@cli.command()
@click.argument("device_ids", nargs=-1, required=True, metavar="DEVICE_ID…")
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds.")
@click.pass_context
def detach(context: click.Context, device_ids: tuple[str, ...], timeout: float) -> None:
    """Detach devices; returns when the VM says that they are gone."""
    with _session(context, changes=True, timeout=timeout) as session:
        session.sandbox.detach_many(device_ids, timeout=timeout)


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
        cli.main(standalone_mode=False)
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
