"""What scores say: image folders and their score table in, statistics, tables, figures and pages out."""

from xdpo.report.statistics import Comparison, Summary, bootstrap_interval, compare, summarize, wilson_interval

__all__ = ["Comparison", "Summary", "bootstrap_interval", "compare", "summarize", "wilson_interval"]
