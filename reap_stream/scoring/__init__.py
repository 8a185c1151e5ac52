"""Scoring: what the router and the experts did, and which experts stay."""

from __future__ import annotations
