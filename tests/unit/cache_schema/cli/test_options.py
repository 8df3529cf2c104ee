"""Options declared on the fields of a config: what click makes of them, what is refused, and how they are spelled."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import click
import pytest

from cache_schema.cli.options import (
    BYTES,
    REQUIRED,
    Range,
    check_ranges,
    make_config,
    make_options,
    name_option,
    same_option,
    spell_out,
)
from cache_schema.cli.options import option as declare


def option(default: Any, **said: Any) -> Any:
    return declare(default, "Data", "Text.", **said)


@dataclass(frozen=True)
class Inner:
    ids: tuple[int, ...] = option(())
    mode: Literal["auto"] | Literal["a", "b"] = option("auto")


@dataclass(frozen=True)
class Outer:
    place: str = option(REQUIRED, name="run-dir")
    inner: Inner = Inner()
    rate: float = option(0.5, range=Range(above=0, at_most=1.0))
    count: int | None = option(None, range=Range(at_least=1, text="{} tile"))
    folds: int = option(0, range=Range(at_least=2))
    size: int | None = option(None, type=BYTES)
    amp: bool | None = option(None)
    dry_run: bool = option(False)
    internal: str = "no option"

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)


@dataclass(frozen=True)
class Other:
    rate: float = same_option(Outer, "rate")


def parse(words: list[str], **choice: Any) -> dict[str, Any]:
    return click.Command("c", params=make_options(Outer, **choice)).make_context("c", words).params


def test_options_have_the_names_types_and_defaults_of_the_fields() -> None:
    found = {param.name: param for param in make_options(Outer)}
    assert list(found) == ["place", "ids", "mode", "rate", "count", "folds", "size", "amp", "dry_run"]
    assert found["place"].opts == ["--run-dir"]
    assert found["amp"].secondary_opts == ["--no-amp"]
    assert isinstance(found["mode"].type, click.Choice)
    assert list(found["mode"].type.choices) == ["auto", "a", "b"]
    assert parse([]) == {
        "place": None,
        "ids": (),
        "mode": "auto",
        "rate": 0.5,
        "count": None,
        "folds": 0,
        "size": None,
        "amp": None,
        "dry_run": False,
    }


def test_a_command_may_choose_options_and_other_defaults() -> None:
    assert parse(["--rate", "1"], only=("rate", "ids")) == {"rate": 1.0, "ids": ()}
    assert parse([], without=("place", "ids", "mode"), defaults={"rate": 0.25, "folds": 3})["rate"] == 0.25
    (same,) = make_options(Other)
    assert (same.name, same.default) == ("rate", 0.5)


def test_what_is_parsed_makes_a_nested_config() -> None:
    words = ["--run-dir", "r", "--ids", "5, 48", "--mode", "b", "--count", "2", "--size", "1K", "--no-amp", "--dry-run"]
    expected = Outer("r", Inner((5, 48), "b"), count=2, size=1024, amp=False, dry_run=True)
    assert make_config(Outer, parse(words)) == expected


@pytest.mark.parametrize("words", [["--ids", "5,x"], ["--size", "0"], ["--mode", "c"], ["--rate", "fast"]])
def test_words_that_are_no_value_are_wrong_usage(words: list[str]) -> None:
    with pytest.raises(click.BadParameter, match=words[1].split(",")[-1]):
        parse(words)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 0.0}, "--rate 0.0: above 0, at most 1"),
        ({"rate": math.nan}, "--rate nan"),
        ({"count": 0}, "--count 0: at least 1 tile"),
        ({"folds": 1}, "--folds 1: at least 2"),
    ],
)
def test_values_out_of_range_are_refused_by_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Outer("r", **options)


@pytest.mark.parametrize(
    "range_, text, inside, outside",
    [
        (Range(at_least=0), "0 or more", (0, 1e300), (-1e-9, math.inf, math.nan)),
        (Range(at_least=2), "at least 2", (2,), (1,)),
        (Range(above=0), "above 0", (1e-9,), (0,)),
        (Range(above=0, below=1, text="a share {}"), "a share above 0, below 1", (0.5,), (0, 1)),
        (Range(above=0, at_most=1e30), "above 0, at most 1e+30", (1e30,), (0, 1e31)),
        (Range(at_least=0, below=1), "0 to below 1", (0, 0.99), (1,)),
        (Range(at_least=0.5, at_most=1), "0.5 to 1", (0.5, 1), (0.4, 1.1)),
        (Range(at_least=0, at_most=2**31 - 1), "0 to 2147483647", (0, 2**31 - 1), (2**31,)),
    ],
)
def test_a_range_says_what_it_holds(
    range_: Range, text: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert str(range_) == text
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)


def test_words_spelled_out_give_the_same_config() -> None:
    config = Outer("r", Inner((5, 48)), rate=0.1 + 0.2, size=512, amp=False)
    values = asdict(config)
    values |= values.pop("inner")
    words = list(spell_out(make_options(Outer), values))
    assert words == ["--run-dir", "r", "--ids", "5,48", "--rate", str(0.1 + 0.2), "--size", "512", "--no-amp"]
    assert make_config(Outer, parse(words)) == config
    words = list(spell_out(make_options(Outer), values, always=("folds",), never=("place", "ids", "rate")))
    assert words == ["--folds", "0", "--size", "512", "--no-amp"]


def test_a_field_knows_what_its_option_is_called() -> None:
    assert [name_option(field) for field in fields(Outer)][:3] == ["--run-dir", "--inner", "--rate"]
