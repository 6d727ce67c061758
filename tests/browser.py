"""Opens a page in the Chromium that QtWebEngine brings (the extra `browser`), and says what it saw as JSON.

python tests/browser.py PAGE --width 390 --dark --picture seen.png
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

MEASURE = """(() => {
  const d = document.documentElement, s = getComputedStyle(document.body);
  const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.right, b.height]; };
  return JSON.stringify({width: innerWidth, overflow: d.scrollWidth - d.clientWidth, height: d.scrollHeight,
    pictures: [...document.querySelectorAll("svg, img")].map(box), paper: s.backgroundColor, ink: s.color});
})()"""


def look(page: Path, width: int, *, dark: bool, picture: Path | None) -> dict[str, object]:
    """What the page is at this width: overflow, pictures as [left, right, height], colours, console messages."""
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={0 if dark else 1}"
    os.environ.update(QT_QPA_PLATFORM="offscreen", QTWEBENGINE_DISABLE_SANDBOX="1", QTWEBENGINE_CHROMIUM_FLAGS=flags)
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            seen["messages"].append(f"{level.name} {message} at {source}:{line}")

    seen: dict = {"messages": [], "loaded": False}
    app, view = QApplication([]), QWebEngineView()
    view.setPage(Page(view))
    view.resize(width, 900)
    view.show()

    def measured(text: str) -> None:
        seen.update(json.loads(text))
        view.resize(width, int(seen["height"]))
        QTimer.singleShot(1500, finish)

    def finish() -> None:
        if picture:
            view.grab().save(str(picture))
        app.quit()

    def loaded(ok: bool) -> None:
        seen["loaded"] = ok
        QTimer.singleShot(300, lambda: view.page().runJavaScript(MEASURE, measured))

    view.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(page.absolute())))
    QTimer.singleShot(60_000, app.quit)
    app.exec()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    print(json.dumps(look(args.page, args.width, dark=args.dark, picture=args.picture)), flush=True)
    os._exit(0)  # Chromium's own threads may take long to end


if __name__ == "__main__":
    main()
