"""Is what one reads from a localised model true? Three outcomes, fixed before the run; controls.

    python -m experiments.faithfulness configs/faithful_smoke.toml               # in a minute
    python -m experiments.faithfulness configs/faithful_sections.toml --jobs 2
    python -m experiments.faithfulness configs/faithful_sections.toml --report   # count again

A config is that of a sweep, with one more table, [faithful]: the keys of `Study`. Models that are
missing are trained, as sweep.py does it. Each is measured once, into `faithful.npz` in its folder.
The same command goes on after any stop. The report, in the folder of the sweep: faithfulness.md,
faithfulness.json and two figures.

boundary  Does a sentence of the block change a prediction more than one outside of it, as far away
          and as long? In doublings of its influence.
pointer   Where the last layer looks, is that what the prediction depends on? Spearman's correlation
          over the sentences before a token, with the distance removed.
leak      What does an output still tell of the text before its block? In bits a token.

All models are asked about the same blocks, the open semantic ones. While the text is replaced, the
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

from eval import load_run
from experiments import faithful_measure
from experiments.faithful_measure import contexts_of, measure, starts_of
from experiments.faithful_report import (
    analyse,
    draw_distance,
    draw_pointers,
    frames_of,
    summarise,
    tables,
)
from locality import schedule
from prepare_data import get_encoding, prepared, read_split, token_bytes
from support.files import (
    InputError,
    alone,
    digest,
    digest_code,
    replacing,
    run_script,
    write_json,
    write_text,
)
from support.machine import pick_device, provenance
from support.report import read_results
from support.run import find_checkpoint
from support.settings import check, key, nearest, usage
from sweep import check_folder, read_cells, run, take_jobs
from train import read_values


@dataclass
class Study:
    contexts: int = key(16, "stretches of the test split, as long as a context", at_least=2)
    draws: int = key(2, "foreign texts in place of a sentence", at_least=1)
    leak_draws: int = key(16, "foreign texts in place of all before a block", at_least=2)
    eps: float = key(1e-3, "bits added to an influence before its logarithm", at_least=1e-9)
    first: str = key("quintic semantic", "the model that the tests are about")
    second: str = key("distributed", "the model that it is compared with")
    boundary: float = key(0.1, "a smaller difference is none: doublings of influence", at_least=0)
    pointer: float = key(0.02, "a smaller difference is none: correlation", at_least=0)
    leak: float = key(0.005, "a smaller difference is none: bits a token", at_least=0)

    def __post_init__(self):
        check(self)


def read_study(values):
    """The Study in the table [faithful] of a config, which is taken out. Raises InputError."""
    table, known = values.pop("faithful", {}), list(Study.__dataclass_fields__)
    if not isinstance(table, dict):
        raise InputError("faithful must be a table, [faithful]")
    for name in table.keys() - set(known):
        raise InputError(f"[faithful]: unknown key {name}; the nearest is {nearest(name, known)}")
    return Study(**table)


# --------------------------------------------------------------------------------------------------
# measuring all of them


class Subject(NamedTuple):
    """A model to measure: the weights of a cell, at a dial."""

    name: str
    seed: int
    folder: Path  # of the cell
    schedule: str
    partition: str
    fidelity: float
    path: Path  # of what is measured


# what the cells of a study may differ in
FREE = ("schedule", "partition", "fidelity", "max_lookback", "seed", "out")


def subjects_of(cells, study):
    """The Subjects of a study, a list: each cell; and `second`, its dial turned to that of `first`.

    cells: {name: Config}. Raises InputError where one of the two is missing, or where cells differ
    in more than FREE, or cannot be told apart by their names.
    """
    subjects, some = [], asdict(next(iter(cells.values())))
    for cell in cells.values():
        other = [name for name, x in asdict(cell).items() if name not in FREE and x != some[name]]
        if other:
            raise InputError(f"[faithful]: the models of a study do not differ in {other[0]}")
        local, folder = cell.schedule != "distributed", Path(cell.out)
        partition = cell.partition if local else "semantic"
        name = f"{cell.schedule} {partition}" if local else cell.schedule
        how = cell.schedule, partition, cell.fidelity, folder / "faithful.npz"
        subjects.append(Subject(name, cell.seed, folder, *how))
    names = {s.name: s for s in subjects}
    if len({(s.name, s.seed) for s in subjects}) < len(subjects):
        raise InputError("[faithful]: two models differ neither in schedule nor in partition")
    for name in (study.first, study.second):
        if name not in names:
            raise InputError(f"[faithful]: no model is {name!r}; there are {', '.join(names)}")
    first = names[study.first]
    for s in [s for s in subjects if s.name == study.second]:
        name, path = f"{s.name}, turned to {first.name}", s.folder / "faithful.turned.npz"
        subjects.append(first._replace(name=name, seed=s.seed, folder=s.folder, path=path))
    return subjects


def to_measure(subjects, study, text):
    """Which Subjects are not measured yet: {Subject: what is asked of it, a dict}.

    text: a sha256. Other weights, another question or other code: it is measured again.
    """
    code, missing = digest_code([faithful_measure.__file__]), {}
    for s in subjects:
        about = {name: getattr(study, name) for name in ("contexts", "draws", "leak_draws")}
        about |= {"text": text, "weights": digest([find_checkpoint(s.folder)]), "code": code}
        about |= {name: getattr(s, name) for name in ("schedule", "partition", "fidelity")}
        if read_measured(s.path).get("about") != about:
            missing[s] = about
    return missing


def measure_all(missing, configs, contexts, device, jobs=1):
    """Measure Subjects, `jobs` at a time. Raises InputError.

    missing: as `to_measure` gives it; configs: {folder of a cell: its config, a dict}.
    """
    # each thread has a number of threads of its own
    threads, stop = max(1, torch.get_num_threads() // jobs), []
    bar = tqdm(total=len(missing) * len(contexts), unit="context", disable=None)
    with bar, ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(threads)) as pool:
        how = contexts, device, bar, stop
        jobs = [(s, about, configs[s.folder], *how) for s, about in missing.items()]
        running = [pool.submit(measure_one, *job) for job in jobs]
        try:
            for future in running:
                future.result()
        except BaseException:  # Ctrl-C: what is finished is kept
            stop.append(True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_one(subject, about, config, contexts, device, bar, stop):
    """Write what `measure` finds of a Subject into its file. stop: a list; not empty, it stops.

    about: a dict, to be written there too; config: of its cell, a dict.
    """
    model, _ = load_run(subject.folder, device)
    lambdas = schedule(subject.schedule, model.config.n_layer, subject.fidelity)
    model.set_locality(lambdas)
    folder, found = prepared({**config, "partition": subject.partition, "data": ""}), {}
    lookback = read_split(folder, "test")[1]
    for c, context in enumerate(contexts):
        if stop:
            return
        start = starts_of(lookback, context.place, len(context.tokens) - 1)
        # `distributed` has no blocks to find
        again = context.again.get(subject.partition) if any(lambdas) else None
        for name, values in measure(model, context, start, again).items():
            found[f"{name}.{c}"] = values
        bar.set_postfix_str(f"{subject.name}, seed {subject.seed}", refresh=False)
        bar.update()
    known = {"about": about, "made": provenance(device, subject.seed)}
    known = {name: json.dumps(value) for name, value in known.items()}
    with replacing(subject.path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **known, **found)


def read_measured(path):
    """What `measure_all` wrote, a dict; {} where there is none.

    Arrays "NAME.CONTEXT"; about: what was asked, of which weights; made: when, where and by what.
    Raises InputError where it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            known = {name: json.loads(str(found[name])) for name in ("about", "made")}
            return {**found, **known}
    except FileNotFoundError:
        return {}
    except Exception as e:  # zipfile, zlib and numpy each raise their own
        raise InputError(f"{path} is damaged ({e}); delete it, and it is measured again") from None


def report(folder, subjects, contexts, study):
    """Count, and write the report into the folder of the sweep."""
    frames, summaries, made = frames_of(contexts), [], []
    for s in tqdm(subjects, desc="counting", leave=False, disable=None):
        found = read_measured(s.path)
        summaries.append(summarise(found, frames, study.eps))
        made.append(found["made"])
    results = analyse(subjects, summaries, frames, asdict(study))
    runs = [read_results(s.folder / "results.json") for s in subjects]
    about = provenance(torch.device("cpu"), None)
    about["seeds"] = ", ".join(map(str, sorted({s.seed for s in subjects})))
    for name in ("device", "commit"):
        about[f"measured: {name}"] = ", ".join(sorted({m[name] for m in made}))
    about["measured: dates"] = " … ".join(sorted({m["date"][:10] for m in made}))
    about["trained: commit"] = ", ".join(sorted({r["commit"] for r in runs}))
    about["base"] = ", ".join(sorted({r["config"]["init_from"] for r in runs}))
    results["about"] = {key: value for key, value in about.items() if key != "seed"}
    text = tables(results)
    write_json(folder / "faithfulness.json", results)
    write_text(folder / "faithfulness.md", text)
    draw_distance(results, folder / "faithfulness_distance.png")
    draw_pointers(results, folder / "faithfulness_pointers.png")
    print(text)
    print(f"table: {folder / 'faithfulness.md'}, and .json, _distance.png, _pointers.png beside it")


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    only_count = "--report" in sys.argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys of [faithful]:\n{usage(Study)}")
        return
    jobs = take_jobs(argv)
    values = read_values(argv, more=("sweep", "faithful"))
    study, out, broken = read_study(values), Path(values["out"]), {}
    check_folder(out)
    cells = read_cells(values)
    subjects = subjects_of(cells, study)
    configs = {Path(cell.out): asdict(cell) for cell in cells.values()}
    with alone(out) as held:
        if not only_count:
            broken = run(cells, jobs, held)
        for name, why in broken.items():
            print(f"broken: {name}: {why}", file=sys.stderr)
        if broken:
            sys.exit(1)
        model, config = load_run(subjects[0].folder)
        vocabulary = token_bytes(get_encoding(config["tokenizer"]))
        config, T = configs[subjects[0].folder], model.config.block_size
        contexts, text = contexts_of(config, study, T, vocabulary)
        missing = to_measure(subjects, study, text)
        if missing and only_count:
            raise InputError(f"{len(missing)} models are not measured yet; leave out --report")
        measure_all(missing, configs, contexts, pick_device(config["device"]), jobs or 1)
        report(out, subjects, contexts, study)


if __name__ == "__main__":
    run_script(main)
