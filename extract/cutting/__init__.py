"""Raw xView to tiles and labels: `make tile`."""
