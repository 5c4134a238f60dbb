"""`python -m pyblock`: the command line."""

from pyblock.cli import main

main()
