"""The suite itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import COLLECTED

ROOT = Path(__file__).parents[1]


def collected(hash_seed: str) -> list[str]:
    """The names of all tests, in order."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:randomly", "tests"]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    return [line for line in ran.stdout.splitlines() if "::" in line]


def test_tests_have_the_same_names_whenever_they_are_collected(request: pytest.FixtureRequest) -> None:
    """By this process and by another later, which takes seconds: no clock, hash or address makes a name.

    The processes of `pytest -n 2` each collect the suite, and stop where they disagree, in the order too.
    """
    names, here = collected("1"), request.config.stash[COLLECTED]
    if len(here) > 1000:  # pytest puts those together that share a fixture only after it has noted them here
        assert sorted(names) == sorted(here)
    else:  # this process runs some files alone
        assert names == collected("2")
    assert len(names) > 1000
