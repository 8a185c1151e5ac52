"""Calibration: token rows in, hidden states between layers."""

from __future__ import annotations
