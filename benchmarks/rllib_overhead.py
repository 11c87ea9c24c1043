"""What RLlib's runner costs over the env's own time; the same as `torchbandit bench rllib`."""

from __future__ import annotations

import sys

from torchbandit.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "rllib", *sys.argv[1:]]))
