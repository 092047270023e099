"""Fetch one file over http(s): to a temporary name first, then checked, then renamed.

However a server behaves, a download ends. After SILENCE seconds without content, or a PERIOD slower
than SLOWEST, we give up. What fails a check is not kept.
"""

import hashlib
import os
import queue
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

from tqdm import tqdm

from support.files import InputError, remove_stale, replacing

HOME = os.path.expanduser("~")
HOME = "." if HOME == "~" else HOME  # in a container without a home: here
CACHE = Path(os.environ.get("LOCALIST_CACHE") or Path(HOME, ".cache", "localist-gpt"))
SILENCE = 30  # seconds without a byte of content before we give up
PERIOD = 60  # seconds over which the speed is averaged
SLOWEST = 16 << 10  # bytes a second; a slower server drips, it does not serve


def download(url, path, size=None, sha256=None, limit=2 << 30):
    """Download `url` to `path` (a Path) and return `path`.

    size: the exact length in bytes, where known. limit: the most we accept where it is not.
    sha256: hex digest of the content, where known.
    Raises InputError, and leaves nothing behind, when the server cannot be reached; when it sends
    too little, too much or too slowly; or when the content is not what it should be.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: only http:// and https:// addresses can be downloaded")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        other = "LOCALIST_CACHE names another folder"
        raise InputError(f"{path.parent}: could not be written ({e.strerror}); {other}") from None
    remove_stale(path.parent, f"{path.name}.{{}}.tmp")
    chunks = queue.Queue(maxsize=8)
    threading.Thread(target=fetch, args=(url, chunks), daemon=True).start()
    length = following(url, chunks)
    if size and length not in (None, size):
        raise InputError(f"{url}: the server offers {length} bytes where {size} are expected")
    with replacing(path) as temporary:
        receive(url, chunks, temporary, size or length, size or limit, sha256)
    return path


def fetch(url, chunks):
    """Put the content of `url` on a queue: the announced length or None, then bytes, then an end.

    The end is b"", or an exception.

    It runs in a thread of its own. A server that drips headers blocks for hours in calls that no
    timeout ends; the other end of the queue can give up, and leave the thread behind.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "localist-gpt"})
        with urllib.request.urlopen(request, timeout=SILENCE) as response:
            safe = "https://" if url.startswith("https://") else ("http://", "https://")
            if not response.url.startswith(safe):
                raise ValueError(f"it redirects to {response.url}, which is less safe")
            length = response.headers.get("Content-Length") or ""
            chunks.put(int(length) if length.isdecimal() and len(length) < 20 else None)
            while chunk := response.read1(1 << 20):
                chunks.put(chunk)
        chunks.put(b"")
    except Exception as e:  # whatever it is, it is raised again where the queue is read
        chunks.put(e)


def following(url, chunks):
    """What `fetch` puts on the queue next. Raises InputError for what it met, or for SILENCE."""
    try:
        item = chunks.get(timeout=SILENCE)
    except queue.Empty:
        item = TimeoutError(f"nothing came for {SILENCE} seconds")
    if isinstance(item, Exception):
        reason = item if isinstance(item, HTTPError) else getattr(item, "reason", None) or item
        reason = " ".join(str(reason).split())
        raise InputError(f"{url}: could not be downloaded ({reason})")
    return item


def receive(url, chunks, path, expected, limit, sha256):
    """Write what `fetch` puts on the queue to `path`. Raises InputError if it is not whole."""
    digest, received, since, received_before = hashlib.sha256(), 0, time.monotonic(), 0
    name = url.rpartition("/")[2]
    bar = tqdm(total=expected, unit="B", unit_scale=True, desc=name, leave=False, disable=None)
    with open(path, "wb") as f, bar:
        while chunk := following(url, chunks):
            f.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            if received > limit:
                raise InputError(f"{url}: the server sends more than {limit} bytes; not kept")
            if time.monotonic() - since > PERIOD:
                if received - received_before < PERIOD * SLOWEST:
                    slow = f"less than {SLOWEST >> 10} KiB a second came in"
                    raise InputError(f"{url}: {slow}; try again later")
                since, received_before = time.monotonic(), received
    if expected is not None and received != expected:
        broken = f"broke off after {received} of {expected} bytes"
        raise InputError(f"{url}: {broken}; nothing was kept, run it again")
    if sha256 and digest.hexdigest() != sha256:
        found = f"the content has sha256 {digest.hexdigest()[:16]}…, expected {sha256[:16]}…"
        raise InputError(f"{url}: {found}; nothing was kept")
