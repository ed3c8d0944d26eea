"""Ranks that stay, and are started again when one is lost: a pool to copy."""

from .pool import Pool


__all__ = ["Pool"]
