"""The report of a comparison, from its result file alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peft_dps.compare.data.examples import DataError
from peft_dps.compare.report.checks import checks
from peft_dps.compare.report.conclusion import conclusion
from peft_dps.compare.report.csv_files import FILES, csv_files
from peft_dps.compare.report.experiment import Experiment, experiments_of
from peft_dps.compare.report.mask_plots import draw_overlap, draw_selection
from peft_dps.compare.report.overview import overview_table
from peft_dps.compare.report.page import Page, Picture, Section, to_html, to_markdown
from peft_dps.compare.report.plots import draw_costs, draw_curves, draw_seeds
from peft_dps.compare.report.retention import measures_of, retention_table
from peft_dps.compare.report.retention_plot import draw_retention
from peft_dps.compare.report.style import Style, save, styles_of
from peft_dps.compare.report.tables import cost_table, facts_of, overall_table, score_table, setup_of
from peft_dps.compare.runs.results import Results, merge, read

FIGURES = "figures"
PAGE = "report.html"
_CAPTIONS = {
    "retention": "What the model can still do against what it was trained for: means with their 95% intervals.",
    "costs": "Mean score against costs. Bars: the 95% interval of the mean; the middle half of the costs measured.",
    "seeds": "Every run is a point; the bar below is the mean with its 95% interval.",
    "curves": "By step, the mean of the seeds, and shaded from the lowest to the highest of them.",
    "selection": "The fraction of each weight's entries in the last subnetwork: mean, least and most of the seeds. "
    "Methods that select the same fraction of every weight, as their scope demands, are left out.",
    "overlap": "Entries in both masks over entries in either: mean of the weights, from the least to the most of "
    "a weight. Dotted: what two independent random masks of the same sizes share.",
}


def write_report(source: Path | Sequence[Path], output: Path, reference: str | None = None) -> Page:
    """Write tables, figures, a Markdown file and an HTML page. The same result files give the same tables.

    Args:
        source: The result file, or several: their runs are reported together, each once.
        output: Folder to write to; files of an earlier report are replaced.
        reference: The method that the others are tested against, with its options if it has any; None for full
            fine-tuning, or the first method where that was not run.

    Returns:
        What the report says.

    Raises:
        DataError: A file does not exist, or none holds a run to report.
        ValueError: No run is of the method `reference`.
        OSError: The folder cannot be written to.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    parts = [_read_results(path) for path in sources]
    results = merge(parts)
    experiments = experiments_of(results, reference)
    if not experiments:
        names = " and ".join(repr(str(path)) for path in sources)
        raise DataError(f"There is no run to report in {names}, only {len(results.runs)} trial runs.")
    if not any(experiment.reference for experiment in experiments):
        known = sorted({run.plan.variant for run in results.reported})
        raise ValueError(f"`reference` must be a method of the report, {', '.join(known)}, got {reference!r}.")
    styles = styles_of(experiments)
    _remove_earlier(output)
    (output / FIGURES).mkdir(parents=True, exist_ok=True)
    files = csv_files(experiments)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    sections = [_section(each, styles, output / FIGURES, alone=len(experiments) == 1) for each in experiments]
    if len(experiments) > 1:
        sections.insert(0, Section("All tasks", "all-tasks-together", "", [overall_table(experiments)]))
    page = Page(
        conclusion(experiments),
        [*facts_of(experiments), ("made from", _origin(sources, results))],
        [(name, name) for name in files],
        _warnings(sources, parts),
        sections,
    )
    (output / "report.md").write_text(to_markdown(page, output), encoding="utf-8")
    (output / PAGE).write_text(to_html(page), encoding="utf-8")
    return page


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


def _read_results(source: Path) -> Results:
    if not source.is_file():
        raise DataError(f"The result file {str(source)!r} does not exist. `peft-dps compare` makes one.")
    return read(source)


def _remove_earlier(output: Path) -> None:
    for path in (*(output / FIGURES).glob("*.png"), *(output / name for name in FILES)):
        path.unlink(missing_ok=True)


def _section(experiment: Experiment, styles: dict[str, Style], folder: Path, *, alone: bool) -> Section:
    tables = [score_table(experiment, domain) for domain in experiment.domains]
    tables += [retention_table(experiment, measure) for measure in measures_of(experiment)]
    return Section(
        title=experiment.name,
        slug=experiment.slug,
        conclusion="" if alone else conclusion([experiment]),
        tables=[overview_table(experiment), *tables, cost_table(experiment)],
        pictures=_pictures(experiment, styles, folder) if experiment.domains else [],
        checks=checks(experiment),
        setup=setup_of(experiment),
    )


def _pictures(experiment: Experiment, styles: dict[str, Style], folder: Path) -> list[Picture]:
    drawn = [
        *(("retention", draw_retention(experiment, measure, styles)) for measure in measures_of(experiment)),
        ("costs", draw_costs(experiment, styles)),
        *(("seeds", draw_seeds(experiment, domain, styles)) for domain in experiment.domains),
        ("curves", draw_curves(experiment, styles)),
        ("selection", draw_selection(experiment)),
        ("overlap", draw_overlap(experiment, styles)),
    ]
    pictures = []
    for number, (name, figure) in enumerate(drawn, 1):
        if figure is not None:
            path = folder / f"{experiment.slug}-{number}-{name}.png"
            save(figure, path)
            pictures.append(Picture(path, _CAPTIONS[name]))
    return pictures


def _origin(sources: Sequence[Path], results: Results) -> str:
    files = " and ".join(
        f"{path.name} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})" for path in sources
    )
    tried = len(results.runs) - len(results.reported)
    return f"{files}: {len(results.reported)} runs to report, {tried} to choose learning rates"


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
