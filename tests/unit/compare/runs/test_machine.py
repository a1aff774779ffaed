from pathlib import Path

import pytest

from peft_dps.compare.runs.machine import PACKAGES, source_fingerprint, versions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("A = 1\n")
    (tmp_path / "inner" / "b.py").write_text("B = 2\n")
    return tmp_path


def test_versions_name_the_packages_and_the_source() -> None:
    assert set(versions()) == {"python", *PACKAGES, "peft-dps source"}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.py").write_text("A = 2\n"),
        lambda folder: (folder / "inner" / "b.py").unlink(),
        lambda folder: (folder / "a.py").rename(folder / "c.py"),
        lambda folder: (folder / "inner" / "b.py").rename(folder / "b.py"),
        lambda folder: (folder / "inner" / "new.py").write_text(""),
    ],
)
def test_any_change_of_the_source_shows(folder: Path, change) -> None:
    before = source_fingerprint(folder)

    change(folder)

    assert source_fingerprint(folder) != before


def test_line_ends_and_other_files_do_not(folder: Path) -> None:
    before = source_fingerprint(folder)

    (folder / "a.py").write_bytes(b"A = 1\r\n")
    (folder / "a.pyc").write_bytes(b"\0")

    assert source_fingerprint(folder) == before
