"""``report.html``: one self-contained page that shows a result, for people, who look before they read.

Nothing in it is loaded from elsewhere and nothing runs: pictures are data URIs, drawings SVG, folding is HTML's own.
"""

from __future__ import annotations

from pathlib import Path

from easi3r.report.page import page
from easi3r.scene import Motion
from easi3r.storage import whole_file

FILE_NAME = "report.html"


def write_report(result: Motion, folder: str | Path) -> Path:
    """Write ``report.html`` into a folder that exists, whole or not at all, and return its path.

    Raises OutputError for whatever the file system refuses.
    """
    path = Path(folder) / FILE_NAME
    with whole_file(path) as partial:
        # a file name that is no UTF-8 reaches us as lone surrogates, which cannot be written as they are
        partial.write_text(page(result), encoding="utf-8", errors="backslashreplace")
    return path
