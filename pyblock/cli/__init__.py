"""The command line: what the library does, from a shell. It holds no logic of its own."""

from pyblock.cli.main import main

__all__ = ["main"]
