"""``meta`` of a saved result as it must be where reports and exports read it; what else it holds is free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from easi3r.untrusted import check_pixels

_SIDES = ("original", "resized", "offset", "size")
_LARGEST = 1 << 31


def check_meta(meta: Mapping[str, Any], num_frames: int) -> None:
    """ValueError, saying which entry, for what is no text, number or table where one is expected.

    Entries may be absent or None.  Names are those of files, without folders: they are looked up in the source's.
    """
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "source": (_is_text, "text"),
        "scale": (_is_text, "text"),
        "names": (lambda value: _is_list(value, _is_name) and len(value) == num_frames, "one file name per frame"),
        "crops": (lambda value: _is_list(value, _is_crop) and len(value) == num_frames, "one crop per frame"),
        "timings_s": (lambda value: _is_table(value, _is_number), "a table of seconds"),
        "versions": (lambda value: _is_table(value, _is_text), "a table of versions"),
        "settings": (_is_table, "a table of settings"),
        "checkpoint": (_is_table, "a table of what is known of the weights"),
        "pieces": (lambda value: _is_list(value, _is_piece), "a list of what is known of each piece"),
        "quality": (_is_quality, "a verdict"),
        "warnings": (lambda value: _is_list(value, _is_text), "a list of sentences"),
    }
    _check_depth(meta)
    for name, (fits, expected) in checks.items():
        if meta.get(name) is not None and not fits(meta[name]):
            raise ValueError(f"meta[{name!r}] is not {expected}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_table(value: Any, fits: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


def _is_pair(value: Any) -> bool:
    return _is_list(value, lambda side: type(side) is int and abs(side) < _LARGEST) and len(value) == 2


def _is_crop(value: Any) -> bool:
    if not (_is_table(value, _is_pair) and value.keys() == set(_SIDES)):
        return False
    sizes = [value[name] for name in _SIDES if name != "offset"]
    for width, height in sizes:
        check_pixels(width, height)
    return all(min(size) > 0 for size in sizes)


def _is_piece(value: Any) -> bool:
    return (
        _is_table(value)
        and _is_pair(value.get("frames"))
        and _is_threshold(value.get("threshold"))
        and (value.get("seam_residual") is None or _is_number(value["seam_residual"]))
    )


def _is_threshold(value: Any) -> bool:
    """One for all frames of a piece, or one for each; None where none was needed."""
    return value is None or _is_number(value) or _is_list(value, lambda one: one is None or _is_number(one))


def _is_quality(value: Any) -> bool:
    return _is_table(value, lambda entry: _is_number(entry) or not isinstance(entry, (int, float))) and all(
        _is_list(value.get(name, []), _is_text) for name in ("reasons", "not_checked")
    )


def _check_depth(tree: Any, deepest: int = 32) -> None:
    level = [tree]
    for _ in range(deepest):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"meta is nested more than {deepest} levels deep")
