"""A run folder whose process is killed: at every system call, and while a stage runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tcal_compiler.errors import RunFolderError
from tcal_compiler.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def listing(path: Path) -> set[str]:
    """All files below path but the manifest and the lock."""
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"tcal.json", ".lock"}


# A child for every system call that changes the disk, killed just before that call.
KILLER = """
import os, signal, sys
from pathlib import Path
import tcal_compiler.runtime.run_folder as rf

base, killed = Path(sys.argv[1]), 0
def work(path, version):
    with rf.RunFolder.create_or_open(path, teacher_fingerprint="f", teacher_source="t", config_json={}) as run:
        for name in ("one", "two"):
            with run.stage(name, config=version, inputs=0) as stage:
                if stage.done:
                    continue
                for rel in (f"{name}/a", f"{name}.txt", f"{name}/only-{version}"):
                    (stage.dir / rel).parent.mkdir(exist_ok=True)
                    (stage.dir / rel).write_text(version)
                (stage.scratch / "step").write_text(version)
                stage.evidence = {"version": version}
for at in range(1000):
    path, pid = base / f"run{at}", os.fork()
    if pid == 0:
        work(path, "old") if at % 2 else None
        count = 0
        def counted(real):
            def call(*args, **kwargs):
                global count
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **kwargs)
            return call
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        work(path, "new")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
print(at)
"""


def check_stage_is_whole(run: RunFolder, name: str) -> None:
    record = run.record(name)
    version = record.evidence["version"]
    assert set(record.files) == {f"{name}/a", f"{name}.txt", f"{name}/only-{version}"}
    assert all((run.path / rel).read_text() == version for rel in record.files)


def test_a_kill_at_any_moment_leaves_whole_stages_and_no_rest(tmp_path):
    script = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert script.returncode == 0, script.stderr
    moments = int(script.stdout)
    assert moments > 40
    for at in range(moments):
        path = tmp_path / f"run{at}"
        if at % 3 == 0 and (path / "tcal.json").exists():
            with RunFolder.open_existing(path) as reader:  # a reader finishes a commit that was cut off
                assert reader.verify_files() == {}, at
        with RunFolder.create_or_open(path, teacher_fingerprint="f", teacher_source="t", config_json={}) as run:
            stages = list(run.manifest.stages)
            assert run.verify_files() == {}, at
            for name in stages:
                check_stage_is_whole(run, name)
                done = run.record(name).evidence["version"] == "new"
                assert not (done and (path / ".scratch" / name).exists()), at
            found = {rel for rel in listing(path) if not rel.startswith(".scratch/")}
            assert found == {rel for r in run.manifest.stages.values() for rel in r.files}, at
            assert stages == ["one", "two"] or at % 2 == 0, at  # an old complete stage is never lost


SLEEPER = """
import sys
from tcal_compiler.runtime.run_folder import RunFolder
with RunFolder.create_or_open(sys.argv[1], teacher_fingerprint="f", teacher_source="t", config_json={}) as run:
    with run.stage("one", config=0, inputs=0) as stage:
        (stage.dir / "one").write_text("1")
    with run.stage("two", config=0, inputs=0) as stage:
        (stage.scratch / "step").write_text("7")
        (stage.dir / "two").write_text("half")
        print("ready", flush=True)
        sys.stdin.read()
"""


def test_a_killed_process_gives_its_lock_back_and_the_work_goes_on(tmp_path):
    path = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    with pytest.raises(RunFolderError, match=f"pid {child.pid}"):
        RunFolder.open_existing(path, write=True)
    child.kill()
    child.communicate()
    with RunFolder.open_existing(path, write=True) as run:
        assert list(run.manifest.stages) == ["one"] and not list(path.glob(".tmp-*"))
        with run.stage("two", config=0, inputs=0) as stage:
            assert (stage.scratch / "step").read_text() == "7"
            (stage.dir / "two").write_text("2")
        assert listing(path) == {"one", "two"} and run.verify_files() == {}
