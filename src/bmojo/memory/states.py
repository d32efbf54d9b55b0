"""Memories kept under names: what a model remembers of documents and conversations, in a folder.

FOLDER/store.json             the model: its configuration and its fingerprint
FOLDER/NAME/00000001.safetensors, ...     the versions of a memory, as `MemoryState.save` writes them
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, StateError, StoreError, nearest
from bmojo.files import write_whole
from bmojo.memory.state import MemoryState, require_same

FORMAT = "bmojo.state-store"
VERSION = 1
LONGEST_NAME = 200  # bytes of the folder's name
FINGERPRINT = "fingerprint"  # in the note of a stored state


class StateStore:
    """The memories of one model, each under a name and in versions.

        store = StateStore("memories", model.config, model.fingerprint())
        version = store.put("contract", state)
        state = store.get("contract")

    A name is any text: it is made safe for a file system. Every `put` makes a new version, written whole or not at all,
    and never changes an old one; several processes may put at once. Raises StoreError for a folder that is another
    model's or no store, for names and versions that are not there; StateError names a file that is damaged.
    """

    def __init__(self, folder: str | os.PathLike, config: ModelConfig, fingerprint: str) -> None:
        self.folder, self.config, self.fingerprint = Path(folder), config, fingerprint
        path = self.folder / "store.json"
        if path.exists():
            self._check(path)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise StoreError(f"{self.folder} is no store of states, and not empty; choose another folder")
        else:
            about = {"format": FORMAT, "version": VERSION, FINGERPRINT: fingerprint, "config": config.to_dict()}
            write_whole(path, (json.dumps(about, indent=1) + "\n").encode())

    def _check(self, path: Path) -> None:
        try:
            about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise StoreError(f"{path} is not that of a store of states: its format is {about['format']!r}")
            if about["version"] > VERSION:
                raise StoreError(
                    f"{self.folder} has format {about['version']}, this bmojo reads up to {VERSION}; update bmojo"
                )
            theirs, config = about[FINGERPRINT], ModelConfig.from_dict(about["config"])
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} is damaged ({error}); put back a copy, or choose another folder") from None
        try:
            require_same(config, self.config)
        except StateError as error:
            raise StoreError(f"{self.folder} is another model's: {error}") from None
        self._require_fingerprint(theirs, self.folder)

    def _require_fingerprint(self, theirs: str, where: Path) -> None:
        if theirs != self.fingerprint:
            raise StoreError(
                f"{where} is of a model with fingerprint {theirs}, this one has {self.fingerprint}: the same "
                "configuration, other weights; load the model that made it, or choose another folder"
            )

    def put(self, name: str, state: MemoryState) -> int:
        """Keep `state` as the newest version of `name`; its number, from 1."""
        require_same(state.config, self.config)
        place = self._place(name)
        place.mkdir(exist_ok=True)
        note = {**state.note, FINGERPRINT: self.fingerprint}
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".put.") as drafts:
            draft = Path(drafts) / "draft"
            dataclasses.replace(state, note=note).save(draft)
            version = max(_versions(place), default=0) + 1
            while True:
                try:
                    os.link(draft, _file(place, version))  # fails if it is there, where a rename would replace it
                    return version
                except FileExistsError:
                    version += 1
                except OSError as error:  # a file system without hard links, or the name was just deleted
                    raise StoreError(
                        f"can't keep {name!r} in {self.folder}: {error.strerror}; nothing was changed"
                    ) from error

    def get(self, name: str, version: int | None = None, device: str = "cpu") -> MemoryState:
        """The newest version of `name`, or another one; the note that it was put with, and the fingerprint."""
        path = self._file(name, version)
        state = MemoryState.load(path, self.config, device)
        self._require_fingerprint(state.note.get(FINGERPRINT, "none"), path)
        return state

    def names(self) -> dict[str, list[int]]:
        """The versions of every name, in order."""
        places = sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        found = {unquote(place.name): _versions(place) for place in places}
        return {name: versions for name, versions in found.items() if versions}

    def delete(self, name: str, version: int | None = None) -> None:
        """Erase one version of `name`, or all of them."""
        if version is None:
            self._file(name, None)
            shutil.rmtree(self._place(name))
        else:
            self._file(name, version).unlink()

    def rename(self, old: str, new: str) -> None:
        self._file(old, None)
        if _versions(place := self._place(new)):
            raise StoreError(f"there is a state {new!r} in {self.folder} already; delete it first")
        os.replace(self._place(old), place)

    def _place(self, name: str) -> Path:
        try:
            safe = quote(name, safe=" ").replace(".", "%2E", 1) if name.startswith(".") else quote(name, safe=" ")
        except UnicodeEncodeError:
            safe = ""
        if not 0 < len(safe) <= LONGEST_NAME:
            raise StoreError(f"the name of a state must be text of 1 to {LONGEST_NAME} bytes, got {name!r:.50}")
        return self.folder / safe

    def _file(self, name: str, version: int | None) -> Path:
        versions = _versions(self._place(name))
        if not versions:
            raise StoreError(f"no state {name!r} in {self.folder}; {nearest(name, self.names())}")
        if version is not None and version not in versions:
            raise StoreError(f"no version {version} of {name!r}; there are {', '.join(map(str, versions))}")
        return _file(self._place(name), versions[-1] if version is None else version)


def _versions(place: Path) -> list[int]:
    return sorted(int(path.stem) for path in place.glob("*.safetensors") if path.stem.isdecimal())


def _file(place: Path, version: int) -> Path:
    return place / f"{version:08}.safetensors"
