"""QEMU, over its monitor."""
