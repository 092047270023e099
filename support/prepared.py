"""The prepared folder and its one owner: it builds, seals, locks, checks and reads it.

A prepared folder holds

    train.bin val.bin test.bin                              token ids, uint16
    train.lookback.bin val.lookback.bin test.lookback.bin   tokens back to the block's start, uint16
    meta.json                                               the recipe, statistics, the background
                                                            words, and the sha256 of every file
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from support import files
from support.files import InputError
from support.sources import left_out, source_files

SPLITS = ("train", "val", "test")


class Prepared:
    """A prepared folder. Raises InputError if its metadata is missing or damaged."""

    def __init__(self, folder):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.arrays = {}

    def split(self, name):
        """Token ids and lookbacks of a split, two uint16 memory maps of the same length.

        Raises InputError unless both files are, byte for byte, what was prepared: a stale lookback
        would quietly train and measure another model.
        """
        if name in self.arrays:
            return self.arrays[name]
        arrays = []
        for path in (self.folder / f"{name}.bin", self.folder / f"{name}.lookback.bin"):
            try:
                same = files.digest([path]) == self.meta["files"][path.name]
            except OSError as e:
                raise InputError(
                    f"{path} cannot be read ({e.strerror}); delete the folder and prepare it again"
                ) from None
            if not same:
                raise InputError(
                    f"{path} was changed, damaged or replaced after it was prepared; delete the "
                    "folder and prepare it again"
                )
            arrays.append(np.memmap(path, np.uint16, "r"))
        self.arrays[name] = tuple(arrays)
        return self.arrays[name]

    def identity(self):
        """What a checkpoint remembers of its text, so that a run is measured only on that text."""
        return {name: self.meta[name] for name in ("source_sha256", "files", "background")}


def open_or_build(folder, recipe, cwd, build):
    """The prepared folder of a recipe, built if it is missing or stale.

    recipe: a dict of what the content depends on, "source" among them; cwd: where relative sources
    start. build(paths, work) writes the arrays of the text files `paths` to the folder `work` and
    returns what else meta.json says, a dict, with the "source_sha256" of what it read. If the text
    is missing, what was prepared from it is enough. If several processes ask for the same folder,
    one builds it and the others wait.
    Raises InputError for a source that is not a text or if the folder cannot be written; then
    nothing new is left behind.
    """
    try:
        paths = source_files(recipe["source"], cwd)
    except InputError as missing:
        if stale_because(folder, recipe):
            raise
        print(
            f"{missing}; using what was prepared in {folder}, which could not be compared with "
            "the text",
            file=sys.stderr,
        )
        return Prepared(folder)
    recipe = {**recipe, "source_sha256": files.digest(paths)}
    files.remove_stale(folder, ".preparing-{}")
    if stale_because(folder, recipe):
        with files.alone(folder):
            if reason := stale_because(folder, recipe):  # no other process has built it meanwhile
                for line in left_out(recipe["source"], cwd):
                    print(line, file=sys.stderr)
                fill(folder, recipe, reason, lambda work: build(paths, work))
    prepared = Prepared(folder)
    for name, value in recipe.items():
        if prepared.meta[name] != value:
            raise InputError(
                f"{folder} has just been prepared with {name} = {prepared.meta[name]!r} by another "
                "process; give each run a data folder of its own"
            )
    return prepared


def fill(folder, recipe, reason, build):
    """Build a folder or rebuild it. reason: why its present content is stale. Raises InputError."""
    ours = {f"{split}{end}" for split in SPLITS for end in (".bin", ".lookback.bin")}
    for path in folder.iterdir():
        if path.name not in (*ours, "meta.json") and not path.name.startswith(".preparing-"):
            raise InputError(
                f"{folder} contains files that were not prepared here ({path.name}); prepare the "
                "text in a folder of its own"
            )
    if (folder / "meta.json").exists():
        print(f"rebuilding {folder}: {reason}")
    with files.filling(folder, last="meta.json") as work:
        built = build(work)
        if built["source_sha256"] != recipe["source_sha256"]:
            raise InputError(
                f"{recipe['source']} changed while it was being prepared; run the command again"
            )
        digests = {path.name: files.digest([path]) for path in sorted(work.iterdir())}
        files.write_json(work / "meta.json", files.seal({**recipe, **built, "files": digests}))


def new_array(path, n):
    """A new memory map of n uint16 with its disk space allocated: on a full disk this raises an
    OSError, where a write to the map would kill the process."""
    with open(path, "wb") as f:
        f.truncate(2 * n)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, 2 * n)
    return np.memmap(path, np.uint16, "r+")


def stale_because(folder, recipe):
    """Why this folder is not a complete one made by this recipe; "" if it is one."""
    try:
        meta = read_meta(folder)
        tokens = {name: meta["splits"][name.split(".")[0]]["tokens"] for name in meta["files"]}
        complete = all((folder / name).stat().st_size == 2 * n for name, n in tokens.items())
    except (InputError, OSError) as e:
        return str(e)
    titles = {"source_sha256": "text", "code_sha256": "version of the code that finds blocks"}
    changed = [titles.get(key, key) for key, value in recipe.items() if meta.get(key) != value]
    if changed:
        return f"it was prepared with another {', '.join(changed)}"
    return "" if complete else "a file has another length"


def read_meta(folder):
    """meta.json as a dict. Raises InputError if it is missing or is not what was written."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{folder}: there is no prepared data (no meta.json); run prepare_data.py"
        ) from None
    except (ValueError, RecursionError):
        raise InputError(f"{folder}/meta.json is damaged; delete the folder") from None
    if not files.is_sealed(meta):
        raise InputError(f"{folder}/meta.json was edited or damaged; delete the folder")
    return meta


# --------------------------------------------------------------------------------------------------
# the text that a run was trained on


def find_cwd(source, data, trained_on):
    """Where the relative paths of a run start: where it was started, or here if its text is here.

    source, data: of the run's config; trained_on: what its checkpoint says of its text. Raises
    InputError if the text has changed.
    """
    expected, known = trained_on["source_sha256"], []
    places = {place: text_digest(source, place) for place in (trained_on["cwd"], "")}
    for place, digest in places.items():
        if expected in (digest, data_digest(Path(place, data))):
            known.append(place)
    cwd = known[0] if known else trained_on["cwd"]
    if places[cwd] not in (expected, None):
        raise changed(source)
    return cwd


def check_identity(prepared, trained_on):
    """Raises InputError unless this is the text, with the tokens and blocks, of a run."""
    if prepared.meta["source_sha256"] != trained_on["source_sha256"]:
        raise changed(prepared.meta["source"])  # its text is missing, and another is prepared
    before, now = trained_on["files"], prepared.meta["files"]
    names = [name for name in now if before.get(name) != now[name]]
    if any("lookback" not in name for name in names):
        raise InputError(
            f"{prepared.folder} has other tokens ({', '.join(names)}): the tokenizer has changed "
            "since this run was trained; use the version of the code that trained it"
        )
    if names:
        raise InputError(
            f"{prepared.folder} has other blocks ({', '.join(names)}): the partitioner has changed "
            "since this run was trained; use the version of the code that trained it"
        )


def changed(source):
    return InputError(
        f"{source} has changed since this run was trained on it; put the old text back"
    )


def text_digest(source, cwd):
    """sha256 of the text of a source; None if it is missing."""
    try:
        return files.digest(source_files(source, cwd))
    except InputError:
        return None


def data_digest(folder):
    """sha256 of the text that a folder was prepared from; None if there is none."""
    try:
        return read_meta(folder)["source_sha256"]
    except InputError:
        return None
