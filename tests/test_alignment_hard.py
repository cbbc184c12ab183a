"""The published alignment under hard noise (worlds.md): what flow brings, and what masks bring."""

from functools import partial

import numpy as np
import pytest
from alignment_runs import path_errors as every_path_errors

pytestmark = pytest.mark.slow  # minutes: the published optimiser, which the fast one is measured by elsewhere

path_errors = partial(every_path_errors, range(3), hard=True, method="published")


def test_flow_from_the_images_halves_the_error_of_the_path_under_hard_noise() -> None:
    assert np.median(path_errors(flow=True)) < 0.5 * np.median(path_errors())


def test_leaving_the_movers_unmasked_makes_the_path_worse_on_every_seed() -> None:
    masked, unmasked = path_errors(flow=True), path_errors(flow=True, masked=False)
    assert (unmasked > masked).all()
    assert unmasked.mean() > 1.2 * masked.mean()
