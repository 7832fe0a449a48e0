"""The calibration panel in a real browser: served by Voilà, and in JupyterLab."""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from volcal.ops.history import insert_calibration_history

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "apps" / "calibration_panel.ipynb"
CHROMIUM = os.environ.get("VOLCAL_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytest.importorskip("voila", reason="the extra 'panel' is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium, or set VOLCAL_TEST_CHROMIUM")
SLOW = 180_000  # ms; a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, process, seconds=120):
    for _ in range(seconds * 5):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended before it listened"
            time.sleep(0.2)
    raise TimeoutError(port)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A desk of its own: the sample's last days as BTC, a damaged copy of them as ETH."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "data" / "sample" / "_history", folder / "harvest" / "_history")
    for day in range(11, 16):
        shutil.copytree(ROOT / "data" / "sample" / "BTC" / "2025" / "10" / str(day), folder / "harvest" / "BTC" / "2025" / "10" / str(day))
    for file in (folder / "harvest" / "BTC").rglob("*.parquet"):
        torn = folder / "harvest" / "ETH" / file.relative_to(folder / "harvest" / "BTC").parent / file.name.replace("BTC", "ETH")
        torn.parent.mkdir(parents=True, exist_ok=True)
        torn.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shutil.copy(NOTEBOOK, folder / NOTEBOOK.name)
    return folder


def environment(desk, history):
    return {**os.environ, "VOLCAL_DATABASE_URL": f"sqlite:///{desk}/{history}.db", "VOLCAL_DATA_ROOT": str(desk / "harvest"),
            "VOLCAL_REPORT_DIR": str(desk / "reports")}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def voila(desk):
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "voila", str(desk / NOTEBOOK.name), f"--port={port}", "--no-browser", "--Voila.ip=127.0.0.1",
                               "--show_tracebacks=True"],
                              env=environment(desk, "voila"), cwd=desk, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(port, server)
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait(30)


def open_page(browser, address, width=1400):
    """A page that asks nothing of other machines (icons from a CDN would hold up its loading) and says at once why it stays empty."""
    for last in (False, False, False, True):
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.route(lambda url: not url.startswith(("http://127.0.0.1", "data:", "blob:")), lambda route: route.abort())
        wrong = page.locator("[data-mime-type='application/vnd.jupyter.stderr']")
        try:
            page.goto(address, wait_until="commit", timeout=SLOW)
            page.locator("button.widget-button:visible, .jp-Notebook .jp-CodeCell:visible").or_(wrong).first.wait_for(timeout=SLOW if last else SLOW / 4)
            break
        except playwright.TimeoutError:
            page.close()
            if last:
                raise
    assert wrong.count() == 0, wrong.first.inner_text()
    return page


class Panel:
    """The page as a person handles it."""

    def __init__(self, page):
        self.page = page
        self.button("Run calibration").wait_for(timeout=SLOW)
        self.idle()

    def button(self, name):
        return self.page.locator("button.widget-button", has_text=name)

    def idle(self):
        playwright.expect(self.button("Run calibration")).to_be_enabled(timeout=SLOW)

    def field(self, label, value):
        self.page.get_by_label(label).fill(value)
        self.page.get_by_label(label).press("Enter")
        self.idle()

    def press(self, name, text):
        """Press a button and wait for a sentence."""
        self.idle()
        self.button(name).click()
        self.page.locator(".vcp-note", has_text=re.compile(text)).first.wait_for(timeout=SLOW)
        self.idle()

    def rows(self):
        return self.page.locator(".vcp-history tbody tr")

    def overflow(self):
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_desk_works_with_the_page(browser, voila, desk):
    page = open_page(browser, voila)
    panel = Panel(page)
    assert page.get_by_text("No run is recorded yet").is_visible()
    panel.press("Use Latest", "nothing to apply to BTC, 3 to 10 days: it has no run")
    panel.field("Lookback, days", "3")
    panel.field("Most options", "600")
    panel.button("Run calibration").click()
    playwright.expect(panel.button("Use Latest")).to_be_disabled(timeout=SLOW)
    page.locator(".vcp-note.ok", has_text="run 1").first.wait_for(timeout=SLOW)
    panel.idle()
    assert panel.rows().count() == 1 and "OK" in panel.rows().first.inner_text()
    assert page.locator(".widget-tab img").count() >= 4
    panel.press("Use Latest", "in force in this process until it restarts")
    assert page.get_by_text("from the runtime override").is_visible()
    panel.press("Apply by policy", r"run 1: multiplier headline 1\.000 to")
    assert "applied by panel" in panel.rows().first.inner_text()
    broken_run(page, panel)
    a_run_of_another_process_shows_after_refresh(page, panel, desk)
    for width in (1280, 640, 480):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert panel.overflow() <= 0, f"the page is wider than {width} pixels"
        for chip in page.locator(".vcp-history .vc-chip").all():
            box = chip.bounding_box()
            assert box["x"] + box["width"] <= width, "a status is off the page"
        page.screenshot(path=desk / f"panel_{width}.png")
    page.close()


def a_run_of_another_process_shows_after_refresh(page, panel, desk):
    """What the night wrote while the page was open."""
    night = {"underlying": "BTC", "dte_min": 3, "dte_max": 10, "lookback_days": 14, "multiplier": 0.5, "mae_pct": 512.0, "num_samples": 7}
    insert_calibration_history({**night, "status": "failed", "reason": "multiplier 0.5 is at or below 0.7"}, f"sqlite:///{desk}/voila.db")
    panel.button("Refresh").click()
    page.locator(".vcp-history tr.vcp-dim", has_text="multiplier 0.5 is at or below 0.7").wait_for(timeout=SLOW)
    assert panel.rows().count() == 2 and page.get_by_text("the guardrails do not let this run pass").is_visible()
    panel.press("Use Latest", "multiplier .* of run 1 is in force .* Note: 1 newer run that must not be used was passed over")


def broken_run(page, panel):
    """A damaged copy of the data: it shows as failed, dimmed, with its reason, and changes nothing that is applied."""
    page.get_by_label("Underlying").select_option("ETH")
    panel.idle()
    panel.press("Run calibration", "FAILED")
    row = panel.rows().first
    assert row.get_attribute("class") == "vcp-dim" and "FAILED" in row.inner_text() and "none of the" in row.inner_text()
    colours = [panel.page.evaluate("e => getComputedStyle(e).color", row.locator("td").nth(n).element_handle()) for n in (0, 9)]
    assert colours == ["rgb(95, 107, 120)"] * 2
    panel.press("Use Latest", "nothing to apply to ETH, 3 to 10 days: its newest run, 2, failed")
    panel.press("Apply by policy", "never applied")
    assert page.get_by_text("nothing is applied").is_visible()
    page.get_by_label("Underlying").select_option("BTC")
    panel.idle()
    page.get_by_text("by panel").first.wait_for(timeout=SLOW)
    assert panel.rows().count() == 1


def test_another_visitor_sees_what_is_kept_not_what_was_for_a_session(browser, voila):
    page = open_page(browser, voila, 1200)
    panel = Panel(page)
    assert page.get_by_text("from the applied surface").is_visible() and panel.rows().count() == 2
    panel.press("Revert", "back to the configured surface")
    assert page.get_by_text("from the configuration").is_visible()
    page.close()


def run_all(page):
    """Run All Cells, again while the kernel is not yet there to hear it; whether a cell ran."""
    for _ in range(8):
        page.wait_for_timeout(2000)
        page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
        page.wait_for_timeout(3000)
        if any(text.strip() in ("[*]:", "[1]:") for text in page.locator(".jp-InputPrompt").all_inner_texts()):
            return True
    return False


def in_jupyterlab(browser, url):
    """The notebook's page with all cells run; opened anew where its kernel never came, as on a machine that starts it for the first time."""
    for _ in range(3):
        page = open_page(browser, url)
        if run_all(page):
            return page
        page.close()
    raise AssertionError("the kernel never ran a cell")


def test_the_same_notebook_in_jupyterlab(browser, desk):
    port = free_port()
    options = [f"--port={port}", "--no-browser", "--IdentityProvider.token=", f"--ServerApp.root_dir={desk}", "--ServerApp.ip=127.0.0.1", "--allow-root"]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment(desk, "lab"), cwd=desk,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        page = in_jupyterlab(browser, f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}")
        panel = Panel(page)
        panel.press("Use Latest", "nothing to apply to BTC")
        page.screenshot(path=desk / "lab.png")
        page.close()
    finally:
        server.terminate()
        server.wait(30)
