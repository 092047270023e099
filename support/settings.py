"""Settings: a dataclass of `key` fields, filled from a TOML file and the command line, checked."""

import contextlib
import difflib
import json
import math
import shlex
import tomllib
from dataclasses import asdict, field, fields
from pathlib import Path

from support.files import InputError, read_text

# what a value of each type may be in TOML, and the name of the type in messages
TYPES = {
    str: ((str,), "a string"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    int | None: ((int, type(None)), "a whole number"),
    str | list: ((str, list), "a string or a list of strings"),
    str | bool: ((str, bool), 'true, false or "auto"'),
}


def key(default, meaning, at_least=None, below=None, one_of=None):
    """A field of a settings dataclass: its default, its meaning, and the values it accepts."""
    rules = {"meaning": meaning, "at_least": at_least, "below": below, "one_of": one_of}
    return field(default=default, metadata=rules)


def check(config):
    """Check every field against its type and range; make floats of whole numbers in float fields.
    Raises InputError, which names the key."""
    for f in fields(config):
        value, (types, expected) = getattr(config, f.name), TYPES[f.type]
        if not isinstance(value, types) or isinstance(value, bool) and bool not in types:
            given = "a table" if isinstance(value, dict) else json.dumps(value, default=str)
            raise InputError(f"{f.name} must be {expected}, not {given}")
        limit = math.inf if isinstance(value, float) else 2**63
        if isinstance(value, (int, float)) and not abs(value) < limit:
            raise InputError(f"{f.name} must be a finite number of reasonable size, not {value}")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise InputError(f"{f.name} contains characters that cannot be printed: {text!r}")
            if isinstance(text, str) and text.startswith("~"):
                raise InputError(f"{f.name}: write the name of the home folder instead of {text}")
        if f.type is float:
            setattr(config, f.name, float(value))
        low, below, one_of = (f.metadata[rule] for rule in ("at_least", "below", "one_of"))
        if None not in (value, low) and value < low:
            raise InputError(f"{f.name} must be at least {low}, not {value}")
        if None not in (value, below) and value >= below:
            raise InputError(f"{f.name} must be below {below}, not {value}")
        if one_of and value not in one_of:
            choices = ", ".join(map(json.dumps, one_of))
            raise InputError(f"{f.name} must be one of {choices}, not {json.dumps(value)}")


def nearest(word, known):
    """The known word that is most like `word`."""
    return difflib.get_close_matches(str(word), list(known), 1, 0.0)[0]


def read(kind, argv, more=()):
    """The keys that a command line, `CONFIG.toml [--key value ...]`, sets: a dict. kind: the
    dataclass. more: further keys that the file may have. Raises InputError for an unknown key."""
    path, known = Path(argv[0]), [f.name for f in fields(kind)]
    try:
        values = tomllib.loads(read_text(path, limit=100_000))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:  # not TOML, not UTF-8, or too many open brackets
        raise InputError(f"{path}: not a TOML file: {e}") from None
    if "sweep" in values and "sweep" not in more:
        command = f"python sweep.py {shlex.quote(str(path))}"
        raise InputError(f"{path} describes a sweep, not a run; run all its cells with: {command}")
    for name in values.keys() - {*known, *more}:
        raise InputError(f"{path}: unknown key {name}; the nearest is {nearest(name, known)}")
    return {**values, **read_flags(kind, argv[1:])}


def read_flags(kind, words):
    """The keys that `--key value`, `--key=value`, or `--key` for true, set: a dict. Its values are
    not checked yet. Raises InputError for an unknown key and for one without a value."""
    types, values = {f.name: f.type for f in fields(kind)}, {}
    words = [part for w in words for part in (w.split("=", 1) if w.startswith("--") else [w])]
    while words:
        flag, *words = words
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name not in types:
            raise InputError(f"unknown key --{name}; the nearest is --{nearest(name, types)}")
        if name in values:
            raise InputError(
                f"--{name} is given twice; several sources are one list, as in "
                """--source '["a.txt", "b.txt"]'"""
                if name == "source"
                else f"--{name} is given twice; give it once"
            )
        no_value = not words or words[0].startswith("--")
        if flag.startswith("--") and types[name] is bool and no_value:
            values[name] = True  # --plain is short for --plain true
        elif not flag.startswith("--") or not words:
            raise InputError(f"{flag}: every key needs exactly one value, as in --key value")
        else:
            text, *words = words
            values[name] = parse(text, types[name])
    return values


def parse(text, kind):
    """A word of the command line as a TOML value, or the word itself if it is not one."""
    if kind is str or kind == str | list and not text.startswith("["):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        return tomllib.loads(f"value = {text}")["value"]
    for number in (int, float) if kind in (int, int | None, float) else ():
        with contextlib.suppress(ValueError):
            return number(text)  # such as .5, which TOML does not allow
    return text  # `check` names what the value should have been


def to_toml(config):
    """The config as TOML with every key, so that a run folder documents all settings of the run."""
    # JSON writes numbers, booleans, lists and strings like TOML
    items = [(name, value) for name, value in asdict(config).items() if value is not None]
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in items)


def usage(kind):
    """Two lines for every key: its name, type and default; then its meaning."""
    lines = []
    for f in fields(kind):
        default = "none" if f.default is None else json.dumps(f.default)
        lines.append(f"  --{f.name}: {TYPES[f.type][1]}; default {default}")
        lines.append(f"        {f.metadata['meaning']}")
    return "\n".join(lines)
