"""`python -m lit_sparse` does what the command `lit-sparse` does."""

import sys

from lit_sparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
