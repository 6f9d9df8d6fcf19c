"""Open a page in a headless browser and ask it something: `python -m tests.browser URL SCRIPT [SCREENSHOT]`.

Prints JSON: what the script evaluated to, and the errors and warnings of the console. Exits with 77 where
there is no PyQt6-WebEngine, which is Chromium as a Python package. A process of its own, for its event loop.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

NO_BROWSER = 77
WIDTH, HEIGHT, SETTLE_MS, LIMIT_MS = 1200, 1600, 3000, 60_000


def browse(url: str, script: str, screenshot: str | None) -> dict[str, Any]:
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    found: dict[str, Any] = {"answer": None, "console": []}

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            if level != QWebEnginePage.JavaScriptConsoleMessageLevel.InfoMessageLevel:
                found["console"].append(message)

    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    view.resize(WIDTH, HEIGHT)

    def ask() -> None:
        page.runJavaScript(f"JSON.stringify({script})", answered)

    def answered(answer: str | None) -> None:
        found["answer"] = json.loads(answer) if answer else None
        if screenshot:
            view.grab().save(screenshot)
        QTimer.singleShot(200, application.quit)

    page.loadFinished.connect(lambda _: QTimer.singleShot(SETTLE_MS, ask))
    QTimer.singleShot(LIMIT_MS, application.quit)
    view.load(QUrl(url))
    view.show()
    application.exec()
    return found


def main(url: str, script: str, screenshot: str | None = None) -> int:
    try:
        print(json.dumps(browse(url, script, screenshot)))
    except ImportError as error:
        print(error, file=sys.stderr)
        return NO_BROWSER
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
