"""`python -m thawline` is `thawline`."""

from __future__ import annotations

import sys

from thawline.cli import main

if __name__ == "__main__":
    sys.exit(main())
