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
        conclusion: What it shows, in a sentence; empty if the page says it.
        tables: Tables; the figures come below the first one.
        pictures: Figures.
        checks: What to know before believing the numbers.
        setup: How the runs were made, as pairs of a name and a text.
    """

    title: str
    slug: str
    conclusion: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    checks: Sequence[str] = ()
    setup: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        conclusion: What all of it shows, in a sentence.
        facts: What was compared, as pairs of a name and a text.
        links: Where the numbers lie, as pairs of a name and an address relative to the page.
        warnings: What is wrong with the file as a whole.
        sections: What it says.
    """

    conclusion: str
    facts: Sequence[tuple[str, str]]
    links: Sequence[tuple[str, str]]
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
    parts = [f"# {TITLE}", f"**{markdown(page.conclusion)}**"]
    links = ", ".join(f"[{markdown(name)}]({address})" for name, address in page.links)
    parts.append("\n".join([_bullets([f"{name}: {text}" for name, text in page.facts]), f"- numbers: {links}"]))
    parts.append(_bullets(page.warnings))
    for section in page.sections:
        parts += [f"## {markdown(section.title)}", markdown(section.conclusion)]
        if section.checks:
            parts += ["Before believing these numbers:", _bullets(section.checks)]
        tables = [f"### {markdown(table.title)}\n\n{table.to_markdown().rstrip()}" for table in section.tables]
        parts += tables[:1]
        for picture in section.pictures:
            link = picture.path.relative_to(folder).as_posix()
            parts += [f"![{markdown(picture.caption)}]({link})", markdown(picture.caption)]
        parts += tables[1:]
        if section.setup:
            parts += ["How the runs were made:", _bullets([f"{name}: {text}" for name, text in section.setup])]
    parts += ["## How to read this", *map(markdown, _reading())]
    return "\n\n".join(filter(None, parts)) + "\n"


def _reading() -> list[str]:
    """How to read a report, a paragraph each."""
    text = files("peft_dps.compare.report").joinpath("templates/reading.txt").read_text(encoding="utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown(line)}" for line in lines)
