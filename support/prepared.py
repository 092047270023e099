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
from support.files import InputError, fits
from support.sentences import N_WORD_IDS
from support.sources import left_out, source_files

SPLITS = ("train", "val", "test")
FILES = [f"{split}{end}" for split in SPLITS for end in (".bin", ".lookback.bin")]

# what identifies a prepared text, in meta.json and in a checkpoint
TEXT = {
    "source_sha256": str,
    "files": dict.fromkeys(FILES, str),
    "background": (None, {"total": int, "words": [int], "counts": [int]}),
}
NUMBER = (int, float)
META = {
    **TEXT,
    "source": (str, [str]),
    "tokenizer": str,
    "partition": str,
    "max_lookback": int,
    "vocab_size": int,
    "plain": bool,
    "splits": dict.fromkeys(SPLITS, {"tokens": int, "bytes": int, "mean_lookback": NUMBER}),
}
# what the statistics of a split may contain as well
STATISTICS = {"blocks": int, "block_length_quartiles": [NUMBER], "lag": NUMBER, "forced": NUMBER}


class Prepared:
    """A prepared folder. Raises InputError if its metadata is missing or damaged."""

    def __init__(self, folder):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.arrays = {}

    def split(self, name):
        """Token ids and lookbacks of a split, two uint16 memory maps of the same length; of "all",
        the splits in order, two arrays.

        Raises InputError unless both files are, byte for byte, what was prepared: a stale lookback
        would quietly train and measure another model.
        """
        if name == "all":
            return tuple(map(np.concatenate, zip(*map(self.split, SPLITS))))
        if name in self.arrays:
            return self.arrays[name]
        arrays = []
        for path in (self.folder / f"{name}.bin", self.folder / f"{name}.lookback.bin"):
            try:
                with open(path, "rb") as f:
                    same = files.digest([f]) == self.meta["files"][path.name]
                    # map what was checked, even if another file has this name by now
                    arrays.append(np.memmap(f, np.uint16, "r") if same else None)
            except (OSError, ValueError) as e:
                raise InputError(
                    f"{path} cannot be read ({e}); delete the folder and prepare it again"
                ) from None
            if not same:
                raise InputError(
                    f"{path} was changed, damaged or replaced after it was prepared; delete the "
                    "folder and prepare it again"
                )
        self.arrays[name] = tuple(arrays)
        return self.arrays[name]

    def identity(self):
        """What a checkpoint remembers of its text, so that a run is measured only on that text."""
        return {name: self.meta[name] for name in ("source_sha256", "files", "background")}


def open_or_build(folder, recipe, cwd, build, fetch=True):
    """The prepared folder of a recipe, built if it is missing or stale.

    recipe: a dict of what the content depends on, "source" among them; cwd: where relative sources
    start; fetch: whether a source may be downloaded. build(paths, work) writes the arrays of the
    text files `paths` to the folder `work` and returns what else meta.json says, a dict, with the
    "source_sha256" of what it read. If the text is missing, what was prepared from it is enough. If
    several processes ask for the same folder, one builds it and the others wait.
    Raises InputError for a source that is not a text or if the folder cannot be written; then
    nothing new is left behind.
    """
    try:
        paths = source_files(recipe["source"], cwd, fetch)
        recipe = {**recipe, "source_sha256": files.digest(paths)}
    except (InputError, OSError) as missing:
        if stale_because(folder, recipe):
            raise
        print(
            f"{missing}; using what was prepared in {folder}, which could not be compared with "
            "the text",
            file=sys.stderr,
        )
        return Prepared(folder)
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
    names = {path.name for path in folder.iterdir()}
    left = {
        name for name in names if name.startswith(".preparing-")
    }  # by a process that was killed
    others = names - {*FILES, "meta.json"} - left
    # the names train.bin, val.bin and meta.json are those of other tools, too
    if others or names and not left and not names & {f"{split}.lookback.bin" for split in SPLITS}:
        raise InputError(
            f"{folder} contains files that were not prepared here ({min(others or names)}); "
            "prepare the text in a folder of its own"
        )
    files.remove_stale(folder, ".preparing-{}")
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
        tokens = {name: meta["splits"][name.split(".")[0]]["tokens"] for name in FILES}
        complete = all((folder / name).stat().st_size == 2 * n for name, n in tokens.items())
    except (InputError, OSError) as e:
        return str(e)
    titles = {"source_sha256": "text", "code_sha256": "version of the code that prepares it"}
    changed = [titles.get(key, key) for key, value in recipe.items() if meta.get(key) != value]
    if changed:
        return f"it was prepared with a different {', '.join(changed)}"
    return "" if complete else "a file has the wrong length"


def read_meta(folder):
    """meta.json as a dict. Raises InputError if it is missing or is not what was written."""
    path = Path(folder, "meta.json")
    try:
        meta = json.loads(files.read_text(path))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: there is no prepared data (no meta.json); run prepare_data.py"
        ) from None
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged; delete the folder") from None
    if not files.is_sealed(meta):
        raise InputError(f"{path} was edited or damaged; delete the folder")
    if not (
        fits(meta, META) and is_identity(meta) and all(map(are_statistics, meta["splits"].values()))
    ):
        raise InputError(f"{path} is not what prepare_data.py writes; delete the folder")
    return meta


def are_statistics(split):
    """Whether this can be what report.blocks.block_stats returned for a split."""
    counted = fits(split, {key: shape for key, shape in STATISTICS.items() if key in split})
    quartiles = split.get("block_length_quartiles", [0, 0, 0])
    return counted and len(quartiles) == 3 and min(split["tokens"], split["bytes"]) > 0


def is_identity(text):
    """Whether this is what `Prepared.identity` returned, and perhaps more."""
    return fits(text, TEXT) and (text["background"] is None or is_background(text["background"]))


def is_background(background):
    """Whether this is what locality.count_background returned."""
    if not fits(background, TEXT["background"][1]):
        return False
    words, counts = background["words"], background["counts"]
    in_range = all(0 <= word < N_WORD_IDS for word in words) and all(n >= 0 for n in counts)
    return in_range and len(words) == len(counts) and background["total"] > 0


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
        raise InputError(
            f"{prepared.folder} was prepared from another text than this run was trained on, and "
            f"{prepared.meta['source']} is missing; put the text back"
        )
    before, now = trained_on["files"], prepared.meta["files"]
    names = [name for name in now if before.get(name) != now[name]]
    if any("lookback" not in name for name in names):
        raise InputError(
            f"{prepared.folder} has different tokens ({', '.join(names)}): the tokenizer has "
            "changed since this run was trained; use the version of the code that trained it"
        )
    if names:
        raise InputError(
            f"{prepared.folder} has different blocks ({', '.join(names)}): the partitioner has "
            "changed since this run was trained; use the version of the code that trained it"
        )


def changed(source):
    return InputError(
        f"{source} has changed since this run was trained on it; put the old text back"
    )


def text_digest(source, cwd):
    """sha256 of the text of a source; None if it is not here, or cannot be read."""
    try:
        return files.digest(source_files(source, cwd, fetch=False))
    except (InputError, OSError):
        return None


def data_digest(folder):
    """sha256 of the text that a folder was prepared from; None if there is none."""
    try:
        return read_meta(folder)["source_sha256"]
    except InputError:
        return None
