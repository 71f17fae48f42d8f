"""The training loop: batch -> loss -> step -> log -> validate -> save. One for every command.

Everything that decides a step is a pure function of its number: the rows (`feed.py`), the learning
rate (`schedule.py`) and the seed of its dropout masks (`init.py`). So a run that was killed
anywhere and resumed from its last checkpoint repeats the missing steps to the bit. What is trained,
on what, and with which options is settled before, in `pretrain.py` and `finetune.py`.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from phi_lit.errors import UserError
from phi_lit.train import checkpoint, saved_steps, state
from phi_lit.train.args import TrainArgs
from phi_lit.train.checkpoint import Background, Place
from phi_lit.train.course import Course
from phi_lit.train.deepspeed import ZeroStrategy
from phi_lit.train.experts import Experts
from phi_lit.train.feed import Batch, Feed
from phi_lit.train.init import reseed
from phi_lit.train.monitor import Monitor
from phi_lit.train.together import together

EXPLODED = 3.0
"""A loss above this many times that of a uniform guess counts as exploded."""


@dataclass
class Run:
    """A training run under way: what is trained, on what, where it stands and where it saves."""

    fabric: Fabric
    module: nn.Module
    """The training module in Fabric's wrapper; called with (inputs, targets, denominator,
    documents) it returns the loss."""
    optimizers: list[Optimizer]
    """In Fabric's wrapper."""
    peaks: list[list[float]]
    """The highest learning rate of each optimizer's groups, as configured."""
    feed: Feed
    held_out: Callable[[], Iterable[Batch]]
    """Makes one pass over the validation batches."""
    course: Course
    train: TrainArgs
    place: Place
    monitor: Monitor
    out_dir: Path
    seed: int
    identity: dict[str, Any]
    """What a resumed run must match."""
    write_side_files: Callable[[Path], None]
    """Writes what makes a checkpoint directory LitGPT's: config, tokenizer, prompt style."""
    weights_file: str
    """Where LitGPT looks for the weights that train."""
    uniform_loss: float
    """Loss of a uniform guess: ln(vocabulary)."""
    experts: Experts
    """The model's layers of experts, if it has any."""
    sample: Callable[[], str] | None = None
    """Lets the model write, or None."""
    background: Background | None = None
    rows_without_target: int = 0
    """Rows since this process began that taught nothing: their answers were cut away."""

    def __post_init__(self) -> None:
        if self.train.async_save:
            self.background = Background()


class Stopped(Exception):
    """A run that ended before its last step on purpose; its state is saved."""


def fit(run: Run) -> None:
    """Train from the run's place to the end of its course, saving as it goes.

    Raises:
        Stopped: after SIGTERM, a first Ctrl-C, or `max_time`; the state is saved.
        UserError: the loss is NaN, infinite or exploding; the last good checkpoint is named.
    """
    started = time.monotonic()
    saved_at = run.place.step if run.place.step else None
    _point_again(run)
    with stop_signals() as asked:
        while run.place.step < run.course.steps:
            out_of_time = run.train.max_time is not None and (
                time.monotonic() - started >= run.train.max_time
            )
            stop = step_once(run, stop=bool(asked) or out_of_time)
            if is_due(run.place.step, run.course.validate_every):
                validate(run)
            named = run.place.step in (run.train.name_steps or {})
            if stop or named or is_due(run.place.step, run.train.save_interval):
                save(run)
                saved_at = run.place.step
            if stop and run.place.step < run.course.steps:
                finish_saving(run)
                reason = f"max_time of {run.train.max_time:g} s" if out_of_time else "another rank"
                raise Stopped(asked[0] if asked else reason)
        if saved_at != run.place.step:
            save(run)
        finish_saving(run)


def is_due(step: int, interval: int | None) -> bool:
    """Tell whether something that happens every `interval` steps happens after this one."""
    return interval is not None and step % interval == 0


def step_once(run: Run, *, stop: bool) -> bool:
    """Do one optimizer step; returns whether any rank wants to stop after it."""
    began = time.perf_counter()
    fabric, course, step = run.fabric, run.course, run.place.step
    for optimizer, peaks in zip(run.optimizers, run.peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = course.rate(step, peak)
    batches = [run.feed.take() for _ in range(course.accumulate)]
    # A step's loss is the mean over all its target tokens, wherever they lie: masked targets may
    # be spread unevenly over micro-batches and ranks. Ranks' gradients are averaged, hence the
    # number of ranks.
    total, empty = _count_targets(fabric, batches)
    if not total:
        run.monitor.say(
            f"step {step + 1}: not one target among its rows; are the answers cut off by "
            "max_seq_length?"
        )
    denominator = max(total, 1) / fabric.world_size
    loss_sum = torch.zeros((), device=fabric.device)
    run.experts.begin(fabric, [batch.inputs.numel() for batch in batches])
    for micro, batch in enumerate(batches):
        reseed(run.seed, step, micro, fabric.global_rank)
        run.experts.weigh(micro, _loss_scale(fabric))
        last = micro == course.accumulate - 1
        with fabric.no_backward_sync(run.module, enabled=not last):
            inputs, targets, documents = fabric.to_device(batch)
            loss = run.module(inputs, targets, denominator, documents)
            fabric.backward(loss)
        run.experts.note(micro)
        loss_sum += loss.detach().float() / fabric.world_size
    mean, stop, parts = _reduce(run, loss_sum, stop)
    norm = _clip(run)
    good = _is_good(run, mean, norm)
    if good:
        for optimizer in run.optimizers:
            optimizer.step()
        if not math.isfinite(norm):  # the loss scale was too high, and the scaler left it out
            run.place.skipped += 1
    else:
        _handle_bad(run, mean, norm)
    routed = run.experts.finish(fabric, move_biases=good and math.isfinite(norm))
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    run.place.step += 1
    run.place.rows = run.feed.position
    run.rows_without_target += empty
    _report(run, mean, norm, {**parts, **routed}, seconds=time.perf_counter() - began)
    return stop


def _count_targets(fabric: Fabric, batches: list[Batch]) -> tuple[int, int]:
    """Return how many targets a step has, and how many rows without one, over all ranks."""
    counts = [
        sum(batch.n_targets for batch in batches),
        sum(batch.n_rows_without_target for batch in batches),
    ]
    if fabric.world_size > 1:
        counts = fabric.all_reduce(
            torch.tensor(counts, device=fabric.device), reduce_op="sum"
        ).tolist()
    return counts[0], counts[1]


def _reduce(run: Run, loss: Tensor, stop: bool) -> tuple[float, bool, dict[str, float]]:
    """Return (the loss of all ranks, whether any of them wants to stop, the loss's parts)."""
    world, parts = run.fabric.world_size, getattr(unwrapped(run.module), "summed", {})
    figures = torch.stack(
        [
            loss,
            torch.tensor(float(stop), device=loss.device),
            *(part / world for part in parts.values()),
        ]
    )
    if world > 1:
        figures = run.fabric.all_reduce(figures, reduce_op="sum")
    values = figures.tolist()
    named = dict(zip(parts, values[2:], strict=True))
    parts.clear()
    return values[0], values[1] > 0, named


def _clip(run: Run) -> float:
    """Clip the gradients of all optimizers to `max_norm`; returns their norm before."""
    limit = run.train.max_norm if run.train.max_norm is not None else math.inf
    if len(run.optimizers) == 1:
        norm = run.fabric.clip_gradients(
            run.module, run.optimizers[0], max_norm=limit, error_if_nonfinite=False
        )
    else:  # Fabric clips one optimizer's parameters at a time, which would be another norm
        norm = nn.utils.clip_grad_norm_(run.module.parameters(), limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(norm)


def _scaler(fabric: Fabric) -> Any:
    """Return the fp16 loss scale of Fabric's precision plugin, or None."""
    return getattr(fabric._precision, "scaler", None)


def _loss_scale(fabric: Fabric) -> float:
    scaler = _scaler(fabric)
    return 1.0 if scaler is None else scaler.get_scale()


def _is_good(run: Run, loss: float, norm: float) -> bool:
    # With a loss scale an infinite gradient is ordinary: the scaler leaves the step out itself.
    norm_is_good = math.isfinite(norm) or _scaler(run.fabric) is not None
    return norm_is_good and math.isfinite(loss) and loss <= EXPLODED * run.uniform_loss


def _handle_bad(run: Run, loss: float, norm: float) -> None:
    what = f"step {run.place.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}"
    if run.train.on_nonfinite == "skip":
        run.place.skipped += 1
        if (scaler := _scaler(run.fabric)) is not None:
            scaler.update()  # closes the step that `_clip` opened by unscaling
        if isinstance(run.fabric.strategy, ZeroStrategy):
            run.fabric.strategy.skip_step()
        run.monitor.say(f"{what}: step skipped ({run.place.skipped} so far)")
        return
    finish_saving(run)
    # Where the loss is bad, so are the weights that gave it, and a checkpoint of this very moment.
    last = run.place.step - (not (math.isfinite(loss) and loss <= EXPLODED * run.uniform_loss))
    steps = saved_steps.step_dirs(run.out_dir)
    good = next((path for step, path in steps if step <= last), None)
    where = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before that"
    raise UserError(
        f"{what}: training has diverged; {where}. Lower the learning rate, lengthen the warm-up, "
        "or set train.on_nonfinite: skip"
    )


def _report(run: Run, loss: float, norm: float, parts: dict[str, Any], *, seconds: float) -> None:
    scaler = _scaler(run.fabric)
    figures: dict[str, Any] = {
        "loss": loss,
        **parts,
        "learning_rate": run.course.rate(run.place.step - 1, run.peaks[0][0]),
        "grad_norm": norm,
        **({} if scaler is None else {"loss_scale": scaler.get_scale()}),
        **({"skipped": run.place.skipped} if run.place.skipped else {}),
        **({"rows_without_target": run.rows_without_target} if run.rows_without_target else {}),
    }
    if run.feed.rows_per_epoch:
        figures["epoch"] = run.feed.position / run.feed.rows_per_epoch
    run.monitor.step(
        step=run.place.step,
        seconds=seconds,
        log=is_due(run.place.step, run.train.log_interval),
        **figures,
    )


@torch.no_grad()
def validate(run: Run) -> float:
    """Measure the held-out loss (nats per token, over all ranks), note it, let the model write."""
    began = time.perf_counter()
    fabric = run.fabric
    run.module.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    for number, batch in enumerate(run.held_out()):
        first = number * fabric.world_size
        if first >= run.course.validate_batches:
            break
        # The same rows count on any number of ranks. Even a batch that doesn't, or has no target,
        # runs: the other ranks' shards are gathered in the forward.
        counts = first + fabric.global_rank < run.course.validate_batches
        count = batch.n_targets if counts else 0
        inputs, targets, documents = fabric.to_device(batch)
        loss = run.module(inputs, targets, None, documents)
        sums += torch.stack([loss.double() * count, loss.new_tensor(count).double()])
    if fabric.world_size > 1:
        sums = fabric.all_reduce(sums, reduce_op="sum")
    run.module.train()
    loss_sum, tokens = sums.tolist()
    run.place.val_loss = loss_sum / tokens if tokens else math.nan
    run.monitor.validated(
        step=run.place.step, loss=run.place.val_loss, seconds=time.perf_counter() - began
    )
    if run.sample is not None:
        run.monitor.say(f"--- sample after step {run.place.step}\n{run.sample()}\n---")
    return run.place.val_loss


def save(run: Run) -> None:
    """Write a checkpoint of this moment; every rank must call it."""
    directory = run.out_dir / f"step-{run.place.step:08d}"
    if not is_due(run.place.step, run.course.validate_every):
        run.place.val_loss = None
        if run.train.keep_best:
            validate(run)
    scaler = _scaler(run.fabric)
    place = Place(**{**vars(run.place), "scaler": scaler.state_dict() if scaler else {}})
    raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in run.optimizers]
    whole = run.train.checkpoint_format != "sharded"
    module = unwrapped(run.module)
    model_state, optimizer_state = state.gather(module, raw, whole=whole)
    first = run.fabric.global_rank == 0
    if not whole:
        checkpoint.write_sharded(
            directory, model_state, optimizer_state, place, run.identity, run.write_side_files,
            rank=run.fabric.global_rank, world=run.fabric.world_size,
            together=partial(together, run.fabric),
        )  # fmt: skip
        together(run.fabric, (lambda: _point(run, directory, place)) if first else None)
        return
    if first and run.background is not None:
        model_state = state.to_host(model_state)
        optimizer_state = state.to_host(optimizer_state)

    def write() -> None:
        checkpoint.write_whole(
            directory, model_state, optimizer_state, place, run.identity, run.write_side_files,
            weights_file=run.weights_file,
        )  # fmt: skip
        _point(run, directory, place)

    start = write if run.background is None else partial(run.background.start, write)
    together(run.fabric, start if first else None)


def _point(run: Run, directory: Path, place: Place) -> None:
    """Link the new checkpoint and remove old ones, now that it is on the disk."""
    saved_steps.link(run.out_dir, "latest", directory)
    held_out = math.inf if place.val_loss is None else place.val_loss
    if run.train.keep_best and held_out < saved_steps.best_so_far(run.out_dir):
        saved_steps.link(run.out_dir, "best", directory)
    if name := (run.train.name_steps or {}).get(place.step):
        saved_steps.link(run.out_dir, name, directory)
    if run.train.keep_last is not None:
        saved_steps.prune(run.out_dir, run.train.keep_last)


def _point_again(run: Run) -> None:
    """Link the checkpoint that this session goes on from: the last one may have been killed
    between its save and its links."""
    directory = run.out_dir / f"step-{run.place.step:08d}"
    is_ours = run.fabric.global_rank == 0 and checkpoint.is_whole(directory)
    together(run.fabric, (lambda: _point(run, directory, run.place)) if is_ours else None)


def finish_saving(run: Run) -> None:
    """Wait for a checkpoint that is being written in the background."""
    together(run.fabric, run.background.wait if run.background is not None else None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the training module below Fabric's wrapper and DDP's (a sharded one stays as it
    is)."""
    inner = getattr(module, "_forward_module", module)
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner


@contextmanager
def stop_signals() -> Any:
    """Collect SIGTERM and a first Ctrl-C as names in a list instead of dying of them."""
    asked: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are not ours to take
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
