"""One QEMU for one test: started in a folder of its own, and ended whatever happens to the test.

Its end does not depend on clean-up being reached. A watcher waits at a pipe that only the test
process holds open for writing; the kernel closes it however that process dies. (PR_SET_PDEATHSIG
would fire when the *thread* that started QEMU ends.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .guest import Guest
from .initramfs import KitMissing, find_kernel, initramfs
from .qmp import Qmp

MEMORY = "256M"
# The shell becomes QEMU, so that the process that Python knows is QEMU itself. fd 3: a background
# job gets /dev/null as its stdin.
WATCHED = 'exec 3<&0 </dev/null; (read -r _ <&3; kill -9 $$; rm -rf "$0") & exec 3<&-; exec "$@"'
# Quiet and without what only costs time under emulation; panic=-1 and -no-reboot: a guest that
# breaks ends its QEMU at once.
COMMAND_LINE = (
    "console=ttyS0 loglevel=6 panic=-1 mitigations=off tsc=reliable no_timer_check "
    "cryptomgr.notests random.trust_cpu=on nokaslr"
)


def find_qemu() -> str:
    qemu = os.environ.get("PYBLOCK_QEMU") or shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise KitMissing(
            "no qemu-system-x86_64: run `scripts/setup qemu` (package qemu-system-x86)"
        )
    return qemu


class Machine:
    """A context manager. With `guest=True` it is entered when the guest answers; without, QEMU is
    paused and bare (`-S`).

    Buses for hot-plug: `scsi0.0`; on q35 the root ports `rp0`, `rp1`, …; on pc `pci.0` and the
    bridges `br0`, `br1`, … A PCI unplug that nobody answers: a bare machine (for ever),
    `guest.ignore_pci()`, `side.command("stop")` until "cont", or for ever in a running guest:
    `kernel_arguments="acpiphp.disable=1 pcie_ports=compat"`.

    :param before: a command that becomes QEMU, such as `unshare -m …`.
    """

    def __init__(
        self,
        machine: str = "q35",
        *,
        guest: bool = True,
        ports: int = 4,
        bridges: int = 1,
        scsi: bool = True,
        nvdimm_slots: int = 0,
        shared_memory: bool = False,
        kernel_arguments: str = "",
        extra: Sequence[str] = (),
        before: Sequence[str] = (),
        boot_timeout: float = 120,
    ) -> None:
        qemu = find_qemu()
        boot: list[str] = []
        if guest:
            kernel = find_kernel()
            boot = [
                "-kernel",
                str(kernel.image),
                "-initrd",
                str(initramfs(kernel)),
                "-append",
                f"{COMMAND_LINE} {kernel_arguments}",
            ]
        self.has_guest = guest
        self._boot_timeout = boot_timeout
        # short: a unix socket's path ends at 107 bytes
        self._folder = tempfile.TemporaryDirectory(prefix="pyblock-", dir="/tmp")
        self.folder = Path(self._folder.name)
        self.qmp_path = self.folder / "qmp"
        self.side_qmp_path = self.folder / "side"
        self.console_path = self.folder / "console"
        self.side: Qmp
        self.guest: Guest
        self._process: subprocess.Popen[bytes] | None = None

        options = [machine, "accel=tcg"]
        memory = f"size={MEMORY}"
        self.arguments = [
            *before,
            qemu,
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-smp",
            "1",
            "-nic",
            "none",
        ]
        if shared_memory:  # a vhost-user backend maps the guest's memory
            options.append("memory-backend=mem")
            self.arguments += ["-object", f"memory-backend-memfd,id=mem,size={MEMORY},share=on"]
        if nvdimm_slots:
            options.append("nvdimm=on")
            memory += f",slots={nvdimm_slots},maxmem=16G"
        self.arguments += ["-machine", ",".join(options), "-m", memory]
        for path in (self.qmp_path, self.side_qmp_path):
            self.arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
        if scsi:
            self.arguments += [
                "-device",
                f"virtio-scsi-{'device' if machine == 'microvm' else 'pci'},id=scsi0",
            ]
        for number in range(ports if machine == "q35" else 0):
            self.arguments += [
                "-device",
                f"pcie-root-port,id=rp{number},chassis={number + 1},slot={number + 1}",
            ]
        for number in range(bridges if machine == "pc" else 0):
            self.arguments += ["-device", f"pci-bridge,id=br{number},chassis_nr={number + 1}"]
        if guest:
            self.arguments += [*boot, "-serial", f"file:{self.console_path}"]
            self.arguments += ["-serial", f"unix:{self.folder / 'agent'},server=on,wait=off"]
        else:
            self.arguments.append("-S")
        self.arguments += extra

    def __enter__(self) -> Self:
        assert self._process is None, "a machine runs once"
        try:
            self._start()
        except BaseException as error:
            error.add_note(self.log_tail())
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.log_tail())
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def image(self, name: str, size: int = 16 << 20) -> Path:
        """A new sparse file in the machine's folder."""
        path = self.folder / name
        with path.open("xb") as file:
            file.truncate(size)
        return path

    def log_tail(self, lines: int = 40) -> str:
        """The end of what QEMU said and of what the guest's kernel said, for a failure's report."""
        texts = []
        for title, path in (("QEMU", self.folder / "log"), ("guest console", self.console_path)):
            if path.exists():
                tail = path.read_text(errors="replace").splitlines()[-lines:]
                texts.append("\n".join([f"--- {title} ---", *tail]))
        return "\n".join(texts)

    def kill(self) -> None:
        """QEMU dies as by a crash; the folder stays for what a test wants to look at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        for client in (getattr(self, "side", None), getattr(self, "guest", None)):
            if client is not None:
                client.close()
        if self._process is not None:
            self.kill()
        self._folder.cleanup()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # last: the watcher finds nothing left to do

    def _start(self) -> None:
        with (self.folder / "log").open("wb") as log:
            command = ["sh", "-c", WATCHED, str(self.folder), *self.arguments]
            # A session of its own: Ctrl-C is for the test process, which then ends QEMU in good
            # order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + self._boot_timeout
        while True:  # until QEMU listens
            try:
                self.side = Qmp(self.side_qmp_path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"QEMU did not start: {self.log_tail()}") from None
                time.sleep(0.01)
        if self.has_guest:
            self.guest = Guest(self.folder / "agent")
            self.guest.wait_ready(deadline - time.monotonic())
