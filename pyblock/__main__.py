"""The program `pyblock`, also as `python -m pyblock`: it says what to install where its extra is
missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("click", "rich")  # the extra `cli`


def main() -> None:
    """Runs the command line; exit status 2 where that is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        what = " and ".join(missing)
        print(
            f"pyblock: the command line needs {what}: pip install pyblock-hotplug[cli]",
            file=sys.stderr,
        )
        sys.exit(2)
    from pyblock.cli import main as run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
