"""`load`, `plan` and `run_job`: what they take, whose turn it is, and how what is planned is read and carried out."""

from lmkit.loading.entry import load, plan, run_job
from lmkit.loading.options import LoadOptions, PrecisionArgument

__all__ = ["LoadOptions", "PrecisionArgument", "load", "plan", "run_job"]
