"""``python -m evaluation DATASET --root PATH``, ``check DATASET --root PATH``, or a benchmark: see their --help."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {  # module and function; nothing is imported before it is asked for
    "alignment": ("evaluation.alignment", "main"),
    "benchmark": ("evaluation.benchmark", "main"),
    "check": ("evaluation.evaluate", "check"),
    "checkpoint": ("evaluation.checkpoint", "main"),
    "instances": ("evaluation.instances", "main"),
    "masks": ("evaluation.masks", "main"),
    "synthetic": ("evaluation.synthetic", "main"),
    "verdict": ("evaluation.verdict", "main"),
}


def main() -> int:
    """Run the command, or evaluate on the data set, that the first argument names."""
    name, *arguments = sys.argv[1:] or [""]
    if name in COMMANDS:
        module, function = COMMANDS[name]
        return int(getattr(importlib.import_module(module), function)(arguments) or 0)
    from evaluation.datasets import DATASETS

    if name in DATASETS:
        from evaluation.evaluate import main as evaluate

        return evaluate([name, *arguments])
    print(
        f"python -m evaluation: {name!r} was given; expected a data set ({', '.join(sorted(DATASETS))}) or "
        f"one of {', '.join(COMMANDS)}.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
