"""A directory or a bucket, as a Zarr store and as single objects."""
