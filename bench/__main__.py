"""``python -m bench``: the same as ``goat-kernels bench``."""

import sys

from goat_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
