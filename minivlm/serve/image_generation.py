"""Pictures from text: what a model wrote between ``<h>`` and ``</h>`` is drawn by a pipeline of diffusers."""

from __future__ import annotations

import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.io import atomic_file

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

GENERATE = " <GEN>"
"""At the end of a question it asks Mini-Gemini for the prompt of a picture."""
_PAIR = re.compile(r"<h>((?:(?!</?h>).)*)</h>", re.DOTALL)
_BEGUN_TAG = re.compile(r"</?h?$")

Progress = Callable[[int, int], None]
"""Called with the number of steps done and of all; what it raises stops the drawing."""


class GenerationError(ValueError):
    """No picture could be drawn; the message says what to do."""


def picture_prompt(answer: str) -> str | None:
    """The text of the last pair ``<h>...</h>``, blanks included, or None if an answer asks for no picture."""
    return next((prompt for prompt in reversed(_PAIR.findall(answer)) if prompt.strip()), None)


def readable(answer: str, *, growing: bool = False) -> str:
    """An answer as people read it: the text before ``<h>``, a line break, ``Prompt: `` and the picture's prompt.

    Of an answer that is still ``growing``, a tag that has only begun is held back.
    """
    if growing:
        answer = _BEGUN_TAG.sub("", answer)
    text, tag, rest = answer.partition("<h>")
    if not tag:
        return answer
    return f"{text}\nPrompt: {picture_prompt(answer) or rest.partition('</h>')[0]}".lstrip("\n")


class ImageGenerator:
    """A text-to-image pipeline, loaded with the first prompt; threads draw one after the other.

    ``path`` is a folder of diffusers or an id on the hub. ``steps``, ``size`` (pixels of a side) and ``seed`` of None
    leave it to the pipeline. Weights are read from safetensors only and no code that comes with them is run; on
    CUDA they are half precision, elsewhere fp32.
    """

    def __init__(
        self,
        path: str,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        size: int | None = None,
        seed: int | None = None,
        device: str = "cpu",
    ):
        self.path = path
        self.negative_prompt = negative_prompt
        self.steps = steps
        self.size = size
        self.seed = seed
        self.device = device
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def draw(self, prompt: str, progress: Progress | None = None) -> Image:
        """One picture. Raises :class:`GenerationError` if there is none."""
        import torch

        with self._lock:
            try:
                if self._pipeline is None:
                    self._pipeline = self._load()
                with torch.inference_mode():
                    return self._pipeline(prompt, **self._options(progress)).images[0]
            except GenerationError:
                raise
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise GenerationError(
                    f"{self.path} needs more memory than {self.device} has; set demo.image_device to another device "
                    "(cpu), or demo.image_size to fewer pixels"
                ) from error
            except Exception as error:  # whatever a pipeline raises, the answer itself is worth keeping
                raise GenerationError(f"{self.path} failed: {_first_line(error)}") from error

    def _load(self) -> Any:
        import torch

        if os.path.isabs(self.path) or self.path.startswith((".", "~")) or self.path.count("/") != 1:
            folder = Path(self.path).expanduser()
            if not folder.is_dir():
                raise GenerationError(f"there is no folder {self.path}; correct demo.image_generator")
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise GenerationError(f'{_first_line(error)}; run pip install "minivlm[generation]"') from error
        try:
            half = torch.empty(0, device=self.device).is_cuda
        except (RuntimeError, AssertionError) as error:  # torch without CUDA says so with an assertion
            raise GenerationError(
                f"device {self.device} cannot be used: {_first_line(error)}; correct demo.image_device"
            ) from error
        settings = {"dtype": torch.float16 if half else torch.float32, "use_safetensors": True}
        failures: dict[str | None, Exception] = {}
        for variant in ("fp16", None) if half else (None, "fp16"):  # many folders have one kind of files only
            try:
                with _without_bars():
                    pipeline = DiffusionPipeline.from_pretrained(
                        os.path.expanduser(self.path), variant=variant, **settings
                    )
                break
            except (OSError, ValueError) as error:
                failures[variant] = error
        else:
            raise GenerationError(
                f"{self.path} cannot be loaded: {_first_line(failures[None])}; set demo.image_generator to the folder "
                "of a pipeline of diffusers, or to an id on the hub that this machine can reach"
            ) from failures[None]
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def _options(self, progress: Progress | None) -> dict[str, Any]:
        """The settings, as far as this pipeline knows them."""
        import torch

        def step_end(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if progress is not None:
                progress(step + 1, getattr(pipeline, "num_timesteps", None) or self.steps or step + 1)
            return values

        options = {
            "negative_prompt": self.negative_prompt or None,
            "num_inference_steps": self.steps,
            "height": self.size,
            "width": self.size,
            "generator": None if self.seed is None else torch.Generator().manual_seed(self.seed),
            "callback_on_step_end": step_end,
        }
        known = inspect.signature(self._pipeline.__call__).parameters
        return {key: value for key, value in options.items() if key in known and value is not None}


def device_beside(model_device: torch.device) -> str:
    """Where to draw beside a model: on the last GPU if it is on one, as Mini-Gemini does, else where it is."""
    import torch

    return f"cuda:{torch.cuda.device_count() - 1}" if model_device.type == "cuda" else str(model_device)


def save_picture(picture: Image, wanted: Path) -> Path:
    """Write a picture under the wanted name, or the next free one: generate.png, generate_2.png, ...

    Returns the name. Raises OSError if it cannot be written.
    """
    from PIL import Image

    target, number = wanted, 1
    while target.exists():
        number += 1
        target = wanted.with_stem(f"{wanted.stem}_{number}")
    try:
        with atomic_file(target) as unfinished:
            picture.save(unfinished, format=Image.registered_extensions()[target.suffix.lower()])
    except OSError as error:
        raise OSError(f"the picture cannot be written to {target}: {error.strerror or error}") from error
    return target


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of diffusers and transformers, which would run into the conversation of a terminal."""
    import diffusers.utils.logging
    import transformers.utils.logging

    shown = [module for module in (diffusers, transformers) if module.utils.logging.is_progress_bar_enabled()]
    for module in shown:
        module.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.utils.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
