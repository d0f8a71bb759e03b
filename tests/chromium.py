"""A headless Chromium for tests of pages: Debian's, since Playwright's own cannot be had everywhere."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import ConsoleMessage, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Watched:
    """A page, and what it must not do."""

    page: Page
    problems: list[str] = field(default_factory=list)
    """Errors on the console, and exceptions."""
    requests: list[str] = field(default_factory=list)
    """Addresses of all requests, `data:` left out."""

    def note(self, message: ConsoleMessage) -> None:
        """Keep what is worse than information."""
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def ask(self, request: Request) -> None:
        """Keep the address."""
        if not request.url.startswith("data:"):
            self.requests.append(request.url)


@contextmanager
def chromium_page(width: int = 1380, height: int = 1500) -> Iterator[Watched]:
    """A page in a fresh browser.

    Without a browser the test is skipped, loudly; with MNEME_REQUIRE_CHROMIUM=1 it fails.
    """
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        reason = f"no browser (looked for {', '.join(NAMES)}): apt-get install chromium"
        if os.environ.get("MNEME_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright, warnings.catch_warnings():
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(20_000)
        watched = Watched(page)
        page.on("console", watched.note)
        page.on("pageerror", lambda error: watched.problems.append(str(error)))
        page.on("request", watched.ask)
        yield watched
        browser.close()
