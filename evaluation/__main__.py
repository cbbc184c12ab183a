"""``python -m evaluation alignment | benchmark | synthetic | verdict``: see each module's --help."""

from __future__ import annotations

import sys

from evaluation import alignment, benchmark, synthetic, verdict

COMMANDS = {
    "alignment": alignment.main,
    "benchmark": benchmark.main,
    "synthetic": synthetic.main,
    "verdict": verdict.main,
}


def main() -> int:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in COMMANDS:
        print(f"python -m evaluation: {name!r} was given; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    COMMANDS[name](arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
