"""``python -m goat_kernels``: the same as the ``goat-kernels`` command."""

import sys

from goat_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
