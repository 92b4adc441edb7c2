"""The training loop of one stage."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from minivlm.checkpoints.native import (
    CheckpointError,
    Manifest,
    kept_names,
    load_weights,
    save_model,
    trained_names,
    write_model,
)
from minivlm.config.experiment import StageConfig
from minivlm.datasets.feed import make_feed
from minivlm.datasets.training_set import Source
from minivlm.io import atomic_folder
from minivlm.models.tuning import parameter_groups
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.bad_samples import BadSamples
from minivlm.runners.engines import SingleEngine
from minivlm.runners.logs import LOG, RunLog, Trackers, draw_loss_curve
from minivlm.runners.schedules import make_schedule
from minivlm.runners.state import (
    TrainState,
    checkpoints,
    prune,
    random_state,
    read_state,
    restore,
    seed_everything,
    write_state,
)
from minivlm.types import Batch, Sample


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved and the run can be resumed."""


class _StopWaiting(BaseException):
    """A signal while data are awaited, which may take minutes; no error, so that no reader of data catches it."""


class TrainingError(RuntimeError):
    """A run that cannot go on: non-finite losses, or too many bad samples."""


class Runner:
    """Trains a model on the sources of a stage and leaves a model folder, a log and a loss curve.

    ``eval_sources`` is what ``run.valid_splits`` name; the best checkpoint by the task's metric is kept.
    """

    def __init__(
        self,
        stage: StageConfig,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        engine: SingleEngine,
        task: Any,
        sources: Sequence[Source],
        eval_samples: Sequence[Sample] | None,
        trained_before: list[str],
        console: Console,
    ):
        self.stage, self.run, self.engine, self.task = stage, stage.run, engine, task
        self.model, self.processor, self.console = model, processor, console
        self.eval_samples = eval_samples
        self.folder = Path(self.run.output_dir)
        pin = engine.device.type == "cuda"
        self.feed = make_feed(sources, processor, self.run, rank=engine.rank, world=engine.world, pin=pin)
        self.bad = BadSamples(self.folder, self.run.max_bad_share, self.feed.size, console, self.is_main)
        self.steps_per_epoch = self.feed.steps_per_epoch
        self.total_steps = self.run.max_epoch * self.steps_per_epoch
        if self.run.max_steps is not None:
            self.total_steps = min(self.total_steps, self.run.max_steps)
        self.schedule = make_schedule(self.run, self.total_steps, self.steps_per_epoch)
        run = self.run
        groups = parameter_groups(model, stage.model, run.init_lr, run.weight_decay, run.lr_multi)
        self.optimizer = engine.optimizer(groups, (run.beta1, run.beta2))
        self.trained = trained_names(model, trained_before)
        self.state = TrainState(precision=engine.precision, world=engine.world, data=self.feed.signature)
        self.stop_signal: int | None = None
        self._waiting = False
        self._nonfinite_in_row = 0
        self._saved_step = -1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.engine.rank == 0

    def train(self) -> None:
        """Train from the state to the last step; raises :class:`Interrupted` when a signal asked to stop."""
        seed_everything(self.run.seed)
        source = self._resume()
        module = self.engine.prepare(self.model, self.optimizer, cached=self.run.feature_cache is not None)
        if source:
            restore(source, self.engine, self.optimizer)
        self.model.train()
        log = self._open_log() if self.is_main else None
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with closing(self._batches()) as batches:
                while self.state.step < self.total_steps:
                    record = self._step(module, batches)
                    if log:
                        log.step(record)
                    self._after_step(log)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if log:
                log.close()
        self._finish()
        if self.engine.sum(self.stop_signal or 0)[0]:
            raise Interrupted(f"stopped behind the last step of {self.stage.name}; the model is saved")

    def _step(self, module: Any, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimiser step over the feed's ``accumulation`` micro batches, weighted by tokens of all processes."""
        start = time.perf_counter()
        before = self._progress()
        micro = self._read(batches)
        waited = time.perf_counter() - start
        self.bad.note(micro)
        own = sum(int((batch.labels[:, 1:] >= 0).sum()) for batch in micro if batch.labels is not None)
        own_positions = sum(int(batch.attention_mask.sum()) for batch in micro)
        supervised, positions, stop, fresh, skipped, read = self.engine.sum(
            own, own_positions, self.stop_signal or 0, len(self.bad.fresh), *self.bad.state()
        )
        if fresh:
            self.bad.share(self.engine.gather(self.bad.fresh))
        self.bad.check(int(skipped), int(read))
        if stop:
            self.stop_signal = self.stop_signal or int(stop)
            self._interrupt(before)  # what was just read is not trained on
        lr = self.schedule(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        double = torch.float32 if self.engine.device.type == "mps" else torch.float64
        total = torch.zeros((), device=self.engine.device, dtype=double)
        for number, batch in enumerate(micro):
            with self.engine.accumulate(module, last=number == len(micro) - 1):
                with self.engine.autocast():
                    output = module(batch.to(self.engine.device, non_blocking=True))
                self.engine.backward(output.loss_sum / max(supervised, 1))
                total += output.loss_sum.detach()
        (loss_sum,) = self.engine.sum(float(total))
        loss = loss_sum / max(supervised, 1)
        norm = self.engine.step(self.optimizer, self.run.max_grad_norm, math.isfinite(loss))
        self.state.step += 1
        self.state.consumed += len(micro)
        self._guard(math.isfinite(loss) and math.isfinite(norm), micro)
        seconds = time.perf_counter() - start
        return {
            "step": self.state.step,
            "epoch": (self.state.step - 1) // self.steps_per_epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "supervised_tokens": int(supervised),
            "tokens_per_s": positions / seconds,
            "data_wait": waited / seconds,
            "seconds": seconds,
        }

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro batches of a step; not all of them when a signal asks to stop, for then they are not trained on."""
        micro: list[Batch] = []
        try:
            self._waiting = True
            while self.stop_signal is None and len(micro) < self.feed.accumulation:
                micro.append(next(batches))
            self._waiting = False
        except _StopWaiting:
            self._waiting = False
        return micro

    def _after_step(self, log: RunLog | None) -> None:
        step = self.state.step
        last = step == self.total_steps
        every = self.run.eval_freq or self.steps_per_epoch
        if self.eval_samples is not None and (step % every == 0 or last):
            self._evaluate(log)
        if step % (self.run.save_freq or self.steps_per_epoch) == 0 and not last:
            self.save()

    def _evaluate(self, log: RunLog | None) -> None:
        metrics = {}
        if self.is_main or self.engine.evaluates_together:
            with self.engine.evaluation(self.model):
                metrics = self.task.evaluate(
                    self.model,
                    self.processor,
                    self.eval_samples,
                    device=self.engine.device,
                    max_samples=self.run.max_eval_samples,
                )
        metrics = self.engine.gather(metrics)[0]
        value = metrics[self.task.metric_name]
        better = self.state.best is None or (
            value > self.state.best if self.task.higher_is_better else value < self.state.best
        )
        if log:
            log.event({"step": self.state.step, **metrics})
            self.console.print(
                f"step {self.state.step}: {self.task.metric_name} {value:.4f}" + (" (best so far)" if better else ""),
                highlight=False,
                soft_wrap=True,
            )
        if better:
            self.state.best, self.state.best_step = value, self.state.step
            self._save_model("best", metrics)
        self.model.train()

    def save(self, progress: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; the older ones stay until it is whole. Raises OSError when the disk is full.

        ``progress`` is where this process stands in its data, if that is not where it reads.
        """
        rngs = self.engine.gather(random_state())
        self.state.processes = self.engine.gather(progress or self._progress())
        if self._saved_step != self.state.step:
            target = self.folder / "checkpoints" / f"step_{self.state.step:08d}"
            weights = self._weights()
            with _told_if_full(target), atomic_folder(target) if self.is_main else nullcontext(target) as own:
                unfinished = Path(self.engine.gather(str(own))[0])
                self.engine.save_state(unfinished, self.optimizer)
                if self.is_main:
                    (unfinished / "model").mkdir()
                    parts = (self.model, self.stage.model, self.processor, self._manifest({}))
                    write_model(unfinished / "model", *parts, weights)
                    write_state(unfinished, self.state, rngs)
                self.engine.barrier()  # it becomes whole when every process has written its part
            if self.is_main:
                prune(target.parent, self.run.keep_last)
        self._saved_step = self.state.step
        self.engine.barrier()

    def _progress(self) -> dict[str, Any]:
        """Where this process stands in its data."""
        return {"feed": self.feed.state(), "bad": self.bad.state()}

    def _finish(self) -> None:
        """The last checkpoint, the model folder of the stage, and the loss curve."""
        self.save()
        self._save_model("model", {})
        if self.is_main:
            draw_loss_curve(self.folder / LOG, self.folder / "loss_curve.png", self.stage.name)
        self.engine.barrier()

    def _weights(self) -> dict[str, Any]:
        """What a model folder holds of the weights; all processes must ask."""
        return self.engine.weights(self.model, kept_names(self.model, self._manifest({})))

    def _save_model(self, name: str, metrics: dict[str, float]) -> None:
        weights = self._weights()
        if self.is_main:
            with _told_if_full(self.folder / name):
                manifest = self._manifest(metrics)
                save_model(self.folder / name, self.model, self.stage.model, self.processor, manifest, weights)

    def _manifest(self, metrics: dict[str, float]) -> Manifest:
        return Manifest(trained=self.trained, step=self.state.step, stage=self.stage.name, metrics=metrics)

    def _batches(self) -> Generator[Batch]:
        left = (self.total_steps - self.state.step) * self.feed.accumulation
        return self.feed.batches(self.state.consumed, self.state.consumed + left)

    def _open_log(self) -> RunLog:
        trackers = Trackers(self.run.trackers, self.folder, self.run.job_name or self.folder.name)
        return RunLog(
            self.folder,
            self.total_steps,
            self.state.step,
            label=self.stage.name,
            log_freq=self.run.log_freq,
            trackers=trackers,
            console=self.console,
        )

    def _resume(self) -> Path | None:
        """Position and weights of ``run.resume``, and its folder; ``none`` puts earlier checkpoints aside."""
        folder = self.folder / "checkpoints"
        if self.run.resume == "none":
            if self.is_main and folder.exists():
                aside = next(p for n in range(1, 10**6) if not (p := self.folder / f"checkpoints.old{n}").exists())
                folder.rename(aside)
                (self.folder / LOG).unlink(missing_ok=True)
            self.engine.barrier()
            return None
        if self.run.resume == "auto":
            found = checkpoints(folder)
            if not found:
                return None
            source = found[-1]
        else:
            source = Path(self.run.resume)
        fresh, self.state = self.state, read_state(source)
        self._check_same_data(source, fresh)
        self._leave_later_checkpoints(source)
        if self.state.precision != self.engine.precision and self.is_main:
            self.console.print(
                f"note: the checkpoint was trained in {self.state.precision}, this run is {self.engine.precision}"
            )
            self.state.precision = self.engine.precision
        if self.state.processes:
            own = self.state.processes[self.engine.rank]
            self.feed.restore(own["feed"])
            self.bad.restore(own["bad"], self.engine.gather(self.bad.written())[0])
        load_weights(self.model, source / "model")
        if self.is_main:
            self.console.print(
                f"resuming from {source} (step {self.state.step} of {self.total_steps})",
                highlight=False,
                soft_wrap=True,
            )
        return source

    def _check_same_data(self, source: Path, fresh: TrainState) -> None:
        """Refuse to count on in other batches than those that were counted."""
        for what, then, now in (("processes", self.state.world, fresh.world), ("data", self.state.data, fresh.data)):
            if then != now:
                raise CheckpointError(
                    f"{source} was written with other {what} ({then}) than this run has ({now}); go on with the "
                    "same processes, loading processes, datasets (of shards: file names and their order), batch sizes "
                    f"and seed, or start anew from its weights with model.checkpoint={source} run.resume=none"
                )

    def _leave_later_checkpoints(self, source: Path) -> None:
        """Going back to an earlier checkpoint, the later ones are kept under another name."""
        own = self.folder / "checkpoints"
        if source.resolve().parent != own.resolve():
            self.state.best = self.state.best_step = None  # of another run, whose best model is not here
        elif self.is_main:
            for later in (p for p in checkpoints(own) if p.name > source.name):
                later.rename(own / f"left_{later.name}")
        self.engine.barrier()

    def _on_signal(self, number: int, _: Any) -> None:
        if self.stop_signal is not None:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stop_signal = number
        if self._waiting:
            raise _StopWaiting

    def _interrupt(self, progress: dict[str, Any]) -> None:
        self.save(progress)
        raise Interrupted(f"stopped at step {self.state.step} of {self.total_steps}; the state is saved")

    def _guard(self, finite: bool, micro: Sequence[Batch]) -> None:
        """Count non-finite steps, which were skipped; abort when they do not end."""
        if finite:
            self._nonfinite_in_row = 0
            return
        self._nonfinite_in_row += 1
        ids = [sample_id for batch in micro for sample_id in batch.sample_ids]
        self.console.print(
            f"step {self.state.step}: loss or gradient is not finite, step skipped "
            f"({self._nonfinite_in_row} in a row); samples: {', '.join(ids[:8])}",
            style="yellow",
        )
        if self._nonfinite_in_row > self.run.nan_patience:
            raise TrainingError(
                f"{self._nonfinite_in_row} steps in a row were not finite (run.nan_patience); lower run.init_lr, use "
                f"run.precision=fp32 or bf16, or look at samples {', '.join(ids[:8])}"
            )


@contextmanager
def _told_if_full(target: Path) -> Iterator[None]:
    """What the libraries raise when a disk is full, as one OSError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(
            f"cannot save {target}: {error}; free some space and run the same command again, training goes on "
            "from the newest whole checkpoint"
        ) from error
