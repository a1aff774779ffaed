"""The report of a comparison, from its result file alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from peft_dps.compare.captions import CAPTIONS, READING
from peft_dps.compare.checks import checks
from peft_dps.compare.contest import REFERENCE, Contest, contests_of
from peft_dps.compare.corpora import DataError
from peft_dps.compare.export import costs_csv, overall_csv, runs_csv, scores_csv
from peft_dps.compare.mask_plots import draw_overlap, draw_overlap_by_layer, draw_selection
from peft_dps.compare.overview import overview_sheet
from peft_dps.compare.page import Page, Picture, Section, to_html, to_markdown
from peft_dps.compare.palette import Style, save, styles_of
from peft_dps.compare.plots import draw_costs, draw_curves, draw_seeds
from peft_dps.compare.results import Results, merge, read
from peft_dps.compare.summary import cost_sheet, overall_sheet, score_sheet, setup_of

FIGURES = "figures"
PAGE = "report.html"


def write_report(source: Path | Sequence[Path], output: Path, reference: str = REFERENCE) -> list[Section]:
    """Write tables, figures, a Markdown file and an HTML page. The same result files give the same tables.

    Args:
        source: The result file, or several: their runs are reported together, each once.
        output: Folder to write to; files of an earlier report are replaced.
        reference: The method that the others are tested against, with its options if it has any.

    Returns:
        The sections of the report.

    Raises:
        DataError: A file does not exist, or none holds a run to report.
        ValueError: `reference` is another method than full fine-tuning, and no run is of it.
        OSError: The folder cannot be written to.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    parts = [_read(path) for path in sources]
    results = merge(parts)
    contests = contests_of(results, reference)
    if not contests:
        names = " and ".join(repr(str(path)) for path in sources)
        raise DataError(f"There is no run to report in {names}, only {len(results.runs)} trial runs.")
    if reference != REFERENCE and not any(contest.reference for contest in contests):
        known = sorted({run.plan.variant for run in results.reported})
        raise ValueError(f"`reference` must be a method of the report, {', '.join(known)}, got {reference!r}.")
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
    page = Page(_origin(sources, results), _warnings(sources, parts), READING, sections)
    (output / "report.md").write_text(to_markdown(page, output), encoding="utf-8")
    (output / PAGE).write_text(to_html(page), encoding="utf-8")
    return sections


def report_folder(sources: Sequence[Path]) -> Path:
    """Return the folder that a report goes to unless told otherwise.

    Args:
        sources: The result files, one or more.

    Returns:
        Beside the first file; named after it, or "report" if there are several.
    """
    first = sources[0]
    if len(sources) > 1:
        return first.parent / "report"
    return first.with_suffix("") if first.suffix else first.with_name(f"{first.name}-report")


def _read(source: Path) -> Results:
    if not source.is_file():
        raise DataError(f"The result file {str(source)!r} does not exist. `peft-dps compare` makes one.")
    return read(source)


def _section(contest: Contest, styles: dict[str, Style], folder: Path) -> Section:
    sheets = [score_sheet(contest, domain) for domain in contest.domains]
    return Section(
        title=contest.name,
        slug=contest.slug,
        sheets=[overview_sheet(contest), *sheets, cost_sheet(contest)],
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


def _origin(sources: Sequence[Path], results: Results) -> str:
    files = " and ".join(
        f"{path.name} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}...)" for path in sources
    )
    return (
        f"Made from {files}: {len(results.reported)} runs to report, "
        f"{len(results.runs) - len(results.reported)} to choose learning rates."
    )


def _warnings(sources: Sequence[Path], parts: Sequence[Results]) -> list[str]:
    said = []
    for path, part in zip(sources, parts, strict=True):
        if part.damaged:
            lines = ", ".join(map(str, part.damaged))
            said.append(
                f"Lines of {path.name} that hold no record were left out: {lines}. A run that was cut off while it "
                "was written is lost."
            )
    keys = Counter(key for part in parts for key in part.runs)
    if repeated := sum(times > 1 for times in keys.values()):
        said.append(f"{repeated} runs are in more than one of the files; each counts once.")
    return said
