"""Write a comparison down for readers; see :mod:`experiments.report.write` for the files.

``folder`` reads a comparison back, ``findings`` gathers what is known, ``sections`` says it, ``html``, ``markdown``,
``latex`` and ``files`` write it.
"""

from experiments.report.write import PAGE, ReportOptions, report, write_report

__all__ = ["PAGE", "ReportOptions", "report", "write_report"]
