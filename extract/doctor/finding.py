"""Represent findings, and run one check after another even if some fail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from cache_schema import TileprobeError
from cache_schema.cli.text import show_name

State = Literal["ok", "warning", "fail", "skipped"]
_BY_WEIGHT: tuple[State, ...] = ("ok", "warning", "fail")

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: name of the check.
        status: `fail` for a problem that stops extraction or training, `warning` for one that a user should know.
        detail: what was found.
        remedy: what to do about it; empty if there is nothing to do.
    """

    check: str
    status: State
    detail: str
    remedy: str

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.check}: {show_name(self.detail)}"
        return f"{line}\n         -> {show_name(self.remedy)}" if self.remedy else line


@dataclass(frozen=True)
class Concern:
    """A problem that a check found, and what to do about it."""

    status: Literal["warning", "fail"]
    detail: str
    remedy: str


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """The result of a check.

    Attributes:
        value: for later checks.
        detail: for the user.
        concerns: the most serious one decides the status.
    """

    value: T
    detail: str
    concerns: Sequence[Concern] = ()


class UnknownError(Exception):
    """The check of this name has no result, which another check needs."""


@dataclass(frozen=True)
class Known(Generic[T]):
    """The result of the check of this name, if it has one."""

    check: str
    value: T | None

    def get(self) -> T:
        """Return the value.

        Raises:
            UnknownError: there is none; the check that calls this is skipped.
        """
        if self.value is None:
            raise UnknownError(self.check)
        return self.value


class Examination:
    """Runs checks one after the other, and passes each finding to `say`; a check that fails never stops the others.

    Attributes:
        findings: so far, in order.
    """

    def __init__(self, say: Callable[[Finding], None]) -> None:
        self.findings: list[Finding] = []
        self._say = say

    def check(self, name: str, look: Callable[[], Verdict[T]], *needs: "Known[Any]") -> Known[T]:
        """Run one check, whatever it raises, and return its result for later checks.

        Args:
            look: performs it; the check is skipped if `look` gets a `Known` that has no value.
            needs: further checks that must have a result.
        """
        value = None
        try:
            for need in needs:
                need.get()
            verdict = look()
        except UnknownError as unknown:
            finding = Finding(name, "skipped", f"needs the result of the check `{unknown}`", "fix that first")
        except TileprobeError as error:
            finding = Finding(name, "fail", *split_message(str(error)))
        except Exception as error:  # an incomplete report is more useful than a traceback
            what = f"this check crashed ({type(error).__name__}: {error})"
            finding = Finding(name, "fail", what, "report this bug; what the check looks at may be fine")
        else:
            finding, value = _describe(name, verdict), verdict.value
        self.findings.append(finding)
        self._say(finding)
        return Known(name, value)


def split_message(message: str) -> tuple[str, str]:
    """Split an error message, `what happened: what to do`."""
    detail, _, remedy = message.replace("\n", "; ").rpartition(": ")
    return (detail, remedy) if detail else (remedy, "")


def _describe(name: str, verdict: Verdict[Any]) -> Finding:
    concerns = sorted(verdict.concerns, key=lambda concern: _BY_WEIGHT.index(concern.status), reverse=True)
    detail = "; ".join(filter(None, [*(concern.detail for concern in concerns), verdict.detail]))
    status = concerns[0].status if concerns else "ok"
    return Finding(name, status, detail, "; ".join(dict.fromkeys(concern.remedy for concern in concerns)))
