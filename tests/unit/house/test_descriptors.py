"""A process that may open no more files: whatever it calls raises a typed error, and works when it
can open files again.

Much is imported inside a call, when it is first needed, and that opens files too; so each call is
the first of its process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.snapshot import MakeImage

FIRST = """
import asyncio, json, os, resource, sys
from pyblock import PyblockError, Sandbox
from pyblock.vmm import open_hypervisor

folder, call = sys.argv[1:]
image, vm, saved = (os.path.join(folder, name) for name in ("image", "vm", "saved.json"))

async def adapter():
    open_hypervisor("qemu:" + vm)

async def file_machine():
    open_hypervisor("memory:" + vm)

async def prepared():
    # what is there already when no file can be opened any more
    if call in ("an adapter", "a machine in a file"):
        return {"an adapter": adapter, "a machine in a file": file_machine}[call]
    sandbox = Sandbox("one", "memory:" + (vm if "store" in call else ""))
    if call == "the host's store":
        return sandbox.__aenter__
    await sandbox.__aenter__()
    return {
        "attach": lambda: sandbox.attach(image),
        "attach with the store": lambda: sandbox.attach(image),
        "save": lambda: sandbox.save(os.path.join(folder, "new.json")),
        "load": lambda: sandbox.load(saved),
        "state": lambda: asyncio.sleep(0, sandbox.state()),
    }[call]

async def main():
    work = await prepared()
    highest = max(map(int, os.listdir("/proc/self/fd")))
    while (limit := os.open(os.devnull, os.O_RDONLY)) < highest:  # no gap is left below the limit
        pass
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = []
    for spare in range(40):  # each time one more can be opened, so that it fails in another place
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 1 + spare, hard))
        try:
            await asyncio.wait_for(work(), 60)
            text = "done"
        except PyblockError as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException as error:
            text = f"RAW {type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        said.append(text)
        if text == "done":
            break
    print(json.dumps(said))

asyncio.run(main())
"""
CALLS = [
    "an adapter",
    "a machine in a file",
    "the host's store",
    "attach",
    "attach with the store",
    "save",
    "load",
    "state",
]
SAVE = """
import asyncio, sys
from pyblock import Sandbox

async def save():
    async with Sandbox("one", "memory:", store=None) as sandbox:
        await sandbox.save(sys.argv[1])

asyncio.run(save())
"""


@pytest.mark.parametrize("call", CALLS)
def test_at_the_limit_of_open_files(call: str, tmp_path: Path, make_image: MakeImage) -> None:
    make_image("image")
    (tmp_path / "vm").touch()
    subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "saved.json")], check=True)
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(tmp_path), call],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said[-1] == "done"
    assert not [text for text in said if text.startswith("RAW")]
    # in a machine in memory; nothing is opened for it
    assert len(said) > 1 or call.startswith("attach")
