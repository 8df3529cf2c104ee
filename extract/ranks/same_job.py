"""Check that all nodes run the same code and settings; report the first mismatch in one line.

Every rank describes itself in torchrun's store, and rank 0 compares. This happens before the process group is made,
since nodes that differ in device or PyTorch may never form one.

Settings decide the result of a job, so they must be equal on all nodes, except the options marked `per_node`: they
concern a node's cores, devices or disks, and no result.
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
"""How long rank 0 waits for the others to describe themselves: all were started, and only load PyTorch."""
MAX_CLOCK_S = 60.0
"""Seconds that clocks may differ. google-auth renews a token 225 s before it expires by the node's clock, while Google
goes by its own; the measurement here includes the time of one message."""

_HEARD_S = 10
_SHOWN_CHARACTERS, _SHOWN_DIFFERENCES, _SHOWN_VALUES = 200, 5, 3
_PACKAGES = ("cache_schema", "extract", "train")
_LIBRARIES = ("torch", "transformers", "zarr")
_MAKE_VARIABLES = {
    **{name: name.upper() for name in ("tiles", "cache", "val_cache", "test_cache", "backbone", "image_size", "limit")},
    **{name: name.upper() for name in ("run", "unfreeze", "out")},
    "names": "INPUT",
}
"""Make variables by setting; all other settings are shown as options."""
_REMEDIES = {
    "versions": "install the same on every node",
    "command": "run the same command on every node",
    "settings": "give every node the same",
    "device": "use the same kind of device: give every node --device cpu, or check why one has no GPU",
}
"""By what is compared, in order; only the first difference is reported, since the others may follow from it."""


@dataclass(frozen=True)
class Asked:
    """The command and settings of a rank.

    Attributes:
        command: such as `train head`.
        settings: those that must be equal on all nodes, by the name users know.
    """

    command: str
    settings: Mapping[str, str]

    @classmethod
    def of(cls, command: str, *configs: Any, **settings: Any) -> Self:
        """Collect the settings of frozen configurations, and further `settings`."""
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
    """A rank's description of itself.

    Attributes:
        host: name of its node.
        facts: what must be equal on all ranks, by the keys of `_REMEDIES`, then by name.
        failed: the error that keeps it from joining, or empty.
    """

    host: str
    facts: Mapping[str, Mapping[str, str]]
    failed: str = ""

    @classmethod
    def describe(cls, asked: Asked, device: str) -> Self:
        """Describe this process, which will compute on `cpu` or `cuda`."""
        facts = {
            "versions": _list_versions(),
            "command": {"command": asked.command},
            "settings": asked.settings,
            "device": {"device": device},
        }
        return cls(socket.gethostname(), facts)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse the description of a rank, which may run another release."""
        told = json.loads(data)
        return cls(told["host"], told["facts"], told["failed"])


def _list_versions() -> dict[str, str]:
    # Python's patch level does not affect what ranks exchange. Two checkouts may have the same version number.
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
        if not files:  # a digest of no files would be the same for all checkouts
            raise RuntimeError(f"found no source files of {package} below {root}")
        for path in files:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def settle(store: dist.Store, rank: int, world_size: int, me: Member) -> str | None:
    """Compare this rank, `me`, with all others of the job.

    Returns:
        why they cannot work together, the same text on all ranks; None if they can.

    Raises:
        torch.distributed.DistError: rank 0 is gone.
    """
    _introduce(store, rank, me)
    if rank == 0:
        verdict, listening = _judge(store, world_size)
        store.set("verdict", verdict)
        if verdict and listening:  # the store may end with this process, so let them read first
            with suppress(dist.DistError):
                store.wait([f"heard/{other}" for other in listening], timedelta(seconds=_HEARD_S))
        return verdict or None
    store.wait(["clock"], 2 * JOIN_TIMEOUT)
    store.set(f"ahead/{rank}", str(time.time() - float(store.get("clock"))))
    verdict = store.get("verdict").decode()
    store.set(f"heard/{rank}", "yes")
    return verdict or None


def decline(store: dist.Store, rank: int, error: str) -> None:
    """Tell the ranks that wait in `settle`, now or later, that this rank failed."""
    me = Member(socket.gethostname(), {}, failed=error)
    _introduce(store, rank, me)
    if rank == 0:
        store.set("verdict", find_difference([me]))
        store.set("clock", str(time.time()))


def _introduce(store: dist.Store, rank: int, me: Member) -> None:
    store.set(f"member/{rank}", json.dumps(asdict(me)))


def _judge(store: dist.Store, world_size: int) -> tuple[str, list[int]]:
    """Compare all ranks on rank 0; return the reason for refusal, or empty, and the ranks that wait for it."""
    others = range(1, world_size)
    try:
        store.wait([f"member/{rank}" for rank in others], JOIN_TIMEOUT)
    except dist.DistStoreError:
        absent = [rank for rank in others if not store.check([f"member/{rank}"])]
        store.set("clock", str(time.time()))
        return (
            f"{len(absent)} of {world_size} ranks, including rank {absent[0]}, did not join within "
            f"{JOIN_TIMEOUT.total_seconds() / 60:.0f} minutes: see the output of its node, then start all nodes again",
            [rank for rank in others if rank not in absent],
        )
    members = [Member.parse(told) for told in store.multi_get([f"member/{rank}" for rank in range(world_size)])]
    # The others wait for this, so it reaches them within the time of one message.
    store.set("clock", str(time.time()))
    refusal = find_difference(members)
    if not refusal:
        ahead = [0.0, *map(float, store.multi_get([f"ahead/{rank}" for rank in others]))]
        refusal = find_wrong_clock(members, ahead)
    return refusal, [rank for rank in others if not members[rank].failed]


def find_difference(members: Sequence[Member]) -> str:
    """Describe in one line the first difference between ranks 0, 1, …, with the values; empty if there is none."""
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
    """Describe in one line the clock furthest from rank 0's; empty if it is within `MAX_CLOCK_S`.

    Args:
        members: ranks 0, 1, …
        ahead: seconds by which each rank's clock is ahead of rank 0's.
    """
    worst = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    if abs(ahead[worst]) <= MAX_CLOCK_S:
        return ""
    where = "ahead of" if ahead[worst] > 0 else "behind"
    return (
        f"the clock of {_name_ranks([worst], members)} is {abs(ahead[worst]):.0f} s {where} that of "
        f"{_name_ranks([0], members)}, and access tokens for buckets expire by the clock: synchronise both (NTP), "
        f"to within {MAX_CLOCK_S:.0f} s"
    )
