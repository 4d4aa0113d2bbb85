"""`aborting`: what each program under mpirun is wrapped in."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

from mpi4py import MPI

from cometrt.cli.ranks import LAST_WORDS_SEC


@contextlib.contextmanager
def aborting() -> Iterator[None]:
    """An error of this rank ends all processes, which would wait for it."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        time.sleep(LAST_WORDS_SEC)
        if MPI.Is_finalized():
            os._exit(1)
        MPI.COMM_WORLD.Abort(1)
