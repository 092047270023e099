"""Exercise 4: train a tiny model with the blocks of `syllable` in lesson/exercises.py.

    python -m lesson.leak

One check is switched off here. prepare_data.py reads the first tokens of every text twice, all at
once and one by one, and refuses a partition if the lookbacks differ. This script shows what that
check protects you from. The prepared text is thrown away, so that a changed `syllable` is read.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import sys
import tempfile

import prepare_data
import train
from lesson.exercises import syllable
from locality import PARTITIONS, Partition
from support.files import run_script


def main():
    PARTITIONS["syllable"] = Partition(syllable)
    prepare_data.check_causal = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        settings = {"partition": "syllable", "data": f"{folder}/data", "out": "runs/syllable"}
        settings |= {"max_steps": 300, "log_interval": 100}
        flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        sys.argv[1:] = ["configs/tiny.toml", *flags, "--overwrite"]
        train.main()


if __name__ == "__main__":
    run_script(main)
