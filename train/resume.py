"""Where a stage stands: saving all of it, going on from there, refusing what does not continue it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.clips import Clips, open_source
from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json
from train import checkpoint
from train.config import TrainConfig
from train.stages.shared import Stage

# Settings that may differ between a checkpoint and the run that continues it: they do not touch the maths.
# A group stands for its keys. Where the clips lie may change, what they are may not: their hash is compared.
FREE = {
    "run", "runs_dir", "save_every", "validate_every", "keep_last", "keep_every", "async_save", "resume",
    "log", "parallel", "micro_batch_size", "checkpointing", "compile", "offload", "device", "expect",
    "stage.attention",
    "scale.train",  # of all stages; what this one reads of it stands under its own keys
    "data.shards", "data.workers", "data.cache_dir", "data.cache_gb",
}  # fmt: skip


@dataclass(frozen=True)
class Position:
    """How far a stage is. Schedules, draws and data are functions of these; nothing else is counted."""

    step: int = 0  # steps done
    counter: int = 0  # samples seen
    wandb_id: str | None = None  # of the W&B run that goes on, also under another name


def finished(config: TrainConfig) -> bool:
    """Whether this stage already left its model, with all the steps asked for.

    Raises:
        UserError: it did, but with other settings.
    """
    path = config.stage_dir / "export" / "flashvsr.json"
    if config.resume != "auto" or not path.exists():
        return False
    if read_json(path)["info"]["provenance"].get("steps") != config.steps:
        return False
    if (used := config.stage_dir / "config.yaml").exists():
        from omegaconf import OmegaConf

        _refuse_changes(config, OmegaConf.to_container(OmegaConf.load(used)))
    return True


class Checkpoints:
    """A stage's checkpoints: every role, its optimiser and the EMA, and where the run stands.

    With `async_save` the loop waits only for a copy to host memory, and for an earlier save that still runs;
    a thread writes the copy. Its memory (pinned where the device is a GPU) is kept from save to save. All
    ranks call every method; as a context it waits for the last save, also when training ended by an error.
    """

    def __init__(self, stage: Stage, folder: Path):
        self.stage, self.folder = stage, folder
        self._threads = ThreadPoolExecutor(1, "save") if stage.config.async_save else None
        self._running: Future | None = None
        self._host: dict[tuple[str, str], Tensor] = {}
        data = stage.feed.data_config("train")
        clips = Clips(data, open_source(data), stage.config.seed, quiet=True)
        self._corpus = clips.identity()["corpus"]  # a hash of the clips' contents, wherever they lie

    def restore(self) -> Position:
        """Loads the newest checkpoint; returns where it stands (step 0: there was none). Then removes what
        killed saves left.

        Raises:
            UserError: it does not continue this run: other settings or clips, another stage, too many or too
                few items, damaged.
        """
        config, stage = self.stage.config, self.stage
        path = checkpoint.latest(self.folder)
        if path is None:
            return Position()
        if config.resume == "never":
            raise UserError(f"{config.stage_dir} already holds a run: give another run=NAME or resume=auto")
        restored = checkpoint.load(path, stage=config.stage.name)
        _refuse_changes(config, restored.state("config"), restored.state("corpus"), self._corpus)
        if restored.step > config.steps:
            raise UserError(f"{path} is beyond steps={config.steps}: give more steps, or another run=NAME")
        position = Position(restored.step, restored.state("counter"), restored.state("wandb_id"))
        for role, engine in stage.roles.items():
            engine.load(restored.take(role), restored.take(f"{role}.optimizer"))
        if stage.ema is not None:
            shadow = stage.roles[stage.main].shard(restored.take(f"{stage.main}.ema"))
            stage.ema.load_state_dict(shadow)
        restored.finish()
        if stage.world.is_main:  # the save of it may have been killed before it removed what it replaced
            checkpoint.tidy(self.folder, restored.step, config.keep_last, config.keep_every)
        return position

    def save(self, position: Position) -> None:
        """A checkpoint of now. Raises UserError when it, or the one before it, cannot be written."""
        self.wait()
        if not self.stage.world.is_main:
            for _ in _parts(self.stage):  # gathering takes all ranks
                pass
        elif self._threads is None:
            self._write(position, _parts(self.stage))
        else:
            copies = [(part, self._copied(part, tensors)) for part, tensors in _parts(self.stage)]
            if self.stage.device.type == "cuda":
                torch.cuda.synchronize(self.stage.device)
            self._running = self._threads.submit(self._write, position, copies)
        if self._threads is None:
            self.stage.world.barrier()

    def wait(self) -> None:
        """Until the save under way is done; raises what ended it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        if error is None:
            self.wait()

    def _copied(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Into host memory that is ours, without waiting for the device."""
        copies, pinned = {}, self.stage.device.type == "cuda"
        for name, tensor in tensors.items():
            host = self._host.get((part, name))
            if host is None or host.shape != tensor.shape:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                self._host[part, name] = host
            copies[name] = host.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, position: Position, parts: Any) -> None:
        config = self.stage.config
        meta = {
            "stage": config.stage.name,
            "config": plain(config),
            "counter": position.counter,
            "wandb_id": position.wandb_id,
            "corpus": self._corpus,
        }
        checkpoint.save(self.folder, position.step, parts, meta, config.keep_last, config.keep_every)


def _parts(stage: Stage) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """What is saved, one part at a time: where weights are sharded, no more than that is ever gathered."""
    for role, engine in stage.roles.items():
        yield role, engine.weights()
        yield f"{role}.optimizer", engine.optimizer_state()
    if stage.ema is not None:
        yield f"{stage.main}.ema", stage.roles[stage.main].gather(stage.ema.state_dict())


def plain(config: TrainConfig) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(config)))


def _refuse_changes(config: TrainConfig, old: Mapping[str, Any], was: str = "", now: str = "") -> None:
    changes = changed(old, plain(config))
    if config.optim.schedule == "constant":  # then more steps are the same steps, and more
        changes = [change for change in changes if not change.startswith("steps:")]
    if was != now:
        changes.append(f"the clips of data.shards: {was[:8]} -> {now[:8]}")
    if changes and config.resume != "force":
        raise UserError(
            f"{config.stage_dir} was made with other settings: {'; '.join(changes)}; "
            "give another run=NAME, or resume=force to continue all the same"
        )


def changed(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that alter the maths and differ, as `key: old -> new`."""
    differences = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{where}{key}"
        if name in FREE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differences += changed(a, b, f"{name}.")
        elif a != b:
            differences.append(f"{name}: {a} -> {b}")
    return differences
