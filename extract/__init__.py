"""How a tile becomes an embedding: list, fetch, decode, transform, backbone, pool, cache."""

import os

# A rank computes while its feed workers decode on the same cores. OpenMP's default is to spin at the end of every
# parallel region, which takes those cores away: on 2 cores extraction ran 4 times slower. Must precede torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
