"""`python -m lightning_resmem` is the `resmem` command."""

import sys

from lightning_resmem.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
