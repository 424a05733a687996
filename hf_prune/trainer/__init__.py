"""`PruneTrainer` and what it hands on: progress to the pruner, rounds to folders, finished models to the Hub."""

from hf_prune.trainer.trainer import PruneTrainer

__all__ = ["PruneTrainer"]
