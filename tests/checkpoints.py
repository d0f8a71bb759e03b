"""Save what a test trains, as the loop would."""

from pathlib import Path

from train.checkpoint.saver import CheckpointSaver
from train.checkpoint.state import Progress
from train.training import Training


def save(training: Training, run_dir: Path, progress: Progress, *, corpus: str = "") -> None:
    """Save and wait; all ranks call it."""
    with CheckpointSaver(training, run_dir, corpus=corpus) as saver:
        saver.save(progress)
