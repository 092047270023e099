"""How a script starts and ends, and who may write where."""

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from forks import started
from support.files import (
    InputError,
    alone,
    fits,
    is_replaceable,
    open_own,
    read_text,
    visible,
    write_json,
)
from support.run import MADE, check_free

PRINTS = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from support.files import run_script

def main():
    print("… ▌ ±")
    print("… ▌ ±", file=sys.stderr)
    for i in range(20000):
        print(i)
    open("done", "w").close()

run_script(main)
"""


def shell(command, folder, **environment):
    """Run a bash command in a folder, with prints.py in it."""
    (folder / "prints.py").write_text(PRINTS, encoding="utf-8")
    environment = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True)


ENDS = ["", "2>&1 >out", "| head -1", "2>&1 | head -1"]
ENDS += [">&- 2>&-", "<&- >&- 2>&-", "latin1", "latin1 2>&1 >out"]


@pytest.mark.parametrize("end", ENDS)
def test_no_print_ends_a_script(end, tmp_path):
    """Whether nobody reads the output, it is closed, or the console cannot show a character."""
    code, line = ("latin1", "? ? ±") if "latin1" in end else ("utf-8", "… ▌ ±")
    command = f"{sys.executable} prints.py {end.replace('latin1', '')}; exit ${{PIPESTATUS[0]}}"
    done = shell(command, tmp_path, PYTHONIOENCODING=code)
    assert done.returncode == 0 and (tmp_path / "done").exists()
    expected = [] if ">&-" in end else [line]
    assert done.stdout.decode(code).splitlines()[:1] == expected
    assert done.stderr.decode(code).splitlines() == ([] if "2>" in end else expected)


HOSTILE = "\x1b]0;title\x07 \x9b31m red \r over \x00 \x1b[A"


def test_what_is_printed_never_controls_the_terminal(tmp_path):
    """A text, a name or a model may contain control characters. tqdm's own still work."""
    (tmp_path / "shows.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from support.files import InputError, run_script
from tqdm import tqdm

def main():
    for stream in (sys.stdout, sys.stderr):
        print({HOSTILE!r}, file=stream)
    print("\\r")  # also at the beginning of a write
    for i in tqdm(range(2)):
        for j in tqdm(range(2), leave=False):
            pass
    raise InputError({HOSTILE!r} + "\\nanother line")

run_script(main)
""")
    done = subprocess.run([sys.executable, "shows.py"], cwd=tmp_path, capture_output=True)
    shown = rb"\x1b]0;title\x07 \x9b31m red \r over \x00 \x1b[A"
    assert done.returncode == 2 and done.stdout == shown + b"\n\\r\n"
    first, *bars, last = done.stderr.split(b"\n")[:-1]
    assert first == shown and last == b"error: " + shown + rb"\nanother line"
    assert re.fullmatch(rb"[^\x00-\x1f\x7f]*", re.sub(rb"\r|\x1b\[A", b"", b"".join(bars)))
    assert b"\x1b[A\r" in b"".join(bars)


def test_visible_leaves_no_character_that_hides_breaks_the_line_or_turns_the_text():
    every = "".join(map(chr, range(0x3000)))
    assert visible(every, kept="").isprintable() or not re.search(
        r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", visible(every, kept="")
    )
    assert visible("a\nb\tc é語 \udce9") == "a\nb\tc é語 \\udce9"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("options", ["", "-u"])
def test_a_full_disk_behind_the_output_is_reported_at_the_end(options, tmp_path):
    done = shell(f"{sys.executable} {options} prints.py >/dev/full", tmp_path)
    assert done.returncode == 2 and (tmp_path / "done").exists()
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("error: part of the output could not be written (No space")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path):
    code = "import support, os; f = open('file', 'w'); os.write(9, str(f.fileno()).encode())"
    shell(f'{sys.executable} -c "{code}" 9>out <&- >&- 2>&-', tmp_path, PYTHONPATH=str(ROOT))
    assert int((tmp_path / "out").read_text()) > 2


def test_every_script_starts_and_ends_in_one_way():
    scripts = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    scripts = [text for text in scripts if 'if __name__ == "__main__":' in text]
    assert len(scripts) >= 5
    for text in scripts:
        assert re.search(r'\nif __name__ == "__main__":\n    (files\.)?run_script\(main\)\n$', text)
        assert re.search(r"^(?:import|from) .*", text, re.M)[0].startswith("import support")


LOADS = """
import sys, time
class Watch:
    def find_spec(name, *more):
        if name == "torch":
            print("loading", flush=True)
sys.meta_path.insert(0, Watch)
import support, model
time.sleep(60)
"""


@pytest.mark.parametrize("seconds", [0, 0.3, 0.6, 1.2])
def test_ctrl_c_while_a_script_loads_prints_nothing(seconds):
    command, pipe = [sys.executable, "-c", LOADS], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "loading\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and error == ""


ADDS = """if True:
    import os, sys, time
    from pathlib import Path
    from support.files import alone
    while not Path("go").exists():
        time.sleep(0.001)
    for i in range(500):
        with alone(Path(f"a{i % 3}/b/c")):
            names = os.listdir(f"a{i % 3}/b/c")
            assert names in ([], ["kept"]), names
            Path(f"a{i % 3}/b/c/mine").touch()
            time.sleep(0.0001)
            while i == 0 and not any("waiting" in p.read_text() for p in Path().glob("*.txt")):
                time.sleep(0.001)
            os.unlink(f"a{i % 3}/b/c/mine")
            if i == 499:
                Path(f"a{i % 3}/b/c/kept").touch()
    print("whole")
"""


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    (tmp_path / "adds.py").write_text(ADDS)
    with contextlib.ExitStack() as stack:
        names = [f"{i}.txt" for i in range(3)]
        adds = [started(tmp_path / "adds.py", cwd=tmp_path, output=name) for name in names]
        processes = [stack.enter_context(process) for process in adds]
        time.sleep(0.5)
        (tmp_path / "go").touch()
        for process in processes:
            process.join(60)
    printed = [(tmp_path / name).read_text() for name in names]
    assert all(text.endswith("whole\n") for text in printed), printed
    assert any("b/c: waiting for another process" in text for text in printed)
    assert os.listdir(tmp_path / "a1/b/c") == ["kept"]


def test_an_empty_folder_is_removed_with_the_parents_created_for_it(tmp_path):
    with pytest.raises(InputError), alone(tmp_path / "a" / "b"):
        raise InputError
    assert not (tmp_path / "a").exists() and tmp_path.exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be written"), alone(tmp_path / "file"):
        pass


BEGUN = {"metrics.jsonl": "{}\n", "config.toml": MADE}
OTHER = {"metrics.jsonl": '{"epoch": 1}\n', "config.toml": "mine = 1"}
FOLDERS = [
    (None, True, True),
    ({}, True, True),
    ({"metrics.jsonl": ""}, True, True),  # the disk was full at once
    ({"metrics.jsonl": "", "config.toml.7.tmp": "se"}, True, True),  # or it was killed
    ({**BEGUN, "best.pt": ""}, True, True),
    ({**BEGUN, "best.pt.7.tmp": ""}, True, True),
    ({"notes.2024.tmp": ""}, False, False),  # not a temporary file of ours
    ({**BEGUN, "last.pt": ""}, False, True),
    ({**BEGUN, "metrics.jsonl": "{}\n{}\n"}, False, True),
    ({**BEGUN, "results.json": "{}"}, False, True),
    (OTHER, False, False),  # the same names, written by another program
    ({**OTHER, "best.pt": "", "results.json": "{}"}, False, False),
    ({**BEGUN, "last.pt": None}, False, False),  # a folder
    ({"my.toml": "seed = 2"}, False, False),
    ({"config.toml": "", "model.py": ""}, False, False),
    ({"metrics.jsonl": "{}\n"}, False, False),  # of something else
    ("a file", False, False),
]


@pytest.mark.parametrize("content, free, replaceable", FOLDERS)
def test_a_run_takes_only_a_free_folder_or_that_of_a_run(content, free, replaceable, tmp_path):
    folder = tmp_path / "out"
    if isinstance(content, str):
        folder.write_text(content)
    elif content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).mkdir() if text is None else (folder / name).write_text(text)
    refused = pytest.raises(InputError, match="give another --out")
    for allowed, overwrite in ((free, False), (replaceable, True)):
        with contextlib.nullcontext() if allowed else refused:
            check_free(folder, overwrite)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_only_regular_files_are_read_and_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "victim", tmp_path / "link")
    (tmp_path / "victim").write_text("precious")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError):
            read_text(path)
    for mode in ("ab", "wb"):
        for name in ("pipe", "link"):
            with pytest.raises(OSError):
                open_own(tmp_path / name, mode)
    assert read_text(tmp_path / "link") == "precious"
    with pytest.raises(ValueError, match="longer than 3 bytes"):
        read_text(tmp_path / "victim", limit=3)


def test_a_file_is_not_written_through_a_symlink_of_its_temporary_name(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    os.symlink(precious, tmp_path / f"x.json.{os.getpid()}.tmp")
    write_json(tmp_path / "x.json", {"a": 1})
    assert precious.read_text() == "precious" and not (tmp_path / "x.json").is_symlink()
    assert os.listdir(tmp_path) in (["x.json", "precious"], ["precious", "x.json"])


FITS = [
    (1, int, True),
    (True, int, False),
    (True, (bool, None), True),
    (None, (int, None), True),
    (1.5, (int, None), False),
    ([1, 2], [int], True),
    ([], [int], True),
    ([1, "2"], [int], False),
    ((1, 2), [int], False),
    ({"a": 1, "b": "more"}, {"a": int}, True),
    ({"b": 1}, {"a": int}, False),
    ({"x": ["y"]}, {str: (str, [str])}, True),
    ({1: "y"}, {str: str}, False),
    ([("a", 1)], {"a": int}, False),
    ({"a": {"b": [None]}}, {"a": {"b": [None]}}, True),
]


@pytest.mark.parametrize("value, shape, fit", FITS)
def test_a_value_fits_the_types_of_a_shape(value, shape, fit):
    assert fits(value, shape) == fit


REPLACED = {"free.json": None, "ours.json": '{"run": "x"}'}
KEPT = {
    "last.pt": None,
    "x.json": '{"a": 1}',
    "list.json": '["walk", "run"]',
    "n.json": "3",
    "no.json": "run",
}


@pytest.mark.parametrize("name", [*REPLACED, *KEPT])
def test_results_replace_only_results(name, tmp_path):
    content = {**REPLACED, **KEPT}[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    assert is_replaceable(tmp_path / name, "run") == (name in REPLACED)


def test_without_a_home_the_cache_is_in_the_working_directory(monkeypatch):
    path = str(ROOT / "support" / "download.py")
    for name in ("LOCALIST_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", {}.__getitem__)  # KeyError
    assert runpy.run_path(path)["CACHE"] == Path(".cache", "localist-gpt")
    monkeypatch.setenv("HOME", "")
    assert runpy.run_path(path)["CACHE"] == Path(".cache", "localist-gpt")
    monkeypatch.setenv("HOME", "/home/a~b")
    assert runpy.run_path(path)["CACHE"] == Path("/home/a~b/.cache/localist-gpt")
