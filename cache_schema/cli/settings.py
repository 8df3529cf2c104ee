"""Read options that the command line does not set: from the environment, or from a TOML file.

    [train]                     # every command of `python -m train` that has such an option
    device = "cpu"

    [train.head]                # `python -m train head`; names are those of the options, without their dashes
    epochs = 20

`TILEPROBE_TRAIN_HEAD_EPOCHS=20` is the same in the environment. If an option is set twice, the command line wins, then
the environment, then the file; in the file, a command's own table wins over the package's.

Click's `auto_envvar_prefix` is not used: it names no variable in its errors, ignores misspelt ones, and splits the
value of a repeatable option at spaces. What is read here goes into click's `default_map`.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click

FILE = "tileprobe.toml"
"""Read from the working directory if no other file is named."""
PREFIX = "TILEPROBE_"
FILE_VARIABLE = f"{PREFIX}SETTINGS"
PACKAGES = ("cache_schema", "extract", "train")
_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

Options = Mapping[str, click.Option]


class SettingsError(click.ClickException):
    """A file or a variable that is not valid: one line, and the status of wrong usage."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


@dataclass(frozen=True)
class Setting:
    """A value as click takes it for a default, and its origin: the name of a file or a variable."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


def isolate(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a command that another command runs: it takes options from its command line only."""
    kept = {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
    return kept | {FILE_VARIABLE: os.devnull}


def read_settings(
    package: str, command: str, options: Mapping[str, Options], file: str | None, environment: Mapping[str, str]
) -> dict[str, Setting]:
    """Read what file and environment set for one command.

    Args:
        package, command: `train`, `head`.
        options: of every command of the package, by the command's name, then the option's without dashes.
        file: TOML; None for `tileprobe.toml`, if it exists.
        environment: variables.

    Returns:
        settings by the name of the command's parameter, which may differ from the option's.

    Raises:
        SettingsError: the file is not TOML; a table, a key or a variable of this package is unknown; an option of this
            command does not take its value.
    """
    found = _read_tables(package, command, options, file) if file or os.path.exists(FILE) else {}
    found |= _read_variables(package, command, options, environment)
    return {str(options[command][name].name): setting for name, setting in found.items()}


def _read_tables(package: str, command: str, options: Mapping[str, Options], file: str | None) -> dict[str, Setting]:
    file = file or FILE
    try:
        with open(file, "rb") as stream:
            tables = tomllib.load(stream)
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not TOML: {error}") from error
    for name, table in tables.items():
        _refuse_unknown(name, PACKAGES, f"{file}: no table [{name}]")
        if not isinstance(table, dict):
            raise SettingsError(f"{file}: {name} is a table: write [{name}] or [{name}.COMMAND]")
    shared, own = {}, {}
    for name, value in tables.get(package, {}).items():
        if not isinstance(value, dict):
            known = {option for of_command in options.values() for option in of_command}
            _refuse_unknown(name, known, f"{file}: [{package}] has no {name}")
            shared[name] = (value, f"[{package}] {name}")
            continue
        _refuse_unknown(name, options, f"{file}: no table [{package}.{name}]")
        for key in value:
            _refuse_unknown(key, options[name], f"{file}: [{package}.{name}] has no {key}")
        if name == command:
            own = {key: (given, f"[{package}.{name}] {key}") for key, given in value.items()}
    return {
        name: Setting(_read_value(options[command][name], value, f"{file}: {where}"), file)
        for name, (value, where) in {**shared, **own}.items()
        if name in options[command]
    }


def _read_variables(
    package: str, command: str, options: Mapping[str, Options], environment: Mapping[str, str]
) -> dict[str, Setting]:
    named = {
        f"{PREFIX}{package}_{of}_{option}".upper().replace("-", "_"): (of, option)
        for of in options
        for option in options[of]
    }
    found = {}
    for variable in sorted(name for name in environment if name.startswith(f"{PREFIX}{package.upper()}_")):
        _refuse_unknown(variable, named, f"{variable} in the environment is not a setting")
        of, name = named[variable]
        if of == command:
            option, value = options[of][name], environment[variable]
            given: Any = [value] if option.multiple else _FLAGS.get(value.lower(), value) if option.is_flag else value
            found[name] = Setting(_read_value(option, given, variable), variable)
    return found


def _read_value(option: click.Option, value: Any, where: str) -> Any:
    """Check a value as the command line would, and return it as click takes it for a default."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise SettingsError(f"{where} = {value}: must be true or false")
        return value
    values = value if option.multiple and isinstance(value, list) else [value]
    if any(isinstance(each, bool | dict | list) for each in values):
        raise SettingsError(
            f"{where} = {value}: must be {'strings or numbers' if option.multiple else 'one string or number'}"
        )
    texts = [str(each) for each in values]
    try:
        for text in texts:
            option.type.convert(text, option, None)
    except click.UsageError as error:
        raise SettingsError(f"{where} = {value}: {error.message.rstrip('.')}") from error
    return texts if option.multiple else texts[0]


def _refuse_unknown(name: str, known: Iterable[str], message: str) -> None:
    known = sorted(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise SettingsError(f"{message}; the nearest name is {near[0]}")
