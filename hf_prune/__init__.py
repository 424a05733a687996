"""hf_prune: prune Hugging Face models during or after fine-tuning, and save what is left as ordinary checkpoints."""

__version__ = "0.1.0"

from hf_prune.checkpoint.registration import register_loader

register_loader()
