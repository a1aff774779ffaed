"""The report of a comparison, from its result file alone."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from peft_dps.compare.captions import CAPTIONS, READING
from peft_dps.compare.checks import checks
from peft_dps.compare.contest import Contest, contests_of
from peft_dps.compare.corpora import DataError
from peft_dps.compare.export import costs_csv, overall_csv, runs_csv, scores_csv
from peft_dps.compare.mask_plots import draw_overlap, draw_overlap_by_layer, draw_selection
from peft_dps.compare.page import Page, Picture, Section, to_html, to_markdown
from peft_dps.compare.palette import Style, save, styles_of
from peft_dps.compare.plots import draw_costs, draw_curves, draw_seeds
from peft_dps.compare.results import Results, read
from peft_dps.compare.summary import cost_sheet, overall_sheet, score_sheet, setup_of

FIGURES = "figures"


def write_report(source: Path, output: Path) -> list[Section]:
    """Write tables, figures, a Markdown file and an HTML page. The same result file gives the same tables.

    Args:
        source: The result file.
        output: Folder to write to; files of an earlier report are replaced.

    Returns:
        The sections of the report.

    Raises:
        DataError: The file does not exist, or holds no run to report.
        OSError: The folder cannot be written to.
    """
    if not source.is_file():
        raise DataError(f"The result file {str(source)!r} does not exist. `peft-dps compare` makes one.")
    results = read(source)
    contests = contests_of(results)
    if not contests:
        raise DataError(
            f"The result file {str(source)!r} holds no run to report, only {len(results.runs)} trial runs."
        )
    styles = styles_of(contests)
    (output / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, text in {
        "scores.csv": scores_csv(contests),
        "costs.csv": costs_csv(contests),
        "overall.csv": overall_csv(contests),
        "runs.csv": runs_csv(contests),
    }.items():
        (output / name).write_text(text, encoding="utf-8")
    sections = [_section(contest, styles, output / FIGURES) for contest in contests]
    if len(contests) > 1:
        sections.insert(0, Section("All tasks", "all-tasks-together", [overall_sheet(contests)]))
    page = Page(_source(source, results), _warnings(results), READING, sections)
    (output / "report.md").write_text(to_markdown(page, output), encoding="utf-8")
    (output / "report.html").write_text(to_html(page), encoding="utf-8")
    return sections


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command `report`.

    Args:
        parser: The command's parser.
    """
    parser.add_argument("results", type=Path, help="result file of a comparison (JSON lines)")
    parser.add_argument("--output", type=Path, help="folder for the report (default: 'report' beside the result file)")


def run_report(options: argparse.Namespace, console: Console) -> int:
    """Write a report, and show its tables.

    Args:
        options: The parsed arguments.
        console: Where to show them.

    Returns:
        The exit status, 0.

    Raises:
        DataError: As `write_report` does.
    """
    output = options.output or options.results.parent / "report"
    for section in write_report(options.results, output):
        for sheet in section.sheets:
            console.print(sheet.to_rich())
        for check in section.checks:
            console.print(f"! {check}", markup=False, highlight=False)
    console.print(f"Report: {output / 'report.html'}", markup=False)
    return 0


def _section(contest: Contest, styles: dict[str, Style], folder: Path) -> Section:
    sheets = [score_sheet(contest, domain) for domain in contest.domains]
    return Section(
        title=contest.name,
        slug=contest.slug,
        sheets=[*sheets, cost_sheet(contest)],
        pictures=_pictures(contest, styles, folder) if contest.domains else [],
        checks=checks(contest),
        setup=setup_of(contest),
    )


def _pictures(contest: Contest, styles: dict[str, Style], folder: Path) -> list[Picture]:
    drawings: dict[str, Callable[[], Figure | None]] = {
        "costs": lambda: draw_costs(contest, styles),
        "seeds": lambda: draw_seeds(contest, styles),
        "curves": lambda: draw_curves(contest, styles),
        "selection": lambda: draw_selection(contest),
        "overlap": lambda: draw_overlap(contest, styles),
        "overlap-by-layer": lambda: draw_overlap_by_layer(contest),
    }
    pictures = []
    for name, draw in drawings.items():
        if (figure := draw()) is not None:
            path = folder / f"{contest.slug}-{name}.png"
            save(figure, path)
            pictures.append(Picture(path, CAPTIONS[name]))
    return pictures


def _source(source: Path, results: Results) -> str:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return (
        f"Made from {source.name} (SHA-256 {digest[:16]}...): {len(results.reported)} runs to report, "
        f"{len(results.runs) - len(results.reported)} to choose learning rates."
    )


def _warnings(results: Results) -> list[str]:
    if not results.damaged:
        return []
    lines = ", ".join(map(str, results.damaged))
    return [f"Lines that hold no record were left out: {lines}. A run that was cut off while it was written is lost."]
