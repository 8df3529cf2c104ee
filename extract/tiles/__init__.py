"""Tiles and their labels: listed, fetched, decoded and fed in batches."""
