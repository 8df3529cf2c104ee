"""Declare each option once, on a field of a config, and derive everything else from it.

    @dataclass(frozen=True)
    class TrainConfig:
        lr: float = option(1e-3, "Training", "Peak learning rate of the head.", range=Range(above=0))

`make_options` turns such fields into click options, `make_config` turns what click parsed into a config, `check_ranges`
refuses values out of range, and `spell_out` gives the words of a command line that sets the same values.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import click

from .text import parse_bytes, parse_integers

T = TypeVar("T")

REQUIRED: Any = MISSING
"""Default of a field that has none."""

HEADING = "heading"
"""Attribute of a click option: its heading in --help."""

_OPTION = "option"


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values that an option takes.

    Attributes:
        at_least, above: lower bound, included or not.
        at_most, below: upper bound, included or not. Infinity and NaN are never in range.
        text: what a user reads if a value is out of range; `{}` stands for the bounds.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    text: str = "{}"

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        return self.text.format(self._describe_bounds())

    def _describe_bounds(self) -> str:
        low, high = _show_bound(max(self.at_least, self.above)), _show_bound(min(self.at_most, self.below))
        if self.above > -math.inf:
            end = f", below {high}" if self.below < math.inf else f", at most {high}" if self.at_most < math.inf else ""
            return f"above {low}{end}"
        if self.at_most == self.below == math.inf:
            return f"at least {low}" if self.at_least else "0 or more"
        return f"{low} to below {high}" if self.below < math.inf else f"{low} to {high}"


def _show_bound(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Option(NamedTuple):
    """How a field is set on the command line, see `option`."""

    group: str
    help: str
    name: str
    range: Range | None
    type: click.ParamType[Any] | None
    per_node: bool


class _Parsed(click.ParamType[Any]):
    """Parse a value by a function, and show a user the text of its ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


BYTES, _INTEGERS = _Parsed("bytes", parse_bytes), _Parsed("text", parse_integers)
FILE, FOLDER = click.Path(dir_okay=False), click.Path(file_okay=False)


def option(
    default: Any,
    group: str,
    help: str,
    *,
    name: str = "",
    range: Range | None = None,
    type: click.ParamType[Any] | None = None,
    per_node: bool = False,
) -> Any:
    """Make a dataclass field that an option of the command line sets.

    Args:
        default: of the field and of the option; `REQUIRED` for none.
        group: heading in --help.
        help: one sentence. It also says what None stands for: `…  [default: half of what is free]`.
        name: of the option, without dashes; empty for the field's own name.
        range: numbers that the option takes. The default is always accepted, so that it can mean "off".
        type: what parses it, where the field's annotation does not say.
        per_node: whether the nodes of one job may set it differently.
    """
    return field(default=default, metadata={_OPTION: Option(group, help, name, range, type, per_node)})


def same_option(config: type, name: str) -> Any:
    """Make a field with the same default and option as a field of another config."""
    other = config.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=other.default, metadata=other.metadata)


def find_option(config_field: Field[Any]) -> Option | None:
    """Return the option that sets a field; None if no option does."""
    found: Option | None = config_field.metadata.get(_OPTION)
    return found


def name_option(config_field: Field[Any]) -> str:
    """Return a field's option as a user types it, `--run-dir`."""
    said = find_option(config_field)
    return f"--{(said and said.name) or config_field.name.replace('_', '-')}"


def make_options(
    config: type,
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[click.Parameter]:
    """Make the click options of a config and of the configs nested in it, in the order of their fields.

    Args:
        config: a dataclass.
        only: names of the fields wanted; None for all.
        without: names of fields left out.
        defaults: by field, where a command has another default than the config.
    """
    return [
        _make_option(each, hint, (defaults or {}).get(each.name, each.default))
        for each, hint in _list_fields(config)
        if find_option(each) and each.name not in without and (only is None or each.name in only)
    ]


def _list_fields(config: type) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(config)
    for each in fields(config):
        if is_dataclass(hint := hints[each.name]):
            yield from _list_fields(hint)  # type: ignore[arg-type]
        else:
            yield each, hint


def _make_option(config_field: Field[Any], hint: Any, default: Any) -> click.Option:
    said = config_field.metadata[_OPTION]
    names = [name_option(config_field), config_field.name]
    kind = said.type or _choose_type(hint)
    is_flag = kind is click.BOOL
    if is_flag and default is None:
        names[0] += f"/--no-{names[0][2:]}"
    made = click.Option(
        names,
        type=None if is_flag else kind,
        is_flag=is_flag,
        default=None if default is MISSING else _spell(default) if isinstance(default, tuple) else default,
        help=said.help,
    )
    vars(made)[HEADING] = said.group
    return made


def _choose_type(hint: Any) -> click.ParamType[Any]:
    """Return the type that parses an annotation: `int`, `str | None`, `Literal[…]`, `tuple[int, ...]`."""
    kinds = [kind for kind in _flatten(hint) if kind is not NoneType]
    if all(get_origin(kind) is Literal for kind in kinds):
        return click.Choice([choice for kind in kinds for choice in get_args(kind)])
    return _INTEGERS if get_origin(kinds[0]) is tuple else click.types.convert_type(kinds[0])


def _flatten(hint: Any) -> tuple[Any, ...]:
    return (hint,) if get_origin(hint) in (None, Literal, tuple) else get_args(hint)


def make_config(config: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Make a config, and configs nested in it, from values by field name; fields without a value keep their defaults.

    Raises:
        TileprobeError: the config refuses a value.
    """
    hints = get_type_hints(config)
    given = {}
    for name, hint in hints.items():
        if is_dataclass(hint):
            given[name] = make_config(hint, values)  # type: ignore[arg-type]
        elif name in values:
            given[name] = values[name]
    return config(**given)


def check_ranges(config: Any, error: type[Exception]) -> None:
    """Raise `error` for the first value out of its option's range: `--lr 0.0: above 0`."""
    for each in fields(config):
        said, value = find_option(each), getattr(config, each.name)
        if said and said.range and value != each.default and value not in said.range:
            raise error(f"{name_option(each)} {value}: {said.range}")


def spell_out(
    options: Iterable[click.Parameter],
    values: Mapping[str, Any],
    *,
    always: Collection[str] = (),
    never: Collection[str] = (),
) -> Iterator[str]:
    """Yield the words of a command line that sets these values, without options that have their defaults.

    Args:
        options: of the command.
        values: by the names of the options' fields.
        always: names to spell out even where they are the default.
        never: names to leave out.
    """
    for each in options:
        value = values.get(str(each.name))
        if value is None or each.name in never or (_spell(value) == _spell(each.default) and each.name not in always):
            continue
        if isinstance(value, bool):
            yield from each.opts[:1] if value else each.secondary_opts[:1]
        else:
            yield from (each.opts[0], _spell(value))


def _spell(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
