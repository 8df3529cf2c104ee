"""What the nodes of a job must have in common, and the one line that says what they have not.

Every rank writes who it is into the store that torchrun gives them, and rank 0 compares. That comes before anything
the ranks do together, and before the process group: nodes that differ in device or PyTorch may never form one.

Settings decide what comes out of a job, so nodes may differ in none of them, but for the fields of a configuration
whose options are `per_node`: they are about a node's own cores, devices or disks, and change no figure.
"""

import hashlib
import json
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import timedelta
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from cache_schema.cli.options import find_option, name_option

JOIN_TIMEOUT = timedelta(minutes=5)
"""How long rank 0 waits for the others to say who they are: all have been started, and load PyTorch at most."""
MAX_CLOCK_S = 60.0
"""Seconds that clocks may be apart. google-auth renews a token 225 s before it expires by the node's own clock, and
Google judges by its own; what is measured here is off by the time a message takes."""

_HEARD_S = 10
_SHOWN_CHARACTERS, _SHOWN_DIFFERENCES, _SHOWN_VALUES = 200, 5, 3
_PACKAGES = ("cache_schema", "extract", "train")
_LIBRARIES = ("torch", "transformers", "zarr")
_MAKE_VARIABLES = {
    **{name: name.upper() for name in ("tiles", "cache", "val_cache", "test_cache", "backbone", "image_size", "limit")},
    **{name: name.upper() for name in ("run", "unfreeze", "out")},
    "names": "INPUT",
}
"""By the setting's name; all others are options."""
_REMEDIES = {
    "versions": "install the same on every node",
    "command": "start every node with the same",
    "settings": "give every node the same",
    "device": "compute on one kind on all: give every node --device cpu, or see why one has no GPU",
}
"""By what is compared, in that order; only the first that differs is told, for what follows depends on it."""


@dataclass(frozen=True)
class Asked:
    """What a rank was asked to do.

    Attributes:
        command: such as `train head`.
        settings: all that nodes may not differ in, by the name users know.
    """

    command: str
    settings: Mapping[str, str]

    @classmethod
    def of(cls, command: str, *configs: Any, **settings: Any) -> Self:
        """Of frozen configurations, and of settings beside them."""
        found = dict(pair for config in configs for pair in _list_settings(config))
        found |= {_MAKE_VARIABLES.get(name, f"--{name}"): str(value) for name, value in settings.items()}
        return cls(command, found)


def _list_settings(config: Any) -> Iterator[tuple[str, str]]:
    for field in fields(config):
        value, option = getattr(config, field.name), find_option(field)
        if is_dataclass(value):
            yield from _list_settings(value)
        elif not (option and option.per_node):
            yield _MAKE_VARIABLES.get(field.name, name_option(field)), str(value)


NOTHING_ASKED = Asked("", {})


@dataclass(frozen=True)
class Member:
    """A rank, and what it must have in common with the others.

    Attributes:
        host: name of its node.
        facts: by the keys of `_REMEDIES`, then by name.
        failed: the error that keeps it from joining; empty without one.
    """

    host: str
    facts: Mapping[str, Mapping[str, str]]
    failed: str = ""

    @classmethod
    def describe(cls, asked: Asked, device: str) -> Self:
        """This process, asked for something and about to compute on `cpu` or `cuda`."""
        facts = {
            "versions": _list_versions(),
            "command": {"command": asked.command},
            "settings": asked.settings,
            "device": {"device": device},
        }
        return cls(socket.gethostname(), facts)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """What a rank wrote, of whatever release."""
        told = json.loads(data)
        return cls(told["host"], told["facts"], told["failed"])


def _list_versions() -> dict[str, str]:
    # The patch level of Python changes nothing that ranks exchange; two checkouts may have one version.
    python = ".".join(platform.python_version_tuple()[:2])
    own = f"{installed_version('tileprobe')} (source {digest_source()})"
    return {"tileprobe": own, "Python": python, **{name: installed_version(name) for name in _LIBRARIES}}


def digest_source(root: Path = Path(__file__).parents[2]) -> str:
    """Return 12 hex digits of the sha256 over names and bytes of all source files of the packages below `root`.

    Raises:
        RuntimeError: a package has no source files there.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        files = sorted((root / package).rglob("*.py"))
        if not files:  # a digest of nothing would make all checkouts look the same
            raise RuntimeError(f"found no source files of {package} below {root}")
        for path in files:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def settle(store: dist.Store, rank: int, world_size: int, me: Member) -> str | None:
    """Find out with all other ranks whether they belong together.

    Args:
        store: of this job, and this attempt of it.
        rank, world_size: in the whole job.
        me: this rank.

    Returns:
        why they do not, the same on all ranks; None if they do.

    Raises:
        torch.distributed.DistError: rank 0 is gone.
    """
    _introduce(store, rank, me)
    if rank == 0:
        verdict, listening = _judge(store, world_size)
        store.set("verdict", verdict)
        if verdict and listening:  # the store may end with this process
            with suppress(dist.DistError):
                store.wait([f"heard/{other}" for other in listening], timedelta(seconds=_HEARD_S))
        return verdict or None
    store.wait(["clock"], 2 * JOIN_TIMEOUT)
    store.set(f"ahead/{rank}", str(time.time() - float(store.get("clock"))))
    verdict = store.get("verdict").decode()
    store.set(f"heard/{rank}", "yes")
    return verdict or None


def decline(store: dist.Store, rank: int, error: str) -> None:
    """Tell the ranks that wait in `settle`, or will, that this one has ended with an error."""
    me = Member(socket.gethostname(), {}, failed=error)
    _introduce(store, rank, me)
    if rank == 0:
        store.set("verdict", find_difference([me]))
        store.set("clock", str(time.time()))


def _introduce(store: dist.Store, rank: int, me: Member) -> None:
    store.set(f"member/{rank}", json.dumps(asdict(me)))


def _judge(store: dist.Store, world_size: int) -> tuple[str, list[int]]:
    """What rank 0 says of all, empty if nothing speaks against them, and who waits for it."""
    others = range(1, world_size)
    try:
        store.wait([f"member/{rank}" for rank in others], JOIN_TIMEOUT)
    except dist.DistStoreError:
        absent = [rank for rank in others if not store.check([f"member/{rank}"])]
        store.set("clock", str(time.time()))
        return (
            f"{len(absent)} of {world_size} ranks, rank {absent[0]} among them, did not come within "
            f"{JOIN_TIMEOUT.total_seconds() / 60:.0f} minutes: see what its node says, then start all again",
            [rank for rank in others if rank not in absent],
        )
    members = [Member.parse(told) for told in store.multi_get([f"member/{rank}" for rank in range(world_size)])]
    # The others wait for it, so what passes between it and their own clock is the way of one message.
    store.set("clock", str(time.time()))
    refusal = find_difference(members)
    if not refusal:
        ahead = [0.0, *map(float, store.multi_get([f"ahead/{rank}" for rank in others]))]
        refusal = find_wrong_clock(members, ahead)
    return refusal, [rank for rank in others if not members[rank].failed]


def find_difference(members: Sequence[Member]) -> str:
    """One line on what ranks 0, 1, … may not differ in and do, and who has what; empty if there is nothing."""
    for rank, member in enumerate(members):
        if member.failed:
            return f"{member.host} (rank {rank}) cannot take part: {member.failed}"
    for kind, remedy in _REMEDIES.items():
        names = dict.fromkeys(name for member in members for name in member.facts.get(kind, {}))
        told = [line for name in names if (line := _compare(name, [m.facts.get(kind, {}) for m in members], members))]
        if told:
            more = [f"{len(told) - _SHOWN_DIFFERENCES} more differ"] if len(told) > _SHOWN_DIFFERENCES else []
            return f"{'; '.join([*told[:_SHOWN_DIFFERENCES], *more])}: {remedy}"
    return ""


def _compare(name: str, facts: Sequence[Mapping[str, str]], members: Sequence[Member]) -> str:
    holders: dict[str, list[int]] = {}
    for rank, known in enumerate(facts):
        holders.setdefault(known.get(name, ""), []).append(rank)
    if len(holders) == 1:
        return ""
    parts = [f"{_name_ranks(ranks, members)} has {_shorten(value)}" for value, ranks in holders.items()]
    more = ["…"] if len(parts) > _SHOWN_VALUES else []
    return f"{name} differs: {', '.join([*parts[:_SHOWN_VALUES], *more])}"


def _name_ranks(ranks: Sequence[int], members: Sequence[Member]) -> str:
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"{members[ranks[0]].host} (rank {ranks[0]}{more})"


def _shorten(value: str) -> str:
    if len(value) <= _SHOWN_CHARACTERS:
        return value or "none"
    return f"{value[:_SHOWN_CHARACTERS]}… ({len(value):,} characters)"


def find_wrong_clock(members: Sequence[Member], ahead: Sequence[float]) -> str:
    """One line on the clock that is furthest from rank 0's; empty if it is near enough.

    Args:
        members: ranks 0, 1, …
        ahead: seconds that the clock of each is ahead of rank 0's.
    """
    worst = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    if abs(ahead[worst]) <= MAX_CLOCK_S:
        return ""
    where = "ahead of" if ahead[worst] > 0 else "behind"
    return (
        f"the clock of {_name_ranks([worst], members)} is {abs(ahead[worst]):.0f} s {where} that of "
        f"{_name_ranks([0], members)}, and tokens for a bucket expire by the clock: set both right (NTP), to within "
        f"{MAX_CLOCK_S:.0f} s"
    )
