"""Settings: one dataclass, filled from a TOML file and the command line, with types and ranges.

@dataclass
class Config:
    batch_size: int = key(8, "contexts in one forward pass", at_least=1)

    def __post_init__(self):
        check(self)

config = Config(**read(Config, ["my.toml", "--batch_size", "4"]))
"""

import difflib
import json
import math
import tomllib
from dataclasses import asdict, field, fields
from pathlib import Path

from support.files import InputError

# what a value of each type may be in TOML, and how we call it
KINDS = {
    str: ((str,), "a string"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    int | None: ((int, type(None)), "a whole number"),
    str | list: ((str, list), "a string or a list of strings"),
    str | bool: ((str, bool), 'true, false or "auto"'),
}

# keys of an earlier version, with the only value that still means something; see docs/LOG.md
RETIRED = {"min_lookback": 0, "dial": "blend"}
# keys that an earlier version did not have, with the value that means what it did
ADDED = {"joined": False}


def lost(config):
    """The retired keys that mattered in a config of an earlier version, a dict: a list of names."""
    return [name for name, only in RETIRED.items() if config.get(name, only) != only]


def key(default, meaning, at_least=None, below=None, one_of=None):
    """A field of a settings dataclass: its default, what it means, and what it may be."""
    rules = {"meaning": meaning, "at_least": at_least, "below": below, "one_of": one_of}
    return field(default=default, metadata=rules)


def check(config):
    """Hold every field to its type and its range. Whole numbers in float fields become floats.

    Raises InputError, which names the key.
    """
    for f in fields(config):
        value, (types, words) = getattr(config, f.name), KINDS[f.type]
        if not isinstance(value, types) or isinstance(value, bool) and bool not in types:
            raise InputError(f"{f.name} must be {words}, not {json.dumps(value, default=str)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{f.name} must be a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise InputError(f"{f.name} must be a number of reasonable size")
        if isinstance(value, str) and value and not value.isprintable():
            raise InputError(f"{f.name} holds characters that cannot be written: {value!r}")
        if f.type is float:
            setattr(config, f.name, float(value))
        low, below, one_of = (f.metadata.get(rule) for rule in ("at_least", "below", "one_of"))
        if value is not None and low is not None and value < low:
            raise InputError(f"{f.name} must be at least {low}, not {value}")
        if value is not None and below is not None and value >= below:
            raise InputError(f"{f.name} must be below {below}, not {value}")
        if one_of and value not in one_of:
            shown = ", ".join(json.dumps(choice) for choice in one_of)
            raise InputError(f"{f.name} must be one of {shown}, not {json.dumps(value)}")


def nearest(word, known):
    """The known word that is most like `word`."""
    return difflib.get_close_matches(str(word), list(known), 1, 0.0)[0]


def read(kind, argv, more=()):
    """The keys that a command line, `CONFIG.toml [--key value ...]`, sets: a dict.

    kind: the dataclass. more: names of keys in the file that it does not know.
    Raises InputError for what cannot be read, and for an unknown key.
    """
    path = Path(argv[0])
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:  # not TOML, not UTF-8, or brackets without end
        raise InputError(f"{path}: not a TOML file: {e}") from None
    types, in_file = {f.name: f.type for f in fields(kind)}, set(values)
    rest = [word for a in argv[1:] for word in (a.split("=", 1) if a.startswith("--") else [a])]
    for flag, text in zip(rest[::2], rest[1::2] + [None] * (len(rest) % 2)):
        if not flag.startswith("--") or text is None:
            raise InputError(f"{flag}: every key needs one value, --key value")
        name = flag[2:].replace("-", "_")
        values[name] = parse(text, types.get(name))
    for name in values.keys() - types.keys() - set(more):
        if name not in RETIRED:
            where = f"{path}: unknown key {name}" if name in in_file else f"unknown key --{name}"
            raise InputError(f"{where}; the nearest known one is {nearest(name, types)}")
        if values.pop(name) != RETIRED[name]:
            only = json.dumps(RETIRED[name])
            raise InputError(f"{name} has left this version, which has {only} alone: docs/LOG.md")
    return values


def parse(text, kind):
    """A word of the command line as a value of TOML; the word itself where it is none."""
    if kind is str or kind == str | list and not text.startswith("["):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # `check` says what it should have been


def to_toml(config):
    """The config as TOML, every key written out, so that a run folder says all of what was run."""
    lines = []
    for name, value in asdict(config).items():
        if value is not None:  # JSON writes numbers, booleans, lists and strings as TOML does
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def usage(kind):
    """Two lines for every key: its name, type and default; then its meaning."""
    lines = []
    for f in fields(kind):
        default = "none" if f.default is None else json.dumps(f.default)
        lines.append(f"  --{f.name}: {KINDS[f.type][1]}; default {default}")
        lines.append(f"        {f.metadata['meaning']}")
    return "\n".join(lines)
