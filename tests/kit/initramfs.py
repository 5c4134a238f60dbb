"""The guest's kernel and its initramfs: busybox, the block drivers and `init.sh` in one newc
archive.

Load order comes out of the modules themselves (`depends=` in .modinfo), so no depmod and no
installed kernel is needed. The archive is written here and not by the cpio command: that is no
longer, and needs neither root for /dev/console nor a tree on disk.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "guest"
INIT = Path(__file__).with_name("init.sh")
DRIVERS = ("virtio_pci", "virtio_blk", "sd_mod", "virtio_scsi", "nfit", "nd_pmem")


class KitMissing(Exception):
    """This machine lacks something that the guest is made of; the text says what to install."""


@dataclass(frozen=True)
class Kernel:
    release: str
    image: Path
    modules: Path


def find_kernel() -> Kernel:
    """The newest kernel that `scripts/setup kernel` unpacked, or below $PYBLOCK_GUEST_KERNEL (a
    folder with boot/ and lib/modules/)."""
    root = Path(os.environ.get("PYBLOCK_GUEST_KERNEL") or CACHE / "kernel")
    found = []
    for image in root.glob("boot/vmlinuz-*"):
        release = image.name.removeprefix("vmlinuz-")
        for modules in (root / "lib/modules" / release, root / "usr/lib/modules" / release):
            if modules.is_dir():
                found.append(Kernel(release, image, modules))
    if not found:
        raise KitMissing(f"no guest kernel below {root}: run `scripts/setup kernel`")
    return max(
        found, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.release)]
    )


def find_busybox() -> Path:
    path = shutil.which("busybox")
    if path is None or b"/ld-" in Path(path).read_bytes()[:4096]:
        # an interpreter: linked dynamically, useless without its libraries
        raise KitMissing("no static busybox: run `scripts/setup qemu` (package busybox-static)")
    return Path(path)


def initramfs(kernel: Kernel) -> Path:
    """The archive for this kernel, made once for each state of what goes into it."""
    busybox = find_busybox()
    key = hashlib.sha256(INIT.read_bytes() + Path(__file__).read_bytes())
    for path in (kernel.image, busybox):
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    archive = CACHE / f"initramfs-{key.hexdigest()[:16]}.cpio"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=CACHE, prefix="initramfs-", delete=False) as file:
            file.write(_archive(kernel, busybox))
        # two test runs may both build it; either result is whole, and they are equal
        Path(file.name).replace(archive)
    return archive


def _archive(kernel: Kernel, busybox: Path) -> bytes:
    modules = dict(_in_load_order(kernel))
    entries = [_entry(folder, 0o040755) for folder in ("bin", "dev", "modules", "proc", "sys")]
    entries += [
        _entry("dev/console", 0o020600, device=(5, 1)),
        _entry("bin/busybox", 0o100755, busybox.read_bytes()),
        _entry("bin/sh", 0o120777, b"busybox"),
        _entry("init", 0o100755, INIT.read_bytes()),
        _entry("modules/order", 0o100644, "".join(f"{name}\n" for name in modules).encode()),
        *(_entry(f"modules/{name}.ko", 0o100644, data) for name, data in modules.items()),
        _entry("TRAILER!!!", 0),
    ]
    return b"".join(entries)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One newc member: 13 numbers of 8 hex digits, name and data each padded to 4 bytes."""
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def _in_load_order(kernel: Kernel) -> Iterator[tuple[str, bytes]]:
    files = {_module_name(path.name): path for path in kernel.modules.rglob("*.ko*")}
    built_in = {
        _module_name(line) for line in (kernel.modules / "modules.builtin").read_text().split()
    }
    seen: set[str] = set()

    def load(name: str) -> Iterator[tuple[str, bytes]]:
        if name in seen or name in built_in:
            return
        seen.add(name)
        if name not in files:
            raise KitMissing(f"kernel {kernel.release} has no {name}: run `scripts/setup kernel`")
        data = _module(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().split(",") if depends and depends[1] else ():
            yield from load(_module_name(other))
        yield name, data

    for driver in DRIVERS:
        yield from load(driver)


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _module(path: Path) -> bytes:
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":  # in the standard library from Python 3.14 on; the command is everywhere
            if shutil.which("zstd") is None:
                raise KitMissing(
                    "the kernel's modules are packed with zstd: run `scripts/setup qemu` (package "
                    "zstd)"
                )
            return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
        case _:
            return path.read_bytes()
