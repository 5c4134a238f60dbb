"""The storm's command line."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence

from kit import KitMissing

from .judge import Options, Violation
from .weather import storm


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="storm", description="processes on real QEMUs that are killed at random"
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--deaths", type=int, default=0, help="end after so many, before the seconds are over"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="repeats a plan (also PYBLOCK_SEED); how far each process gets is the host's affair",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="go on after what is wrong, and show one example of each kind at the end",
    )
    given = parser.parse_args(arguments)
    seed = (
        given.seed
        if given.seed is not None
        else int(os.environ.get("PYBLOCK_SEED") or random.SystemRandom().randrange(1_000_000))
    )
    say(f"seed {seed} (PYBLOCK_SEED={seed} repeats the plan)")
    with storm(Options(given.seconds, seed, given.deaths, given.keep_going)) as one:
        try:
            one.run()
        except KitMissing as missing:
            say(f"no storm here: {missing}")
            return 2
        except Violation as violation:
            say(one.report(violation))
            return 1
        except BaseException as error:
            say(one.report(error))
            raise
        finally:
            for line in [*one.examples.values(), *one.summary()]:
                say(line)
        if one.wrong:
            return 1
    say("nothing was leaked, lost or there twice")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
