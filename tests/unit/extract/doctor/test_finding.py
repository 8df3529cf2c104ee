"""How checks depend on each other, and which concern decides."""

from __future__ import annotations

from extract.doctor.finding import Concern, Examination, Finding, Verdict
from extract.errors import ConfigError


def test_a_check_that_fails_ends_no_other() -> None:
    said: list[Finding] = []
    exam = Examination(said.append)

    def raise_(error: Exception) -> Verdict[int]:
        raise error

    first = exam.check("first", lambda: raise_(ConfigError("it is wrong: fix it")))
    second = exam.check("second", lambda: Verdict(first.get() + 1, "more"))
    third = exam.check("third", lambda: Verdict(1, "else"), second)
    crash = exam.check("crash", lambda: raise_(ZeroDivisionError("by zero")))
    zero = exam.check("zero", lambda: Verdict(0, "nothing found"))
    last = exam.check("last", lambda: Verdict(zero.get() + 5, "five"))
    assert exam.findings == said
    assert [(finding.check, finding.status) for finding in said] == [
        ("first", "fail"),
        ("second", "skipped"),
        ("third", "skipped"),
        ("crash", "fail"),
        ("zero", "ok"),
        ("last", "ok"),
    ]
    assert (said[0].detail, said[0].remedy) == ("it is wrong", "fix it")
    assert "`first`" in said[1].detail
    assert "`second`" in said[2].detail
    assert "ZeroDivisionError: by zero" in said[3].detail
    assert (third.value, crash.value, last.value) == (None, None, 5)


def test_the_gravest_concern_decides() -> None:
    exam = Examination(lambda finding: None)
    light, grave = Concern("warning", "odd", "look"), Concern("fail", "broken", "fix")
    exam.check("both", lambda: Verdict(1, "seen", [light, grave, light]))
    assert exam.findings == [Finding("both", "fail", "broken; odd; odd; seen", "fix; look")]
    assert "\x1b" not in str(Finding("x", "warning", "a\x1b[1mb", "c\x1b"))
