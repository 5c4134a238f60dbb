"""The VMMs: one file each, which only translates. A new one is a file here and a row in SCHEMES."""

from __future__ import annotations

from importlib import import_module

from pyblock.errors import UnknownScheme
from pyblock.hypervisors.base import Hypervisor

# scheme -> module and class; imported when first opened, so that importing pyblock loads no network library
SCHEMES = {
    "memory": ("pyblock.hypervisors.memory", "MemoryHypervisor"),
    "qemu": ("pyblock.hypervisors.qemu", "QemuHypervisor"),
}


def open_hypervisor(address: str) -> Hypervisor:
    """The adapter for `scheme:rest`, not connected yet. Raises UnknownScheme, naming the known ones."""
    scheme, colon, rest = address.partition(":")
    if not colon or scheme not in SCHEMES:
        known = ", ".join(f"{known}:" for known in SCHEMES)
        raise UnknownScheme(f"VMM address {address!r} begins with no known scheme; known are {known} (for example qemu:/run/vm1/qmp.sock)")
    module, name = SCHEMES[scheme]
    adapter: Hypervisor = getattr(import_module(module), name)(rest)
    return adapter
