"""The work of `torchbandit profile`: measure, print, write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torchbandit.profile.measure import profile
from torchbandit.profile.options import ProfileOptions
from torchbandit.profile.report import picture, table


def main(options: ProfileOptions) -> None:
    """Measure, and put the table on stdout, the figures and the picture where the options say.

    Raises:
        ValueError: as `profile`, or the picture's ending is no format.
        OSError: a file cannot be written.
    """
    found = profile(options, say=lambda text: print(text, file=sys.stderr))
    print(table(found))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        picture(found, options.plot)
