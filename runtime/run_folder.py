"""The run folder: what a compilation has done so far, safe against a kill at any moment.

    run/tcal.json            the manifest: the only word on which stages are complete
    run/plan.toml, onnx/...  files of complete stages, under stable names
    run/.lock                one writer, or readers
    run/.tmp-STAGE-PID/      files of a stage that runs, or of one that was just committed
    run/.scratch/STAGE/KEY/  checkpoints inside a stage: survive a kill, deleted when the stage completes

How a stage commits. Its files are written below .tmp-STAGE-PID and fsynced. Then the manifest is replaced by one that
lists the new files' sha256 and names that folder as pending: this one os.replace is the commit point. Only then are
the files moved to their names, and the manifest is replaced once more without the pending entry. So a kill before the
commit point leaves the old stage, untouched; a kill after it leaves a pending entry, and the next open moves the files
that were not moved yet. Nothing is compared with hashes to decide this, so a file that the user edited in between
(plan.toml) is never overwritten; it only makes its stage count as not done.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tcal_compiler.errors import RunFolderError

from .durable import FolderLock, disk_full_error, is_disk_full, remove_tree, sync_tree, write_atomic
from .manifest import (
    MANIFEST_NAME,
    STAGE_NAME,
    Manifest,
    Pending,
    StageRecord,
    TeacherRecord,
    as_json,
    hash_file,
    hash_json,
    package_version,
    tool_versions,
)
from .run_files import (
    LOCK_NAME,
    NEW_MANIFEST,
    SCRATCH_NAME,
    HashedFiles,
    check_teacher,
    discard,
    has_files,
    make_folders,
    new_files,
    os_error,
    parents_below,
    publish,
    read_manifest,
    refuse_foreign,
    remove_empty,
    remove_empty_below,
)

AGAIN = ("its settings changed", "what it is made from changed", "its files were changed", "it was asked for anew")
STOPPED = "what a stopped run left of it is of other settings or inputs, and is deleted"


@dataclass
class Stage:
    """A stage inside `with run.stage(...)`.

    Attributes:
        done: the stage is complete with the same config and inputs: do nothing, read evidence and run.path.
        dir: where to write files, under their names relative to the run folder (only when not done).
        scratch: folder for checkpoints inside the stage; what an earlier run with the same config and inputs left is
            still there. Write to it with write_atomic.
        evidence: JSON data about what was measured; set it before the block ends.
        plan: when set, replaces the manifest's plan.
        seconds: of work that the stage's record is to count besides the block itself.
    """

    name: str
    done: bool
    dir: Path
    scratch: Path
    evidence: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    seconds: float = 0.0


class RunFolder:
    """An open run folder. Use it in a `with` block, which gives the lock back and removes a folder without result."""

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock | None, *, writable: bool) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._writable = writable
        self._fresh = False  # made by this call
        self._made: list[Path] = []  # folders made by this call, innermost first
        self._redo = False
        self.ran: set[str] = set()  # stages that were completed since it was opened
        self._files = HashedFiles(path)
        self.on_again: Callable[[str, str], None] = lambda stage, why: None  # before a stage runs again

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        *,
        teacher_fingerprint: str,
        teacher_source: str,
        config_json: Mapping[str, Any],
        resume: bool = True,
        teacher_kind: str = "",
        vocab_size: int | None = None,
    ) -> RunFolder:
        """Open a run folder for writing; make it where there is nothing or an empty folder.

        Args:
            teacher_fingerprint: see runtime.teacher.fingerprint; a folder of another teacher is refused.
            config_json: the whole configuration, kept in the manifest for the reader; only the config of a stage
                decides whether that stage is done.
            resume: False runs each stage once more; the old one stays until it is replaced.

        Raises:
            RunFolderError: not a run folder, in use, damaged, or of another teacher; nothing is touched.
            StageError: no space left.
        """
        path = Path(path).absolute()
        refuse_foreign(path)
        made = make_folders(path)
        try:
            lock = FolderLock(path / LOCK_NAME, shared=False)
        except OSError as e:
            remove_empty(made)
            raise os_error(e, path) from e
        teacher = TeacherRecord(
            source=teacher_source, kind=teacher_kind, fingerprint=teacher_fingerprint, vocab_size=vocab_size
        )
        config = as_json(config_json)
        fresh = not os.path.lexists(path / MANIFEST_NAME)
        try:
            if fresh:
                manifest = Manifest(
                    tcal_version=package_version(), versions=tool_versions(), teacher=teacher, config=config
                )
            else:
                manifest = read_manifest(path)
                check_teacher(manifest, teacher, path)
            run = cls(path, manifest, lock, writable=True)
            run._fresh, run._made, run._redo = fresh, made, not resume
            if fresh or manifest.config != config:
                run._write(manifest.model_copy(update={"config": config}))
            run._heal()
        except BaseException as e:
            if fresh:
                discard(path, made)
            lock.close()
            if isinstance(e, OSError):
                raise os_error(e, path) from e
            raise
        return run

    @classmethod
    def open_existing(cls, path: str | Path, *, write: bool = False) -> RunFolder:
        """Open a run folder that exists. Several readers may share it; a writer has it alone.

        Raises:
            RunFolderError: missing, not a run folder, damaged, or in use by a writer.
        """
        path = Path(path).absolute()
        if not os.path.isfile(path / MANIFEST_NAME):  # False, too, for a name that no file can have
            what = "is not a run folder (no tcal.json)" if os.path.exists(path) else "no such run folder"
            raise RunFolderError(str(path), what, "the folder given to tcal-compile with -o")
        lock = None
        try:
            with contextlib.suppress(*(() if write else (FileNotFoundError, PermissionError))):
                lock = FolderLock(path / LOCK_NAME, shared=not write)  # a reader of a plain copy needs none
            run = cls(path, read_manifest(path), lock, writable=write)
            if write:
                run._heal()
        except BaseException as e:
            if lock is not None:
                lock.close()
            if isinstance(e, OSError):
                raise os_error(e, path) from e
            raise
        if run.manifest.pending is None:
            return run
        run.close()  # a commit was cut off: finishing it needs a moment alone
        cls.open_existing(path, write=True).close()
        return cls.open_existing(path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. A folder that this call made is removed when it holds no stage and no checkpoint."""
        if self._lock is not None:
            if self._writable:
                remove_empty_below(self.path / SCRATCH_NAME)
            if self._fresh and not self.manifest.stages and not has_files(self.path / SCRATCH_NAME):
                discard(self.path, self._made)
            self._lock.close()
        self._lock, self._writable = None, False

    def record(self, name: str) -> StageRecord:
        """The manifest's record of a stage. Raises RunFolderError when the stage was never completed."""
        if name not in self.manifest.stages:
            done = ", ".join(self.manifest.stages) or "none"
            hint = f"the tcal-compile command that made it goes on: with the same teacher and -o {self.path}"
            raise RunFolderError(str(self.path), f"stage {name} is not complete; complete: {done}", hint)
        return self.manifest.stages[name]

    def stage_hash(self, name: str) -> str:
        """sha256 (hex) of what a stage was made from and made: an input of the stages that read its files."""
        self.record(name)
        return self.manifest.stage_hash(name)

    def changed(self, name: str) -> dict[str, str]:
        """Files of a stage that are not what its record says: name -> what is wrong. Reads them once per change."""
        found = {}
        for rel, sha in self.record(name).files.items():
            if problem := self._files.problem(rel, sha):
                found[rel] = problem
        return found

    def verify_files(self) -> dict[str, str]:
        """changed() of every stage together; empty when all files are as the manifest says."""
        return {rel: problem for name in self.manifest.stages for rel, problem in self.changed(name).items()}

    def require(self, name: str) -> None:
        """What has to come before the files of a complete stage are loaded.

        Raises:
            RunFolderError: the stage was never completed, a stage that it was made from is another now, or one of its
                files is not what its record says.
        """
        self.record(name)
        if earlier := self.manifest.made_before(name):
            what = f"stage {name} is of before {earlier} was made anew"
            raise RunFolderError(str(self.path), what, "the same tcal-compile command goes on from there")
        for rel, problem in self.changed(name).items():
            raise RunFolderError(str(self.path / rel), problem, "the same tcal-compile command makes it again")

    @contextlib.contextmanager
    def stage(self, name: str, *, config: Any, inputs: Any) -> Iterator[Stage]:
        """Run one stage, or find it done. See Stage and the module's docstring.

        Args:
            config: JSON data or a pydantic model: what the user chose for this stage.
            inputs: JSON data: what it reads, such as the teacher's fingerprint and stage_hash of earlier stages.

        Raises:
            StageError: no space left. When this call made the folder and no stage is complete, it is gone.
            RunFolderError: a file's name is taken by another stage, or is a link.
        """
        self._need_writable()
        if not re.fullmatch(STAGE_NAME, name):
            raise ValueError(f"{name!r} is not a stage name")
        hashes = hash_json(config), hash_json(inputs)
        key = hash_json(hashes)[:12]
        folder, scratch = self.path / f".tmp-{name}-{os.getpid()}", self.path / SCRATCH_NAME / name / key
        old = self.manifest.stages.get(name)
        redo = self._redo and name not in self.ran
        if old:
            same = old.config_hash == hashes[0], old.inputs_hash == hashes[1], not self.changed(name), not redo
            if all(same):
                self._note_made_from(name, old, inputs)
                yield Stage(name, True, self.path, scratch, dict(old.evidence))
                return
            self.on_again(name, next(why for why, ok in zip(AGAIN, same, strict=True) if not ok))
        started = time.monotonic()
        stage = Stage(name, False, folder, scratch)
        reserve = bytearray(1 << 20)  # given back when the stage fails: there is memory to clean up with
        try:
            self._publish()  # a disk that was full may have cut off the stage before
            self._make_folders(folder, scratch, keep=not redo)
            yield stage
            self._commit(stage, hashes, inputs, stage.seconds + time.monotonic() - started)
        except BaseException as e:
            del reserve
            pending = self.manifest.pending
            if pending is None or pending.folder != folder.name:
                remove_tree(folder)
            if isinstance(e, Exception) and is_disk_full(e, self.path):
                error = disk_full_error(f"stage {name}", self.path)
                if self._fresh and not self.manifest.stages:
                    discard(self.path, self._made)
                    self.close()
                raise error from e
            raise

    def scratch(self, name: str) -> Path:
        """The checkpoint folder of a stage that is running, as Stage.scratch; RunFolderError when none is."""
        found = sorted((self.path / SCRATCH_NAME / name).glob("*"))
        if len(found) != 1:
            raise RunFolderError(str(self.path), f"stage {name} is not running")
        return found[0]

    def _make_folders(self, folder: Path, scratch: Path, *, keep: bool) -> None:
        """Make a stage's two folders; delete checkpoints that another config or other inputs left, or all."""
        try:
            remove_tree(folder)
            folder.mkdir()
            for place in (*reversed(parents_below(self.path, scratch)), scratch):
                if place.is_symlink():
                    place.unlink()
                place.mkdir(exist_ok=True)
            for other in scratch.parent.iterdir():
                if other.name != scratch.name or not keep:
                    if keep and not other.is_symlink() and has_files(other):
                        self.on_again(scratch.parent.name, STOPPED)
                    remove_tree(other)
            scratch.mkdir(exist_ok=True)
        except OSError as e:
            raise os_error(e, self.path) from e

    def _commit(self, stage: Stage, hashes: tuple[str, str], inputs: Any, seconds: float) -> None:
        taken = {rel: n for n, r in self.manifest.stages.items() if n != stage.name for rel in r.files}
        names = new_files(stage.dir, stage=stage.name, taken=taken, root=self.path)
        files = {rel: hash_file(stage.dir / rel) for rel in names}
        sync_tree(stage.dir)
        record = StageRecord(
            config_hash=hashes[0],
            inputs_hash=hashes[1],
            files=files,
            made_from=self.manifest.stages_in(as_json(inputs), but=stage.name),
            evidence=as_json(stage.evidence),
            seconds=round(seconds, 3),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        old = self.manifest.stages.get(stage.name)
        gone = sorted(set(old.files) - set(files)) if old else []
        new: dict[str, Any] = {
            "tcal_version": package_version(),
            "versions": tool_versions(),
            "stages": {**self.manifest.stages, stage.name: record},
            "pending": Pending(stage=stage.name, folder=stage.dir.name, remove=gone),
        }
        if stage.plan is not None:
            new["plan"] = as_json(stage.plan)
        self._write(self.manifest.model_copy(update=new))  # the commit point
        self.ran.add(stage.name)
        self._publish()

    def _note_made_from(self, name: str, record: StageRecord, inputs: Any) -> None:
        """What a complete stage was made from, which its inputs say: the record of an earlier program may not know."""
        made_from = self.manifest.stages_in(as_json(inputs), but=name)
        if made_from != record.made_from:
            stages = {**self.manifest.stages, name: record.model_copy(update={"made_from": made_from})}
            try:
                self._write(self.manifest.model_copy(update={"stages": stages}))
            except OSError as e:
                raise os_error(e, self.path) from e

    def _publish(self) -> None:
        """Finish the commit of the pending stage; may be repeated from any point."""
        pending = self.manifest.pending
        if pending is None:
            return
        owned = {rel for r in self.manifest.stages.values() for rel in r.files}
        publish(
            self.path,
            pending.folder,
            files=self.record(pending.stage).files,
            remove=set(pending.remove).difference(owned),
        )
        scratch = self.path / SCRATCH_NAME  # before the entry is gone, so that a kill in between leaves no rest
        remove_tree(scratch if scratch.is_symlink() else scratch / pending.stage)
        with contextlib.suppress(OSError):  # if this write fails, the next open finds everything already moved
            self._write(self.manifest.model_copy(update={"pending": None}))

    def _heal(self) -> None:
        """After taking the lock: finish a commit that was cut off, and remove what killed writers left."""
        self._publish()
        for entry in self.path.glob(".tmp-*"):
            remove_tree(entry)
        (self.path / NEW_MANIFEST).unlink(missing_ok=True)

    def _write(self, manifest: Manifest) -> None:
        text = manifest.model_dump_json(indent=2)
        try:
            Manifest.model_validate_json(text)
        except ValidationError as e:
            raise TypeError(f"a manifest that could not be read back: {e}") from e
        write_atomic(self.path / MANIFEST_NAME, text.encode() + b"\n")
        self.manifest = manifest

    def _need_writable(self) -> None:
        if not self._writable:
            raise RunFolderError(str(self.path), "is open for reading only, or closed")
