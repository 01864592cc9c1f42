"""What an evaluation leaves: a report (HTML, and the same in Markdown), its pictures, results.json, and tables on the screen."""

from engine.evals.charts import MAPS
from engine.evals.report.compare import Compared, compared
from engine.evals.report.environment import PACKAGES
from engine.evals.report.files import check_folder, write
from engine.evals.report.table import differences, sentence, show, sweeps, table

__all__ = [
    "MAPS",
    "PACKAGES",
    "Compared",
    "check_folder",
    "compared",
    "differences",
    "sentence",
    "show",
    "sweeps",
    "table",
    "write",
]
