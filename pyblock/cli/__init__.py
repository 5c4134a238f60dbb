"""The command line: `pyblock attach`, `detach`, `list`, `name`, `index`, `demo`. It holds no logic of its own."""

from pyblock.cli.main import main

__all__ = ["main"]
