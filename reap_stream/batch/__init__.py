"""Many jobs from one file: checked first, then run one after another, each in its own process."""

from __future__ import annotations
