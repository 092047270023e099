"""Shared by the tests: a web server, a finished run, and scripts that run in this process."""

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
from model import GPT, GPTConfig  # noqa: E402
from support import files  # noqa: E402
from support.files import InputError  # noqa: E402
from support.prepared import read_meta  # noqa: E402
from support.tokenizers import get_encoding  # noqa: E402


def pytest_collection_finish():
    """If forks.py is used, start the process that it copies, which imports torch meanwhile."""
    if "forks" in sys.modules:
        forkserver.ensure_running()


def pytest_terminal_summary(terminalreporter):
    """The size of every file of the lesson, so that growth is seen."""
    sizes = {path.name: len(path.read_text().splitlines()) for path in sorted(ROOT.glob("*.py"))}
    listed = ", ".join(f"{name} {lines}" for name, lines in sizes.items())
    terminalreporter.write_line(f"lines of the lesson: {listed}; {sum(sizes.values())} in all")


@pytest.fixture
def serve():
    """A web server on 127.0.0.1: serve({path: bytes}) -> (address, that dict, which may change).

    A value (bytes, length) announces another length than it sends. A function is called with the
    handler. None or a missing path is a 404.
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
    """file_size(n): no file can grow longer than n bytes, as on a full disk. None: any length."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if n is None else n, before[1]))

    yield limit
    limit(None)


@pytest.fixture
def threads():
    """threads(n): torch uses n threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return get_encoding("gpt2")
    except InputError:
        pytest.skip("the gpt2 tokenizer is not cached on this machine")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder of weights that train.py never saw: a small GPT with GPT-2's vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    GPT(GPTConfig(50257, 64, n_layer=1, n_head=2, n_embd=48)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def code_is_digested_once():
    """The code does not change during the tests: hundreds of preparations share its digest."""
    known = functools.cache(files.digest_code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "digest_code", lambda paths, without=(): known(tuple(paths), without))
        yield


# --------------------------------------------------------------------------------------------------
# scripts: in a process of their own, as a user runs them, or in this one; for a third way see
# forks.py


def flags(**values):
    """The words of a command line that sets these keys."""
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A working folder with the sample text; runs/tiny is a finished run of configs/tiny.toml.

    It ran in a process of its own, as a user runs it. Its stdout and stderr, which were not a
    terminal, are in printed.txt and errors.txt.
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
    """The prepared data of the run of configs/tiny.toml."""
    folders = (place / "data").glob("sample.bytes.semantic.1000.*")
    (folder,) = (path for path in folders if not read_meta(path)["plain"])
    return folder


def script_here(name, *args):
    """Run a script in this process. Returns the exit status.

    A run of train.py has pictures and ends with a sample of 300 bytes, which take longer than a
    short training. Here there are no pictures and the sample is short; the run in `place` has all.
    """
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / name), *map(str, args)])
        if name == "train.py":
            generate = sample.generate

            def generate_few(model, prompts, n, *args, **options):
                return generate(model, prompts, 9, *args, **options)

            patch.setattr("sample.generate", generate_few)
            for picture in ("eval.figure", "view.quick_page", "report.plots.draw_loss"):
                patch.setattr(picture, lambda *args, **options: None)
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            return 0
        except SystemExit as e:
            return e.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def run(place, monkeypatch, capsys):
    """script_here in the folder `place`: run(script, …) -> (status, stdout, stderr)."""
    monkeypatch.chdir(place)
    return lambda name, *args: (script_here(name, *args), *capsys.readouterr())


@pytest.fixture
def train(place, run):
    """train(name, key=value, …): a whole run of configs/tiny.toml with these values.

    Returns its folder, runs/NAME.
    """

    def start(name, **values):
        status, _, error = run("train.py", TINY, *flags(out=f"runs/{name}", **values))
        assert status == 0, error
        return place / "runs" / name

    return start
