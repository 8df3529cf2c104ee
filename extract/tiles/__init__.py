"""List, fetch and decode tiles and their labels, and feed them in batches."""
