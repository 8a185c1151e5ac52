"""Weights written in another format than the source's: one file an encoder, see `recoding.base`."""

from __future__ import annotations
