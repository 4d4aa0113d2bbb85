"""The command `cometrt demo` under mpirun, where each rank is a process.

Real text goes through a Mixture-of-Experts layer. All results are checked, and its timeline is
drawn. cometrt/cli/demo.py has what it does, step by step.

mpirun -n 4 python -m mpi4py examples/demo.py        (or: make demo)
"""

import sys

from cometrt.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
