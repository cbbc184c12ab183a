"""``hooks`` is a common name: make sure that the package found under it is ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def check_hooks() -> None:
    """Raise ImportError, naming both paths, if a user's own file shadows our ``hooks``; imports nothing."""
    expected = Path(__file__).resolve().parent.parent / "hooks" / "__init__.py"
    spec = importlib.util.find_spec("hooks")
    found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if found != expected:
        raise ImportError(
            f"easi3r needs its own package 'hooks' at {expected}, but Python finds "
            f"{found or 'no such package'}; rename that file, or install easi3r again if ours is missing."
        )
