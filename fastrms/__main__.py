"""``python -m fastrms``: the same program as ``fastrms``."""

import sys

from fastrms.cli import main

if __name__ == "__main__":
    sys.exit(main())
