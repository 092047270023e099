"""Is what one reads from a localized model true? Tests, fixed before the run, and controls.

    python -m experiments.faithfulness configs/faithful_smoke.toml               # in a minute
    python -m experiments.faithfulness configs/faithful_sections.toml --jobs 2
    python -m experiments.faithfulness configs/faithful_sections.toml --report   # only the report

A config is that of a sweep with another table, [faithful], which holds the keys of `Study`. Missing
models are trained as sweep.py trains them, and each is measured once, into `faithful.npz` in its
folder. After any interruption, the same command resumes. The report is in the folder of the sweep.

boundary  Does a sentence of the block change a prediction more than a sentence outside the block
          that is as far away and as long? In doublings of its influence.
pointer   Does a prediction depend on what the last layer attends to? Spearman's correlation over
          the sentences of a token's block, with distance removed.
leak      What does an output still tell of the text before its block? In bits per token.

All models are measured with the same blocks, the open semantic ones, which stay as they were when
text is replaced.
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

import model
import view
from eval import load
from experiments import faithful_measure, faithful_report
from experiments.faithful_measure import contexts_of, measure, starts_of
from experiments.faithful_report import BASE
from fast import attention
from locality import schedule
from report import excerpt
from report.sweep import read_results
from report.tables import listed
from support import files
from support.files import InputError, run_script, write_json, write_text
from support.jobs import take_jobs
from support.machine import pick_device, provenance
from support.run import find_checkpoint
from support.settings import check, key, nearest, usage
from support.tokenizers import get_encoding, token_bytes
from sweep import check_folder, prepare_cell, read_cells, read_sweep, run
from train import Config


# what view.py defines besides `influence` and what that needs
OF_THE_PAGE = ("page", "quick_page", "everything", "own_text", "given_text", "turns", "main")


@dataclass
class Study:
    contexts: int = key(16, "contexts, evenly spread over the test split", at_least=2)
    draws: int = key(2, "foreign texts that replace each sentence", at_least=1)
    leak_draws: int = key(16, "foreign texts that replace everything before a block", at_least=2)
    eps: float = key(1e-3, "bits added to an influence before its logarithm", at_least=1e-9)
    first: str = key("quintic semantic", "the model under test")
    second: str | list = key("distributed", "the models that it is compared with")
    boundary: float = key(0.1, "smallest difference that counts: doublings", at_least=0)
    pointer: float = key(0.02, "smallest difference that counts: correlation", at_least=0)
    leak: float = key(0.005, "smallest difference that counts: bits per token", at_least=0)

    def __post_init__(self):
        check(self)
        second = self.second if isinstance(self.second, list) else [self.second]
        self.second = [str(name) for name in second]
        if not second or len({self.first, *self.second}) < 1 + len(second):
            raise InputError("second must name at least one model, none twice, and not first")


def read_study(values):
    """The Study in the table [faithful] of a config, which is removed. Raises InputError."""
    table, known = values.pop("faithful", {}), list(Study.__dataclass_fields__)
    if not isinstance(table, dict):
        raise InputError("faithful must be a table, [faithful]")
    for name in table.keys() - set(known):
        raise InputError(f"[faithful]: unknown key {name}; the nearest is {nearest(name, known)}")
    return Study(**table)


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
    """The Subjects of a study: a list of all cells, Configs, and of `distributed` with its dial as
    in `first`. Raises InputError for cells that cannot be compared."""
    subjects, base = [], asdict(cells[0])
    for cell in cells:
        for name, value in asdict(cell).items():
            if name not in VARIED and value != base[name]:
                raise InputError(f"[faithful]: the models of a study must not differ in {name}")
        partition, name = "semantic", cell.schedule
        if cell.schedule != "distributed":
            partition, name = cell.partition, f"{cell.schedule} {cell.partition}"
        dial, folder = (cell.schedule, partition, cell.floor), Path(cell.out)
        subjects.append(Subject(name, cell.seed, folder, *dial, folder / "faithful.npz"))
    if len({(s.name, s.seed) for s in subjects}) < len(subjects):
        raise InputError("[faithful]: two models have the same schedule, partition and seed")
    names, first = {s.name for s in subjects}, [s for s in subjects if s.name == study.first]
    for name in [study.first, *study.second]:
        if name not in names:
            raise InputError(f"[faithful]: no model is {name!r}; there are {listed(names)}")
        seeds = {s.seed for s in subjects if s.name == name}
        if not {s.seed for s in first} & seeds:
            raise InputError(f"[faithful]: {study.first!r} and {name!r} share no seed")
    for s in [s for s in subjects if s.name == BASE]:
        name, path = f"{s.name}, turned to {study.first}", s.folder / "faithful.turned.npz"
        subjects.append(first[0]._replace(name=name, seed=s.seed, folder=s.folder, path=path))
    return subjects


def to_measure(subjects, study, text):
    """The Subjects without valid measurements: {Subject: what they depend on, a dict}. text: a
    sha256. Other weights, another study or other code make measurements invalid."""
    modules = faithful_measure, excerpt, model, attention, view
    code, missing = files.digest_code([module.__file__ for module in modules], OF_THE_PAGE), {}
    for s in subjects:
        about = {name: getattr(study, name) for name in ("contexts", "draws", "leak_draws")}
        about |= {name: getattr(s, name) for name in ("schedule", "partition", "floor")}
        about |= {"text": text, "weights": files.digest([find_checkpoint(s.folder)]), "code": code}
        if read_measured(s.path).get("about") != about:
            missing[s] = about
    return missing


def measure_all(missing, cells, contexts, jobs=1):
    """Measure Subjects and write their files, `jobs` contexts at a time. missing: as `to_measure`
    returns it; cells: {folder: Config}. Raises InputError."""
    # the number of threads is a setting of each thread
    options = {"initializer": torch.set_num_threads}
    options["initargs"] = (max(1, torch.get_num_threads() // jobs),)
    bar = tqdm(total=len(missing) * len(contexts), unit="context", disable=None)
    with bar, ThreadPoolExecutor(jobs, **options) as pool:
        for s, about in missing.items():
            bar.set_postfix_str(f"{s.name}, seed {s.seed}", refresh=False)
            device = pick_device(cells[s.folder].device)
            model, *_ = load(s.folder, device)
            model.set_locality(schedule(s.schedule, model.config.n_layer, s.floor))
            data = prepare_cell(cells[s.folder], data="", partition=s.partition)
            _, lookback = data.split("test")
            start = [starts_of(lookback, c.place, len(c.tokens) - 1) for c in contexts]
            # `distributed` has no blocks that could move
            again = [c.again.get(s.partition) if any(model.locality) else None for c in contexts]
            facts = {"about": about, "made": provenance(device, s.seed)}
            arrays = {name: json.dumps(value) for name, value in facts.items()}
            each = pool.map(measure, [model] * len(contexts), contexts, start, again)
            for c, measured in enumerate(each):
                arrays |= {f"{name}.{c}": values for name, values in measured.items()}
                bar.update()
            with files.replacing(s.path) as temporary, open(temporary, "wb") as f:
                np.savez_compressed(f, **arrays)


def read_measured(path):
    """The file of a Subject: {"NAME.CONTEXT": array of a measure, "about": what it depends on,
    "made": its provenance}, or {} if there is none. Raises InputError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = {name: json.loads(str(stored[name])) for name in ("about", "made")}
            return {**stored, **facts}
    except FileNotFoundError:
        return {}
    except Exception as e:  # zipfile, zlib and numpy each raise their own errors
        raise InputError(f"{path} is damaged ({e}); delete it and run the command again") from None


def write_report(folder, subjects, frames, study):
    """Write the report to the folder of the sweep. frames: a Frame for each context. Raises
    InputError."""
    summaries, made = [], []
    for s in tqdm(subjects, desc="counting", leave=False, disable=None):
        measured = read_measured(s.path)
        summaries.append(faithful_report.summarize(measured, frames, study.eps))
        made.append(measured["made"])
    results = faithful_report.analyze(subjects, summaries, frames, asdict(study))
    runs = [read_results(s.folder / "results.json", Config) for s in subjects]
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
    print(f"{text}\ntable: {folder / 'faithfulness.md'}, and .json, _distance.png, _pointers.png")


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    only_report = "--report" in sys.argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys of [faithful]:\n{usage(Study)}")
        return
    jobs = take_jobs(argv)
    values = read_sweep(argv, more=("sweep", "faithful"))
    study, out = read_study(values), Path(values["out"])
    check_folder(out)
    cells = read_cells(values)
    subjects = subjects_of(list(cells.values()), study)
    with files.alone(out) as held:
        broken = {} if only_report else run(cells, jobs, held)
        for name, why in broken.items():
            print(f"broken: {name}: {why}", file=sys.stderr)
        if broken:
            sys.exit(1)
        cells = {Path(cell.out): cell for cell in cells.values()}
        model, config, _ = load(subjects[0].folder)
        vocabulary = token_bytes(get_encoding(config["tokenizer"]))
        T, cell = model.config.block_size, cells[subjects[0].folder]
        contexts, text = contexts_of(cell, study, T, vocabulary)
        frames = faithful_report.frames_of(contexts)
        missing = to_measure(subjects, study, text)
        if missing and only_report:
            raise InputError(f"{len(missing)} models are not measured yet; leave out --report")
        measure_all(missing, cells, contexts, jobs or 1)
        write_report(out, subjects, frames, study)


if __name__ == "__main__":
    run_script(main)
