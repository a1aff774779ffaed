"""A report as one HTML page that needs nothing but itself, and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from peft_dps.compare.report.table import Table, markdown


@dataclass(frozen=True)
class Picture:
    """A figure on disk.

    Attributes:
        path: The PNG file.
        caption: What it shows and how to read it.
    """

    path: Path
    caption: str

    @property
    def data(self) -> str:
        """The file as text in base64."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Section:
    """What a report says of one experiment, or of all together.

    Attributes:
        title: Heading.
        slug: Target of links to it; unique on the page.
        tables: Tables.
        pictures: Figures.
        checks: What to know before believing the numbers.
        setup: How the runs were made, as pairs of a name and a text.
    """

    title: str
    slug: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    checks: Sequence[str] = ()
    setup: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        source: Name of the result file and what it holds.
        warnings: What is wrong with the file as a whole.
        sections: What it says.
    """

    source: str
    warnings: Sequence[str]
    sections: Sequence[Section]


TITLE = "Fine-tuning methods compared"
_TEMPLATES = Environment(
    loader=PackageLoader("peft_dps.compare.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def to_html(page: Page) -> str:
    """Return one HTML page with all figures in it, which loads nothing."""
    return _TEMPLATES.get_template("report.html").render(title=TITLE, page=page, reading=_reading())


def to_markdown(page: Page, folder: Path) -> str:
    """Return the report in Markdown, with links to the figures.

    Args:
        page: The report.
        folder: Where the text will lie; links are relative to it.
    """
    parts = [f"# {TITLE}\n", f"{markdown(page.source)}\n"]
    parts += _bullets(page.warnings)
    for section in page.sections:
        parts.append(f"## {markdown(section.title)}\n")
        for table in section.tables:
            parts += [f"### {markdown(table.title)}\n", table.to_markdown()]
        if section.checks:
            parts += ["Before believing these numbers:\n", *_bullets(section.checks)]
        for picture in section.pictures:
            link = picture.path.relative_to(folder).as_posix()
            parts.append(f"![{markdown(picture.caption)}]({link})\n\n{markdown(picture.caption)}\n")
        if section.setup:
            parts += ["How the runs were made:\n", *_bullets([f"{name}: {text}" for name, text in section.setup])]
    parts += ["## How to read this\n", *(f"{markdown(paragraph)}\n" for paragraph in _reading())]
    return "\n".join(parts)


def _reading() -> list[str]:
    """How to read a report, a paragraph each."""
    text = files("peft_dps.compare.report").joinpath("templates/reading.txt").read_text(encoding="utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {markdown(line)}" for line in lines) + "\n"] if lines else []
