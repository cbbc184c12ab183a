"""Our reader and writer of tensor files against the format's own package, and against files that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from easi3r.backbones.safetensors import DTYPES, read_safetensors, write_safetensors


def tensors_of_every_type() -> dict[str, torch.Tensor]:
    values = torch.arange(6).reshape(2, 3)
    many = {name: values.to(dtype) for name, dtype in DTYPES.items()}
    return {**many, "one": torch.tensor(3.5), "none": torch.empty(0, 4), "after an odd byte": torch.ones(5)}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape
        assert torch.equal(value, theirs[name]), name


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    save_file(tensors_of_every_type(), tmp_path / "x", metadata={"format": "pt"})
    assert_equal(read_safetensors(tmp_path / "x"), tensors_of_every_type())


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", tensors_of_every_type())
    assert_equal(load_file(tmp_path / "x"), tensors_of_every_type())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_views_and_slices_are_written_as_they_look(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": values.T, "part": values[1:, ::2]}
    write_safetensors(tmp_path / "x", tensors)
    assert_equal(read_safetensors(tmp_path / "x"), tensors)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.zeros(3)})
    read_safetensors(tmp_path / "x")["a"].fill_(1)
    assert read_safetensors(tmp_path / "x")["a"].sum() == 0


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "not a table"),
        ({"a": 3}, "'a'"),
        ({"a": {**GOOD, "dtype": "F7"}}, "'a'"),
        ({"a": {**GOOD, "shape": [3]}}, "do not agree"),
        ({"a": {**GOOD, "shape": [-2]}}, "do not agree"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "do not agree"),
        ({"a": {**GOOD, "shape": [2.0]}}, "do not agree"),
        ({"a": {**GOOD, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, "ends before 'a'"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "ends before 'a'"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "do not agree"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "'a'"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, says: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=says):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, struct.pack("<Q", 2) + b"\xff{"])
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError):
        read_safetensors(tmp_path / "x")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.zeros(30), "b": torch.zeros(30)})
    content = (tmp_path / "x").read_bytes()
    for size in (4, 60, len(content) - 1):
        (tmp_path / "x").write_bytes(content[:size])
        with pytest.raises(ValueError):
            read_safetensors(tmp_path / "x")
