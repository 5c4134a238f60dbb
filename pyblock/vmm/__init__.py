"""The VMMs: one file each, which only translates. A new one is a file here and a row in SCHEMES."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

from pyblock.errors import UnknownScheme, VmmUnreachable
from pyblock.loading import loading
from pyblock.vmm.base import Hypervisor

# scheme -> module, and what opens an adapter in it; imported when first opened, so that importing
# pyblock loads no network library
SCHEMES = {
    "memory": ("pyblock.vmm.memory.file", "open_memory"),
    "qemu": ("pyblock.vmm.qemu.adapter", "QemuHypervisor"),
}


def open_hypervisor(address: str) -> Hypervisor:
    """The adapter for `scheme:rest`, not connected yet. Raises UnknownScheme, naming the known
    ones; VmmUnreachable when its code cannot be loaded."""
    scheme, colon, rest = address.partition(":")
    if not colon or scheme not in SCHEMES:
        known = ", ".join(f"{known}:" for known in SCHEMES)
        text = (
            f"VMM address {address!r} begins with no known scheme; known are {known} (for example "
            "qemu:/run/vm1/qmp.sock)"
        )
        raise UnknownScheme(text, vm=address, value=address)
    return _adapter(scheme)(rest)


@cache
def _adapter(scheme: str) -> Callable[[str], Hypervisor]:
    module, name = SCHEMES[scheme]
    with loading(f"VMMs at {scheme}:", VmmUnreachable):
        opener: Callable[[str], Hypervisor] = getattr(import_module(module), name)
    return opener
