"""What a recipe sets up when it is started from a command line: its log lines and its CPU threads."""

from __future__ import annotations

import logging
import os
import warnings

import datasets
import torch

logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """INFO lines of the recipes and of GradES; of the libraries only what a user can act on."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("recipes", "grades_hf"):
        logging.getLogger(name).setLevel(logging.INFO)
    datasets.disable_progress_bars()  # what is left of them (formatting a few hundred rows) takes no second
    # transformers warns of a name that peft still uses.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def use_all_cores() -> None:
    """Undo `accelerate launch`'s default of one CPU thread where one process trains alone on a machine's CPU."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if launched and alone and not torch.accelerator.is_available() and torch.get_num_threads() == 1 < cores:
        torch.set_num_threads(cores)
        logger.info("Training on %d CPU threads (`accelerate launch` alone gives one).", cores)
