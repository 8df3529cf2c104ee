"""The files of a run that people read: report.html, model_card.md, TensorBoard events and pictures of tiles.

    facts       reads the files of the run directory once
    analysis    computes from logits and labels: curves, errors by co-occurrence, best and worst tiles
    plots       SVG plots
    tiles       thumbnails, read by name from the tile source of the cache
    embeddings  the 2-D map
    summary     sections on the run as a whole
    classes     sections on each class
    page        report.html, one file that opens offline
    card        model_card.md
    licences    the licences of backbone and imagery
    commands    the commands that made the run
    run         `python -m train report`

A run writes both files at its end, from its own directory; `make report` adds the parts that need tiles and vectors.
"""

from train.report.events import write_events
from train.report.page import write_report
from train.report.picture import draw_tiles

__all__ = ["draw_tiles", "write_events", "write_report"]
