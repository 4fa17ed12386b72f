"""The anonymous memory of a process, which no file can give back."""

from __future__ import annotations

import re
from pathlib import Path


def memory(process: int | str = "self") -> int:
    """Bytes of it that are in memory (RssAnon)."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1])
