"""`python -m reap_stream` is `reap-stream`."""

from __future__ import annotations

import sys

from reap_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
