"""`python -m torchbandit` is `torchbandit`."""

import sys

from torchbandit.cli import main

if __name__ == "__main__":
    sys.exit(main())
