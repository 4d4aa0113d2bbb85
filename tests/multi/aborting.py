"""`aborting`: what each program under mpirun is wrapped in."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

from mpi4py import MPI


@contextlib.contextmanager
def aborting() -> Iterator[None]:
    """An error of this rank ends all processes, which would wait for it."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        if MPI.Is_finalized():
            os._exit(1)
        MPI.COMM_WORLD.Abort(1)
