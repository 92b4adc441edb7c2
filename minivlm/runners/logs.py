"""What a run tells while it runs: the progress bar, the log file, trackers, the loss curve."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG = "log.jsonl"


class Trackers:
    """TensorBoard, wandb and SwanLab behind one call; packages are imported only when asked for.

    SwanLab writes into the run's folder and asks for no account, unless SWANLAB_MODE says otherwise.
    """

    def __init__(self, names: Sequence[str], folder: Path, job_name: str):
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._swanlab: Any = None
        try:
            if "tensorboard" in names:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
            if "wandb" in names:
                import wandb

                self._wandb = wandb.init(project="minivlm", name=job_name, dir=str(folder))
            if "swanlab" in names:
                import swanlab

                mode = os.environ.get("SWANLAB_MODE", "offline")
                self._swanlab = swanlab.init(
                    project="minivlm", name=job_name, log_dir=str(folder / "swanlab"), mode=mode
                )
        except ImportError as error:
            extra = "swanlab" if error.name == "swanlab" else "tracking"
            raise ImportError(f'run.trackers: {error}; run pip install "minivlm[{extra}]"') from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of a step."""
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._swanlab is not None:
            self._swanlab.log(values, step=step)

    def close(self) -> None:
        """Write what is pending."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._swanlab is not None:
            self._swanlab.finish()


class RunLog:
    """The JSON-lines log with full precision, trackers, and a bar (or lines where there is no terminal)."""

    def __init__(
        self, folder: Path, total: int, start: int, *, label: str, log_freq: int, trackers: Trackers, console: Console
    ):
        self.total, self.log_freq, self.label = total, log_freq, label
        self.console, self.trackers = console, trackers
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        forget_after(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, text="")
            self._bar.start()
        self._started, self._first = time.perf_counter(), start

    def step(self, record: dict[str, Any]) -> None:
        """Log one optimiser step; ``record`` has step, loss, lr, tokens_per_s, data_wait and more."""
        self._write(record)
        self.trackers.log(record["step"], {k: v for k, v in record.items() if isinstance(v, float)})
        text = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_s']:,.0f} tok/s  data wait {record['data_wait']:.0%}"
        )
        done = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif done % self.log_freq == 0 or done == self.total:
            left = (time.perf_counter() - self._started) / max(done - self._first, 1) * (self.total - done)
            self.console.print(
                f"{self.label} {done}/{self.total}  {text}  ETA {left:.0f} s", highlight=False, soft_wrap=True
            )
            sys.stdout.flush()

    def event(self, record: dict[str, Any]) -> None:
        """Log an evaluation; trackers get it under ``val/``, apart from the loss of the step."""
        self._write(record)
        if "step" in record:
            self.trackers.log(record["step"], {f"val/{k}": v for k, v in record.items() if isinstance(v, float)})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Stop the bar, close the files."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self.trackers.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log file; a last line that was cut off by a kill is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop what was logged behind a step from which training goes on."""
    kept = [r for r in read_log(path) if r.get("step", 0) <= step]
    if path.is_file():
        path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


def draw_loss_curve(log: Path, target: Path, title: str) -> None:
    """Loss and learning rate over the steps, and what was evaluated on the way, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    steps = [r for r in read_log(log) if "loss" in r and "lr" in r]
    if len(steps) < 2:  # no curve yet
        return
    x, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
    figure, axis = plt.subplots(figsize=(8, 4), dpi=120)
    axis.plot(x, losses, color="#9db7d5", linewidth=0.8, label="loss")
    axis.plot(x, _smooth(losses), color="#1f4e8c", linewidth=1.8, label="loss, smoothed")
    evaluated = [(r["step"], r["loss"]) for r in read_log(log) if "loss" in r and "lr" not in r]
    if evaluated:
        axis.plot(*zip(*evaluated), "o-", color="#b0413e", markersize=4, label="validation")
    axis.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    axis.set_title(title, loc="left")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")  # 0.5, not 5 x 10^-1
    axis.yaxis.set_minor_formatter(NullFormatter())
    evaluations = [r for r in read_log(log) if "accuracy" in r]
    right = axis.twinx()
    if evaluations:
        points = [r["step"] for r in evaluations], [r["accuracy"] for r in evaluations]
        right.plot(*points, "o-", color="#2a8c4a", markersize=4, label="accuracy")
        right.set(ylabel="accuracy", ylim=(0, 1.02))
    else:
        right.plot(x, [r["lr"] for r in steps], color="#c98b2b", linewidth=1, label="learning rate")
        right.set(ylabel="learning rate")
    lines = [*axis.get_lines(), *right.get_lines()]
    names = [line.get_label() for line in lines]
    axis.legend(lines, names, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(lines), frameon=False)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def _smooth(values: Sequence[float], share: float = 0.02, limit: int = 100) -> list[float]:
    """Means over as many values before as behind each, so that nothing lags: a share of all, fewer at the ends.

    ``limit`` bounds the work of a long run: without it a million steps would take hours.
    """
    most = min(limit, max(1, round(share * len(values))))
    ranges = (values[n - k : n + k + 1] for n in range(len(values)) for k in (min(most, n),))
    return [sum(some) / len(some) for some in ranges]
