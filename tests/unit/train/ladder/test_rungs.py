"""Which rungs a ladder has, for a backbone of so many layers."""

from __future__ import annotations

import pytest

from train.errors import TrainError
from train.ladder.rungs import RUNGS, Leg, Record, choose_rungs

CACHED = ["neighbours", "linear", "mlp"]


@pytest.mark.parametrize(
    "depth, layers, notes",
    [
        (24, [1, 3, 6, 24], ()),
        (7, [1, 3, 6, 7], ()),
        (6, [1, 3, 6], ("all is the same rung as 6: it runs once",)),
        (4, [1, 3, 4], ("UNFREEZE=6 is left out: the backbone has 4 layers",)),
        (
            3,
            [1, 3],
            ("UNFREEZE=6 is left out: the backbone has 3 layers", "all is the same rung as 3: it runs once"),
        ),
    ],
)
def test_the_default_rungs_of_a_depth(depth: int, layers: list[int], notes: tuple[str, ...]) -> None:
    rungs, said = choose_rungs(RUNGS, depth)
    assert [rung.name for rung in rungs] == [*CACHED, *(f"unfreeze-{n}" for n in layers)]
    assert [rung.unfreeze for rung in rungs] == [0, 0, 0, *layers]
    assert said == notes
    assert [rung.title for rung in rungs if "(all)" in rung.title] == [
        f"UNFREEZE={n} (all)" for n in layers if n == depth
    ]


def test_rungs_are_climbed_cheapest_first_and_once() -> None:
    rungs, said = choose_rungs(" 3, mlp,1 ,linear,03,mlp", 6)
    assert [rung.name for rung in rungs] == ["linear", "mlp", "unfreeze-1", "unfreeze-3"]
    assert said == ("03 is the same rung as 3: it runs once", "mlp is the same rung as mlp: it runs once")


@pytest.mark.parametrize(
    "asked, message",
    [
        ("mlp,0", "0 is no rung: choose from neighbours, linear, mlp, numbers of layers from 1, and all"),
        ("mlp,-1", "-1 is no rung"),
        ("mlp,²", "² is no rung"),
        ("MLP", "MLP is no rung"),
        ("", "no rung is left (none is named): try neighbours,linear,mlp,1,3,6,all"),
        ("9", "no rung is left (UNFREEZE=9 is left out: the backbone has 4 layers)"),
        ("linear,3", "trained layers start from the MLP head: add mlp"),
    ],
)
def test_what_cannot_be_climbed_is_refused(asked: str, message: str) -> None:
    with pytest.raises(TrainError) as error:
        choose_rungs(asked, 4)
    assert f"--rungs {asked}: {message}" in str(error.value)


def test_a_record_comes_back_from_its_file_and_adds_its_legs_up() -> None:
    record = Record(
        choose_rungs("mlp,2", 4)[0][1], "failed", "why", [Leg(1, 10.0, 2.5, -9, None), Leg(2, 20.0, 4.0, 1, 7)]
    )
    assert Record.from_json(record.to_json()) == record
    assert (record.wall_s, record.peak_bytes) == (6.5, 7)
