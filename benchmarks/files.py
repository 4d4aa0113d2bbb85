"""JSON files that are written again and again while a benchmark runs, and what they were written
on."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
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


def machine() -> dict[str, Any]:
    """GPU, driver, date and commit; COMETRT_COMMIT where there is no repository to ask."""
    import cupy as cp

    properties = cp.cuda.runtime.getDeviceProperties(0)
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "gpu": properties["name"].decode(),
        "driver": cp.cuda.runtime.driverGetVersion(),
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMETRT_COMMIT")
        or subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
    }
