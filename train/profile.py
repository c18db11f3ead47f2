"""What a few steps spend their time and memory on: `log.profile=STEP`, written to the stage's profile/.

trace.json.gz      open in https://ui.perfetto.dev or chrome://tracing
operations.txt     the operations that take longest; also printed
memory.pickle      on a GPU: every allocation of these steps; open in https://pytorch.org/memory_viz
"""

from __future__ import annotations

from typing import Any

import torch

from flashvsr.base.files import atomic
from train.config import TrainConfig
from train.launch import World

STEPS = 3
ROWS = 20


class Profile:
    """Records the main rank's steps from `log.profile` on (from 1; 0: none)."""

    def __init__(self, config: TrainConfig, world: World):
        self.folder, self.device, self.quiet = config.stage_dir / "profile", world.device, config.log.quiet
        self.first = config.log.profile if world.is_main else 0
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before step `step`, from 1."""
        if not self.first or step != self.first:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.__enter__()

    def after(self, step: int, last: bool) -> None:
        """Call after step `step`; `last` of the run: then what there is gets written."""
        if self._profiler is None or (step < self.first + STEPS - 1 and not last):
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.device.type == "cuda":
            with atomic(self.folder / "memory.pickle") as part:
                torch.cuda.memory._dump_snapshot(str(part))
            torch.cuda.memory._record_memory_history(enabled=None)
        with atomic(self.folder / "trace.json.gz") as part:
            profiler.export_chrome_trace(str(part))
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        with atomic(self.folder / "operations.txt") as part:
            part.write_text(table + "\n")
        if not self.quiet:
            print(f"{table}\nsteps {self.first} to {step} are in {self.folder}", flush=True)
