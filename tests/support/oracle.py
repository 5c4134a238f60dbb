"""What the core must agree with, written the slow and obvious way: a set with a linear probe, a
base-26 loop, f-strings."""

from __future__ import annotations

from collections.abc import Iterable

MASK = 2**64 - 1


class Full(Exception):
    """No index is free."""


class NaiveIndex:
    """The block index as a set."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken: set[int] = set()

    def acquire(self) -> int:
        return self.acquire_many(1)[0]

    def acquire_many(self, n: int) -> list[int]:
        if n > self.capacity - len(self.taken):
            raise Full
        got: list[int] = []
        index = 0
        while len(got) < n:
            if index not in self.taken:
                got.append(index)
            index += 1
        self.taken.update(got)
        return got

    def first_bad(self, indexes: Iterable[int]) -> int | None:
        """The first that cannot be reserved together with those before it; None when all can."""
        seen = set(self.taken)
        for index in indexes:
            if index in seen or not 0 <= index < self.capacity:
                return index
            seen.add(index)
        return None


def letters(number: int) -> str:
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(ord("a") + digit) + text
    return text


def drive_name(number: int, prefix: str = "vd") -> str:
    return prefix + letters(number)


def scsi_address(index: int) -> str:
    return f"{index // 256}:{index % 256}"


def siphash(key: bytes, text: bytes) -> int:
    """SipHash-2-4 as in the paper of Aumasson and Bernstein."""
    key0, key1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v0, v1 = key0 ^ 0x736F6D6570736575, key1 ^ 0x646F72616E646F6D
    v2, v3 = key0 ^ 0x6C7967656E657261, key1 ^ 0x7465646279746573

    def rotate(word: int, by: int) -> int:
        return (word << by | word >> (64 - by)) & MASK

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0 = (v0 + v1) & MASK
            v1 = rotate(v1, 13) ^ v0
            v0 = rotate(v0, 32)
            v2 = (v2 + v3) & MASK
            v3 = rotate(v3, 16) ^ v2
            v0 = (v0 + v3) & MASK
            v3 = rotate(v3, 21) ^ v0
            v2 = (v2 + v1) & MASK
            v1 = rotate(v1, 17) ^ v2
            v2 = rotate(v2, 32)

    padded = text + bytes(7 - len(text) % 8) + bytes([len(text) % 256])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xFF
    rounds(4)
    return v0 ^ v1 ^ v2 ^ v3


def digest(device_id: str, salt: int) -> str:
    key = salt.to_bytes(8, "little") + 0x707962D16C6F636B.to_bytes(8, "little")
    number = siphash(key, device_id.encode())
    return "".join(
        "abcdefghijklmnopqrstuvwxyz234567"[number >> shift & 31] for shift in range(60, -1, -5)
    )


def make_name_id(kind: str, device_id: str, limit: int = 31, salt: int = 0) -> str:
    text = f"{kind}-{device_id}"
    if len(text.encode()) <= limit:
        return text
    room = limit - len(kind.encode()) - 2 - 13
    kept = device_id
    while len(kept.encode()) > room:
        kept = kept[:-1]
    return f"{kind}-{kept}.{digest(device_id, salt)}"
