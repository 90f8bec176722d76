"""Pretraining of GPT and BERT with tensor, pipeline and data parallelism."""

from __future__ import annotations

# The only place of the version: pyproject.toml reads it from here without importing anything.
__version__ = "0.1.0"
