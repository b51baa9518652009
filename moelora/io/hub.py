"""Adapters of the Hugging Face hub: known before they are downloaded, and read from one commit.

    org/name                 the repository as its default branch has it
    org/name/sub/folder      a folder of it
    org/name@revision        a branch, tag or commit; also behind a folder

Whatever exists as a path is a local folder, by any name. The hub says first which files there are, of what size, and
the SHA-256 of the large ones. Downloaded is what moelora reads and no more: the two files of a PEFT LoRA, or, where
there is a moelora.json, the files of the mixture. All of it is of one commit, and what the hub said is compared with
what came. A whole commit (40 digits) that is in the cache already is not asked for again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, errors, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from moelora.io.files import MAX_CONFIG, fail, sha256_of, short
from moelora.io.folder import MANIFEST, MAX_MANIFEST, PART, read_manifest
from moelora.io.peft import CONFIG, CONVERT, PICKLES, WEIGHTS
from moelora.io.tensors import MAX_FILE

HUB_ID = re.compile(rf"({PART}/{PART})((?:/{PART})*)(?:@([A-Za-z0-9_.+/-]{{1,200}}))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MIXTURE = re.compile(rf"router\.safetensors|README\.md|experts/{PART}/adapter_(?:config\.json|model\.safetensors)")
HOW = "a hub id: org/name, org/name/sub/folder, either with @revision"
FOREIGN = (errors.HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError)
"""What the hub's client raises: for the network, the disk, and answers that are not the hub's."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Located:
    """Where an adapter lies on this machine.

    root: how far links may lead, None for the folder itself. pin: ``org/name[/sub/folder]@commit``, None for a local
    folder; ``locate(pin)`` is the same adapter for ever.
    """

    folder: Path
    root: Path | None
    pin: str | None


def locate(entry: str | Path) -> Located:
    """The adapter that a path or hub id means, downloaded if need be. Raises AdapterError."""
    if os.path.lexists(entry):
        return Located(Path(entry), None, None)
    text = entry.as_posix() if isinstance(entry, Path) else entry
    found = HUB_ID.fullmatch(text)
    if found is None or {".", ".."} & set(text.partition("@")[0].split("/")):
        fail(text, "path", f"no such file or folder ({os.path.abspath(text)})", f"a folder, or {HOW}", "check the path")
    repo, sub, revision = found[1], found[2][1:], found[3]
    _asked(text, repo, partial(validate_repo_id, repo))
    if COMMIT.fullmatch(revision or ""):
        place = _Place(text, repo, sub, revision)
        names = place.mixture() if place.has(MANIFEST) else [CONFIG, WEIGHTS]
        if all(place.has(name) for name in names):
            return place.located(names)
    return _fetch(text, repo, sub, revision)


def _fetch(entry: str, repo: str, sub: str, revision: str | None) -> Located:
    ask = partial(HfApi().model_info, timeout=constants.HF_HUB_ETAG_TIMEOUT, files_metadata=True)
    info = _asked(entry, repo, partial(ask, repo, revision=revision))
    commit, wanted = info.sha or "", COMMIT.fullmatch(revision or "") and revision
    if COMMIT.fullmatch(commit) is None or (wanted and commit != wanted):
        fail(entry, "commit", short(commit), wanted or "40 digits", f"check HF_ENDPOINT, {constants.ENDPOINT}")
    place = _Place(entry, repo, sub, commit)
    start = f"{sub}/" if sub else ""
    files = {item.rfilename[len(start) :]: item for item in info.siblings or () if item.rfilename.startswith(start)}
    names = [CONFIG, WEIGHTS]
    if MANIFEST in files:
        if CONFIG in files:
            fail(entry, "files", f"{MANIFEST} and {CONFIG}", "one of them in a folder", "name one with one adapter")
        place.download([MANIFEST], files)
        names = place.mixture()
    place.download(names, files)
    return place.located(names)


@dataclass(frozen=True)
class _Place:
    """A folder of a repository at one commit, in the hub's cache."""

    entry: str
    repo: str
    sub: str
    commit: str

    @property
    def folder(self) -> Path:
        return _cache_of(self.repo) / "snapshots" / self.commit / self.sub

    def has(self, name: str) -> bool:
        """Whether a file of the folder is in the cache."""
        path = f"{self.sub}/{name}" if self.sub else name
        found = try_to_load_from_cache(self.repo, path, revision=self.commit)
        return isinstance(found, str) and Path(found) == self.folder / name

    def mixture(self) -> list[str]:
        """The files of a mixture whose manifest is in the cache."""
        manifest = read_manifest(self.folder, self.located([MANIFEST]).root)
        for name in manifest.files:
            if MIXTURE.fullmatch(name) is None:
                known = f"router.safetensors, README.md and experts/NAME/{CONFIG} or {WEIGHTS}"
                fail(self.folder / MANIFEST, "files", short(name), known, "a mixture from the hub has no other files")
        return [MANIFEST, *manifest.files]

    def located(self, names: Iterable[str]) -> Located:
        """The folder, once every file is found to lie in the repository's cache or in what all repositories share."""
        own = root = _cache_of(self.repo)
        for name in names:
            real = Path(os.path.realpath(self.folder / name))
            if real.is_relative_to(os.path.realpath(own)):
                continue
            root = own.parent
            if not real.is_relative_to(os.path.realpath(root / "blobs")):
                what = "delete the link: the file will be downloaded again"
                fail(self.folder / name, "link", "a path that leaves the folder", f"a file in {own}", what)
        return Located(self.folder, root, f"{self.repo}{'/' if self.sub else ''}{self.sub}@{self.commit}")

    def download(self, names: Iterable[str], files: Mapping[str, RepoSibling]) -> None:
        """Bring files into the cache, if all are there and none is too large; compare them with what the hub said."""
        sizes = {name: self._size(name, files) for name in names}
        for name, size in sizes.items():
            item, path = files[name], self.folder / name
            _asked(self.entry, self.repo, partial(hf_hub_download, self.repo, item.rfilename, revision=self.commit))
            actual, real = sha256_of(self.folder, name, self.located([name]).root), path.stat().st_size
            expected = item.lfs.sha256 if item.lfs else actual
            if (real, actual) != (size, expected):
                with suppress(OSError):
                    os.unlink(os.path.realpath(path))
                found, wanted = f"{real} bytes, sha256 {actual[:12]}...", f"{size} bytes, sha256 {expected[:12]}..."
                fail(path, "content", found, f"{wanted} by the hub", "it was taken out of the cache: try again")

    def _size(self, name: str, files: Mapping[str, RepoSibling]) -> int:
        if name not in files:
            pickled = next((other for other in PICKLES if other in files and name == WEIGHTS), None)
            if pickled is not None:
                found = "a pickle, which can run code and is never downloaded"
                fail(f"{self.entry}: {pickled}", "format", found, WEIGHTS, CONVERT)
            folders = [path.rpartition("/")[0] for path in files if path.endswith((f"/{CONFIG}", f"/{MANIFEST}"))]
            what = f"adapters are in its folders {short(folders[:3])}" if folders else "check the name and the revision"
            fail(self.entry, "file", f"no {name} at {self.commit[:12]}", "every file of the adapter", what)
        size, most = files[name].size, MAX_FILE if name.endswith(".safetensors") else MAX_CONFIG
        most = MAX_MANIFEST if name == MANIFEST else most
        if type(size) is not int or not 0 <= size <= most:
            fail(f"{self.entry}: {name}", "size", f"{size} bytes", f"at most {most}", "nothing was downloaded")
        return size


def _asked(entry: str, repo: str, call: Callable[[], Answer]) -> Answer:
    """What a call of the hub's client returns; its failures as AdapterErrors."""
    try:
        return call()
    except errors.HFValidationError as error:
        found = f"no such folder ({os.path.abspath(entry)}), and no name of a repository ({_line(error)})"
        fail(entry, "hub id", found, HOW, "check the name")
    except errors.GatedRepoError:
        what = f"ask for access on {constants.ENDPOINT}/{repo}, and log in with `hf auth login`"
        fail(entry, "repository", "a gated one, to which you have no access", "one you may read", what)
    except errors.RepositoryNotFoundError:
        found = f"none on {constants.ENDPOINT} that you may read, and no such folder ({os.path.abspath(entry)})"
        fail(entry, "repository", found, HOW, "check the name; for a private one, log in with `hf auth login`")
    except errors.RevisionNotFoundError:
        fail(entry, "revision", "nothing of this name", "a branch, tag or commit of the repository", "check the name")
    except FOREIGN as error:
        cause = error.__cause__ or error if isinstance(error, errors.LocalEntryNotFoundError) else error
        offline = isinstance(cause, errors.OfflineModeIsEnabled)
        found = "offline mode (HF_HUB_OFFLINE is set)" if offline else _line(cause)
        commits = "".join(f" {repo}@{path.name}" for path in list(_cache_of(repo).glob("snapshots/*"))[:2])
        what = f"check the connection and the disk; what is in the cache loads by its commit:{commits or ' nothing is'}"
        if getattr(getattr(cause, "response", None), "status_code", 0) in (401, 403):
            what = "log in with `hf auth login`, by a token that may read it"
        found = f"{found}, and no such folder ({os.path.abspath(entry)})"
        fail(entry, "download", found, f"an answer from {constants.ENDPOINT}", what)


def _cache_of(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]!a}"
