"""Families in which more than hidden states goes from layer to layer, or between them."""

from __future__ import annotations

from tests.family import Family

FAMILIES: list[Family] = []
