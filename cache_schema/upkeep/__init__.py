"""Maintenance of a cache: its lock, verification, comparison, and removal of old versions."""
