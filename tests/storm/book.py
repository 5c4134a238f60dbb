"""What a sandbox may hold, image by image, by what its processes were told: the lowest and the
highest count of attaches.

Counts add up whatever the order, so calls may overlap. A call widens the range when it begins, and
narrows it when it says what became of it: one that never says (its process died) leaves it wide,
until a sandbox that has settled is counted anew.
"""

from __future__ import annotations

from collections import Counter

from .notes import DeviceSeen, Note

# A detach that ends so has changed nothing. Of others (cancelled) the outcome is not known;
# DetachPending says that it will be gone.
UNCHANGED = {
    "StoreBusy",
    "StoreError",
    "VmmRefused",
    "VmmUnreachable",
    "VmmProtocolError",
    "ConnectionLost",
    "SandboxClosed",
    "AttachPending",
}
# An attach that ends so may be finished instead of undone where the VMM does not let go of it.
OPEN_ENDED = {"AttachPending", "CancelledError", "SandboxClosed", "ClosedMeanwhile"}

CALLS = 40  # the last calls of an image that a wrong count is shown with


class Book:
    """:ivar replaced: the machine was started anew since the sandbox was last settled, so all may
    be lost."""

    def __init__(self) -> None:
        self.low: Counter[str] = Counter()
        self.high: Counter[str] = Counter()
        self.replaced = False
        self._counts: Counter[str] = Counter()  # when it was settled last
        self._calls: list[Note] = []  # since then

    def begin(self, note: Note) -> None:
        self._calls.append(note)
        if note.kind in ("attach", "attach_many"):
            self.high.update(note.images)
        elif note.kind in ("detach", "detach_many"):
            self.low.subtract(note.images)

    def end(self, note: Note) -> None:
        self._calls.append(note)
        done = note.result == ""
        if note.kind in ("attach", "attach_many"):
            if done:
                self.low.update(note.images)
            elif not (note.sticky and note.result in OPEN_ENDED):
                self.high.subtract(note.images)
        elif note.kind == "detach" or (done and note.kind == "detach_many"):
            if done or (note.result == "DetachPending" and not note.sticky):
                self.high.subtract(note.images)
            elif note.result in UNCHANGED:
                self.low.update(note.images)

    def replace_machine(self) -> None:
        self.replaced = True

    def settle(self, devices: list[DeviceSeen]) -> list[str]:
        """Compares, takes the counts as known from here on, and returns what is wrong."""
        counts = {device.image: device.count for device in devices if device.phase == "attached"}
        pending = {device.image for device in devices if device.phase != "attached"}
        wrong = []
        for image in sorted(counts.keys() | self.low.keys() | self.high.keys()):
            low, high = (0, 0) if self.replaced else (max(0, self.low[image]), self.high[image])
            if image not in pending and not low <= counts.get(image, 0) <= high:
                told = str(low) if low == high else f"{low} to {high}"
                about = [f"    {note}" for note in self._calls if image in note.images][-CALLS:]
                text = (
                    f"image {image} is attached {counts.get(image, 0)} times; by what its callers "
                    f"were told it is {told}:"
                )
                about.insert(0, f"    it was {self._counts[image]} when it was last compared")
                wrong.append("\n".join([text, *about]))
        self.low, self.high, self.replaced = Counter(counts), Counter(counts), False
        self._counts = Counter(counts)
        self._calls.clear()
        for device in devices:
            if device.image in pending:  # it may yet be kept
                self.high[device.image] = max(1, device.count)
        return wrong
