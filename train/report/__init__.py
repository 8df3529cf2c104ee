"""What a run leaves for people: report.html and model_card.md, TensorBoard events, and pictures of tiles.

    facts       what the run directory holds, read once
    analysis    what follows from logits and labels: curves, errors by co-occurrence, best and worst tiles
    plots       drawings as SVG
    tiles       thumbnails, read by name from the tile source of the cache
    embeddings  the 2-D map
    summary     sections on the run as a whole
    classes     sections on each class
    page        report.html, one file that opens offline
    card        model_card.md, and what is known of licences
    commands    the commands that made the run
    run         `python -m train report`

At its end a run writes what its own directory tells; `make report` adds what takes tiles and vectors.
"""

from train.report.events import write_events
from train.report.page import write_report
from train.report.picture import draw_tiles

__all__ = ["draw_tiles", "write_events", "write_report"]
