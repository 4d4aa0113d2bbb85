"""examples/moe_layer.py of every known model, one after the other in one launch: a start of all
ranks takes longer than a small model.

    mpirun -n 4 python -m tests.multi.run_models --scale 32 --tokens 96 --device cuda
"""

from __future__ import annotations

import runpy
import sys

from cometrt.models import MODELS
from tests.launch import ROOT
from tests.multi.aborting import aborting


def main() -> None:
    script, options = str(ROOT / "examples" / "moe_layer.py"), sys.argv[1:]
    sys.path.insert(0, str(ROOT / "examples"))
    with aborting():
        for model in MODELS:
            sys.argv = [script, "--model", model, *options]
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
