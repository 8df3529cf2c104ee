"""Give all command lines the same behaviour: help in groups, settings, output streams, logging, exit statuses."""

import io
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from cache_schema.errors import TileprobeError

from .options import HEADING
from .settings import FILE, FILE_VARIABLE, Setting, read_settings

F = TypeVar("F", bound=Callable[..., Any])

DONE, FAILED, USAGE, FOUND = 0, 1, 2, 3
STATUSES = (
    (str(DONE), "done"),
    (str(FAILED), "an error, in one line that says what to do"),
    (str(USAGE), "a command line, settings file or variable that is not valid"),
    (
        str(FOUND),
        "it ran and found what it looks for: damage, a difference, too many quarantined tiles, a failed check",
    ),
    ("128 + n", "stopped by signal n: 130 after Ctrl-C, 143 after SIGTERM"),
)
"""Exit statuses of all commands, and what they mean."""

HEADINGS = ("Data", "Model", "Training", "Output", "Machine", "Command line")
_SETTINGS, _QUIET, _VERBOSE, _JSON = (f"tileprobe.{name}" for name in ("settings", "quiet", "verbose", "json"))
_DETAILED = ("cache_schema", "extract", "train", "urllib3")
"""Loggers whose debug lines --verbose shows; urllib3 logs one line for each request to a bucket."""
_PAUSE_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a command returns to scripts.

    Attributes:
        values: the object that --json prints; NaN and infinities become null.
        status: exit status of the process.
        line: the line that --quiet prints; empty for the last line printed.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    status: int = DONE
    line: str = ""


def heading(title: str) -> Callable[[F], F]:
    """Put the options of the decorators below, as far as the next heading, under a title in --help."""

    def mark(function: F) -> F:
        for param in getattr(function, "__click_params__", ()):
            vars(param).setdefault(HEADING, title)
        return function

    return mark


class Command(click.Command):
    """A command whose help has headings and examples, with the options that all commands share.

    Args:
        examples: command lines that --help shows at its end.
        gives_json: whether the callback returns an `Outcome` with values for --json.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), gives_json: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.gives_json = gives_json

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)  # --help comes last
        return [*own[:-1], *self._common, *own[-1:]]

    @property
    def _common(self) -> list[click.Option]:
        return [_JSON_OPTION, *_COMMON] if self.gives_json else _COMMON

    def list_settings(self) -> dict[str, click.Option]:
        """Return the options that a file or a variable may set, by their name without dashes."""
        options = [param for param in (*self.params, *self._common) if isinstance(param, click.Option)]
        return {_name(option): option for option in options if option is not _SETTINGS_OPTION}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in HEADINGS}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                names, text = record
                if not (param.is_flag or param.required or "default:" in text):
                    text += "  [default: none]"
                groups.setdefault(vars(param).get(HEADING, HEADINGS[-1]), []).append((names, text))
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {example}\n" for example in self.examples))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback with streams and log as the options say, and exit with its status."""
        try:
            with _streams(ctx) as held, _logging(ctx):
                _tell_settings(ctx)
                try:
                    outcome = super().invoke(ctx)
                except TileprobeError:
                    _log.debug("where the error arose:", exc_info=True)
                    raise
        except KeyboardInterrupt:
            exit_interrupted()
        outcome = outcome if isinstance(outcome, Outcome) else Outcome()
        if ctx.meta.get(_JSON) and outcome.values:
            click.echo(json.dumps(_replace_infinite(outcome.values), indent=2, ensure_ascii=False, allow_nan=False))
        elif lines := held.getvalue().strip().splitlines():
            click.echo(outcome.line or lines[-1])
        if outcome.status:
            sys.exit(outcome.status)


class Group(click.Group):
    """The commands of one package, with its name."""

    command_class = Command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit status"):
            formatter.write_dl(STATUSES)
        variable = f"TILEPROBE_{self.name}_COMMAND_OPTION".upper()
        with formatter.section("Settings"):
            formatter.write_text(
                f"Options are also read from {FILE} in the working directory (tables [{self.name}] and "
                f"[{self.name}.COMMAND]) and from variables {variable}. If an option is set twice, the command line "
                "wins, then the environment, the file, the default."
            )


def run_group(group: Group) -> None:
    """Run the command that this process was started for, and exit.

    Wrong usage and Ctrl-C exit with one line. Under torchrun every rank parses the same command line: only the first
    prints the error, and the others wait, so that torchrun does not stop it before.
    """
    try:
        status = group.main(prog_name=f"python -m {group.name}", standalone_mode=False)
    except click.ClickException as error:
        if is_first_rank():
            error.show()
        else:
            time.sleep(_PAUSE_S)
        sys.exit(error.exit_code)
    except click.Abort:
        exit_interrupted()
    sys.exit(status if isinstance(status, int) else DONE)


def exit_interrupted() -> NoReturn:
    """Exit after Ctrl-C, with one line."""
    if is_first_rank():
        click.echo("stopped by SIGINT", err=True)
    sys.exit(128 + signal.SIGINT)


def _end_quietly(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Exit with one line on Ctrl-C while modules are imported, which takes seconds for torch."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    try:
        exit_interrupted()
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(int(stop.code or 0))  # a normal exit would end by the signal instead


def is_first_rank() -> bool:
    """Return whether this process prints for its job: it is the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def is_given(context: click.Context, param: click.Parameter) -> bool:
    """Return whether a user set this parameter: on the command line, in the environment or in a file."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    return param.name is not None and context.get_parameter_source(param.name) in given


def _name(option: click.Option) -> str:
    return max(option.opts, key=len).lstrip("-")


def _make_flag(key: str, help: str, *names: str) -> click.Option:
    """Make a flag whose value `ctx.meta` holds under `key`."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value

    return click.Option(names, is_flag=True, expose_value=False, callback=note, help=help)


def _apply_settings(ctx: click.Context, param: click.Parameter, file: str | None) -> None:
    """Make settings the defaults of the options that are not parsed yet. Hidden commands, which only code calls, take
    none."""
    group, command = ctx.parent.command if ctx.parent else None, ctx.command
    if ctx.resilient_parsing or not isinstance(group, Group) or command.hidden:
        return
    options = {
        name: each.list_settings()
        for name, each in group.commands.items()
        if isinstance(each, Command) and not each.hidden
    }
    settings = read_settings(str(group.name), str(command.name), options, file, os.environ)
    ctx.meta[_SETTINGS] = settings
    ctx.default_map = {name: setting.value for name, setting in settings.items()}


def _tell_settings(ctx: click.Context) -> None:
    """Print one line with the options in use that the command line did not set, and where each was set."""
    settings: dict[str, Setting] = ctx.meta.get(_SETTINGS, {})
    used = [
        f"--{_name(param)} {setting} ({setting.origin})"
        for param in ctx.command.get_params(ctx)
        if isinstance(param, click.Option)
        and (setting := settings.get(str(param.name)))
        and ctx.get_parameter_source(str(param.name)) is ParameterSource.DEFAULT_MAP
    ]
    if used and is_first_rank():
        print(f"settings: {', '.join(used)}", flush=True)


@contextmanager
def _streams(ctx: click.Context) -> Iterator[io.StringIO]:
    """Send what is printed for people to stderr with --json, and into the buffer yielded with --quiet."""
    quiet, held = ctx.meta.get(_QUIET), io.StringIO()
    if quiet and ctx.meta.get(_VERBOSE):
        raise click.UsageError("--quiet and --verbose exclude each other", ctx)
    with redirect_stdout(held if quiet else sys.stderr if ctx.meta.get(_JSON) else sys.stdout):
        yield held


@contextmanager
def _logging(ctx: click.Context) -> Iterator[None]:
    """Set log levels while a command runs: debug lines with --verbose, only errors with --quiet.

    Progress bars are drawn only if warnings are logged, so they follow the same level.
    """
    root, quiet, verbose = logging.getLogger(), ctx.meta.get(_QUIET), ctx.meta.get(_VERBOSE)
    loggers = [logging.getLogger(name) for name in _DETAILED] if verbose else [root] if quiet else []
    before = [logger.level for logger in loggers]
    handler = logging.StreamHandler()
    rank = f"rank {os.environ['RANK']} " if "RANK" in os.environ else ""
    handler.setFormatter(logging.Formatter(f"{rank}%(name)s: %(message)s"))
    if loggers:
        root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG if verbose else logging.ERROR)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _replace_infinite(value: Any) -> Any:
    """Return the value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _replace_infinite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_infinite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SETTINGS_OPTION = click.Option(
    ["--settings"],
    type=click.Path(exists=True, dir_okay=False),
    envvar=FILE_VARIABLE,
    is_eager=True,
    expose_value=False,
    callback=_apply_settings,
    help=f"TOML file of further options.  [default: {FILE}, if it exists]",
)
_COMMON = [
    _SETTINGS_OPTION,
    _make_flag(_QUIET, "Print only errors and the last line.", "-q", "--quiet"),
    _make_flag(_VERBOSE, "Also print every block, batch and request, and where an error arose.", "-v", "--verbose"),
]
_JSON_OPTION = _make_flag(_JSON, "Print one JSON object on stdout, and everything else on stderr.", "--json")

# Set on import: a `__main__` has no place for a call between its imports.
sys.excepthook = _end_quietly
