"""What a run did, counted and shown."""

from hf_prune.report.summary import make_report, sparsity

__all__ = ["make_report", "sparsity"]
