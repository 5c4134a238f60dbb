"""Which devices `pyblock detach` takes, how they may be named, and what it says of those that
stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import samples
from support.shell import Shell
from support.snapshot import MakeImage

from pyblock import Sandbox

IDS = ("abc1", "abc2", "xyz")


def with_ids(shell: Shell, make_image: MakeImage) -> dict[str, Path]:
    """Devices of these IDs, attached through a state that was written with them."""
    images = {device_id: make_image(f"{device_id}.img") for device_id in IDS}

    async def attach() -> None:
        async with Sandbox("named", shell.vm) as sandbox:
            for device_id, image in images.items():
                await sandbox.attach(image, device_id=device_id)

    shell.run_in_store(attach)
    return images


def attached(shell: Shell) -> dict[str, int]:
    return {row["device_id"]: row["attach_count"] for row in shell.json("list")}


def test_by_the_beginning_of_an_id(shell: Shell, make_image: MakeImage) -> None:
    with_ids(shell, make_image)
    assert shell.fine("detach", "x") == ""
    assert attached(shell) == {"abc1": 1, "abc2": 1}
    assert shell.fine("detach", "abc2", "abc1") == ""
    assert attached(shell) == {}


def test_a_beginning_that_two_have(shell: Shell, make_image: MakeImage) -> None:
    images = with_ids(shell, make_image)
    text = shell.refused("detach", "xyz", "abc")
    assert "abc1" in text and "abc2" in text and str(images["abc1"]) in text and "xyz" not in text
    assert attached(shell) == dict.fromkeys(IDS, 1)  # nothing of it is done


def test_an_id_is_no_beginning_of_another(shell: Shell, make_image: MakeImage) -> None:
    async def attach() -> None:
        async with Sandbox("named", shell.vm) as sandbox:
            for device_id in ("a", "ab"):
                await sandbox.attach(make_image(device_id), device_id=device_id)

    shell.run_in_store(attach)
    shell.fine("detach", "a")
    assert attached(shell) == {"ab": 1}


@pytest.mark.parametrize("spelling", ["path", "relative", "symlink", "hard link", "dots"])
def test_by_the_path_of_an_image(
    shell: Shell, make_image: MakeImage, tmp_path: Path, spelling: str
) -> None:
    image = make_image("the.img")
    shell.fine("attach", image, make_image("other.img"))
    words: dict[str, str | Path] = {
        "path": image,
        "relative": Path(os.path.relpath(image)),
        "symlink": tmp_path / "link",
        "hard link": tmp_path / "hard",
        "dots": f"{tmp_path}/./the.img",
    }
    if spelling == "symlink":
        (tmp_path / "link").symlink_to(image)
    if spelling == "hard link":
        (tmp_path / "hard").hardlink_to(image)
    assert shell.fine("detach", words[spelling]) == ""
    assert [Path(row["host_path"]).name for row in shell.json("list")] == ["other.img"]


def test_by_the_path_of_an_image_that_is_gone(shell: Shell, make_image: MakeImage) -> None:
    image = make_image("the.img")
    shell.fine("attach", image)
    image.unlink()
    assert shell.fine("detach", image) == ""
    assert attached(shell) == {}


def test_dots_behind_a_link_are_no_other_image(
    shell: Shell, make_image: MakeImage, tmp_path: Path
) -> None:
    """`link/../img` is the image beside what the link leads to, not the one beside the link; also
    when it is gone."""
    (tmp_path / "elsewhere" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/in")
    [beside] = shell.json("attach", make_image("img"))
    dotted, other = (
        f"{tmp_path}/link/../img",
        make_image("other.img").rename(tmp_path / "elsewhere" / "img"),
    )
    shell.refused("detach", dotted)
    assert attached(shell) == {beside["device_id"]: 1}
    shell.fine("attach", dotted)
    assert shell.fine("detach", dotted) == ""
    assert attached(shell) == {beside["device_id"]: 1}
    shell.fine("attach", dotted)
    other.unlink()
    assert shell.fine("detach", dotted) == ""
    assert attached(shell) == {beside["device_id"]: 1}


def test_a_path_under_which_there_is_another_image_now(shell: Shell, make_image: MakeImage) -> None:
    """Two devices have that path, so neither is guessed."""
    image = make_image("the.img")
    [first] = shell.json("attach", image)
    image.rename(image.with_name("moved.img"))
    [second] = shell.json("attach", make_image("the.img"))
    text = shell.refused("detach", image)
    assert first["device_id"] in text and second["device_id"] in text
    assert attached(shell) == {first["device_id"]: 1, second["device_id"]: 1}


@pytest.mark.parametrize("word", ["", "nothing", "/", ".", "/absent.img", "no\nsuch"])
def test_a_word_that_fits_none(shell: Shell, make_image: MakeImage, word: str) -> None:
    """An empty one is what a shell makes of an unset variable."""
    [row] = shell.json("attach", make_image("only.img"))
    assert repr(word) in shell.refused("detach", row["device_id"], word)
    assert attached(shell) == {row["device_id"]: 1}


def test_all(shell: Shell, make_image: MakeImage) -> None:
    with_ids(shell, make_image)
    assert shell.fine("detach", "--all") == ""
    assert attached(shell) == {}
    done = shell("detach", "--all")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "nothing is attached\n")


def test_all_of_kata(shell: Shell, tmp_path: Path, make_image: MakeImage) -> None:
    """What is plugged in goes; a device of another kind is Kata's to give back."""
    state = tmp_path / "kata.json"
    state.write_bytes(samples.text(samples.sandbox([samples.VFIO], [])))
    shell.fine("import", state)
    shell.fine("attach", make_image("ours.img"))
    shell.fine("detach", "--all")
    assert attached(shell) == {}
    shell.fine("export", tmp_path / "out.json")
    assert samples.VFIO["ID"] in (tmp_path / "out.json").read_text()


def test_all_or_some(shell: Shell) -> None:
    for arguments in (["detach", "--all", "x"], ["detach"]):
        assert "--all" in shell.misused(*arguments)


def test_a_device_that_was_attached_twice(shell: Shell, make_image: MakeImage) -> None:
    image = make_image("image")
    for _ in range(3):
        [row] = shell.json("attach", image)
    device_id = row["device_id"]
    for arguments, text in (([device_id], "2 times"), (["--all"], "once")):
        done = shell("detach", *arguments)
        assert (done.returncode, done.stdout) == (0, "")
        assert (
            device_id in done.stderr
            and f"still attached {text}" in done.stderr
            and done.stderr.count("\n") == 1
        )
    assert attached(shell) == {device_id: 1}
    assert shell.fine("detach", image) == ""
    assert attached(shell) == {}


def test_what_stays_is_said_beside_an_error(shell: Shell, make_image: MakeImage) -> None:
    twice, once = make_image("twice"), make_image("once")
    [row] = shell.json("attach", twice)
    [other] = shell.json("attach", once)
    shell.fine("attach", twice)
    refuse = (
        "from pyblock.vmm.memory.machine import MemoryHypervisor as M\n"
        "from pyblock.errors import VmmRefused\n"
        "async def no(self, drive): raise VmmRefused('not now', step='device-del')\n"
        "M.request_removal = no"
    )
    done = shell("detach", "--all", patch=refuse)
    assert done.returncode == 1 and "not now" in done.stderr
    assert (
        f"{row['device_id']} is still attached once" in done.stderr
        and f"{other['device_id']} is still" not in done.stderr
    )
