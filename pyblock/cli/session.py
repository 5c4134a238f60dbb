"""One command's hold on a sandbox: its state file, locked, loaded before and saved after.

Each VM has a state file of its own in the state folder. The lock file beside it keeps two commands from working on one VM at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pyblock import blocking
from pyblock.errors import InvalidState, VmmUnreachable
from pyblock.sandbox import TIMEOUT

LOCK_PAUSE = 0.02  # seconds between two looks at the lock
_WORDS = re.compile(r"[^A-Za-z0-9.]+")


def state_folder() -> Path:
    """`$PYBLOCK_STATE_DIR` if set, else `/run/pyblock` for root, else `$XDG_RUNTIME_DIR/pyblock`. Made if absent, private to its user.

    Raises InvalidState when there is none.
    """
    if text := os.environ.get("PYBLOCK_STATE_DIR"):
        folder = Path(text)
    elif os.geteuid() == 0:
        folder = Path("/run/pyblock")
    elif text := os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(text, "pyblock")
    else:
        raise InvalidState("no state folder: set PYBLOCK_STATE_DIR (or XDG_RUNTIME_DIR), or name a file with --state")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def canonical(vm: str) -> str:
    """The VM's address with a socket's path made absolute, so that one VM has one state file from every folder."""
    scheme, colon, rest = vm.partition(":")
    return f"{scheme}:{Path(rest).resolve()}" if colon and rest and scheme != "memory" else vm


def state_file(vm: str) -> Path:
    """The state file of a VM by its address: readable words of it, and a digest that keeps two addresses apart."""
    digest = hashlib.sha256(vm.encode()).hexdigest()[:16]
    words = _WORDS.sub("-", vm).strip("-.")[-80:].strip("-.") or "vm"
    return state_folder() / f"{words}-{digest}.json"


class Session:
    """A context manager; `sandbox` is open inside it. The state is saved also when the body fails, for a failure may leave devices
    pending.

    :param changes: the command will change the machine, so the state must be writable: it is written once before.
    :param timeout: seconds to wait for another command that works on the same VM.
    """

    def __init__(self, vm: str, state: str | None, *, changes: bool, timeout: float = TIMEOUT) -> None:
        vm = canonical(vm)
        self.sandbox = blocking.Sandbox("cli", vm)
        self._vm = vm
        self._path = Path(state) if state is not None else state_file(vm)
        self._changes = changes
        self._timeout = timeout
        self._lock = -1

    def __enter__(self) -> Self:
        self._lock = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait_for_lock()
            self.sandbox.__enter__()
            if self._path.exists():
                self.sandbox.load(self._path)
            if self._changes:
                self.sandbox.save(self._path)  # a full disk or a read-only folder is better met now than with disks plugged in
        except BaseException:
            self._leave()
            raise
        self._before = self.sandbox.state()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.sandbox.settle()
            if self.sandbox.state() != self._before:
                self.sandbox.save(self._path)
        except BaseException as trouble:
            known = ", ".join(device.id for device in self.sandbox.devices) or "none"
            trouble.add_note(f"the state could not be saved; devices in the VM now: {known}")
            raise
        finally:
            self._leave()

    def _wait_for_lock(self) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise VmmUnreachable(f"another pyblock command has been working on {self._vm} for {self._timeout:g} s") from None
                time.sleep(LOCK_PAUSE)

    def _leave(self) -> None:
        try:
            self.sandbox.close()
        finally:
            os.close(self._lock)
