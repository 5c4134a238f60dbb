"""The command line as a program: what it prints, how it ends, and that one call knows what an
earlier one did."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import samples
from support.children import NOBODY, in_child
from support.shell import LONG, OWN, Shell, on_terminal
from support.snapshot import MakeImage

from pyblock import InvalidState, Sandbox, __version__, blocking
from pyblock.cli import session
from pyblock.store import files, state_folder

SCRIPT = Path(sys.executable).with_name("pyblock")
KEYS = {
    *(
        "device_id",
        "drive_id",
        "index",
        "driver",
        "host_path",
        "read_only",
        "attach_count",
        "scsi_addr",
        "pci_path",
        "nvdimm_id",
    ),
    *("virt_path", "predicted_name", "guest_match", "serial"),
}


def test_one_call_knows_what_an_earlier_one_did(shell: Shell, make_image: MakeImage) -> None:
    one, two, three = (make_image(name) for name in ("one", "two", "three"))
    [first] = shell.json("attach", one, "--serial", "S-1")
    assert (first["index"], first["predicted_name"], first["serial"], first["attach_count"]) == (
        0,
        "/dev/sda",
        "S-1",
        1,
    )
    [second, third] = shell.json("attach", two, three, "--driver", "virtio-blk", "--read-only")
    # the guest may have seen either first
    assert [row["predicted_name"] for row in (second, third)] == [None, None]
    assert [row["guest_match"] is not None for row in (second, third)] == [True, True]
    [again] = shell.json("attach", one)
    assert (again["device_id"], again["attach_count"]) == (first["device_id"], 2)
    assert shell.json("list") == [again, second, third]
    done = shell("detach", first["device_id"], second["device_id"])
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.count("\n") == 1
    assert shell.json("list") == [first, third]
    shell.fine("detach", first["device_id"])
    assert [row["index"] for row in shell.json("attach", one, two)] == [0, 1]
    assert "unknown" not in shell.refused("detach", second["device_id"])


def test_each_vm_has_a_state_of_its_own(shell: Shell, make_image: MakeImage) -> None:
    shell.fine("attach", make_image("one"))
    assert shell.json("list", vm=shell.machine("vm2")) == []
    assert shell.json("list", vm=shell.machine("vm1 ")) == []
    assert shell.json("list", vm="memory:") == []
    assert len(shell.json("list")) == 1


def test_all_machines_in_one_list(shell: Shell, make_image: MakeImage) -> None:
    assert shell.json("list", vm=None) == []
    [one] = shell.json("attach", make_image("one"))
    [two] = shell.json("--sandbox", "two", "attach", make_image("two"), vm=shell.machine("vm2"))
    assert two["sandbox"] == "two"
    assert sorted(row["device_id"] for row in shell.json("list", vm=None)) == sorted(
        [one["device_id"], two["device_id"]]
    )
    assert one["sandbox"] in (text := shell.fine("list", vm=None)) and "two" in text
    # The ID alone finds the machine, and the machine its sandbox.
    assert (
        shell.json("--sandbox", "two", "list", vm=None)
        == [two]
        == shell.json("list", vm=shell.machine("vm2"))
    )
    assert "vm2" in shell.refused(
        "--sandbox", "three", "attach", make_image("three"), vm=shell.machine("vm2")
    )
    shell.fine("--sandbox", "two", "detach", two["device_id"], vm=None)
    assert "no sandbox 'two'" in shell.refused("--sandbox", "two", "detach", "x", vm=None)


def test_a_machine_that_ends_with_the_command(shell: Shell, make_image: MakeImage) -> None:
    assert [row["index"] for row in shell.json("attach", make_image("one"), vm="memory:")] == [0]
    assert not shell.folder.exists()
    assert "memory:" in shell.refused("import", make_image("state"), vm="memory:")


def test_an_image_has_one_writer(shell: Shell, make_image: MakeImage) -> None:
    image, other = make_image("image"), shell.machine("vm2")
    [row] = shell.json("attach", image)
    text = shell.refused("attach", image, vm=other)
    assert (
        str(image) in text
        and row["sandbox"] in text
        and row["device_id"] in text
        and "forget" in text
    )
    shell.refused("attach", image, "--read-only", vm=other)
    shell.refused("attach", image, "--share", vm=other)  # both have to say so
    shell.fine("detach", row["device_id"])
    for vm in (OWN, other):
        shell.fine("attach", image, "--share", vm=vm)
    shared = make_image("shared")
    for vm in (OWN, other):
        shell.fine("attach", shared, "--read-only", vm=vm)
    shell.refused("attach", shared, vm=shell.machine("vm3"))


def test_reconcile(shell: Shell, make_image: MakeImage) -> None:
    rows = shell.json("attach", *(make_image(name) for name in ("kept", "lost", "half")))
    path = Path(shell.vm.removeprefix("memory:"))
    machine = json.loads(path.read_text())
    for which, where in ((1, ("backends", "devices")), (2, ("devices",))):
        for name in where:
            del machine[name][rows[which]["drive_id"]]
    machine["backends"]["drive-nobodys"] = "/x"
    path.write_text(json.dumps(machine))
    lost, half, orphan = rows[1]["drive_id"], rows[2]["drive_id"], "drive-nobodys"

    def outcomes(*arguments: str, vm: str | None = OWN) -> dict[str, tuple[str, str]]:
        answer = shell.json("reconcile", *arguments, vm=vm)
        assert [each["error"] for each in answer["sandboxes"]] == [None]
        return {one["drive_id"]: (one["found"], one["outcome"]) for one in answer["findings"]}

    assert outcomes("--dry-run") == {
        lost: ("lost", "left"),
        half: ("lost", "left"),
        orphan: ("orphan", "left"),
    }
    assert shell.json("list") == rows and json.loads(path.read_text()) == machine
    assert outcomes(vm=None) == {
        lost: ("lost", "freed"),
        half: ("lost", "removed"),
        orphan: ("orphan", "left"),
    }
    assert shell.json("list") == rows[:1]
    assert outcomes("--orphans") == {orphan: ("orphan", "removed")}
    assert outcomes() == {}
    assert json.loads(path.read_text())["backends"].keys() == {rows[0]["drive_id"]}
    assert "nothing differs" in shell("reconcile", vm=None).stderr


def test_a_machine_that_is_gone(shell: Shell, make_image: MakeImage) -> None:
    image = make_image("image")
    [row] = shell.json("attach", image)
    sandbox = row["sandbox"]
    assert "still answers" in shell.refused("forget", sandbox, vm=None)
    Path(shell.vm.removeprefix("memory:")).unlink()
    done = shell("reconcile", "--json", vm=None)
    assert done.returncode == 1 and json.loads(done.stdout)["sandboxes"][0]["error"]
    assert shell.json("list") == [row]
    assert "claim" in shell.refused("attach", image, vm=shell.machine("vm2"))
    assert (done := shell("forget", sandbox, vm=None)).returncode == 0 and sandbox in done.stderr
    assert shell.json("list", vm=None) == []
    shell.fine("attach", image, vm=shell.machine("vm2"))
    assert "'nothing'" in shell.refused("forget", "nothing", vm=None)


@pytest.mark.parametrize("name", samples.KATA)
def test_import_then_export_keeps_all(shell: Shell, tmp_path: Path, name: str) -> None:
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    theirs.write_bytes(samples.text(samples.KATA[name]))
    shell.fine("import", theirs)
    shell.fine("export", ours)
    assert samples.without_pyblock(json.loads(ours.read_bytes())) == samples.without_pyblock(
        samples.as_written(samples.KATA[name])
    )


def test_keys_of_a_record(shell: Shell, make_image: MakeImage) -> None:
    rows = {
        driver: shell.json("attach", make_image(driver), "--driver", driver)[0]
        for driver in ("virtio-scsi", "virtio-blk", "nvdimm")
    }
    for driver, row in rows.items():
        assert row.keys() >= KEYS
        assert (row["driver"], row["read_only"], row["drive_id"]) == (
            driver,
            False,
            f"drive-{row['device_id']}",
        )
    scsi, blk, nvdimm = rows.values()
    assert (scsi["scsi_addr"], scsi["pci_path"], scsi["virt_path"], scsi["nvdimm_id"]) == (
        "0:0",
        None,
        None,
        None,
    )
    assert (blk["scsi_addr"], blk["pci_path"], blk["virt_path"]) == (None, "02/00", "/dev/vda")
    assert (nvdimm["nvdimm_id"], nvdimm["predicted_name"], nvdimm["serial"]) == (
        "0",
        "/dev/pmem0",
        None,
    )
    assert all(row["guest_match"] for row in rows.values())
    assert shell.json("list") == [*rows.values()]


def test_table(shell: Shell, make_image: MakeImage) -> None:
    done = shell("list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "nothing is attached\n")
    image = make_image("an-image-with-quite-a-long-name-that-nobody-may-cut-short.img")
    for text in (shell.fine("attach", image), shell.fine("list")):
        assert all(
            word in text
            for word in ("device_id", "predicted_name", "/dev/sda", "virtio-scsi", image.name)
        )


ERRORS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing image": (lambda folder: ["attach", f"{folder}/absent"], "absent"),
    "folder": (lambda folder: ["attach", str(folder)], "a directory"),
    "one of two missing": (
        lambda folder: ["attach", f"{folder}/image", f"{folder}/absent"],
        "absent",
    ),
    "driver": (
        lambda folder: ["attach", f"{folder}/image", "--driver", "virtio-ide"],
        "'virtio-ide'",
    ),
    "serial": (
        lambda folder: ["attach", f"{folder}/image", "--serial", "two words"],
        "'two words'",
    ),
    "timeout": (lambda folder: ["attach", f"{folder}/image", "--timeout", "-1"], "-1"),
    "timeout nan": (lambda folder: ["attach", f"{folder}/image", "--timeout", "nan"], "nan"),
    "unknown device": (lambda folder: ["detach", "nothing"], "'nothing'"),
    "number": (lambda folder: ["name", "9223372036854775808"], "9223372036854775808"),
    "name": (lambda folder: ["index", "vd1"], "'vd1'"),
    "prefix": (lambda folder: ["name", "0", "--prefix", "x" * 31], "31"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusals_are_one_line(
    shell: Shell, make_image: MakeImage, tmp_path: Path, name: str
) -> None:
    make_image("image")
    arguments, text = ERRORS[name]
    assert text in shell.refused(*arguments(tmp_path))
    assert shell.json("list") == []


@pytest.mark.parametrize(
    ("vm", "text"), [("xen:/run", "'xen:/run'"), ("", "''"), ("qemu:/nowhere/qmp", "/nowhere/qmp")]
)
def test_machines_that_are_none(shell: Shell, make_image: MakeImage, vm: str, text: str) -> None:
    assert text in shell.refused("attach", make_image("image"), vm=vm)


@pytest.mark.parametrize(
    "arguments",
    [
        ["attach"],
        ["attach", "--serial", "S", "a", "b"],
        ["attach", "a", "--timeout", "soon"],
        ["detach"],
        ["list", "extra"],
        ["list", "--nonsense"],
        ["forget"],
        ["import"],
        ["export"],
        ["name"],
        ["name", "x"],
        ["plug"],
    ],
    ids=" ".join,
)
def test_wrong_usage(shell: Shell, arguments: list[str]) -> None:
    shell.misused(*arguments)


def test_vm_is_needed(shell: Shell, make_image: MakeImage) -> None:
    for arguments in (["export", "x"], ["attach", str(make_image("image"))], ["detach", "x"]):
        assert "--vm" in shell.misused(*arguments, vm=None)


def test_names_and_numbers(shell: Shell) -> None:
    assert shell.fine("name", "702", vm=None) == "vdaaa\n"
    assert shell.fine("name", "0", "--prefix", "sd", vm=None) == "sda\n"
    assert shell.fine("index", "vdaaa", vm=None) == "702\n"
    assert shell.fine("index", "sdz", "--prefix", "sd", vm=None) == "25\n"
    assert "-1" in shell.refused("name", "--", "-1", vm=None)


def test_help_version_demo(shell: Shell) -> None:
    assert __version__ in shell.fine("--version", vm=None)
    for arguments in (["--help"], ["-h"], ["attach", "--help"]):
        assert "Usage: " in shell.fine(*arguments, vm=None)
    text = shell.fine("demo", vm=None)
    assert "detached all: 0 devices, 0 indexes taken, 0 backends left" in text


@pytest.mark.skipif(
    not SCRIPT.exists(), reason="the console script is not installed beside this Python"
)
def test_the_installed_script(shell: Shell) -> None:
    for arguments, status in ((["name", "1"], 0), (["index", "x"], 1), (["plug"], 2)):
        done = subprocess.run(
            [SCRIPT, *arguments],
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status


def test_a_spoiled_store_is_left_as_it_is(shell: Shell, make_image: MakeImage) -> None:
    image = make_image("image")
    shell.fine("attach", image)
    state = shell.folder / "state.db"
    state.write_bytes(text := state.read_bytes()[:-4096])
    for arguments in (["list"], ["attach", str(image)], ["detach", "x"], ["reconcile"]):
        assert str(state) in shell.refused(*arguments)
    assert state.read_bytes() == text


def test_state_folder_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "deep" / "named"
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(named))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    old = os.umask(0)
    try:
        assert state_folder() == named
    finally:
        os.umask(old)
    assert stat.S_IMODE(named.stat().st_mode) == 0o700
    assert not (tmp_path / "xdg").exists()


@pytest.mark.parametrize("text", ["", None])
def test_state_folder_of_root_and_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is None:
        monkeypatch.delenv("PYBLOCK_STATE_DIR", raising=False)
    else:
        monkeypatch.setenv("PYBLOCK_STATE_DIR", text)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made: list[Path] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(files, "check_folder", lambda folder: None)  # whose it is really
    with monkeypatch.context() as patch:  # /run is the machine's
        patch.setattr(Path, "mkdir", lambda path, **_: made.append(path))
        assert state_folder() == Path("/run/pyblock")
    assert made == [Path("/run/pyblock")]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state_folder() == tmp_path / "pyblock"
    assert stat.S_IMODE((tmp_path / "pyblock").stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(InvalidState, match="PYBLOCK_STATE_DIR"):
        state_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_state_folder_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYBLOCK_STATE_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    def attempt() -> str:
        try:
            return str(state_folder())
        except InvalidState as error:
            return str(error)

    status, text = in_child(attempt, uid=NOBODY)
    assert status == 0
    assert "no state folder" in text


def test_files_in_the_state_folder_are_private(shell: Shell, make_image: MakeImage) -> None:
    shell.fine("attach", make_image("image"))
    assert stat.S_IMODE(shell.folder.stat().st_mode) == 0o700
    assert {path.name for path in shell.folder.iterdir()} >= {"state.db", "state.db-owners"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in shell.folder.iterdir()} == {0o600}


def test_one_socket_has_one_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("qmp.sock")
    spellings = [f"qemu:{tmp_path}/qmp.sock", "qemu:qmp.sock", "qemu:./qmp.sock", "qemu:link"]
    assert len({asyncio.run(session.by_vm(vm)).sandbox_id for vm in spellings}) == 1
    others = [
        "memory:",
        "memory:/a",
        "memory:/a/b",
        "memory:/a-b",
        "qemu:/a/b",
        "qemu:/a-b",
        "qemu:" + "/x" * 50,
        "qemu:" + "/x" * 51,
    ]
    ids = {asyncio.run(session.by_vm(vm)).sandbox_id for vm in others}
    assert len(ids) == len(others)
    for each in ids:
        Sandbox(each, "memory:")  # takes it as an ID


def test_commands_at_once_take_their_turns(shell: Shell, make_image: MakeImage) -> None:
    images = [make_image(f"image{number}") for number in range(8)]
    running = [
        subprocess.Popen(
            shell.command("attach", image), env=shell.environment, stdout=subprocess.DEVNULL
        )
        for image in images
    ]
    assert [process.wait(60) for process in running] == [0] * 8
    rows = shell.json("list")
    assert [row["index"] for row in rows] == [*range(8)]
    assert {row["host_path"] for row in rows} == {str(image) for image in images}


def test_a_command_waits_for_another(
    shell: Shell, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    [row] = shell.json("attach", make_image("one"))
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(shell.folder))
    command = shell.command("attach", make_image("two"))
    with blocking.Sandbox(row["sandbox"], shell.vm):
        late = shell("attach", make_image("three"), "--timeout", "0.1")
        assert late.returncode == 1 and f"process {os.getpid()} " in late.stderr
        process = subprocess.Popen(command, env=shell.environment, stdout=subprocess.PIPE)
        # time enough for one that does not wait to be done
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(shell.json("list")) == 2


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_without_streams(shell: Shell, make_image: MakeImage, closed: str) -> None:
    """What cannot be printed is lost, and nothing else is."""
    command = shell.command("attach", make_image("img"))
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command],
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [row["attach_count"] for row in shell.json("list")] == [1]


def test_progress_only_on_a_terminal(shell: Shell, make_image: MakeImage) -> None:
    images = [make_image(f"image{number}") for number in range(5)]
    status, text = on_terminal(shell, "attach", *images)
    assert status == 0
    assert "attaching" in text
    assert shell("attach", *images).stderr == ""
    assert {row["attach_count"] for row in shell.json("list")} == {2}


def test_refusal_on_a_terminal(shell: Shell, make_image: MakeImage, tmp_path: Path) -> None:
    status, text = on_terminal(shell, "attach", make_image("image"), tmp_path / "absent")
    assert status == 1
    assert "absent" in text
    assert "Traceback" not in text


def test_import_of_an_image_that_two_share(shell: Shell, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    theirs = tmp_path / "theirs.json"
    device = samples.device(0, samples.drive(0, File=str(image), SCSIAddr="0:0"))
    theirs.write_bytes(samples.text(samples.sandbox([device], [0])))
    shell.fine("import", "--share", theirs)
    other = shell.machine("vm2")
    assert "share" in shell.refused("import", theirs, vm=other)
    shell.fine("import", "--share", theirs, vm=other)
    rows = shell.json("list", vm=None)
    assert len({row["sandbox"] for row in rows}) == len(rows) == 2
    assert {row["guest_match"] for row in rows} == {"/0:0:0:0/"}
