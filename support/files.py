"""User errors, the one way to write a file, locks, digests, and how a script starts and ends.

Text that comes from a file, a server or a model can contain anything. It reaches a terminal only
through `Terminal`, a message only through `visible`; a value from a file has to pass `fits`.
"""

import ast
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import sys
import unicodedata
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class InputError(ValueError):
    """A mistake of the user. Scripts print it as one line and exit with status 2."""


def run_script(main):
    """Call main(). A user's mistake ends in one line and status 2; SIGINT, SIGTERM and SIGHUP raise
    KeyboardInterrupt(number) in main and end in status 128 + number."""
    sys.stdout = steady(sys.stdout, sys.__stdout__)
    sys.stderr = steady(sys.stderr, sys.__stderr__)
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, interrupt)
    try:
        main()
        sys.stdout.flush()
        if Steady.failed:
            raise InputError(f"part of the output could not be written ({Steady.failed})")
    except (InputError, OSError, RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            e = "out of memory; end other processes, do less at a time, or use another device"
        elif "can't start new thread" in str(e):
            e = "the system allows no more threads; end other processes, or raise ulimit -u"
        elif not isinstance(e, (InputError, OSError)):
            raise
        print(f"error: {visible(str(e), kept='')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch may be slow to end; allow a second one
        sys.exit(128 + next((n for n in e.args if isinstance(n, int)), signal.SIGINT))


def interrupt(number, frame):
    """The signal handler that ends a script like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt(number)


def out_of_memory(error):
    """Whether an exception of torch or of Python means that memory is short."""
    short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return short or "allocate memory" in str(error)  # torch on a CPU, and the system itself


class Steady(io.FileIO):
    """A file whose writes never fail. failed: why one did, unless only its reader had left."""

    failed = ""

    def write(self, content):
        try:
            return super().write(content)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):  # a pipe or terminal without a reader
                Steady.failed = e.strerror
            return len(content)


def steady(stream, original):
    """Wrap standard output or error in a Terminal on which print never fails, even if it is closed,
    full or has no reader, or a character cannot be encoded (then "?"). Return others unchanged."""
    if stream is None:
        return open(os.devnull, "w")
    if stream is not original:
        return stream
    stream.reconfigure(errors="replace")
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # a console of Windows
        return stream
    raw = Steady(raw.fileno(), "w", closefd=False)
    lines, through = stream.line_buffering, stream.write_through
    buffer = raw if through else io.BufferedWriter(raw)
    terminal = Terminal(buffer, stream.encoding, "replace", None, lines, through)
    terminal.shows_progress = original is sys.__stderr__
    return terminal


class Terminal(io.TextIOWrapper):
    """A text stream that writes control characters as, say, \\x1b: a text, a file name or a model
    cannot set the title of a terminal, move its cursor or erase what it shows.

    Tabs and newlines are passed on, and on standard error what tqdm begins a write with.
    """

    progress_or_control = re.compile(r"\A\r|\A(?:\x1b\[A)+\Z|([\x00-\x08\x0b-\x1f\x7f-\x9f])")
    control = re.compile(r"([\x00-\x08\x0b-\x1f\x7f-\x9f])")
    shows_progress = False

    def write(self, text):
        pattern = self.progress_or_control if self.shows_progress else self.control
        escaped = pattern.sub(lambda m: repr(m[0])[1:-1] if m[1] else m[0], text)
        super().write(escaped)
        return len(text)


# characters that change the direction of the text after them
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def visible(text, kept="\n\t"):
    """The text with each character that is invisible or changes the direction as, say, \\u202e,
    except for the characters `kept`. Without newlines, it stays on one line."""
    hidden = {
        c
        for c in set(text) - set(kept)
        if c in TURNS or unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cn", "Co", "Cs")
    }
    return "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in text)


def fits(value, shape):
    """Whether a value that was read from a file has the types that `shape` says.

    shape: a type; None; a tuple of alternatives; [shape] for a list of any length; {key: shape} for
    a dict with these keys and perhaps others; {str: shape} for a dict with any strings as keys. A
    bool is no number.
    """
    if isinstance(shape, tuple):
        return any(fits(value, alternative) for alternative in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if isinstance(shape, dict) and str in shape:
        return isinstance(value, dict) and all(
            isinstance(k, str) and fits(v, shape[str]) for k, v in value.items()
        )
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], kind) for key, kind in shape.items()
        )
    if shape is None:
        return value is None
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))


@contextlib.contextmanager
def writing(path):
    """Turn an error of the system in this block into an InputError about `path`."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        # torch hides the error of the system behind one of its own
        reason = e if isinstance(e, OSError) else e.__context__
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path}: could not be written ({reason.strerror or reason})") from None


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`. If all goes well, it is synced and renamed to `path`,
    which is always a whole file, the old one or the new one. Raises InputError."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.unlink(missing_ok=True)
            temporary.touch(exist_ok=False)  # so that no symlink of that name is followed
            yield temporary
            with open(temporary, "r+b") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all. Raises InputError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write a value as JSON, whole or not at all. Raises InputError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def check_writable(path):
    """Raises InputError if no file can be written at `path`, a Path: before the work is done."""
    too_long = len(os.fsencode(path.name)) > 230  # a temporary name is longer
    if too_long or path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; use a shorter name or a writable folder")


def is_replaceable(path, key):
    """Whether `path`, a Path that ends in .json, is free, or a file of the script that is about to
    write it: a JSON object with this key."""
    try:
        known = not path.exists() or fits(json.loads(read_text(path)), {key: object})
    except (OSError, ValueError, RecursionError):
        known = False
    return known and path.suffix == ".json"


def open_regular(path, flags):
    """The descriptor of an open regular file: os.open, which neither waits for a pipe nor reads a
    device. Raises OSError."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def open_own(path, mode):
    """Open a file in a folder that a stranger may have made, for writing in binary: never through a
    symlink. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    flags |= os.O_APPEND if mode == "ab" else os.O_TRUNC
    return open(path, mode, buffering=0, opener=lambda path, _: open_regular(path, flags))


def read_text(path, limit=1 << 26):
    """The content of a UTF-8 file of at most `limit` bytes. Raises OSError or ValueError."""
    with open(open_regular(path, os.O_RDONLY), "rb") as f:
        content = f.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit:,} bytes")
    return content.decode("utf-8-sig")


def lock(file, wait=False):
    """Hold the lock of an open file or folder until it is closed, here and in child processes.
    Raises BlockingIOError if another process has it (unless `wait`), OSError without locks."""
    if fcntl is None:
        raise OSError("this system has no flock")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def alone(folder):
    """Let one process at a time work in a folder, which is created, and removed if it is empty.

    Yields the file descriptor that holds its lock, or None on Windows. Raises InputError.
    """
    created = [path for path in [folder, *folder.parents] if not path.exists()]
    with writing(folder):
        descriptor = open_locked(folder)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def open_locked(folder, tries=100):
    """Create and open a folder, and wait for its lock, which Windows does not have."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, FileExistsError):
        if not tries:
            raise
        return open_locked(folder, tries - 1)  # another process has just removed it
    try:
        lock(descriptor)
    except BlockingIOError:
        print(f"{folder}: waiting for another process that works there", file=sys.stderr)
        lock(descriptor, wait=True)
    except OSError:
        pass  # a disk without locks
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    os.close(descriptor)  # the process that held the lock has removed the folder
    return open_locked(folder, tries)


@contextlib.contextmanager
def filling(folder, last):
    """Yield an empty folder to work in. If all goes well, its files move to `folder`, the one named
    `last` last: without it, the folder is not complete. Raises InputError."""
    work = folder / f".preparing-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)  # in a container, the next process has the same number
    try:
        with writing(folder):
            work.mkdir()
            yield work
            (folder / last).unlink(missing_ok=True)
            for path in sorted(work.iterdir(), key=lambda path: path.name == last):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_stale(folder, pattern):
    """Remove what killed processes left. pattern: a name with {} for the number of the process."""
    numbered = re.escape(pattern).replace(r"\{\}", "([0-9]+)")
    for path in folder.glob("*") if os.name == "posix" else ():
        try:
            if match := re.fullmatch(numbered, path.name):
                os.kill(int(match[1]), 0)  # signal 0 only checks whether the process exists
        except (ProcessLookupError, OverflowError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
        except OSError:
            pass  # the process belongs to someone else and is alive


def digest(files):
    """sha256 over the content of files, paths or open files, in order: hex digits."""
    total = hashlib.sha256()
    for file in files:
        with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def digest_code(paths, without=()):
    """sha256 over what Python files do. Comments, docstrings, layout, and the top-level functions,
    classes and variables named in `without` do not count."""
    total, documented = hashlib.sha256(), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in paths:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if name_of(node) not in without]
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                del node.body[0]
        total.update(ast.unparse(tree).encode())
    return total.hexdigest()


def name_of(node):
    """The name that a function, a class or `name = value` defines; None for other statements."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return getattr(node, "name", getattr(target, "id", None))


def seal(meta):
    """A copy of a dict with one more key, "sha256": the digest of all other keys as JSON."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    content = json.dumps(rest, sort_keys=True).encode()
    return {**rest, "sha256": hashlib.sha256(content).hexdigest()}


def is_sealed(meta):
    """Whether this is a dict made by `seal` and unchanged since."""
    return isinstance(meta, dict) and meta.get("sha256") == seal(meta)["sha256"]
