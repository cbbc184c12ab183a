"""The benchmark's twin gives what our network gives, and the command runs at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_inputs import moving_square, random_model

from easi3r.inference import to_network_input
from evaluation import benchmark, published_twin
from hooks import capture_attention, cut_attention


@pytest.mark.parametrize("masked", [False, True])
def test_the_twin_computes_the_same_another_way(masked: bool) -> None:
    network, images = random_model().network, moving_square(2)
    first, second = (to_network_input(images[[i]]) for i in (0, 1))
    dice = torch.Generator().manual_seed(0)
    static, moving = torch.rand(2, 1, 12, generator=dice) < 0.5
    moving &= masked
    with torch.no_grad(), capture_attention(network) as captured, cut_attention(network, static, moving):
        expected = network(first, second)
    twin = published_twin.published_style(network)
    cut = static[:, :, None] & moving[:, None]
    with torch.no_grad():
        logits = published_twin.twin_pair(twin, images, (0, 1), cut)
        found = twin(first, second)
    depth = network.config.dec_depth
    for maps, mean in zip(captured.take(), (logits[:depth], logits[depth:]), strict=True):
        torch.testing.assert_close(torch.stack(mean, 1).flatten(1, 2).mT, maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.points_second, expected.points_second, rtol=1e-4, atol=1e-4)
    assert all(type(m).__name__ != "WrittenOut" for m in network.modules())


def test_the_command_prints_and_writes_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--checkpoint=demo", "--size=64x48", "--frames=3", "--runs=1", "--twin-pairs=2", "--clips=1"]
    benchmark.main([*small, "--lengths=2,3", f"--json={tmp_path / 'all.json'}"])
    screen = capsys.readouterr().out
    result = json.loads((tmp_path / "all.json").read_text())
    assert tuple(result) == benchmark.SECTIONS
    assert all(np.isfinite(value) and name in screen for part in result.values() for name, value in part.items())
    assert any("times faster than the twin" in name for name in result["time"])


def test_a_section_that_is_none_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--only=speed"])
    assert stopped.value.code == 2 and "counts, time, precision, memory" in capsys.readouterr().err
