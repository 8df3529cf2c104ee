"""Measure speed and memory: `python -m tests.benchmarks`, or `make bench`; README.md in this folder has results."""

import tempfile
from importlib import import_module
from pathlib import Path

import click

from .measure import format_table, write_figures

AREAS = {area: f"tests.benchmarks.{area}" for area in ("extract", "head", "finetune", "scale")}
"""Module of each area. Its `MEASURES` maps short names to functions that take `Fixtures` and return figures."""
RESULTS = Path("runs", "bench")


@click.command()
@click.option("--area", type=click.Choice(list(AREAS)), help="One area.  [default: all]")
@click.option("--only", help="One measure of the area by its short name; writes no file.")
def main(area: str | None, only: str | None) -> None:
    """Measure, print a table per area, and write runs/bench/AREA.json. A missed bound is not an error."""
    from .fixtures import Fixtures

    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in [area] if area else AREAS:
        measures = import_module(AREAS[name]).MEASURES
        if only and only not in measures:
            raise click.BadParameter(f"choose from {', '.join(measures)}", param_hint="--only")
        with tempfile.TemporaryDirectory(dir=RESULTS.resolve(), prefix=f"{name}-") as directory:
            with Fixtures(Path(directory)) as fixtures:
                figures = [figure for key, run in measures.items() if only in (None, key) for figure in run(fixtures)]
        click.echo(format_table(name, figures))
        if not only:
            write_figures(RESULTS / f"{name}.json", figures)


if __name__ == "__main__":
    main()
