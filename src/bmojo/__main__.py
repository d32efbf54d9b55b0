"""`python -m bmojo`: the command line, also for `torchrun -m bmojo`."""

import sys

from bmojo.cli import main

if __name__ == "__main__":
    sys.exit(main())
