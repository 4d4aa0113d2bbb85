"""The command line: `cometrt` and `python -m cometrt`. It needs the extra `cli`.

Exit status: 0 done, 1 a check or a call failed, 2 wrong arguments. On a machine without a GPU,
commands that need one say "no GPU: skipped" and exit with 0, unless --device cuda was given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit. arguments: None: those of the process."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the command line needs rich and typer: pip install 'cometrt[cli]'")
    from cometrt.cli.app import run

    run(arguments)
