"""What test files share: a web server, a finished run, and scripts run within this process."""

import functools
import os
import runpy
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.toml"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread makes small models slower

import support  # before torch: it sets what torch reads when it is loaded  # noqa: E402, F401
import torch  # noqa: E402

import sample  # noqa: E402
from prepare_data import get_encoding  # noqa: E402
from support import files  # noqa: E402
from support.files import InputError  # noqa: E402


def pytest_collection_finish():
    """Where forks are used, the process that they are copies of imports torch from now on."""
    if "forks" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture
def serve():
    """A web server on 127.0.0.1: serve({path: bytes}) -> (address, that dict, which may change).

    A value (bytes, length) announces another length than it sends. A function is given the handler,
    and does as it likes. None or a missing path is a 404.
    """
    servers = []

    def start(files):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = files.get(self.path)
                if content is None:
                    return self.send_error(404)
                if callable(content):
                    return content(self)
                content, length = content if isinstance(content, tuple) else (content, len(content))
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", files

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def file_size():
    """file_size(n): no file may grow longer than n bytes, as on a full disk. None: any length."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if n is None else n, before[1]))

    yield limit
    limit(None)


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return get_encoding("gpt2")
    except InputError:
        pytest.skip("the gpt2 tokenizer is not cached on this machine")


@pytest.fixture(scope="session", autouse=True)
def code_is_digested_once():
    """The code does not change while it is tested: hundreds of preparations share its digest."""
    known = functools.cache(files.digest_code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "digest_code", lambda paths, without: known(tuple(paths), without))
        yield


# --------------------------------------------------------------------------------------------------
# scripts: as a user starts them, or within this process; for a third way see forks.py


def flags(**values):
    """The words of a command line that give these keys their values."""
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A working folder with the sample text; runs/tiny is a finished run of configs/tiny.toml.

    It ran as a user starts it. What it wrote to stdout and stderr, which are not a terminal, is in
    printed.txt and errors.txt.
    """
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    (folder / "data" / "sample.txt").symlink_to(ROOT / "data" / "sample.txt")
    with open(folder / "printed.txt", "wb") as out, open(folder / "errors.txt", "wb") as errors:
        command = [sys.executable, ROOT / "train.py", TINY]
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=errors, timeout=240)
    assert done.returncode == 0, (folder / "errors.txt").read_text()
    return folder


def prepared_folder(place):
    """Where the run of configs/tiny.toml has put its data."""
    (folder,) = (place / "data").glob("sample.bytes.semantic.128.*")
    return folder


def script_here(name, *args):
    """Run a script within this process. Returns the status.

    What ends a run of train.py, a figure and a sample of 300 bytes, takes longer than a short
    training. Here there is no figure and the sample is short; the run in `place` has both.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / name), *map(str, args)])
        if name == "train.py":
            generate = sample.generate

            def generate_few(model, prompts, n, *more, **options):
                return generate(model, prompts, 9, *more, **options)

            patch.setattr("sample.generate", generate_few)
            patch.setattr("eval.figure", lambda *args, **more: None)
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            return 0
        except SystemExit as e:
            return e.code or 0
        finally:
            signal.signal(signal.SIGINT, on_interrupt)


@pytest.fixture
def run(place, monkeypatch, capsys):
    """The same in the folder `place`: run(script, …) -> (status, stdout, stderr)."""
    monkeypatch.chdir(place)
    return lambda name, *args: (script_here(name, *args), *capsys.readouterr())


@pytest.fixture
def train(place, run):
    """train(name, key=value, …): a whole run of configs/tiny.toml with other values.

    Returns its folder, runs/NAME.
    """

    def start(name, **values):
        status, _, error = run("train.py", TINY, *flags(out=f"runs/{name}", **values))
        assert status == 0, error
        return place / "runs" / name

    return start


@pytest.fixture
def threads():
    """threads(n): torch computes with n threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
