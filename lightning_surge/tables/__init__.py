"""Tables of runs at several batch sizes and learning rates: their optima, and the laws that fit them."""

from lightning_surge.tables.bootstrap import Estimate
from lightning_surge.tables.columns import Columns
from lightning_surge.tables.figure import draw_fits
from lightning_surge.tables.fit import FittedLaw, GridFit, Unfitted, fit_grid
from lightning_surge.tables.law_fits import HeldOut, LawFit
from lightning_surge.tables.optima import Optimum, Valley, valleys
from lightning_surge.tables.read import RunTable, read_table, read_tables
from lightning_surge.tables.report import describe, document

__all__ = [
    "Columns", "Estimate", "FittedLaw", "GridFit", "HeldOut", "LawFit", "Optimum", "RunTable", "Unfitted",
    "Valley", "describe", "document", "draw_fits", "fit_grid", "read_table", "read_tables", "valleys",
]  # fmt: skip
