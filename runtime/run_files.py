"""The run folder's files on disk: what may be opened, written, moved and taken back. No stages here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from tcal_compiler.errors import RunFolderError, StageError
from tcal_compiler.passes.files import read_small

from .durable import disk_full_error, is_disk_full, remove_tree, sync
from .manifest import MANIFEST_NAME, Manifest, TeacherRecord, check_relative, hash_file, parse_manifest
from .plan_record import check_plan

LOCK_NAME = ".lock"
SCRATCH_NAME = ".scratch"
NEW_MANIFEST = f".{MANIFEST_NAME}.new"
_OWN = {LOCK_NAME, NEW_MANIFEST}  # what a creation that was killed may leave


def new_files(folder: Path, *, stage: str, taken: Mapping[str, str], root: Path) -> list[str]:
    """Names of the files that a stage wrote below folder, each checked to be free for it in the run folder root.

    Args:
        taken: the stage that owns a name, for the names of all other stages.

    Raises:
        RunFolderError: a link or special file, a name of the folder itself or of another stage, or a blocked place.
    """
    names = []
    for where, folders, files in os.walk(folder):
        for entry in [*folders, *files]:
            full = Path(where) / entry
            rel = full.relative_to(folder).as_posix()
            if full.is_symlink() or not (full.is_file() or full.is_dir()):
                raise RunFolderError(rel, f"stage {stage} made a link or special file", "write plain files")
            if full.is_dir():
                continue
            try:
                check_relative(rel)
            except ValueError as e:
                raise RunFolderError(rel, f"stage {stage} cannot have this file: {e}") from e
            if rel in taken:
                raise RunFolderError(rel, f"stage {stage} would overwrite a file of stage {taken[rel]}")
            check_target(root, rel)
            names.append(rel)
    return sorted(names)


def check_target(root: Path, rel: str) -> Path:
    """The place of a file, when moving a file there stays inside the run folder.

    Raises:
        RunFolderError: a parent is a link or a file, or a folder is in the way.
    """
    target = root / rel
    for parent in parents_below(root, target):
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            raise RunFolderError(str(parent), "is not a folder of the run but a link or a file", "move it away")
    if target.is_dir() and not target.is_symlink():
        raise RunFolderError(str(target), "is a folder where a file has to be", "move it away")
    return target


def parents_below(root: Path, target: Path) -> list[Path]:
    """The folders between target and root, innermost first, without root."""
    return [p for p in target.parents if p != root and p.is_relative_to(root)]


def publish(root: Path, folder: str, *, files: Iterable[str], remove: Iterable[str]) -> None:
    """Move files from a folder below root to their names in root, delete others and the folder; may be repeated.

    Raises:
        RunFolderError: see check_target. OSError: what was not moved is moved when this is called again.
    """
    source, touched = root / folder, {root}
    for rel in files:
        links = [p for p in parents_below(root, source / rel) if p.is_symlink()]
        if (source / rel).is_file() and not links:
            target = check_target(root, rel)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / rel, target)
            touched.update(parents_below(root, target))
    for rel in remove:
        target = check_target(root, rel)
        target.unlink(missing_ok=True)
        for parent in parents_below(root, target):
            with contextlib.suppress(OSError):  # holds other files
                parent.rmdir()
    for place in touched:
        sync(place)
    remove_tree(source)


class HashedFiles:
    """Files below root, each hashed once and again only when it changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hashes: dict[str, tuple[tuple[int, ...], str]] = {}

    def problem(self, rel: str, sha: str) -> str:
        """What is wrong with a file whose sha256 should be sha; "" when nothing is."""
        path = self._root / rel
        if any(p.is_symlink() for p in (path, *parents_below(self._root, path))):
            return "is a symbolic link"
        if not path.is_file():
            return "is missing"
        s = path.stat()
        stamp = (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        if self._hashes.get(rel, ((), ""))[0] != stamp:
            self._hashes[rel] = stamp, hash_file(path)
        return "" if self._hashes[rel][1] == sha else "has another sha256 than when its stage completed"


def refuse_foreign(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise RunFolderError(str(path), "exists and is not a folder", "another output folder with -o")
    names = sorted(set(os.listdir(path)) - _OWN)
    if names and MANIFEST_NAME not in names:
        raise RunFolderError(
            str(path),
            f"is not a run folder and not empty; it holds {names[:4]}",
            "another output folder with -o; nothing was touched",
        )


def check_output(path: Path, teacher: TeacherRecord | None = None) -> None:
    """What create_or_open would refuse, found before any work is done; nothing is touched.

    Raises:
        RunFolderError: a file, a foreign folder, or the run folder of another teacher.
    """
    path = path.absolute()
    refuse_foreign(path)
    if teacher is not None and (path / MANIFEST_NAME).is_file():
        check_teacher(read_manifest(path), teacher, path)


def make_folders(path: Path) -> list[Path]:
    """Make path and its parents; the folders that were made, innermost first."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        remove_empty(missing)
        raise os_error(e, path) from e
    return missing


def cache_folder(root: Path, name: str) -> Path:
    """A folder below the scratch folder that stages leave alone; a link in its place is removed, never followed.

    Raises:
        RunFolderError: a file is in the way. StageError: no space left.
    """
    folder = root / SCRATCH_NAME / name
    try:
        for place in (folder.parent, folder):
            if place.is_symlink():
                place.unlink()
            place.mkdir(exist_ok=True)
    except OSError as e:
        raise os_error(e, folder) from e
    return folder


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_empty_below(folder: Path) -> None:
    """Deletes folders without files below and at folder, which may be missing; no link is followed."""
    if not folder.is_symlink():
        remove_empty([Path(where) for where, _, _ in os.walk(folder, topdown=False)])


def discard(path: Path, made: list[Path]) -> None:
    """Take back a run folder without any complete stage: our own files, then the folders that we made."""
    for entry in path.glob(".tmp-*"):
        remove_tree(entry)
    remove_tree(path / SCRATCH_NAME)
    for name in (*_OWN, MANIFEST_NAME):
        with contextlib.suppress(OSError):
            (path / name).unlink()
    remove_empty(made)


def has_files(folder: Path) -> bool:
    return any(files for _, _, files in os.walk(folder))


def read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST_NAME
    if file.is_symlink() or not file.is_file():
        raise RunFolderError(str(file), "is a link or no file", "another output folder")
    try:
        text = read_small(file)
    except OSError as e:
        raise RunFolderError(str(file), f"cannot be read: {e.strerror}", "restore the file") from e
    manifest = parse_manifest(text, str(file))
    check_plan(manifest, str(file))
    return manifest


def check_teacher(manifest: Manifest, teacher: TeacherRecord, path: Path) -> None:
    old = manifest.teacher
    if old.fingerprint != teacher.fingerprint:
        raise RunFolderError(
            str(path),
            f"belongs to another teacher: {old.source} (fingerprint {old.fingerprint[:12]}), "
            f"not {teacher.source} ({teacher.fingerprint[:12]})",
            "another output folder with -o",
        )


def os_error(e: OSError, path: Path) -> RunFolderError | StageError:
    if is_disk_full(e, path):
        return disk_full_error(str(path), path)
    return RunFolderError(str(path), f"cannot be written: {e.strerror or e}", "another output folder with -o")
