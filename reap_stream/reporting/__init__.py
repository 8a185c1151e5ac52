"""The report: what a run found and chose, as one page that stands alone."""

from __future__ import annotations
