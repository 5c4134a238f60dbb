"""libvirt, for comparison: its QEMU driver embedded in this process, in a folder of its own.

Embedded (`qemu:///embed`) there is no daemon to start, no RPC to pay, and nothing of the host's own
libvirt is touched; so it is libvirt at its quickest, and the bias is in its favour.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DOMAIN = """
<domain type='qemu'>
  <name>bench</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>{qemu}</emulator>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>
"""
DISK = """
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='{name}' bus='scsi'/>
<address type='drive' controller='0' bus='0' target='0' unit='{unit}'/></disk>
"""  # noqa: E501
_events: threading.Thread | None = None
_root = ""  # one embedded driver in a process, in one folder, for as long as it lives


class LibvirtMachine:
    """A paused machine, started and ended through libvirt. Raises ImportError or
    libvirt.libvirtError where it cannot be had."""

    def __init__(self, qemu: str) -> None:
        import libvirt  # noqa: PLC0415 - it is optional, and its absence is said aloud

        global _events  # noqa: PLW0603 - one event loop for the process, as libvirt wants it
        if _events is None:
            libvirt.virEventRegisterDefaultImpl()
            _events = threading.Thread(target=_run_events, args=(libvirt,), daemon=True)
            _events.start()
        libvirt.registerErrorHandler(lambda *_: None, None)
        self._libvirt: Any = libvirt
        self._qemu = qemu

    def __enter__(self) -> Self:
        global _root  # noqa: PLW0603
        if not _root:
            _root = tempfile.mkdtemp(prefix="lv-", dir="/tmp")  # short: sockets are made in it
            atexit.register(shutil.rmtree, _root, ignore_errors=True)
            (Path(_root) / "etc").mkdir(exist_ok=True)
        lists = "namespaces = []\ncgroup_controllers = []\n"
        config = (
            'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n'
            f"{lists}"
        )
        (Path(_root) / "etc").mkdir(exist_ok=True)
        config = (
            'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n'
            "namespaces = []\ncgroup_controllers = []\n"
        )
        (Path(_root) / "etc/qemu.conf").write_text(config)
        self._connection = self._libvirt.open(f"qemu:///embed?root={_root}")
        self._domain = self._connection.createXML(
            DOMAIN.format(qemu=self._qemu), self._libvirt.VIR_DOMAIN_START_PAUSED
        )
        return self

    def attach(self, path: Path, unit: int) -> None:
        """One disk, at unit `unit` of target 0."""
        self._domain.attachDeviceFlags(
            DISK.format(path=path, name=_name(unit), unit=unit),
            self._libvirt.VIR_DOMAIN_AFFECT_LIVE,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._domain.destroy()
        self._connection.close()


def _name(unit: int) -> str:
    from rivals import drive_name  # noqa: PLC0415 - it loads the other rivals' libraries

    return drive_name(unit, "sd")


def _run_events(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
