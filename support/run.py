"""The run folder and its one owner: the lock, metrics, checkpoints written and read, divergence.

A run folder holds

    config.toml      every key, as it was run
    metrics.jsonl    a line per `log_interval` steps, and one per look at the validation split
    best.pt last.pt  checkpoints: the model with the best validation loss; all the next step needs
    results.json     what the best model is worth on the test split, at the end
    attention.png    its attention, drawn
    diverged.json    only of a run that diverged: the step, and what was not finite any more
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
from support.settings import ADDED, to_toml
from support.weights import CHECKPOINTS, load, pack, save

RESULTS = ("results.json", "attention.png", "diverged.json", "best.pt", "last.pt")


class Diverged(Exception):
    """A number of the training is not finite any more. step: when; values: {name: number}."""

    def __init__(self, step, values):
        super().__init__(step, values)
        self.step, self.values = step, values


def check_finite(step, **values):
    """Raises Diverged unless all the values, numbers by name, are finite."""
    if not all(map(math.isfinite, values.values())):
        raise Diverged(step, values)


# --------------------------------------------------------------------------------------------------
# checkpoints: a dict of "step", "val_loss", "config", and the model (see weights.pack)
# what last.pt has more stands in Run.keep


def read_checkpoint(path):
    """A checkpoint as `Run` wrote it, a dict, with the config of its run in "config".

    There, "cwd" is the directory that relative paths start from: where the run was started.
    Raises InputError where it is not a checkpoint.
    """
    state = load(path)
    config = state.get("config")
    if not isinstance(config, dict) or not isinstance(state.get("step"), int):
        raise InputError(f"{path}: not a checkpoint of train.py")
    config = state["config"] = {**ADDED, **config}
    if "cwd" in config:  # it is stored as seen from the run folder
        try:
            cwd = (Path(path).parent.resolve() / config["cwd"]).resolve()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{path}: not a checkpoint of train.py") from None
        config["cwd"] = "" if cwd == Path.cwd() else str(cwd)
    return state


def find_checkpoint(folder):
    """The path of the best checkpoint in a run folder. Raises InputError where there is none."""
    for name in CHECKPOINTS:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    what = "a run is the folder that 'python train.py CONFIG' fills"
    raise InputError(f"{folder}: no checkpoint here; {what}")


def is_run(folder):
    """Whether a folder holds a checkpoint."""
    return any((Path(folder) / name).is_file() for name in CHECKPOINTS)


def check_free(folder, overwrite=False):
    """Raises InputError unless a new run may use this folder.

    A run that ended before its first last.pt may be replaced; with `overwrite`, any run.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give another --out")
    names, metrics = {path.name for path in folder.iterdir()}, folder / "metrics.jsonl"
    names = {name for name in names if not name.endswith(".tmp")}
    lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    begun = "config.toml" in names and metrics.is_file() or not lines and names == {metrics.name}
    if names and not begun:
        raise InputError(f"{folder} is not empty and holds no run; give another --out")
    if not overwrite and (lines > 1 or "last.pt" in names):
        how = "go on with it (--resume) or --overwrite it, or give another --out"
        raise InputError(f"{folder} holds a run: {how}")


def restore_optimizer(optimizer, saved, fresh):
    """Give the optimizer its saved moments; what else it has follows from the config.

    fresh: it has made no step yet, and so has no moments. Raises ValueError if some are missing.
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
    kinds = {tuple(optimizer.state[p]) for p in parameters}  # the names of its moments
    if not whole or not fresh and (len(kinds) != 1 or () in kinds):
        raise ValueError


# --------------------------------------------------------------------------------------------------
# a run


class Run:
    """A run folder, locked, and what a run needs to go on after a crash.

    with Run("runs/mine") as run:
        run.begin(model, optimizers, config, text)   # restores what was saved, if it goes on
        run.log(loss=...)                            # a line of metrics.jsonl
        run.best(val_loss)                           # best.pt, if it is the best so far
        run.keep()                                   # last.pt: all that the next step needs

    goes_on: whether this continues a run; then last.pt is read at once, into `saved`.
    overwrite: whether it may replace a run.
    kept: the step of last.pt, None as long as there is none.
    writes: false in all but the first of several processes; they only read and count.
    """

    def __init__(self, folder, goes_on=False, overwrite=False, writes=True):
        self.folder, self.goes_on, self.overwrite = Path(folder), goes_on, overwrite
        self.writes = writes
        self.step, self.kept = 0, None  # steps made
        self.cwd = ""
        self.val_loss, self.best_loss, self.looks_since_best = math.nan, math.inf, 0
        self.seconds = 0.0  # spent before this process
        self.metrics = self.saved = None
        self.started = time.perf_counter()

    def __enter__(self):
        if not self.goes_on:
            check_free(self.folder, self.overwrite)
        else:
            try:
                if self.writes:
                    self.lock()
                self.saved = read_checkpoint(self.folder / "last.pt")
                self.kept, self.cwd = self.saved["step"], self.saved["config"].get("cwd", "")
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_):
        if self.metrics:
            self.metrics.close()

    def lock(self):
        """Open metrics.jsonl, and hold it: two runs in one folder would ruin each other.

        The lock dies with the process, however that ends. Raises InputError if another one has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        try:
            lock(self.metrics)
        except BlockingIOError:
            other = "another process is training in this folder"
            raise InputError(f"{self.folder}: {other}; stop it, or give another --out") from None
        except OSError as e:
            alone = "take care that only one run uses it"
            print(f"{self.folder} could not be locked ({e}): {alone}", file=sys.stderr)
        for path in self.folder.glob("*.*.tmp"):  # of a run that was killed while it saved
            path.unlink()

    def begin(self, model, optimizers, config, text):
        """Take over the folder: restore what was saved, or clear what an older run left.

        config: the run's settings, a dataclass. text: what else a checkpoint has to say of the
        text it was trained on, a dict. Raises InputError where last.pt does not fit, another run
        has the folder, or it cannot be written.
        """
        self.model, self.optimizers = model, optimizers
        self.device = next(model.parameters()).device
        cwd = os.path.relpath(self.cwd or os.getcwd(), self.folder.resolve())
        self.config = {**asdict(config), **text, "cwd": cwd}
        length = self.restore() if self.saved else 0
        self.started = time.perf_counter()  # to prepare is not to train
        if not self.writes:
            return
        if not self.goes_on:
            self.lock()
            check_free(self.folder, self.overwrite)  # another run may have been there meanwhile
            self.metrics.truncate(0)
        for name in ("diverged.json",) if self.goes_on else RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        write_text(self.folder / "config.toml", to_toml(config))
        if os.fstat(self.metrics.fileno()).st_size < length:
            shorter = "is shorter than it was when last.pt was written; put the whole one back"
            raise InputError(f"{self.metrics.name} {shorter}")
        self.metrics.truncate(length)  # what came after the last checkpoint comes again

    def restore(self):
        """Go on from what was saved. Returns the length of metrics.jsonl then, in bytes."""
        state, self.saved = self.saved, None  # as large as the model three times over
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                restore_optimizer(optimizer, saved, fresh=state["step"] == 0)
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            keys = "step", "looks_since_best", "metrics_bytes"
            self.step, self.looks_since_best, length = (int(state[key]) for key in keys)
            keys = "best", "val_loss", "seconds"
            self.best_loss, self.val_loss, self.seconds = (float(state[key]) for key in keys)
            if min(self.step, length) < 0:
                raise ValueError
            return length
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as e:
            kind = f"not a whole checkpoint of this model ({type(e).__name__})"
            raise InputError(f"{self.folder / 'last.pt'}: {kind}") from None

    def log(self, **values):
        """Append a line to metrics.jsonl: the step, and these values by name. Raises InputError."""
        if self.writes:
            append_line(self.metrics, json.dumps({"step": self.step, **values}))

    def best(self, val_loss):
        """Note the loss on the validation split, in nats; save the model if it is the best yet.

        Raises Diverged if it is not finite, InputError where it cannot be saved.
        """
        check_finite(self.step, val_loss=val_loss)
        self.log(val_loss=val_loss, val_perplexity=math.exp(min(val_loss, 700)))
        self.val_loss = val_loss
        self.looks_since_best += 1
        if val_loss < self.best_loss:
            self.best_loss, self.looks_since_best = val_loss, 0
            save(self.checkpoint(), self.folder / "best.pt")

    def keep(self):
        """Write last.pt, from which a run goes on as if it had never stopped.

        Raises Diverged for a model that is not finite, InputError where it cannot be saved.
        """
        if not self.writes:
            return
        os.fsync(self.metrics.fileno())  # the checkpoint counts on what stands there
        cuda = self.device.type == "cuda"
        more = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "best": self.best_loss,
            "looks_since_best": self.looks_since_best,
            "metrics_bytes": self.metrics.seek(0, os.SEEK_END),
            "seconds": self.elapsed(),
        }
        save({**self.checkpoint(), **more}, self.folder / "last.pt")
        self.kept = self.step

    def checkpoint(self):
        """What best.pt and last.pt share. Raises Diverged before a broken model is saved."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(self.step, {"weights": math.nan})
        state = {"step": self.step, "val_loss": self.val_loss, "config": self.config}
        return {**state, **pack(self.model)}

    def elapsed(self):
        """Seconds that this run has taken, in all its processes so far."""
        return self.seconds + time.perf_counter() - self.started

    def load_best(self):
        """Give the model the weights of best.pt. Returns (step, validation loss) of that model."""
        state = read_checkpoint(self.folder / "best.pt")
        self.model.load_state_dict(state["model"])
        return state["step"], state["val_loss"]

    def diverged(self, e, found, advice, **values):
        """Write diverged.json, and raise InputError.

        e: Diverged. found: what `diagnose` gives. advice: what the user may do. values: more for
        the report.
        """
        names = ((kind, names[0]) for kind, names in found.items() if names)
        kind, name = next(names, ("outputs", "validation split only"))
        told = {key: str(value) for key, value in e.values.items()}
        if self.writes:
            report = {"step": e.step, **told, **values, **found}
            write_json(self.folder / "diverged.json", report)
        late = " or before, which --resume --log_interval 1 tells"
        late = "" if self.device.type == "cpu" else late
        told = ", ".join(f"{key} {value}" for key, value in told.items())
        raise InputError(
            f"training diverged at step {e.step}{late} ({told}; {kind}: {name}; "
            f"more in {self.folder / 'diverged.json'}); {advice}; "
            f"the checkpoints in {self.folder} were saved before that"
        )


@torch.no_grad()
def diagnose(model, batches):
    """Where numbers stopped being finite, a dict of names in the order in which they are met.

    weights: of parameters. outputs: of modules, in a forward pass over `batches`, an iterable of
    arguments. gradients: of parameters, on the way back, which begins at the last layer: the first
    named is where it broke. large: the parameter with the largest gradient, where all are finite
    and only their squares are not.
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
