"""The model: what transformers knows of it, and one decoder layer at a time of it."""

from __future__ import annotations
