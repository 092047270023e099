"""
Fetch one file over http(s): to a temporary name first, then checked, then renamed. What fails a check is not kept.

However a server behaves, it ends: SILENCE seconds without content, or a PERIOD slower than SLOWEST, and we give up.
"""

import hashlib
import http.client
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from locality import InputError

CACHE = Path(os.environ.get("LOCALIST_CACHE") or Path.home() / ".cache" / "localist-gpt")
SILENCE = 30          # seconds without a byte of content before we give up
PERIOD = 60           # seconds over which the speed is averaged
SLOWEST = 16 << 10    # bytes a second; below it a server is dripping, not serving


def fetch(url, chunks):
    """Put the content of `url` on a queue: first the announced length or None, then bytes, at the end b"" or an exception.

    It runs in a thread of its own, because a server that drips headers, or the frames of chunks, blocks for hours in
    calls that no timeout ends. Who waits at the other end of the queue can give up, and leave the thread behind.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "localist-gpt"})
        with urllib.request.urlopen(request, timeout=SILENCE) as response:
            if not response.url.startswith("https://" if url.startswith("https://") else ("http://", "https://")):
                raise ValueError(f"it redirects to {response.url}, which is less safe")
            length = response.headers.get("Content-Length") or ""
            chunks.put(int(length) if length.isdecimal() and len(length) < 20 else None)
            while chunk := response.read1(1 << 20):
                chunks.put(chunk)
        chunks.put(b"")
    except Exception as e:    # whatever it is, it is raised again where the queue is read
        chunks.put(e)


def remove_stale(folder, pattern):
    """Remove the files and folders `pattern`, with the process id in place of its {}, that a killed process has left."""
    before, after = pattern.split("{}")
    for path in folder.glob(before + "[0-9]*" + after) if folder.is_dir() else ():
        number = path.name[len(before):len(path.name) - len(after)]
        try:
            if number.isdecimal() and os.name == "posix":
                os.kill(int(number), 0)    # signal 0 only asks whether there is such a process
        except (ProcessLookupError, OverflowError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError:
            pass    # it is someone else's, and alive


def download(url, path, size=None, sha256=None, limit=2 << 30):
    """Download `url` to `path` (a Path) and return `path`.

    size: the exact length in bytes, where known; limit: the most we accept where it is not.
    sha256: hex digest of the content, where known.
    Raises InputError, and leaves nothing behind, when the server cannot be reached, sends too little, too much or
    too slowly, or sends something else than it should.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: only http:// and https:// addresses can be downloaded")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest, received = hashlib.sha256(), 0
    chunks = queue.Queue(maxsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, f"{path.name}.{{}}.part")
        threading.Thread(target=fetch, args=(url, chunks), daemon=True).start()
        length = following(chunks)
        if size and length not in (None, size):
            raise InputError(f"{url}: the server offers {length} bytes where {size} are expected; not downloaded")
        expected, since, received_before = size or length, time.monotonic(), 0
        with open(part, "wb") as f, tqdm(total=expected, unit="B", unit_scale=True, desc=path.name, leave=False) as bar:
            while chunk := following(chunks):
                f.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if received > (size or limit):
                    raise InputError(f"{url}: the server sends more than {size or limit} bytes; nothing was kept")
                if time.monotonic() - since > PERIOD:
                    if received - received_before < PERIOD * SLOWEST:
                        raise InputError(f"{url}: less than {SLOWEST >> 10} KiB a second came in; try again later")
                    since, received_before = time.monotonic(), received
        if expected is not None and received != expected:
            raise InputError(f"{url}: broke off after {received} of {expected} bytes; nothing was kept, run it again")
        if sha256 and digest.hexdigest() != sha256:
            raise InputError(f"{url}: the content has sha256 {digest.hexdigest()[:16]}…, "
                             f"expected {sha256[:16]}…; nothing was kept")
        os.replace(part, path)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        reason = e if isinstance(e, urllib.error.HTTPError) else getattr(e, "reason", None) or e
        raise InputError(f"{url}: could not be downloaded ({' '.join(str(reason).split())})") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def following(chunks):
    """What `fetch` puts on the queue next. Raises what it met, or TimeoutError after SILENCE seconds."""
    try:
        item = chunks.get(timeout=SILENCE)
    except queue.Empty:
        raise TimeoutError(f"nothing came for {SILENCE} seconds") from None
    if isinstance(item, Exception):
        raise item
    return item
