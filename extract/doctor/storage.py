"""Check the storage of the tiles: credentials, access, clock, and the layout below TILES."""

import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import PurePosixPath

from tqdm import tqdm

from cache_schema import TileTable
from cache_schema.cli.text import show_first, show_name
from cache_schema.storage.objects import open_objects
from cache_schema.storage.place import VIEWER, Purpose, is_bucket
from extract.errors import SourceError
from extract.ranks.group import shows_bars
from extract.tiles.listing import build_table, is_tile, label_name
from extract.tiles.source import GcsSource, ListedPage, Source, open_source

from .finding import Concern, Verdict

LISTING_S = 15.0
"""A longer listing is stopped: ten million objects take minutes."""
LISTED_A_REQUEST = 1000
"""Objects on a page of a bucket's listing."""
DEADLINE_S = 8.0
"""How long requests to a bucket are retried."""
AGAIN = "then run doctor again"
_TILES = Purpose("TILES", VIEWER, AGAIN)
_LARGEST_SKEW_S = 60.0
_EMULATOR = "STORAGE_EMULATOR_HOST"


def check_credentials(urls: Iterable[str]) -> Verdict[bool]:
    """Name the kind of Google credentials that the client libraries find, if one of `urls` needs any.

    Raises:
        SourceError: no credentials.
    """
    bucket = next((url for url in urls if is_bucket(url)), None)
    if bucket is None:
        return Verdict(True, "not needed: neither tiles nor cache are in a bucket")
    if server := os.environ.get(_EMULATOR):
        return Verdict(True, f"anonymous: {_EMULATOR} is set, so requests go to {server}, not to Google")
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    from cache_schema.storage.gcs import explain_gcs_error

    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
    except GoogleAuthError as error:
        raise SourceError(explain_gcs_error(error, bucket, _TILES)) from error
    kind = type(credentials).__module__.removeprefix("google.").removeprefix("auth.")
    account = getattr(credentials, "service_account_email", "")
    return Verdict(True, f"{_KINDS.get(kind, kind)}{f' {account}' if '@' in account else ''}")


_KINDS = {
    "oauth2.credentials": "a user's, by gcloud",
    "oauth2.service_account": "a service account's key file:",
    "compute_engine.credentials": "this machine's service account",
}


def check_storage(tiles: str) -> Verdict[Source]:
    """Open TILES and, in a bucket, list one object.

    Raises:
        SourceError: no such directory.
        StorageError: no such bucket, access refused, or no connection.
    """
    source = open_source(tiles)
    if not isinstance(source, GcsSource):
        return Verdict(source, f"{source.url} is a directory")
    from cache_schema.storage.gcs import GcsObjects

    started = time.perf_counter()
    GcsObjects(source.url, _TILES, deadline_s=DEADLINE_S).check_access()
    return Verdict(source, f"{source.url} answers; the first listing took {time.perf_counter() - started:.2f} s")


def check_clock(address: str) -> Verdict[float]:
    """Compare this machine's clock with the `Date` of a server's answer: a wrong clock makes Google refuse tokens."""
    started = datetime.now(UTC)
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=DEADLINE_S) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # an error page has a date, too
        date = error.headers["Date"]
    except OSError as error:
        raise SourceError(f"{address} does not answer ({type(error).__name__}): check the network") from error
    if not date:
        return Verdict(0.0, "the server does not send its time")
    middle = started + (datetime.now(UTC) - started) / 2
    skew = (middle - parsedate_to_datetime(date)).total_seconds()
    wrong = Concern("warning", "this machine's clock is wrong", "set it (`timedatectl set-ntp true`)")
    detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's, which counts whole seconds"
    return Verdict(skew, detail, [wrong] if abs(skew) > _LARGEST_SKEW_S else [])


def find_server() -> str:
    """Return the address of the storage server."""
    return os.environ.get(_EMULATOR) or "https://storage.googleapis.com"


@dataclass(frozen=True)
class Found:
    """What was listed.

    Attributes:
        table: the tiles an extraction would embed, as far as they were listed.
        whole: whether that is all of them.
        pages: requests that listing all of it took, at a thousand objects each.
    """

    table: TileTable
    whole: bool
    pages: int

    @property
    def at_least(self) -> str:
        return "" if self.whole else "at least "


def check_layout(source: Source, *, unlabelled: bool, seconds: float = LISTING_S) -> Verdict[Found]:
    """List tiles and labels for at most `seconds`, and compare their names.

    Raises:
        SourceError: there is nothing to embed.
    """
    with (
        tqdm(desc="listing", unit=" objects", leave=False, disable=not shows_bars()) as bar,
        ThreadPoolExecutor(1) as thread,
    ):
        deadline = time.monotonic() + seconds
        listed_labels = thread.submit(_list, source, "labels", deadline, bar)
        images, all_images = _list(source, "images", deadline, bar)
        labels, all_labels = listed_labels.result()
    if not len(images):
        raise SourceError(f"no objects under {source.url}/images/: {_name_neighbours(source)}")
    whole = all_images and all_labels
    comparable = whole or isinstance(source, GcsSource)  # a bucket lists in order of names, a directory does not
    tiles = [name for name in images.name.tolist() if is_tile(name)]
    if not tiles:
        raise SourceError(
            f"{len(images):,} objects under {source.url}/images/, but none is PNG, JPEG or TIFF "
            f"({_count_suffixes(images.name.tolist())}): convert them, or check TILES"
        )
    concerns = list(_compare_names(images, labels, all_images, all_labels, unlabelled) if comparable else ())
    listing = build_table([images], [labels], unlabelled=unlabelled or not comparable)
    if not len(listing.table):
        raise SourceError(
            f"{len(tiles):,} tiles under {source.url}/images/, but none has its labels/NAME.txt: "
            "check TILES, or embed them anyway with --unlabelled"
        )
    pages = sum(max(1, -(-len(listed) // LISTED_A_REQUEST)) for listed in (images, labels))
    found = Found(listing.table, whole, pages)
    detail = f"{found.at_least}{len(listing.table):,} tiles to embed of {len(tiles):,}, {len(labels):,} labels"
    if not whole:
        detail += f"; the listing was stopped after {seconds:.0f} s"
    return Verdict(found, detail + ("" if comparable else " and is unordered: labels were not compared"), concerns)


def _list(source: Source, folder: str, deadline: float, bar: "tqdm[None]") -> tuple[ListedPage, bool]:
    """List a folder until the deadline, at least one page; return the objects and whether these are all."""
    pages = []
    for page in source.list(folder):
        pages.append(page)
        bar.update(len(page))
        if time.monotonic() > deadline:
            return ListedPage.concatenate(pages), False
    return ListedPage.concatenate(pages), True


def _compare_names(
    images: ListedPage, labels: ListedPage, all_images: bool, all_labels: bool, unlabelled: bool
) -> Iterator[Concern]:
    """Yield mismatches between images and labels; if a listing was stopped, among the names that both reached."""
    tiles = list(filter(is_tile, images.name.tolist()))
    others = [name for name in images.name.tolist() if not is_tile(name)]
    if others:
        what = f"{len(others):,} objects under images/ are not tiles ({_count_suffixes(others)}) and are skipped"
        yield Concern("warning", what, "convert them to PNG, JPEG or TIFF, or remove them")
    wanted = Counter(map(label_name, tiles))
    if clashing := [name for name, count in wanted.items() if count > 1]:
        what = f"{len(clashing):,} label files belong to several tiles at once, such as {_show(clashing)}"
        yield Concern("warning", what, "give every tile a unique name before the suffix")
    there = set(labels.name.tolist())
    last_label = "" if all_labels else max(there, default="")
    missing = [name for name in wanted if name not in there and (all_labels or name <= last_label)]
    if missing and not unlabelled:
        what = f"{len(missing):,} tiles have no label file and are skipped, such as {_show(missing)}"
        yield Concern("warning", what, "add an empty one for tiles without objects, or use --unlabelled")
    # Whatever its suffix, the tile of `labels/a.txt` is listed before `images/a/`.
    last_image = "" if all_images else str(images.name[-1])
    orphans = [
        name
        for name in there - wanted.keys()
        if all_images or f"images/{name.split('/', 1)[1].removesuffix('.txt')}/" <= last_image
    ]
    if orphans:
        what = f"{len(orphans):,} label files have no tile, such as {_show(sorted(orphans))}"
        yield Concern("warning", what, "check that all tiles were uploaded, and that labels are named NAME.txt")


def _show(names: list[str]) -> str:
    return show_first([show_name(name) for name in names[:3]], limit=3)


def _count_suffixes(names: Iterable[str]) -> str:
    """Format the suffixes and their counts as `.bmp 12, .gif 3`."""
    counts = Counter(PurePosixPath(name).suffix or "no suffix" for name in names)
    return ", ".join(f"{show_name(suffix)} {count:,}" for suffix, count in counts.most_common(5))


def _name_neighbours(source: Source) -> str:
    """Return a remedy that names what lies directly below TILES."""
    names = open_objects(source.url, _TILES, deadline_s=DEADLINE_S).list_dir()
    there = [show_name(name) for name in islice(names, 8)]
    what = f"holds {', '.join(there)}" if there else "is empty"
    return f"TILES must hold images/ and labels/, but {what}"
