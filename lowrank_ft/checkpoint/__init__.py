"""Saving, loading and exporting."""

from lowrank_ft.checkpoint.verbs import base_of, check_format, export, load, save

__all__ = ["base_of", "check_format", "export", "load", "save"]
