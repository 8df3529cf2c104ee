"""The sample of tiles that is read, and how many failures are no accident."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from extract.doctor.storage import check_layout
from extract.doctor.tiles import check_sample, is_no_accident
from extract.tiles.source import open_source


def test_the_seed_draws_the_sample(made: Path) -> None:
    source = open_source(str(made / "tiles"))
    found = check_layout(source, unlabelled=False).value
    rows = [check_sample(source, found, 8, seed, 0.01).value.batch.rows.tolist() for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(set(drawn)) == 8 for drawn in rows)
    assert len(check_sample(source, found, 1000, 0, 0.01).value.batch) == 32


@given(failed=st.integers(0, 24), share=st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_so_many_failures_are_no_accident(failed: int, share: float) -> None:
    """By the survival function of the binomial distribution, from another library."""
    from scipy.stats import binom

    assert is_no_accident(failed, 24, share) == bool(binom.sf(failed - 1, 24, share) < 0.05)
