"""What a run did, counted and shown."""

from hf_prune.report.summary import chain, make_report, sparsity

__all__ = ["chain", "make_report", "sparsity"]
