"""Files: checkpoints that are read and checkpoints that are written."""

from __future__ import annotations
