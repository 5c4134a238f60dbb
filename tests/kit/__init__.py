"""Real machines for tests: QEMU, a guest kernel and a shell in it. Knows nothing of pyblock, so
that it can judge it."""

from .guest import Guest, GuestDisk, GuestError
from .initramfs import KitMissing
from .machine import Machine
from .qmp import Qmp, QmpRefused

__all__ = ["Guest", "GuestDisk", "GuestError", "KitMissing", "Machine", "Qmp", "QmpRefused"]
