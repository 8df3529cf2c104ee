"""A rank that waits until it has company."""

import os
import sys
import time

if os.environ["WORLD_SIZE"] == "2":
    sys.exit(0)
print("alone", flush=True)
time.sleep(120)
