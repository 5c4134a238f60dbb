"""What a source distribution holds: all that the repository does, so that whoever has one can
build, test and measure."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LEFT_OUT = {".gitignore", ".ci/run"}  # of use only to whoever has the repository
# setuptools takes these, and the packages' modules
BY_ITSELF = {"README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py"}


@pytest.mark.skipif(
    not (ROOT / ".git").exists(),
    reason="not a repository: an sdist is compared with one before it leaves it",
)
def test_the_sdist_holds_what_the_repository_holds() -> None:
    filelist = pytest.importorskip("setuptools._distutils.filelist")
    listed = filelist.FileList()
    tracked = set(
        subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
    ) - {""}
    listed.set_allfiles(sorted(tracked))
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            listed.process_template_line(line)
    modules = {name for name in tracked if name.startswith("pyblock/") and name.endswith(".py")}
    assert tracked - set(listed.files) - modules - BY_ITSELF == LEFT_OUT
