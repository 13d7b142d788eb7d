"""Caches and hashes of files."""
