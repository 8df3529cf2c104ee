"""Provide the demo: a bucket of synthetic overhead scenes, a real storage server for it, and a small backbone."""
