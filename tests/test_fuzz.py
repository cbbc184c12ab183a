"""Every reader against mutations of good input: only our own errors, none printed, none slow (tests/fuzzing.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest
from fuzzing import READERS

SCRIPT = Path(__file__).with_name("fuzzing.py")


def fuzz(count, *names, timeout):
    """What the fuzzer writes; it runs by itself, so that a crash and what C libraries print are seen."""
    command = [sys.executable, str(SCRIPT), str(count), *names]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(names)
    return lines


def test_a_few_mutations_of_each_readers_input():
    for line in fuzz(12, *READERS, timeout=600):
        assert ", 0 refused" not in line, f"the mutations change nothing that matters: {line}"


def test_hundreds_of_mutations_where_reading_is_quick():
    fuzz(300, "configuration", "masks", "safetensors", "npz", timeout=600)


def test_the_fuzzer_sees_what_goes_wrong(tmp_path, monkeypatch):

    (tmp_path / "x").write_text("1 2 3")
    reader = fuzzing.Reader([tmp_path / "x"], fuzzing.mutated, lambda: float((tmp_path / "x").read_text().split()[0]))
    monkeypatch.setitem(fuzzing.READERS, "bare", lambda home: reader)
    line, wrong = fuzzing.fuzz("bare", 50, tmp_path)
    assert len(wrong) > 10 and "Error" in wrong[0] and line.endswith(f"{len(wrong)} wrong")


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_mutations(name):
    fuzz(10_000, name, timeout=7200)
