"""What a check found, and the examination that runs one check after another whatever becomes of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
        check: its name, always the same.
        status: `fail` for what ends an extraction or the training after it, `warning` for what a user should know.
        detail: what was found.
        remedy: what to do about it; empty where nothing is to be done.
    """

    check: str
    status: State
    detail: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.check}: {show_name(self.detail)}"
        return f"{line}\n         -> {show_name(self.remedy)}" if self.remedy else line


@dataclass(frozen=True)
class Concern:
    """Something about what was found that is not as it should be, and what to do about it."""

    status: Literal["warning", "fail"]
    detail: str
    remedy: str


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What a check learnt for those after it, and how to say it.

    Attributes:
        value: for the checks after it.
        detail: for the user.
        concerns: the gravest decides the status.
    """

    value: T
    detail: str
    concerns: Sequence[Concern] = ()


class UnknownError(Exception):
    """What a check needs was not found out by the one of this name."""


@dataclass(frozen=True)
class Known(Generic[T]):
    """What the check of this name learnt, if it came to an end."""

    check: str
    value: T | None

    def get(self) -> T:
        """The value.

        Raises:
            UnknownError: there is none; the check that asks is then skipped.
        """
        if self.value is None:
            raise UnknownError(self.check)
        return self.value


class Examination:
    """Checks one after the other; one that fails never ends the others.

    Attributes:
        findings: so far, in order.
    """

    def __init__(self, say: Callable[[Finding], None]) -> None:
        """`say` takes each finding at once."""
        self.findings: list[Finding] = []
        self._say = say

    def check(self, name: str, look: Callable[[], Verdict[T]], *needs: "Known[Any]") -> Known[T]:
        """Run one check, whatever it raises, and give what it learnt to those after it.

        Args:
            name: of the check.
            look: does it; what it asks of `Known` and nobody found out has it skipped.
            needs: checks that must have come to an end besides.
        """
        value = None
        try:
            for need in needs:
                need.get()
            verdict = look()
        except UnknownError as unknown:
            finding = Finding(
                name, "skipped", f"it needs what the check `{unknown}` would have told", "mend that first"
            )
        except TileprobeError as error:
            finding = Finding(name, "fail", *split_message(str(error)))
        except Exception as error:  # a report with a hole says more than a traceback in the middle of it
            what = f"this check itself failed ({type(error).__name__}: {error})"
            finding = Finding(name, "fail", what, "report it; what it looks at may be in order")
        else:
            finding, value = _describe(name, verdict), verdict.value
        self.findings.append(finding)
        self._say(finding)
        return Known(name, value)


def split_message(message: str) -> tuple[str, str]:
    """What happened and what to do, of an error's `what happened: what to do`."""
    detail, _, remedy = message.replace("\n", "; ").rpartition(": ")
    return (detail, remedy) if detail else (remedy, "")


def _describe(name: str, verdict: Verdict[Any]) -> Finding:
    concerns = sorted(verdict.concerns, key=lambda concern: _BY_WEIGHT.index(concern.status), reverse=True)
    detail = "; ".join(filter(None, [*(concern.detail for concern in concerns), verdict.detail]))
    status = concerns[0].status if concerns else "ok"
    return Finding(name, status, detail, "; ".join(dict.fromkeys(concern.remedy for concern in concerns)))
