"""Reports on a finished run: a summary as numbers or text, and figures (which need the extra `plots`)."""

from .card import add_to_model_card, grades_card_section
from .comparison import compare, comparison_csv, comparison_markdown, plot_comparison
from .plots import plot_freezing_map, plot_run, plot_statistic
from .summary import summarize, table_rows, to_markdown

__all__ = [
    "add_to_model_card",
    "compare",
    "comparison_csv",
    "comparison_markdown",
    "grades_card_section",
    "plot_comparison",
    "plot_freezing_map",
    "plot_run",
    "plot_statistic",
    "summarize",
    "table_rows",
    "to_markdown",
]
