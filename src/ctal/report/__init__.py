"""Results as one HTML file that needs nothing else: no network, no script, pictures and sound inside."""

from ctal.report.ablations import write_ablation_report
from ctal.report.inspection import write_inspection
from ctal.report.pretraining import LISTENING, write_pretraining_report
from ctal.report.results import Column, ResultTable, Row
from ctal.report.tasks import write_demo_report, write_task_report

__all__ = [
    "LISTENING",
    "Column",
    "ResultTable",
    "Row",
    "write_ablation_report",
    "write_demo_report",
    "write_inspection",
    "write_pretraining_report",
    "write_task_report",
]
