"""Training under DeepSpeed's ZeRO (Rajbhandari et al. 2020): optimiser, gradients and weights shared out.

ZeRO-1 divides the optimiser's state among the processes, ZeRO-2 the gradients as well, ZeRO-3 also the weights, which
are gathered layer by layer where they are needed. What the settings of :mod:`minivlm.config.deepspeed` leave to the
run stays the run's: schedule, parameter groups, clipping, the guard against non-finite steps.

Numbers: in fp32 all is fp32. In bf16 or fp16 the weights of all parts, frozen ones too, are kept in that type, and so
are gradients while they are exchanged; ZeRO keeps an fp32 master copy of what trains, which AdamW updates. (The other
engines keep fp32 weights and compute in the narrower type.) Model folders hold the narrow weights.

The optimiser is torch's AdamW. Only where its state lies in the CPU's memory and the model on a GPU is it DeepSpeed's
own DeepSpeedCPUAdam, for speed; that one must be compiled, see :mod:`minivlm.runners.deepspeed_build`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.native import WEIGHTS, CheckpointError, load_weights
from minivlm.config.deepspeed import fill_deepspeed, fill_sizes, offloads_optimizer, zero_stage
from minivlm.config.experiment import RunConfig
from minivlm.models.base import Connector, PartModule
from minivlm.models.lora import file_name
from minivlm.models.vlm import PARTS, VisionLanguageModel, VLMOutput
from minivlm.runners.deepspeed_build import CPU_ADAM, import_deepspeed, load_operator
from minivlm.runners.engines import DDPEngine, EngineError, check_trained, go_on_with, trained
from minivlm.types import Batch

SHARDS = "deepspeed"
"""Folder of DeepSpeed's own state in a checkpoint: a file of every process."""
ABOUT = "deepspeed.json"


class DeepSpeedEngine(DDPEngine):
    """One process or several under ``deepspeed.initialize``.

    Raises ConfigError for settings that contradict the run, and :class:`EngineError` where DeepSpeed is not installed,
    refuses the settings, or cannot run.
    """

    def __init__(self, device: torch.device, precision: str, run: RunConfig):
        super().__init__(device, precision)
        self.settings = fill_deepspeed(run, processes=self.world, precision=precision)
        self.stage = zero_stage(self.settings)
        self.evaluates_together = self.shards_weights = self.stage == 3
        self.deepspeed: Any = None
        package = import_deepspeed(device)
        package.init_distributed(verbose=False)  # it takes over the group that there is
        self.zero = package.zero
        _check(self.settings)

    def place(self, model: VisionLanguageModel) -> None:
        """Leave the model where it was built, in the CPU's memory.

        DeepSpeed brings it to the device, in the type that it trains in, under ZeRO-3 parameter by parameter: no
        process ever holds all of it on its device.
        """

    def optimizer(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
        """AdamW of torch, or DeepSpeed's for a state that is offloaded from a GPU."""
        offloads = offloads_optimizer(self.settings)
        if not offloads or self.device.type == "cpu" or self.settings.get("zero_force_ds_cpu_optimizer") is False:
            self.settings["zero_force_ds_cpu_optimizer"] = False
            return super().optimizer(groups, betas)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        for first in (True, False):  # one process compiles, should it be needed
            if first == (self.rank == 0):
                load_operator(CPU_ADAM)
            self.barrier()
        return DeepSpeedCPUAdam(groups, betas=betas, adamw_mode=True)

    def prepare(self, model: VisionLanguageModel, optimizer: Optimizer, *, cached: bool = False) -> Any:
        """Hand the model over to DeepSpeed; the answer is called with a batch.

        Processes must gather the same weights, and reduce the same gradients, in the same order. So under ZeRO-3, and
        where an encoder trains, batches without pictures send a blank one through the encoder.
        """
        import deepspeed

        if self.shards_weights:
            quantised = [part for part in PARTS if getattr(model, part).quantization]
            if quantised:
                raise EngineError(f"ZeRO-3 cannot share out quantised weights (model.{quantised[0]}); use zero2")
        trains_encoder = not model.is_frozen("vision_encoder")
        model.always_encodes = not cached and (self.shards_weights or trains_encoder)
        fill_sizes(self.settings, model.language_model.hidden_size)
        if self.shards_weights:
            self._share_out(model)
        training = _SummedLoss(model, self.autocast)
        self.deepspeed, *_ = deepspeed.initialize(model=training, optimizer=optimizer, config=self.settings)
        return lambda batch: VLMOutput(loss_sum=self.deepspeed(batch))

    def _share_out(self, model: VisionLanguageModel) -> None:
        """Give every process its part of each parameter, without a copy of the model on the device."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)
        for parameter in model.parameters():
            if parameter.is_floating_point() and dtype != torch.float32:
                parameter.data = parameter.data.to(dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        self.zero.Init(module=model, config_dict_or_path=self.settings, dtype=dtype)

    @contextmanager
    def accumulate(self, module: Any, last: bool) -> Iterator[None]:
        """Gradients are finished with the last micro batch."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a summed loss that was divided by the tokens of all processes.

        DeepSpeed looks at gradients only, so those of a loss that is not finite are made so as well.
        """
        loss = loss * (1 + 0 * loss.detach())
        self.deepspeed.backward(loss * self.world, scale_wrt_gas=False)  # it averages over processes

    def step(self, optimizer: Optimizer, max_norm: float | None, finite: bool) -> float:
        """Clip and update, as DeepSpeed does both; a norm that is not finite changes no weight."""
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def weights(self, model: VisionLanguageModel, keys: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors; under ZeRO-3 gathered one by one into the CPU's memory of the first process."""
        if not self.shards_weights:
            return super().weights(model, keys)
        state, whole = model.state_dict(keep_vars=True), {}
        for key in {id(state[key]): key for key in reversed(keys)}.values():  # of tied ones the first
            with self._gathered(state[key]):
                if self.rank == 0:
                    whole[key] = state[key].detach().cpu().clone()
        return whole

    def load_weights(self, model: VisionLanguageModel, folder: Path) -> None:
        """Fill a model that has been trained with weights that this run has written."""
        if not self.shards_weights:
            load_weights(model, folder)
            return
        given = read_weights("model.checkpoint", str(folder / WEIGHTS)).tensors
        saved = {file_name(name): tensor for name, tensor in given.items()}
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key in saved:
                with self._gathered(tensor, modifier_rank=0):
                    if self.rank == 0 or not hasattr(tensor, "ds_id"):  # the others have a buffer of their own
                        tensor.data.copy_(saved[key])

    @contextmanager
    def evaluation(self, model: VisionLanguageModel) -> Iterator[None]:
        """The context of an evaluation, under ZeRO-3 one in which all processes do the same.

        DeepSpeed gathers what a module holds when it is called. The connector, whose stages may be called by
        themselves, and parameters that a part holds itself are gathered for the whole of it.
        """
        inner = (module for part in PARTS for module in getattr(model, part).modules())
        own = [p for m in inner if isinstance(m, PartModule) for p in m.parameters(recurse=isinstance(m, Connector))]
        with self.autocast(), self._gathered(*own):
            yield

    def _gathered(self, *tensors: Tensor, modifier_rank: int | None = None) -> Any:
        """The context in which parameters are whole on all processes."""
        shared = list({id(tensor): tensor for tensor in tensors if hasattr(tensor, "ds_id")}.values())
        return self.zero.GatheredParameters(shared, modifier_rank=modifier_rank) if shared else nullcontext()

    def save_state(self, folder: Path, optimizer: Optimizer) -> None:
        """Write DeepSpeed's state, each process its part of it.

        Raises :class:`EngineError` if the folder is not the same for all processes.
        """
        self.deepspeed.save_checkpoint(str(folder), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
        if self.rank == 0:
            for script in folder.glob("zero_to_*.py"):  # a checkpoint of ours holds no programs
                script.unlink()
            found = len(list((folder / SHARDS).glob("*_optim_states.pt")))
            if found != self.world:
                raise EngineError(
                    f"{folder} holds the state of {found} of {self.world} processes: run.output_dir must be a folder "
                    "that all machines share"
                )
            (folder / ABOUT).write_text(json.dumps(self._about(optimizer)))

    def load_state(self, folder: Path, optimizer: Optimizer) -> None:
        """Read what :meth:`save_state` wrote: optimiser, fp32 weights, loss scaler."""
        if not (folder / ABOUT).is_file():
            raise CheckpointError(f"{folder} was not written with run.engine: deepspeed; {go_on_with(folder)}")
        saved, own = json.loads((folder / ABOUT).read_text()), self._about(optimizer)
        if saved["stage"] != own["stage"]:
            raise CheckpointError(
                f"{folder} was written under ZeRO-{saved['stage']}, this run is under ZeRO-{own['stage']} "
                f"(run.deepspeed); {go_on_with(folder)}"
            )
        check_trained(folder, saved["trained"], own["trained"])
        self.deepspeed.checkpoint_engine.load = _load_safely
        self.deepspeed.load_checkpoint(
            str(folder), tag=SHARDS, load_module_strict=False, load_lr_scheduler_states=False
        )

    def _about(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a state belongs to: the stage, and the names of what trains, group by group."""
        return {"stage": self.stage, "trained": trained(optimizer.param_groups)}

    def close(self) -> None:
        """Let DeepSpeed's buffers and hooks go."""
        if self.deepspeed is not None:
            self.deepspeed.destroy()
            self.deepspeed = None


class _SummedLoss(nn.Module):
    """What DeepSpeed calls: from a batch to a tensor, since it must see from which output gradients come back.

    Autocast is entered in here, for DeepSpeed switches off one that it finds around itself; with weights in a narrow
    type it still has the operators run in fp32 that need it, as under the other engines.
    """

    def __init__(self, model: VisionLanguageModel, autocast: Any):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, batch: Batch) -> Tensor:
        with self.autocast():
            loss = self.model(batch).loss_sum
        assert loss is not None
        return loss


def _check(settings: dict[str, Any]) -> None:
    """Let DeepSpeed look at its settings before a model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepcopy(settings))
    except (ValueError, TypeError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        raise EngineError(f"run.deepspeed: DeepSpeed refuses the settings: {'; '.join(lines)}") from error


def _load_safely(path: str, map_location: Any = None) -> Any:
    """DeepSpeed's files without what they could execute; raises :class:`CheckpointError` for what holds more."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is damaged, or no state of DeepSpeed's: {error}") from error
