"""Curves for TensorBoard, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional

from fused_resnet.machine import files
from fused_resnet.recipes.train import Log


def tensorboard(folder: Path) -> Callable[[int], Optional[Log]]:
    """For `train`: a writer into `folder`, from a step on. What a killed run wrote of later steps is dropped.

    Where TensorBoard is not installed, one warning says so, and nothing is written.
    """

    def writer(step: int) -> Optional[Log]:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            files.report_once("TensorBoard is not installed, so no curves are logged: pip install tensorboard.")
            return None
        return SummaryWriter(folder, purge_step=step + 1)

    return writer
