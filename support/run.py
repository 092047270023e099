"""The run folder and its one owner: the lock, metrics, checkpoints, divergence.

A run folder contains

    config.toml      every key of the config
    metrics.jsonl    a line per `log_interval` steps, and one per evaluation of the validation split
    best.pt last.pt  checkpoints: the model with the best validation loss; all the next step needs
    results.json     the scores of the best model on the test split, written at the end
    attention.png    a figure of its attention
    diverged.json    only if the run diverged: the step, and which numbers were not finite
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from support.files import InputError, append_line, lock, write_json, write_text
from support.settings import to_toml
from support.weights import CHECKPOINTS, load, pack, save

RESULTS = ("results.json", "attention.png", "diverged.json", "best.pt", "last.pt")


class Diverged(Exception):
    """A number of the training is no longer finite. step: when; values: {name: number}."""

    def __init__(self, step, values):
        super().__init__(step, values)
        self.step, self.values = step, values


def check_finite(step, **values):
    """Raises Diverged unless all the values, numbers by name, are finite."""
    if not all(map(math.isfinite, values.values())):
        raise Diverged(step, values)


# --------------------------------------------------------------------------------------------------
# checkpoints: a dict of KEYS and the model (see weights.pack); last.pt has more, see Run.save_last

KEYS = {
    "step": int,
    "val_loss": float,
    "config": dict,  # of the run
    "text": dict,  # TEXT_KEYS: the text that it was trained on
    "cwd": str,  # where relative paths start; in the file it is relative to the run folder
}
TEXT_KEYS = {"source_sha256": str, "files": dict, "background": (dict, type(None))}


def read_checkpoint(path):
    """A checkpoint written by `Run`: a dict, with "cwd" as seen from here ("" if it is here).

    Raises InputError if the file is anything else.
    """
    state = load(path)
    try:
        for types, values in ((KEYS, state), (TEXT_KEYS, state["text"])):
            if not all(isinstance(values[key], kind) for key, kind in types.items()):
                raise TypeError
        cwd = (Path(path).parent.resolve() / state["cwd"]).resolve()
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(f"{path}: not a checkpoint of train.py") from None
    return {**state, "cwd": "" if cwd == Path.cwd() else str(cwd)}


def find_checkpoint(folder):
    """The path of the best checkpoint in a run folder. Raises InputError if there is none."""
    for name in CHECKPOINTS:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise InputError(f"{folder}: no checkpoint here; a run is a folder that train.py has written")


def is_run(folder):
    """Whether a folder contains a checkpoint."""
    return any((Path(folder) / name).is_file() for name in CHECKPOINTS)


def check_free(folder, overwrite=False):
    """Raises InputError unless a new run may use this folder.

    A run that ended before its first last.pt may be replaced; with `overwrite`, any run may.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give another --out")
    names, metrics = {path.name for path in folder.iterdir()}, folder / "metrics.jsonl"
    names = {name for name in names if not name.endswith(".tmp")}
    n_lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    begun = "config.toml" in names and metrics.is_file() or not n_lines and names == {metrics.name}
    if names and not begun:
        raise InputError(f"{folder} is not empty and holds no run; give another --out")
    if not overwrite and (n_lines > 1 or "last.pt" in names):
        raise InputError(f"{folder} holds a run: --resume or --overwrite it, or give another --out")


def check_resumable(folder):
    """Raises InputError unless there is a run in this folder that can be resumed."""
    if (folder / "last.pt").is_file():
        return
    if (folder / "config.toml").is_file():
        raise InputError(f"{folder}: there is no last.pt to resume from; start the run again")
    raise InputError(
        f"{folder}: there is no last.pt to resume from; give the folder of a run: "
        "python train.py runs/NAME --resume"
    )


def check_same_run(folder, config, may_change):
    """Raises InputError if the run in this folder had another config than this dataclass, except
    for the keys that may change, or has already run more steps."""
    state = read_checkpoint(folder / "last.pt")
    before = state["config"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in asdict(config).items()
        if name not in may_change and before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{folder} cannot be resumed with another config ({'; '.join(changed)}); only "
            f"{', '.join(sorted(may_change - {'out'}))} may change"
        )
    if config.max_steps < state["step"]:
        raise InputError(
            f"{folder} has already run {state['step']} steps; max_steps ({config.max_steps}) "
            "cannot be smaller"
        )


def restore_optimizer(optimizer, saved, fresh):
    """Give the optimizer its saved moments; everything else follows from the config.

    fresh: it has made no step yet, so it has no moments. Raises ValueError if some are missing.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = all(
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.shape in (p.shape, ())
        for p in parameters
        for value in optimizer.state[p].values()
    )
    kinds = {tuple(optimizer.state[p]) for p in parameters}  # the names of the moments
    if not whole or not fresh and (len(kinds) != 1 or () in kinds):
        raise ValueError


# --------------------------------------------------------------------------------------------------
# a run


class Run:
    """A locked run folder, and everything a run needs to continue after a crash.

    with Run("runs/mine") as run:
        run.begin(model, optimizers, config, text)   # restores what was saved, if resuming
        run.log(loss=...)                            # a line of metrics.jsonl
        run.save_if_best(val_loss)                   # best.pt, if this is the best loss so far
        run.save_last()                              # last.pt: all that the next step needs

    resuming: continue the run in this folder; last.pt is read at once, into `saved`.
    overwrite: allow this run to replace another one.
    writes: false in all but the first of several processes, which only read and count.
    step: steps made; last_saved: the step of last.pt, None as long as there is none.
    """

    def __init__(self, folder, resuming=False, overwrite=False, writes=True):
        self.folder, self.resuming, self.overwrite = Path(folder), resuming, overwrite
        self.writes = writes
        self.step, self.last_saved = 0, None
        self.val_loss, self.best_loss, self.evals_since_best = math.nan, math.inf, 0
        self.seconds = 0.0  # spent in earlier processes
        self.metrics = self.saved = None
        self.started = time.perf_counter()

    def __enter__(self):
        if not self.resuming:
            check_free(self.folder, self.overwrite)
            return self
        try:
            if self.writes:
                self.lock()
            self.saved = read_checkpoint(self.folder / "last.pt")
            self.last_saved = self.saved["step"]
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        if self.metrics:
            self.metrics.close()

    def lock(self):
        """Open and lock metrics.jsonl: two runs in one folder would ruin each other.

        The lock ends with the process, however that ends. Raises InputError if another process has
        it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        try:
            lock(self.metrics)
        except BlockingIOError:
            message = f"{self.folder}: another process is training here; give another --out"
            raise InputError(message) from None
        except OSError as e:
            message = (
                f"{self.folder} could not be locked ({e}): make sure that only one run uses it"
            )
            print(message, file=sys.stderr)
        for path in self.folder.glob("*.*.tmp"):  # left by a run that was killed while saving
            path.unlink()

    def begin(self, model, optimizers, config, text):
        """Take over the folder: restore what was saved, or remove what an older run left.

        config: the settings of the run, a dataclass; text: a dict with TEXT_KEYS. Raises InputError
        if last.pt does not fit, another run has the folder, or it cannot be written.
        """
        self.model, self.optimizers = model, optimizers
        self.device = next(model.parameters()).device
        cwd = self.saved["cwd"] if self.saved else ""
        cwd = os.path.relpath(cwd or os.getcwd(), self.folder.resolve())
        self.about = {"config": asdict(config), "text": text, "cwd": cwd}
        length = self.restore() if self.saved else 0
        self.started = time.perf_counter()  # exclude the preparation
        if not self.writes:
            return
        if not self.resuming:
            self.lock()
            check_free(self.folder, self.overwrite)  # another run may have used it meanwhile
            self.metrics.truncate(0)
        for name in ("diverged.json",) if self.resuming else RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        write_text(self.folder / "config.toml", to_toml(config))
        if os.fstat(self.metrics.fileno()).st_size < length:
            name = self.metrics.name
            raise InputError(f"{name} is shorter than it was for last.pt; restore the whole file")
        self.metrics.truncate(length)  # the lines after the last checkpoint will come again

    def restore(self):
        """Restore what was saved. Returns the length of metrics.jsonl at that time, in bytes."""
        state, self.saved = self.saved, None  # three times as large as the model
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                restore_optimizer(optimizer, saved, fresh=state["step"] == 0)
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            keys = "step", "evals_since_best", "metrics_bytes"
            self.step, self.evals_since_best, length = (int(state[key]) for key in keys)
            keys = "best_loss", "val_loss", "seconds"
            self.best_loss, self.val_loss, self.seconds = (float(state[key]) for key in keys)
            if min(self.step, length) < 0:
                raise ValueError
            return length
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as e:
            path, kind = self.folder / "last.pt", type(e).__name__
            raise InputError(f"{path}: not a whole checkpoint of this model ({kind})") from None

    def log(self, **values):
        """Append a line to metrics.jsonl: the step, and these values by name. Raises InputError."""
        if self.writes:
            append_line(self.metrics, json.dumps({"step": self.step, **values}))

    def save_if_best(self, val_loss):
        """Log the validation loss, in nats per token; write best.pt if it is the best so far.

        Raises Diverged if the loss is not finite, InputError if the model cannot be saved.
        """
        check_finite(self.step, val_loss=val_loss)
        self.log(val_loss=val_loss, val_perplexity=math.exp(min(val_loss, 700)))
        self.val_loss = val_loss
        self.evals_since_best += 1
        if val_loss < self.best_loss:
            self.best_loss, self.evals_since_best = val_loss, 0
            save(self.checkpoint(), self.folder / "best.pt")

    def save_last(self):
        """Write last.pt, from which a run continues as if it had never stopped.

        Raises Diverged if the model is not finite, InputError if it cannot be saved.
        """
        if not self.writes:
            return
        os.fsync(self.metrics.fileno())  # the checkpoint relies on the lines written so far
        cuda = self.device.type == "cuda"
        state = {
            **self.checkpoint(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "best_loss": self.best_loss,
            "evals_since_best": self.evals_since_best,
            "metrics_bytes": self.metrics.seek(0, os.SEEK_END),
            "seconds": self.elapsed(),
        }
        save(state, self.folder / "last.pt")
        self.last_saved = self.step

    def checkpoint(self):
        """What best.pt and last.pt share. Raises Diverged before a broken model is saved."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(self.step, {"weights": math.nan})
        return {"step": self.step, "val_loss": self.val_loss, **self.about, **pack(self.model)}

    def elapsed(self):
        """Seconds that this run has taken, in all its processes so far."""
        return self.seconds + time.perf_counter() - self.started

    def load_best(self):
        """Load the weights of best.pt into the model. Returns its (step, validation loss)."""
        state = read_checkpoint(self.folder / "best.pt")
        self.model.load_state_dict(state["model"])
        return state["step"], state["val_loss"]

    def report_divergence(self, error, diagnosis, advice, **values):
        """Write diverged.json, and raise InputError.

        error: Diverged; diagnosis: what `diagnose` returned; advice: what the user can do; values:
        more numbers for diverged.json.
        """
        broken = ((kind, names[0]) for kind, names in diagnosis.items() if names)
        kind, name = next(broken, ("outputs", "validation split only"))
        numbers = {key: str(value) for key, value in error.values.items()}
        report = self.folder / "diverged.json"
        if self.writes:
            write_json(report, {"step": error.step, **numbers, **values, **diagnosis})
        numbers = ", ".join(f"{key} {value}" for key, value in numbers.items())
        if self.device.type != "cpu":  # not every step is checked
            advice = f"it may have begun earlier (--resume --log_interval 1 finds out); {advice}"
        raise InputError(
            f"training diverged at step {error.step} ({numbers}; {kind}: {name}; more in "
            f"{report}); {advice}; the checkpoints in {self.folder} were saved before that"
        )


@torch.no_grad()
def diagnose(model, batches):
    """Where numbers are no longer finite: a dict of lists of names, in the order of computation.

    weights: parameters. outputs: modules, in a forward pass over `batches`, an iterable of argument
    tuples. gradients: parameters, in the order of the backward pass, which begins at the last
    layer: the first one is where it broke. large: the parameter with the largest gradient, for the
    case that all gradients are finite and only their squares are not.
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
    gradients = [(name, p.grad) for name, p in parameters if p.grad is not None]
    largest = max(((g.abs().max().item(), name) for name, g in gradients), default=None)
    return {
        "weights": [name for name, p in parameters if not p.isfinite().all()],
        "outputs": list(outputs),
        "gradients": [name for name, g in reversed(gradients) if not g.isfinite().all()],
        "large": [largest[1]] if largest else [],
    }
