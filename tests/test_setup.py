"""The two commands' set-up: which Python they take, and what they say where there is none."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIND = ["/bin/sh", str(ROOT / "tools" / "find_python.sh")]


def test_without_a_python_3_12_one_line_says_what_to_do(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # a Python of another version
    old.chmod(0o755)
    answer = subprocess.run(
        FIND, env={"PATH": str(tmp_path), "HOME": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1 and answer.stdout == ""
    [line] = answer.stderr.splitlines()
    assert line.startswith("No Python 3.12 found: install it") and "PYTHON312=" in line


def test_a_python_may_be_named(tmp_path):
    named = {"PATH": "/nowhere", "HOME": "/nowhere", "PYTHON312": sys.executable}
    answer = subprocess.run(FIND, env=named, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == sys.executable


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import PackageNotFoundError, version

    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.11.0" and pins["megatron-core"].startswith("0.19.")
    for name, pinned in pins.items():
        try:
            assert version(name).split("+")[0] == pinned, name
        except PackageNotFoundError:
            assert name not in ("torch", "megatron-core", "transformers", "safetensors", "tokenizers"), name


def test_a_second_make_installs_nothing():
    answer = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    installed = (ROOT / ".venv" / ".installed").exists()
    assert ("pip install" in answer.stdout) != installed
