"""Cut raw xView scenes into tiles and labels: `make tile`."""
