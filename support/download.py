"""Fetch one file over http(s): to a temporary name first, then checked, then renamed.

A download ends, however a server behaves: after SILENCE seconds without content, or after a PERIOD
in which it was slower than SLOWEST, we give up. A file that fails a check is not kept.
"""

import contextlib
import hashlib
import os
import queue
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

from tqdm import tqdm

from support.files import InputError, alone, remove_stale, replacing

# a container may have no home, or an empty one: then the cache is in the working directory
HOME = "~" if os.environ.get("HOME") == "" else os.path.expanduser("~")
HOME = "." if HOME == "~" else HOME
CACHE = Path(os.environ.get("LOCALIST_CACHE") or Path(HOME, ".cache", "localist-gpt"))
SILENCE = 30  # seconds without a byte of content before we give up
PERIOD = 60  # seconds over which the speed is averaged
SLOWEST = 16 << 10  # bytes per second


def download(url, path, size=None, sha256=None, limit=2 << 30, check=None):
    """Download `url` to `path`, a Path, and return `path`.

    size: the exact length in bytes, if known; limit: the longest we accept if it is not; sha256:
    hex digest of the content; check(temporary, headers): called before the file gets its name, it
    may rewrite it or raise InputError. One process at a time downloads to a folder; a file that
    another one has just downloaded is not downloaded again.
    Raises InputError, and leaves nothing behind, if anything is wrong.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: only http:// and https:// addresses can be downloaded")
    folder = path.parent
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(
            f"{folder}: this folder could not be written; set LOCALIST_CACHE to another one"
        )
    with alone(folder):
        if path.exists() and size in (None, path.stat().st_size):
            return path
        remove_stale(folder, f"{path.name}.{{}}.tmp")
        with replacing(path) as temporary:
            headers = receive(url, temporary, size, sha256, limit)
            if check:
                check(temporary, headers)
    return path


def receive(url, path, size, sha256, limit):
    """Write the content of `url` to `path`. Returns the headers, an email.message.Message. Raises
    InputError if anything is wrong."""
    chunks = queue.Queue(maxsize=8)
    try:
        threading.Thread(target=fetch, args=(url, chunks), daemon=True).start()
    except RuntimeError as e:  # the system allows no more threads
        raise InputError(f"{url}: could not be downloaded ({e})") from None
    headers = next_chunk(url, chunks)
    length = headers.get("Content-Length") or ""
    length = int(length) if length.isdecimal() and len(length) < 20 else None
    if size and length not in (None, size):
        raise InputError(f"{url}: the server offers {length} bytes, not {size}")
    expected, limit, name = size or length, size or limit, url.rpartition("/")[2]
    digest, received, received_before, since = hashlib.sha256(), 0, 0, time.monotonic()
    bar = tqdm(total=expected, unit="B", unit_scale=True, desc=name, leave=False, disable=None)
    with bar, open(path, "wb") as f:
        while chunk := next_chunk(url, chunks):
            f.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if received > limit:
                raise InputError(f"{url}: the server sends more than {limit} bytes; not kept")
            if time.monotonic() - since > PERIOD:
                if received - received_before < PERIOD * SLOWEST:
                    raise InputError(f"{url}: less than {SLOWEST >> 10} KiB/s; try again later")
                since, received_before = time.monotonic(), received
    if expected is not None and received != expected:
        raise InputError(f"{url}: broke off after {received} of {expected} bytes; run it again")
    actual = digest.hexdigest()
    if sha256 not in (None, actual):
        raise InputError(f"{url}: sha256 {actual[:16]}…, expected {sha256[:16]}…; not kept")
    return headers


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, the first or a later one, from https to another scheme."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("https://", f"{req.type}://")):
            raise ValueError(f"it redirects to {newurl}, which is less safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url, chunks):
    """Put on a queue the headers of `url`, its content, and finally b"" or an exception.

    This is a thread that `download` can leave behind: a server that sends its headers byte by byte
    blocks for hours in calls that no timeout ends.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "localist-gpt"})
        opener = urllib.request.build_opener(SafeRedirects)
        with opener.open(request, timeout=SILENCE) as response:
            chunks.put(response.headers)
            while chunk := response.read1(1 << 20):
                chunks.put(chunk)
        chunks.put(b"")
    except Exception as e:  # next_chunk reports it
        chunks.put(e)


def next_chunk(url, chunks):
    """What `fetch` puts on the queue next. Raises InputError for its errors and for SILENCE."""
    try:
        chunk = chunks.get(timeout=SILENCE)
    except queue.Empty:
        chunk = TimeoutError(f"nothing came for {SILENCE} seconds")
    if isinstance(chunk, Exception):
        reason = chunk if isinstance(chunk, HTTPError) else getattr(chunk, "reason", None) or chunk
        raise InputError(f"{url}: could not be downloaded ({' '.join(str(reason).split())})")
    return chunk
