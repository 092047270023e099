"""
Fetch one file over http(s): to a temporary name first, then checked, then renamed. What fails a check is not kept.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from locality import InputError

CACHE = Path(os.environ.get("LOCALIST_CACHE") or Path.home() / ".cache" / "localist-gpt")
SILENCE = 30          # seconds without a byte before we give up
SLOWEST = 16 << 10    # bytes a second, averaged over a minute; below it a server is dripping, not serving


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "localist-gpt"})
        with urllib.request.urlopen(request, timeout=SILENCE) as response, open(part, "wb") as f:
            length = response.headers.get("Content-Length")
            expected = size or (int(length) if length and length.isdigit() else None)
            if size and length and length.isdigit() and int(length) != size:
                raise InputError(f"{url}: the server offers {length} bytes where {size} are expected; not downloaded")
            bar = tqdm(total=expected, unit="B", unit_scale=True, desc=path.name, leave=False)
            minute = time.monotonic()
            received_before = 0
            while chunk := response.read1(1 << 20):
                f.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if received > (size or limit):
                    raise InputError(f"{url}: the server sends more than {size or limit} bytes; nothing was kept")
                if time.monotonic() - minute > 60:
                    if received - received_before < 60 * SLOWEST:
                        raise InputError(f"{url}: less than {60 * SLOWEST >> 10} KiB came in a minute; try again later")
                    minute, received_before = time.monotonic(), received
            bar.close()
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
        raise InputError(f"{url}: could not be downloaded ({reason})") from None
    finally:
        if part.exists():
            part.unlink()
    return path
