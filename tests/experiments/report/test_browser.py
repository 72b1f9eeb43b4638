"""The page in a real browser: it is shown without an error, needs no network, and prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND"),
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """What the browser prints, and what the page said on its console."""
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r"CONSOLE[^\n]*", done.stderr)


def test_the_page_is_shown_without_an_error(written: Path, tmp_path: Path) -> None:
    dom, said = browse(written / "report.html", tmp_path / "profile", "--dump-dom")
    assert said == []
    assert dom.count("<figure") == dom.count("<figcaption") >= 14
    assert "</html>" in dom


def test_the_console_is_heard(tmp_path: Path) -> None:
    """The test above could not fail if it were not."""
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><title>x</title><script>console.error('here'); nothing()</script>")
    _, said = browse(page, tmp_path / "profile", "--dump-dom")
    assert any("here" in line for line in said)
    assert any("nothing is not defined" in line for line in said)


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(written: Path, tmp_path: Path, width: int) -> None:
    """Wide tables scroll inside of their frame."""
    text = (written / "report.html").read_text(encoding="utf-8")
    probe = (
        "<script>document.title = `widths ${document.documentElement.scrollWidth} ${window.innerWidth} "
        "${document.querySelectorAll('svg').length} ${[...document.querySelectorAll('svg')].filter("
        "s => s.getBoundingClientRect().width < 100).length}`</script></body>"
    )
    page = tmp_path / "probe.html"
    page.write_text(text.replace("</body>", probe), encoding="utf-8")
    dom, _ = browse(page, tmp_path / "profile", f"--window-size={width},900", "--dump-dom")
    scroll, inner, figures, tiny = map(int, re.findall(r"<title>widths (\d+) (\d+) (\d+) (\d+)</title>", dom)[0])
    assert scroll <= inner
    assert figures >= 14
    assert tiny == 0


def test_it_prints(written: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "report.pdf"
    browse(written / "report.html", tmp_path / "profile", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 40
