"""What the commands show of a comparison when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from peft_dps.compare.checks import checks
from peft_dps.compare.contest import REFERENCE, contests_of
from peft_dps.compare.corpora import DataError
from peft_dps.compare.overview import overview_sheet
from peft_dps.compare.page import Section
from peft_dps.compare.report import PAGE, write_report
from peft_dps.compare.results import Results
from peft_dps.compare.sheet import Sheet


def show(results: Results, console: Console, reference: str = REFERENCE) -> None:
    """Show each contest at a glance, and what to know before believing it.

    Args:
        results: The records.
        console: Where to show them.
        reference: Variant of the method that the others are tested against.
    """
    for contest in contests_of(results, reference):
        _show([overview_sheet(contest)], checks(contest), console)


def show_report(sections: Iterable[Section], console: Console) -> None:
    """Show all tables of a report.

    Args:
        sections: What it says.
        console: Where to show it.
    """
    for section in sections:
        _show(section.sheets, section.checks, console)


def leave_report(source: Path, folder: Path, console: Console, reference: str = REFERENCE) -> None:
    """Write the report of a comparison that is done, and say where it is.

    Args:
        source: The result file.
        folder: Folder for the report.
        console: Where to say it.
        reference: Variant of the method that the others are tested against.

    Raises:
        OSError: It cannot be written; the results are there all the same.
    """
    try:
        write_report(source, folder, reference)
    except (DataError, OSError, ValueError) as error:
        raise OSError(
            f"The report cannot be written to {str(folder)!r}: {error} All results are kept in {str(source)!r}: make "
            f"the report elsewhere by `peft-dps report {source} --output FOLDER`."
        ) from error
    console.print(f"Report: {folder / PAGE}", markup=False, soft_wrap=True)


def _show(sheets: Iterable[Sheet], warnings: Iterable[str], console: Console) -> None:
    for sheet in sheets:
        console.print(sheet.to_rich())
    for warning in warnings:
        console.print(f"! {warning}", markup=False, highlight=False)
