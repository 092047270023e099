"""What training shows: a first line, progress, and advice if it runs out of memory."""

import functools
import math
import shlex
import sys
import time

from tqdm import tqdm

from support import machine


def headline(run, model, config, process):
    """One line: the run, the size of the model, the device, and the locality of every layer."""
    size = sum(p.numel() for p in model.parameters())
    place = f"{process.device}"
    if process.world_size > 1:
        place += f" and {process.world_size - 1} more"
    missing = machine.missing_compiler(process.device)
    if config.compile == "auto" and machine.fast_bfloat16(process.device) and missing:
        place += f", not compiled, so slower ({missing} was not found)"
    locality = ", ".join(f"{x:.3g}" for x in model.locality)
    resumed = f", from step {run.step} of {config.max_steps}" if run.resuming else ""
    return (
        f"{run.folder}: {size:,} parameters on {place}, {config.schedule}, "
        f"locality by layer: {locality}{resumed}"
    )


def flops_per_token(model, T):
    """Floating-point operations to train on one token in a context of T (PaLM, appendix B).

    The global half of a layer's attention is T wide, the local half as wide as a block can be.
    """
    n = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    W = min(T, model.config.max_lookback + 1)
    width = sum(T * (x < 1) + W * (x > 0) for x in model.locality)
    return 6 * n + 12 * model.config.n_embd * width


class Progress:
    """A progress bar on a terminal; elsewhere, a line now and then. It measures the throughput.

    Compilation and validation are excluded from the throughput: `restart_clock` after them.
    """

    def __init__(self, run, config, model, process):
        self.run, self.config, self.model, self.process = run, config, model, process
        self.tokens_per_step = config.grad_accum * config.batch_size * model.config.block_size
        self.bar = tqdm(
            initial=run.step,
            total=config.max_steps,
            desc=run.folder.name,
            unit="step",
            disable=True if process.rank else None,
        )
        self.val_loss, self.drawn = None, -math.inf
        self.first_step, self.began = run.step, time.perf_counter()
        self.restart_clock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def restart_clock(self):
        self.steps, self.since = 0, time.perf_counter()

    def update(self):
        """Count a step."""
        self.steps += 1
        self.bar.update()

    def tokens_per_s(self):
        """Tokens per second, of all processes together, since the clock was restarted."""
        return self.steps * self.tokens_per_step / max(time.perf_counter() - self.since, 1e-9)

    def show(self, loss, lr, tokens_per_s):
        """Show the training loss, learning rate and throughput. The validation loss is always shown
        on a terminal, elsewhere only if it is new; the time left is printed only elsewhere."""
        line = f"loss {loss:.3f}"
        if self.run.val_loss != self.val_loss or not self.bar.disable:
            self.val_loss = self.run.val_loss
            line += f", val {self.val_loss:.3f}"
        line += f", lr {lr:.1e}, {tokens_per_s:,.0f} tok/s"
        if peak := machine.peak_flops(self.process.device):
            flops = flops_per_token(self.model, self.model.config.block_size)
            mfu = tokens_per_s / self.process.world_size * flops / peak
            line += f", MFU {100 * mfu:.0f}%"
        self.bar.set_postfix_str(line)
        if self.bar.disable and self.run.writes:
            steps = self.config.max_steps - self.run.step
            pace = (time.perf_counter() - self.began) / (self.run.step - self.first_step)
            if steps * pace >= 1:
                line += f", about {duration(steps * pace)} left"
            print(f"step {self.run.step}/{self.config.max_steps}: {line}", flush=True)

    def is_time_to_draw(self, seconds=10):
        """Whether the pictures of the run should be drawn again: at most every few seconds."""
        if time.perf_counter() - self.drawn < seconds:
            return False
        self.drawn = time.perf_counter()
        return True


@functools.cache
def warn_once(message):
    """Print a message to stderr, unless this process has printed it before."""
    print(message, file=sys.stderr)


def duration(seconds):
    """A time in words, in the largest unit that fits: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory_advice(run, config, process, T, finished):
    """Memory is too small: what to change. The size of a step stays the same if possible.

    T: tokens per context; finished: whether only the final evaluation is missing.
    """
    share = config.batch_size // process.world_size
    if finished:
        return (
            "out of memory in the final evaluation; training is done, so measure the run with: "
            f"python eval.py {shlex.quote(config.out)} --batch-size {max(share // 2, 1)}"
        )
    if share > 1:  # divide by the smallest factor: 2, unless the share is odd
        n = next(n for n in range(2, share + 1) if share % n == 0)
        change = f"--batch_size {config.batch_size // n} --grad_accum {config.grad_accum * n}"
        gain = f"the same step in about 1/{n} of the memory"
    else:
        change, gain = f"--block_size {max(T // 2, 1)}", "contexts half as long"
    resume = ""
    if run.last_saved:
        resume = f", or free memory and continue from step {run.last_saved} with --resume"
    return (
        f"out of memory at step {run.step + 1}, with {share} contexts of {T} tokens at a time; "
        f"start over with {change} --overwrite ({gain}){resume}"
    )
