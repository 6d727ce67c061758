"""pip-audit without a network: `python tests/audit_offline.py DATABASE .audit/bin/pip-audit --no-deps -r FILE`.

DATABASE is a copy of PyPA's advisory database (github.com/pypa/advisory-database). It is served here as OSV's API is,
and pip-audit is told to ask that. A version is affected when an advisory lists it, or when it lies in one of its
ranges.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version


def in_range(version: Version, events: list[dict[str, str]]) -> bool:
    """Whether a version lies behind an `introduced` and before the `fixed`, or not behind the `last_affected`."""
    affected = False
    for event in sorted(events, key=lambda e: Version(next(iter(e.values())))):
        ((what, at),) = event.items()
        if what == "introduced":
            affected |= version >= Version(at)
        elif version >= Version(at) if what == "fixed" else version > Version(at):
            affected = False
    return affected


def known(database: Path, name: str, version: str) -> list[dict[str, Any]]:
    """Advisories of a package that a version is affected by."""
    found = []
    for file in sorted((database / "vulns" / name).glob("*.yaml")):
        text = re.sub(
            r"(\b(?:introduced|fixed|last_affected): '?\d[\d.]*)-", r"\1+", file.read_text()
        )  # a local version, as Python has it
        advisory = yaml.load(text, Loader=yaml.BaseLoader)  # times and versions as text
        for affected in advisory.get("affected", []):
            ranges = [r["events"] for r in affected.get("ranges", []) if r["type"] == "ECOSYSTEM"]
            listed = version in affected.get("versions", [])
            if listed or any(in_range(Version(version), events) for events in ranges):
                found.append(advisory)
                break
    return found


def server(database: Path) -> ThreadingHTTPServer:
    """OSV's query on a free port of this machine."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            vulns = known(database, canonicalize_name(asked["package"]["name"]), asked["version"])
            body = json.dumps({"vulns": vulns} if vulns else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            return None

    return ThreadingHTTPServer(("127.0.0.1", 0), Answer)


def main() -> None:
    """Exits as pip-audit does: 1 when it finds a vulnerability."""
    database, words = Path(sys.argv[1]), sys.argv[2:]
    if not any((database / "vulns").glob("*/*.yaml")):
        sys.exit(f"{database} holds no advisory")
    with server(database) as osv:
        threading.Thread(target=osv.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{osv.server_port}"
        done = subprocess.run([*words, "--vulnerability-service", "osv", "--osv-url", url])
        osv.shutdown()
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
