"""The page of a sweep in a real browser: it fits a phone, and leaves pictures to look at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.sweep.report import write_sweep_report
from tests.cluster.sweep.finished_sweep import make_directory
from tests.cluster.sweep.sweeps import make_sweep

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
)
# A window of a browser has a least width; a frame has none. All that folds is opened and measured too.
FRAME = """<!doctype html><body style="margin:0"><iframe id="page" src="{page}"
style="border:0;width:{width}px;height:{height}px"></iframe><p id="found"></p><script>
window.onload = () => {{
  const inner = document.getElementById("page").contentDocument;
  const measure = () => inner.documentElement.scrollWidth;
  const folded = measure();
  const open = {is_open};
  if (open) inner.querySelectorAll("details").forEach(one => one.open = true);
  const boxes = [...inner.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth);
  document.getElementById("found").textContent =
    "widths " + folded + " " + measure() + " scrolling boxes " + boxes.length;
}};
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where pictures stay: below ``TMKD_ARTEFACTS`` if that is set."""
    found = os.environ.get("TMKD_ARTEFACTS")
    directory = Path(found) if found else tmp_path / "artefacts"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def browse(tmp_path: Path, page: Path, *arguments: str) -> str:
    """Runs the browser on a page and returns what it prints."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri()]
    # A loaded machine starts a browser slowly.
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout


def frame(tmp_path: Path, page: Path, width: int, height: int, *, is_open: bool = False) -> Path:
    path = tmp_path / f"frame-{width}{'-open' if is_open else ''}.html"
    text = FRAME.format(page=page.as_uri(), width=width, height=height, is_open=str(is_open).lower())
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["one", "points"])
def test_the_page_does_not_scroll_sideways_on_a_phone_or_a_desktop(
    tmp_path: Path, artefacts: Path, name: str
) -> None:
    lost = (("tmkd", 2), ("m-o-1", 1))
    sweep = make_sweep(alphas=(0.9, 0.1, 0.5), lost=lost) if name == "points" else make_sweep()
    page = write_sweep_report(make_directory(tmp_path / name, sweep, has_logs=name == "one"))
    for width, height in ((360, 4000), (1280, 3000)):
        dom = browse(tmp_path, frame(tmp_path, page, width, height, is_open=True), "--dump-dom")
        found = re.search(r"widths (\d+) (\d+) scrolling boxes (\d+)", dom)
        assert found, dom[-500:]
        folded, opened, boxes = map(int, found.groups())
        assert (folded, opened) == (width, width)
        # The measure is a measure: on a phone the tables are wider than their boxes.
        assert (boxes > 0) or width > 360
        picture = artefacts / f"sweep-{name}-{width}.png"
        window = f"--window-size={max(width, 500)},{height}"
        browse(tmp_path, frame(tmp_path, page, width, height), window, f"--screenshot={picture}")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000
