"""Run directories to one self-contained page: read, draw, lay out."""

from vpmoe.evals.report.page import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
