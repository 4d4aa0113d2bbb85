"""JSON files that are written again and again while a benchmark runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path | None, value: Any) -> None:
    """Whole or not at all: who is stopped leaves the last one. None: nowhere."""
    if path is not None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(new, path)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}
