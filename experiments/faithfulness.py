"""Is what one reads from a localized model true? Three tests, fixed before the run, and controls.

    python -m experiments.faithfulness configs/faithful_smoke.toml               # in a minute
    python -m experiments.faithfulness configs/faithful_sections.toml --jobs 2
    python -m experiments.faithfulness configs/faithful_sections.toml --report   # only the report

A config is that of a sweep with another table, [faithful], which holds the keys of `Study`. Missing
models are trained as sweep.py trains them. Each model is measured once, into `faithful.npz` in its
folder. After any interruption, the same command resumes. It writes the report to the folder of the
sweep: faithfulness.md, faithfulness.json and two figures.

boundary  Does a sentence of the block change a prediction more than a sentence outside the block
          that is as far away and as long? In doublings of its influence.
pointer   Does a prediction depend on what the last layer attends to? Spearman's correlation over
          the sentences before a token, with distance removed.
leak      What does an output still tell of the text before its block? In bits per token.

All models are measured with the same blocks, the open semantic ones. When text is replaced, the
blocks stay as they were.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from eval import load
from experiments import faithful_measure, faithful_report
from experiments.faithful_measure import contexts_of, measure, starts_of
from locality import schedule
from prepare_data import get_encoding, token_bytes
from report.sweep import read_results
from report.tables import listed
from support import files
from support.files import InputError, run_script, write_json, write_text
from support.machine import pick_device, provenance
from support.run import find_checkpoint
from support.settings import check, key, nearest, usage
from sweep import check_folder, prepare_cell, read_cells, run, take_jobs
from train import read_values


@dataclass
class Study:
    contexts: int = key(16, "contexts, evenly spread over the test split", at_least=2)
    draws: int = key(2, "foreign texts that replace each sentence", at_least=1)
    leak_draws: int = key(16, "foreign texts that replace everything before a block", at_least=2)
    eps: float = key(1e-3, "bits added to an influence before its logarithm", at_least=1e-9)
    first: str = key("quintic semantic", "the model under test")
    second: str = key("distributed", "the model that it is compared with")
    boundary: float = key(0.1, "smallest difference that counts: doublings", at_least=0)
    pointer: float = key(0.02, "smallest difference that counts: correlation", at_least=0)
    leak: float = key(0.005, "smallest difference that counts: bits per token", at_least=0)

    def __post_init__(self):
        check(self)


def read_study(values):
    """The Study in the table [faithful] of a config, which is removed. Raises InputError."""
    table, known = values.pop("faithful", {}), list(Study.__dataclass_fields__)
    if not isinstance(table, dict):
        raise InputError("faithful must be a table, [faithful]")
    for name in table.keys() - set(known):
        raise InputError(f"[faithful]: unknown key {name}; the nearest is {nearest(name, known)}")
    return Study(**table)


# --------------------------------------------------------------------------------------------------
# measuring all models


class Subject(NamedTuple):
    """A model to measure: the weights of a cell, at a dial."""

    name: str
    seed: int
    folder: Path  # of the cell
    schedule: str
    partition: str
    floor: float
    path: Path  # of its measurements


# the keys in which the cells of a study may differ
VARIED = ("schedule", "partition", "floor", "max_lookback", "seed", "out")


def subjects_of(cells, study):
    """The Subjects of a study: a list of all cells, and of `second` with its dial as in `first`.

    cells: {name: Config}. Raises InputError if `first` or `second` is missing, if they share no
    seed, if cells differ in keys that are not in VARIED, or if two have the same name and seed.
    """
    subjects, base = [], asdict(next(iter(cells.values())))
    for cell in cells.values():
        for name, value in asdict(cell).items():
            if name not in VARIED and value != base[name]:
                raise InputError(f"[faithful]: the models of a study must not differ in {name}")
        partition, name = "semantic", cell.schedule
        if cell.schedule != "distributed":
            partition, name = cell.partition, f"{cell.schedule} {cell.partition}"
        dial, folder = (cell.schedule, partition, cell.floor), Path(cell.out)
        subjects.append(Subject(name, cell.seed, folder, *dial, folder / "faithful.npz"))
    by_name = {s.name: s for s in subjects}
    if len({(s.name, s.seed) for s in subjects}) < len(subjects):
        raise InputError("[faithful]: two models have the same schedule, partition and seed")
    for name in (study.first, study.second):
        if name not in by_name:
            raise InputError(f"[faithful]: no model is {name!r}; there are {', '.join(by_name)}")
    first = by_name[study.first]
    seeds = [{s.seed for s in subjects if s.name == name} for name in (study.first, study.second)]
    if not seeds[0] & seeds[1]:
        raise InputError(f"[faithful]: {study.first!r} and {study.second!r} share no seed")
    for s in [s for s in subjects if s.name == study.second]:
        name, path = f"{s.name}, turned to {first.name}", s.folder / "faithful.turned.npz"
        subjects.append(first._replace(name=name, seed=s.seed, folder=s.folder, path=path))
    return subjects


def to_measure(subjects, study, text):
    """The Subjects without valid measurements: {Subject: what they depend on, a dict}.

    text: a sha256. Other weights, another study or other code make measurements invalid.
    """
    code, missing = files.digest_code([faithful_measure.__file__], ()), {}
    for s in subjects:
        about = {name: getattr(study, name) for name in ("contexts", "draws", "leak_draws")}
        about |= {name: getattr(s, name) for name in ("schedule", "partition", "floor")}
        about |= {"text": text, "weights": files.digest([find_checkpoint(s.folder)]), "code": code}
        if read_measured(s.path).get("about") != about:
            missing[s] = about
    return missing


def measure_all(missing, cells, contexts, jobs=1):
    """Measure Subjects, `jobs` at a time. Raises InputError.

    missing: as `to_measure` returns it; cells: {folder: Config}.
    """
    # the number of threads is a setting of each thread
    threads, stop = max(1, torch.get_num_threads() // jobs), []
    bar = tqdm(total=len(missing) * len(contexts), unit="context", disable=None)
    with bar, ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(threads)) as pool:
        running = [
            pool.submit(measure_one, s, about, cells[s.folder], contexts, bar, stop)
            for s, about in missing.items()
        ]
        try:
            for future in running:
                future.result()
        except BaseException:  # after Ctrl-C too, finished measurements are kept
            stop.append(True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_one(subject, about, cell, contexts, bar, stop):
    """Measure a Subject and write its file. It stops early when the list `stop` is not empty.

    about: a dict, written to the file as well; cell: its Config.
    """
    device = pick_device(cell.device)
    model, *_ = load(subject.folder, device)
    locality = schedule(subject.schedule, model.config.n_layer, subject.floor)
    model.set_locality(locality)
    data = prepare_cell(cell, data="", partition=subject.partition)
    _, lookback = data.split("test")
    arrays = {}
    for c, context in enumerate(contexts):
        if stop:
            return
        start = starts_of(lookback, context.place, len(context.tokens) - 1)
        # `distributed` has no blocks that could move
        again = context.again.get(subject.partition) if any(locality) else None
        for name, values in measure(model, context, start, again).items():
            arrays[f"{name}.{c}"] = values
        bar.set_postfix_str(f"{subject.name}, seed {subject.seed}", refresh=False)
        bar.update()
    facts = {"about": about, "made": provenance(device, subject.seed)}
    facts = {name: json.dumps(value) for name, value in facts.items()}
    with files.replacing(subject.path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **facts, **arrays)


def read_measured(path):
    """The file that `measure_one` wrote, a dict; {} if there is none.

    It has an array "NAME.CONTEXT" for each measure and context, `about`, what the measurements
    depend on, and `made`, their provenance. Raises InputError if it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = {name: json.loads(str(stored[name])) for name in ("about", "made")}
            return {**stored, **facts}
    except FileNotFoundError:
        return {}
    except Exception as e:  # zipfile, zlib and numpy each raise their own errors
        raise InputError(f"{path} is damaged ({e}); delete it and run the command again") from None


def write_report(folder, subjects, contexts, study):
    """Write the report to the folder of the sweep. Raises InputError."""
    frames, summaries, made = faithful_report.frames_of(contexts), [], []
    for s in tqdm(subjects, desc="counting", leave=False, disable=None):
        measured = read_measured(s.path)
        summaries.append(faithful_report.summarize(measured, frames, study.eps))
        made.append(measured["made"])
    results = faithful_report.analyze(subjects, summaries, frames, asdict(study))
    runs = [read_results(s.folder / "results.json") for s in subjects]
    about = provenance(torch.device("cpu"), None)
    about["seeds"] = listed(s.seed for s in subjects)
    about |= {f"measured: {name}": listed(m[name] for m in made) for name in ("device", "commit")}
    about["measured: dates"] = " … ".join(sorted({m["date"][:10] for m in made}))
    about["trained: commit"] = listed(r["commit"] for r in runs)
    about["base"] = listed(r["config"]["init_from"] for r in runs)
    results["about"] = {name: value for name, value in about.items() if name != "seed"}
    text = faithful_report.report_text(results)
    write_json(folder / "faithfulness.json", results)
    write_text(folder / "faithfulness.md", text)
    faithful_report.draw_distance(results, folder / "faithfulness_distance.png")
    faithful_report.draw_pointers(results, folder / "faithfulness_pointers.png")
    print(text)
    print(f"table: {folder / 'faithfulness.md'}, and .json, _distance.png, _pointers.png beside it")


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    only_report = "--report" in sys.argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys of [faithful]:\n{usage(Study)}")
        return
    jobs = take_jobs(argv)
    values = read_values(argv, more=("sweep", "faithful"))
    study, out = read_study(values), Path(values["out"])
    check_folder(out)
    cells = read_cells(values)
    subjects = subjects_of(cells, study)
    cells_in = {Path(cell.out): cell for cell in cells.values()}
    with files.alone(out) as held:
        broken = {} if only_report else run(cells, jobs, held)
        for name, why in broken.items():
            print(f"broken: {name}: {why}", file=sys.stderr)
        if broken:
            sys.exit(1)
        model, *_ = load(subjects[0].folder)
        cell = cells_in[subjects[0].folder]
        vocabulary = token_bytes(get_encoding(cell.tokenizer))
        contexts, text = contexts_of(cell, study, model.config.block_size, vocabulary)
        missing = to_measure(subjects, study, text)
        if missing and only_report:
            raise InputError(f"{len(missing)} models are not measured yet; leave out --report")
        measure_all(missing, cells_in, contexts, jobs or 1)
        write_report(out, subjects, contexts, study)


if __name__ == "__main__":
    run_script(main)
