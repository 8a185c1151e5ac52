"""What a model loses by pruning, measured against the unpruned one."""

from __future__ import annotations
