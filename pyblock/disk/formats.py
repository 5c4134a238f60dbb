"""What an image that is no raw disk begins with. pyblock plugs in raw images only; a container
plugged in as raw shows the guest the container, and what the guest writes there destroys it.

A guest may write any of these to its own raw disk, and one that encrypts the whole of it does. So
it is a reason to ask, and none to believe: whoever says that the image is raw is believed.
"""

from __future__ import annotations

from pyblock.errors import InvalidImage, InvalidValue

HEAD = 4096  # bytes: all of them stand in the first 68
RAW = "raw"

# (offset, bytes, name)
_MAGIC = (
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),  # a dynamic one; a fixed one is raw, and has this behind its end
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
)
# What begins with none of these bytes, and has not this one behind its beginning, is none of them.
FIRST = frozenset(magic[:1] for offset, magic, _ in _MAGIC if not offset)
BEHIND_AT, BEHIND = next((offset, magic) for offset, magic, _ in _MAGIC if offset)


def format_of(head: bytes) -> str | None:
    """The name of the format that an image begins like, None for none of those that are known."""
    return next((name for offset, magic, name in _MAGIC if head.startswith(magic, offset)), None)


def check_format(text: object) -> None:
    """Raises InvalidValue unless it is "raw", or None: whatever does not look like something
    else."""
    if text is not None and text != RAW:
        raise InvalidValue(
            f"format {text!r} cannot be plugged in: only raw images can, so it is 'raw' or left "
            "out (qemu-img convert makes one)",
            value=text,
        )


def not_raw(path: str, name: str) -> InvalidImage:
    """The error for an image that begins like another format."""
    return InvalidImage(
        f"image {path!r} begins like {name}, and would be plugged in as raw: the guest would see "
        "the container, not what is in it. Make it "
        "raw (qemu-img convert -O raw), or say format='raw' if it is: a guest can write this to "
        "its own disk",
        path=path,
    )
