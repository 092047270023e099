"""The run folder and its one owner: the lock, metrics, checkpoints, divergence.

A run folder contains

    config.toml      every key of the config
    metrics.jsonl    a line per `log_interval` steps, and one per evaluation of the validation split
    best.pt last.pt  checkpoints: the model with the best validation loss; all the next step needs
    results.json     the scores of the best model on the test split, written at the end
    attention.png    a figure of its attention
    loss.png         the losses and the learning rate so far
    page.html        a page of the validation split, renewed during training
    view-*.html      pages that view.py has written
    diverged.json    only if the run diverged: the step, and which numbers were not finite
"""

import contextlib
import errno
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from support.files import InputError, fits, lock, open_own, write_json, write_text, writing
from support.machine import code_version
from support.prepared import is_identity
from support.settings import to_toml
from support.weights import CHECKPOINTS, first_file, load, save

RESULTS = "results.json diverged.json attention.png loss.png page.html best.pt last.pt".split()
OURS = "|".join(map(re.escape, ("config.toml", *RESULTS)))
TEMPORARY = re.compile(rf"({OURS}|view-.*\.html)\.[0-9]+\.tmp")
MADE = "# the config of a run of train.py\n"  # the first line of config.toml

# What a checkpoint contains; last.pt has more. text: what Prepared.identity returned; cwd: where
# relative paths start, in the file relative to the run folder; code: the versions of the code that
# trained the model, joined by "+".
CHECKPOINT = {
    "step": int,
    "val_loss": float,
    "code": str,
    "config": {str: (str, int, float, bool, None, [str])},
    "text": dict,
    "cwd": str,
    "model": {str: torch.Tensor},
    "model_config": {str: (int, float, bool)},
}
# attributes of Run that are in last.pt
COUNTS = {"step": int, "evals_since_best": int, "metrics_bytes": int}
COUNTS |= {"val_loss": float, "best_loss": float, "seconds": float}


class Diverged(Exception):
    """A number of the training is no longer finite. step: when; values: {name: number}."""

    def __init__(self, step, values):
        super().__init__(step, values)
        self.step, self.values = step, values


def check_finite(step, **values):
    """Raises Diverged unless all the values, numbers by name, are finite."""
    if not all(map(math.isfinite, values.values())):
        raise Diverged(step, values)


def read_checkpoint(path):
    """A checkpoint written by `Run`, a dict, with "cwd" as seen from here ("" if it is here).
    Raises InputError for any other file."""
    state = load(path)
    try:
        if not (fits(state, CHECKPOINT) and is_identity(state["text"])):
            raise TypeError
        cwd = (Path(path).parent.resolve() / state["cwd"]).resolve()
    except (TypeError, ValueError, OSError, RuntimeError):  # a path with NUL, or too long
        raise InputError(f"{path}: not a checkpoint of train.py") from None
    return {**state, "cwd": "" if cwd == Path.cwd() else str(cwd)}


def find_checkpoint(folder):
    """The path of the best checkpoint in a run folder. Raises InputError if there is none."""
    if path := first_file(folder, CHECKPOINTS):
        return path
    raise InputError(f"{folder}: no checkpoint here; a run is a folder that train.py has written")


def is_run(folder):
    """Whether a folder contains a checkpoint."""
    return first_file(folder, CHECKPOINTS) is not None


def check_free(folder, overwrite=False):
    """Raises InputError unless a new run may use this folder. A run that ended before its first
    last.pt may be replaced; with `overwrite`, any run may."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give another --out")
    names = {path.name for path in folder.glob("*") if not TEMPORARY.fullmatch(path.name)}
    metrics = folder / "metrics.jsonl"
    n_lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    begun = {"config.toml", metrics.name} <= names and is_ours(folder / "config.toml")
    begun = begun or names == {metrics.name} and not n_lines
    if names and not begun or any((folder / name).is_dir() for name in (*RESULTS, metrics.name)):
        raise InputError(f"{folder} contains files that do not belong to a run; give another --out")
    if not overwrite and (n_lines > 1 or names & {"last.pt", "results.json"}):
        raise InputError(
            f"{folder} contains a run: --resume or --overwrite it, or give another --out"
        )


def is_ours(config):
    """Whether a run of train.py wrote this config.toml."""
    return config.is_file() and config.read_text("utf-8", "replace").startswith(MADE)


def check_resumable(folder):
    """Raises InputError unless there is a run in this folder that can be resumed."""
    if not (folder / "last.pt").is_file():
        raise InputError(
            f"{folder}: there is no last.pt to resume from; start the run again, or give the "
            "folder of another one: python train.py runs/NAME --resume"
        )


def check_same_run(folder, config, may_change):
    """Raises InputError if the run in this folder has made more steps than this config, a
    dataclass, allows, or had another config, except for the keys that may change."""
    state = read_checkpoint(folder / "last.pt")
    before, now = state["config"], asdict(config)
    names = [name for name in now if name not in may_change and before.get(name) != now[name]]
    changes = "; ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in names)
    if changes:
        raise InputError(
            f"{folder} cannot be resumed with another config ({changes}); only "
            f"{', '.join(sorted(may_change - {'out'}))} may change"
        )
    done, limit = state["step"], config.max_steps
    if limit < done:
        raise InputError(f"{folder} has already run {done} steps; max_steps ({limit}) is smaller")
    check_best(folder / "best.pt", state, may_change)


def check_best(path, last, may_change):
    """Raises InputError unless best.pt, if it is there, is a model of the run that saved `last`,
    the content of last.pt, and the best one. A run that was killed may have saved a later one."""
    if not path.exists():
        return
    advice = "restore the file, or delete it; the next best model replaces it"
    try:
        best = read_checkpoint(path)
    except InputError as e:
        raise InputError(f"{e}; {advice}") from None
    configs = [{**x["config"], **dict.fromkeys(may_change)} for x in (best, last)]
    later = best["step"] > last["step"]
    if (
        configs[0] != configs[1]
        or best["text"] != last["text"]
        or not later
        and best["val_loss"] != last.get("best_loss")
    ):
        raise InputError(f"{path} is not the best model of this run; {advice}")


# what each optimizer keeps of a parameter
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def restore_optimizer(optimizer, saved, fresh):
    """Give the optimizer its saved moments; everything else follows from the config. Raises
    ValueError if some are missing, unless it is `fresh`: it has made no step yet."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    names = MOMENTS[type(optimizer).__name__]
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[p]
        if fresh and not state:
            continue
        if set(state) != names:
            raise ValueError
        for name, v in state.items():  # AdamW's kernel trusts their shapes and strides
            shape = () if name == "step" else p.shape
            if v.shape != shape or not v.is_floating_point() or not v.is_contiguous():
                raise ValueError


class Run:
    """A locked run folder, and everything a run needs to continue after a crash.

    with Run("runs/mine") as run:
        run.begin(model, optimizers, config, text)   # restores what was saved, if resuming
        run.log(loss=...)                            # a line of metrics.jsonl
        run.save_if_best(val_loss)                   # best.pt, if this is the best loss so far
        run.save_last()                              # last.pt: all that the next step needs

    resuming: continue the run in this folder; last.pt is read at once, into `saved`. overwrite:
    replace any run in it. writes: false in all but the first of several processes. step: steps
    made; last_saved: the step of last.pt, None as long as there is none.
    """

    def __init__(self, folder, resuming=False, overwrite=False, writes=True):
        self.folder, self.resuming, self.overwrite = Path(folder), resuming, overwrite
        self.writes = writes
        self.step, self.evals_since_best, self.metrics_bytes = 0, 0, 0
        self.val_loss, self.best_loss, self.seconds = math.nan, math.inf, 0.0
        self.last_saved = self.metrics = self.saved = None
        self.started = time.perf_counter()  # seconds: spent before that

    def __enter__(self):
        if self.resuming:
            if self.writes:
                self.lock()
            self.saved = read_checkpoint(self.folder / "last.pt")
            self.last_saved = self.saved["step"]
            if not (self.folder / "best.pt").exists():
                self.saved["best_loss"] = math.inf
                print(
                    f"{self.folder}/best.pt is missing; the next best model replaces it",
                    file=sys.stderr,
                )
        else:
            check_free(self.folder, self.overwrite)
        return self

    def __exit__(self, *_):
        if self.metrics:
            self.metrics.close()

    def lock(self):
        """Open and lock metrics.jsonl, until the process ends: two runs in one folder would ruin
        each other. Raises InputError if another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        with writing(path):
            self.metrics = open_own(path, "ab")
        try:
            lock(self.metrics)
        except BlockingIOError:
            raise InputError(
                f"{self.folder}: another process is training here; give another --out"
            ) from None
        except OSError as e:
            print(f"{self.folder}: no lock ({e}); make sure only one run uses it", file=sys.stderr)
        for path in self.folder.glob("*.tmp"):  # left by a run that was killed while saving
            if TEMPORARY.fullmatch(path.name) and not path.is_dir():
                path.unlink()

    def path(self, name):
        """The path of a file in the folder. Raises InputError if the folder is no longer the one
        that this run has locked: another run may be using its name by now."""
        with contextlib.suppress(FileNotFoundError):
            metrics = os.stat(self.folder / "metrics.jsonl")
            if not self.metrics or os.path.samestat(os.fstat(self.metrics.fileno()), metrics):
                return self.folder / name
        raise InputError(
            f"{self.folder} was moved, removed or replaced while this run was using it, so "
            f"{name} was not written; if the folder still exists, resume the run from there"
        )

    def begin(self, model, optimizers, config, text):
        """Take over the folder: restore what was saved, or remove what an older run left.

        config: a dataclass; text: what Prepared.identity returned. Raises InputError if that is
        not possible.
        """
        self.model, self.optimizers = model, optimizers
        self.device = next(model.parameters()).device
        cwd = self.saved["cwd"] if self.saved else ""
        cwd = os.path.relpath(cwd or os.getcwd(), self.folder.resolve())
        self.about = {"config": asdict(config), "text": text, "cwd": cwd, "code": code_version()}
        if self.saved:
            versions = self.saved["code"].split("+")
            self.restore()
            self.note_other_code(versions)
        self.started = time.perf_counter()  # exclude the preparation
        if not self.writes:
            return
        if not self.resuming:
            self.lock()
            check_free(self.folder, self.overwrite)  # another run may have used it meanwhile
            self.metrics.truncate(0)
        for name in ("diverged.json",) if self.resuming else RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        write_text(self.folder / "config.toml", MADE + to_toml(config))
        length = self.metrics.seek(0, os.SEEK_END)
        if 0 < length < self.metrics_bytes:
            raise InputError(
                f"{self.folder}/metrics.jsonl is shorter than it was for last.pt; restore the "
                "whole file, or delete it to continue without its earlier lines"
            )
        if length < self.metrics_bytes:
            print(
                f"{self.folder}/metrics.jsonl was missing: a new one begins here", file=sys.stderr
            )
        self.metrics.truncate(min(length, self.metrics_bytes))  # the lines after last.pt come again

    def note_other_code(self, versions):
        """Remember, and say, if other `versions` of the code have trained the run so far."""
        code = self.about["code"]
        if versions[-1] != code:
            versions = [*versions, code]
            if self.writes:
                print(
                    f"{self.folder} was trained by another version of the code until step "
                    f"{self.step}; it is resumed with this one",
                    file=sys.stderr,
                )
        self.about["code"] = "+".join(versions)

    def restore(self):
        """Restore what was saved, and set self.metrics_bytes, the length of metrics.jsonl then."""
        state, self.saved = self.saved, None  # three times as large as the model
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                restore_optimizer(optimizer, saved, fresh=state["step"] == 0)
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            for name, kind in COUNTS.items():
                setattr(self, name, kind(state[name]))
            if min(self.step, self.metrics_bytes) < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as e:
            path, kind = self.folder / "last.pt", type(e).__name__
            raise InputError(f"{path}: not a complete checkpoint of this model ({kind})") from None

    def log(self, **values):
        """Append the step, these values and the seconds that the run has taken so far to
        metrics.jsonl: a whole line, or InputError."""
        if not self.writes:
            return
        values["seconds"] = round(self.elapsed(), 3)
        line = json.dumps({"step": self.step, **values}).encode() + b"\n"
        length = self.metrics.seek(0, os.SEEK_END)
        with writing(self.folder / "metrics.jsonl"):
            if self.metrics.write(line) < len(line):
                self.metrics.truncate(length)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rows(self):
        """The lines of metrics.jsonl, a list of dicts of numbers; damaged lines are left out."""
        rows = []
        for line in (self.folder / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        numbers = {"step": int}, {str: (int, float)}
        rows = [row for row in rows if all(fits(row, shape) for shape in numbers)]
        return [row for row in rows if all(abs(value) < 1e30 for value in row.values())]

    def save_if_best(self, val_loss):
        """Log the validation loss, in nats per token; write best.pt if it is the best so far.
        Raises Diverged if a number is not finite, InputError if the file cannot be written."""
        check_finite(self.step, val_loss=val_loss)
        self.log(val_loss=val_loss, val_perplexity=math.exp(min(val_loss, 700)))
        self.val_loss = val_loss
        self.evals_since_best += 1
        if val_loss < self.best_loss:
            self.best_loss, self.evals_since_best = val_loss, 0
            save(self.checkpoint(), self.path("best.pt"))

    def save_last(self):
        """Write last.pt, from which a run continues as if it had never stopped. Raises Diverged if
        a number is not finite, InputError if the file cannot be written."""
        if not self.writes:
            return
        os.fsync(self.metrics.fileno())  # the checkpoint relies on the lines written so far
        self.metrics_bytes = self.metrics.seek(0, os.SEEK_END)
        self.seconds, self.started = self.elapsed(), time.perf_counter()
        cuda = self.device.type == "cuda"
        state = self.checkpoint() | {name: getattr(self, name) for name in COUNTS}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        state["rng"] = torch.get_rng_state()
        state["cuda_rng"] = torch.cuda.get_rng_state(self.device) if cuda else None
        for name in ("results.json", "attention.png"):  # of a finished run that was resumed
            (self.folder / name).unlink(missing_ok=True)
        save(state, self.path("last.pt"))
        self.last_saved = self.step

    def checkpoint(self):
        """What best.pt and last.pt share. Raises Diverged before a broken model is saved."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(self.step, {"weights": math.nan})
        model = {"model": self.model.state_dict(), "model_config": asdict(self.model.config)}
        return {"step": self.step, "val_loss": self.val_loss, **self.about, **model}

    def elapsed(self):
        """Seconds that this run has taken, in all its processes so far."""
        return self.seconds + time.perf_counter() - self.started

    def load_best(self):
        """Load the weights of best.pt into the model. Returns its (step, validation loss)."""
        state = read_checkpoint(self.path("best.pt"))
        self.model.load_state_dict(state["model"])
        return state["step"], state["val_loss"]

    def report_divergence(self, error, diagnosis, advice, **values):
        """Write diverged.json, and raise InputError. error: Diverged; diagnosis: what `diagnose`
        returned; advice: what the user can do; values: more numbers for diverged.json."""
        broken = [f"{kind}: {names[0]}" for kind, names in diagnosis.items() if names]
        broken = broken[0] if broken else "outputs: validation split only"
        numbers = {key: str(value) for key, value in error.values.items()}
        report = self.folder / "diverged.json"
        if self.writes:
            write_json(report, {"step": error.step, **numbers, **values, **diagnosis})
        numbers = ", ".join(f"{key} {value}" for key, value in numbers.items())
        if self.device.type != "cpu":  # not every step is checked
            advice = f"it may have begun earlier (--resume --log_interval 1 finds out); {advice}"
        raise InputError(
            f"training diverged at step {error.step} ({numbers}; {broken}; more in {report}); "
            f"{advice}; the checkpoints in {self.folder} were saved before that"
        )


@torch.no_grad()
def diagnose(model, batches):
    """Where numbers are no longer finite: a dict of lists of names, in the order of computation.

    weights: parameters. outputs: modules, in a forward pass over `batches`, an iterable of argument
    tuples. gradients: parameters. large: the largest gradient; its square may overflow.
    """
    parameters, outputs = list(model.named_parameters()), {}

    def watch(name):
        return lambda _, x, y: None if y.isfinite().all() else outputs.update({name: None})

    leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    for batch in batches:
        model(*batch)
    for hook in hooks:
        hook.remove()
    largest = {name: p.grad.abs().max().item() for name, p in parameters if p.grad is not None}
    return {
        "weights": [name for name, p in parameters if not p.isfinite().all()],
        "outputs": list(outputs),
        "gradients": [name for name in reversed(largest) if not math.isfinite(largest[name])],
        "large": [max(largest, key=largest.get)] if largest else [],
    }
