"""Families of which the language part is pruned, and those whose experts need an adapter."""

from __future__ import annotations

from tests.family import Family

FAMILIES: list[Family] = []
