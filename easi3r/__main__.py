"""``python -m easi3r`` is the command line."""

from easi3r.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
