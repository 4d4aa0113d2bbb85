"""`python -m cometrt`: as the command `cometrt`."""

from cometrt.cli import main

if __name__ == "__main__":
    main()
