"""Whatever a server does, a download ends: with the whole file, or soon and with one line."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from support import download as download_module
from support.download import download
from support.files import InputError


def drip(start, piece, times=400, pause=0.025):
    """A server that sends `start`, and then `times` times `piece`, with pauses, in seconds."""

    def answer(handler):
        with contextlib.suppress(OSError):  # the other end has hung up
            handler.wfile.write(start)
            for _ in range(times):
                handler.wfile.write(piece)
                time.sleep(pause)

    return answer


def redirect(target):
    return drip(b"HTTP/1.1 302 Found\r\nLocation: " + target + b"\r\n\r\n", b"", 0)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE, MANY = (OK + f"Content-Length: {n}\r\n\r\n".encode() for n in (10**6, 10**8))
SERVERS = {
    "silent": (lambda handler: time.sleep(10), "nothing came|timed out"),
    "drips headers": (drip(OK, b"X-More: 1\r\n"), "nothing came|timed out|more than 100 headers"),
    "drips one endless header": (drip(OK + b"X-More: ", b"x"), "nothing came|timed out"),
    "drips the length of a chunk": (drip(CHUNKED + b"1", b";"), "nothing came|timed out"),
    "drips the content": (drip(MEGABYTE, b"0123456789"), "less than 16 KiB/s"),
    "falls silent": (drip(MEGABYTE + b"x" * 500, b""), "nothing came|timed out"),
    "never ends": (drip(OK + b"\r\n", bytes(1 << 16), pause=0), "more than 1000000 bytes"),
    "offers too much": (drip(MANY, b"x" * 200_000), "more than 1000000 bytes"),
    "sends less than it says": ((b"x" * 1000, 2000), "broke off after 1000 of 2000 bytes"),
    "redirects to itself": (redirect(b"/x"), "infinite loop"),
    "redirects to nowhere": (redirect(b"http://127.0.0.1:9/"), "could not be downloaded"),
    "redirects to a file": (redirect(b"file:///etc/passwd"), "302|not allowed"),
    "redirects to ftp": (redirect(b"ftp://127.0.0.1:9/x"), "could not be downloaded"),
    "speaks something else": (drip(b"SSH-2.0-OpenSSH\r\n", b"", 0), "could not be downloaded"),
    "lies about its length": (drip(OK + b"Content-Length: -5\r\n\r\nabc", b"", 0), None),
    "has nothing": (None, "404"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_misbehaves(name, serve, tmp_path, monkeypatch):
    content, message = SERVERS[name]
    base, _ = serve({"/x": content})
    monkeypatch.setattr(download_module, "SILENCE", 0.5)
    monkeypatch.setattr(download_module, "PERIOD", 0.5)
    started = time.monotonic()
    if message is None:  # a length that makes no sense is ignored
        assert download(f"{base}/x", tmp_path / "cache" / "x").read_bytes() == b"abc"
        return
    with pytest.raises(InputError, match=message) as raised:
        download(f"{base}/x", tmp_path / "cache" / "x", limit=1_000_000)
    assert time.monotonic() - started < 8  # such a server needs ten seconds
    assert re.fullmatch(f"{base}/x: .*", str(raised.value))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_known_length_and_sha256_are_checked(serve, tmp_path):
    base, _ = serve({"/x": b"x" * 1000})
    expected = {"size": 999}, {"limit": 999}, {"sha256": "0" * 64}
    for options, message in zip(expected, ("1000 bytes, not 999", "more than 999", "sha256")):
        with pytest.raises(InputError, match=message):
            download(f"{base}/x", tmp_path / "x", **options)
        assert not list(tmp_path.iterdir())
    path = download(f"{base}/x", tmp_path / "x", 1000, hashlib.sha256(b"x" * 1000).hexdigest())
    assert path.read_bytes() == b"x" * 1000 and list(tmp_path.iterdir()) == [path]


def test_https_is_not_left_for_http_not_even_on_the_way(serve, tmp_path, monkeypatch):
    base, files = serve({"/x": b"x" * 1000})
    secure = base.replace("http:", "https:")
    files |= {f"/{i}": redirect(f"{to}/{i + 1}".encode()) for i, to in enumerate([secure, base])}
    files["/2"] = redirect(f"{secure}/x".encode())

    def without_tls(host, timeout, **tls):
        return http.client.HTTPConnection(host, timeout=timeout)

    monkeypatch.setattr(http.client, "HTTPSConnection", without_tls)
    assert download(f"{base}/2", tmp_path / "x").read_bytes() == b"x" * 1000
    for start in (f"{secure}/0", f"{base}/0"):  # one more hop would be https again
        with pytest.raises(InputError, match=f"redirects to {base}/2, which is less safe"):
            download(start, tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_check_sees_the_whole_file_and_the_headers_and_may_change_or_refuse_it(serve, tmp_path):
    base, _ = serve({"/x": b"x" * 1000})

    def change(path, headers):
        assert path.read_bytes() == b"x" * 1000 and headers["Content-Length"] == "1000"
        path.write_bytes(b"y")

    def refuse(path, headers):
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        download(f"{base}/x", tmp_path / "x", check=refuse)
    assert not list(tmp_path.iterdir())
    assert download(f"{base}/x", tmp_path / "x", check=change).read_bytes() == b"y"


def test_of_two_downloads_at_the_same_time_the_second_finds_the_file(serve, tmp_path):
    requests, both = [], threading.Barrier(2)

    def answer(handler):
        requests.append(handler.path)
        time.sleep(0.3)
        drip(OK + b"Content-Length: 5\r\n\r\n", b"whole", 1)(handler)

    def fetch(size):
        both.wait()
        assert download(f"{base}/x", tmp_path / "x", size).read_bytes() == b"whole"

    base, _ = serve({"/x": answer})
    for size in (None, 5):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(fetch, size) for _ in range(2)]:
                done.result()
        assert requests == ["/x"] and [path.name for path in tmp_path.iterdir()] == ["x"]
        requests.clear()
        (tmp_path / "x").write_bytes(b"of another length")
    with pytest.raises(InputError, match="5 bytes, not 6"):
        download(f"{base}/x", tmp_path / "x", 6)


def test_a_folder_or_a_thread_that_cannot_be_had_is_one_line(serve, tmp_path, monkeypatch):
    base, _ = serve({"/x": b"whole"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written.*LOCALIST_CACHE"):
        download(f"{base}/x", tmp_path / "file" / "texts" / "x")

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(InputError, match="could not be downloaded .can't start new thread"):
        download(f"{base}/x", tmp_path / "x")


def test_a_download_removes_what_a_killed_one_left_and_nothing_of_a_live_one(serve, tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    for number in (gone.pid, os.getppid()):
        (tmp_path / f"x.{number}.tmp").write_bytes(b"half")
    base, _ = serve({"/x": b"whole"})
    download(f"{base}/x", tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"x", f"x.{os.getppid()}.tmp"}


def test_a_download_can_be_interrupted(serve, tmp_path, monkeypatch):
    base, _ = serve({"/x": lambda handler: time.sleep(10)})
    # a shell's background job ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            download(f"{base}/x", tmp_path / "x")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
