"""`snax report`: the content of the page, and its behavior in a browser."""

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import recordings, small
from playwright.sync_api import sync_playwright

import snax
from snax import cli

pytestmark = pytest.mark.slow

# A name with two scripts, which would run if the page did not escape it.
EVIL = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">.wav"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a report of two clips, one of which has a malicious name."""
    folder = tmp_path_factory.mktemp("report")
    snax.save(small.model(), folder / "model")
    evil = folder / EVIL.replace("/", "\N{DIVISION SLASH}")  # file names cannot contain a slash
    shutil.copy(recordings.DATA / "speech_3s.wav", evil)
    inputs = [str(recordings.DATA / "guit_em9.flac"), str(evil)]
    out = folder / "report.html"
    assert cli.main(["report", *inputs, "-m", str(folder / "model"), "-o", str(out)]) == 0
    assert cli.main(["report", *inputs, "-m", str(folder / "model"), "-o", str(out)]) == 2, (
        "an existing file must not be overwritten"
    )
    return out


def data(page: Path) -> Any:
    match = re.search(r'<script type="application/json" id="clips">(.*)</script>', page.read_text())
    assert match
    return json.loads(match[1])


def codes_of(clip: Any) -> list[np.ndarray]:
    return [np.frombuffer(base64.b64decode(level), "<u2") for level in clip["codes"]]


def test_page_embeds_audio_and_codes(page: Path) -> None:
    """The page has original and decoded audio in 16 bits and the codes, and refers to no other source."""
    assert not re.search(r"https?://|src=[^x]", page.read_text())
    for clip, source in zip(data(page)["clips"], ("guit_em9.flac", "speech_3s.wav"), strict=True):
        original = snax.data.audio.read(recordings.DATA / source, small.CONFIG.sampling_rate)
        codes = small.model().encode(original[None])
        for level, expected in zip(codes_of(clip), codes, strict=True):
            np.testing.assert_array_equal(level, expected[0])
        decoded = np.asarray(small.model().decode(codes))[0, :, : original.shape[1]]
        for name, expected in (("original", original), ("decoded", decoded)):
            content = base64.b64decode(clip["tracks"][name]["audio"].partition(",")[2])
            samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
            assert rate == small.CONFIG.sampling_rate
            # Half a 16-bit step, plus float32 rounding of decoded audio in packed rows of another length.
            np.testing.assert_allclose(samples, np.clip(expected[0], -1, 1), rtol=0, atol=1.1 / 2**15)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="needs Chromium: apt install chromium")
def test_playback_in_browser(page: Path, tmp_path: Path) -> None:
    """A click plays a track and marks its current codes. The other track continues at the same position.

    The page fetches nothing, logs no error and does not run scripts in clip names.
    """
    clip = data(page)["clips"][0]
    codes = codes_of(clip)
    rates = small.CONFIG.code_rates
    with sync_playwright() as playwright:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=[*quiet, "--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        tab = browser.new_page(viewport={"width": 1150, "height": 900})
        messages, fetched = list[str](), list[str]()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(page.as_uri())

        def tracks() -> list[tuple[bool, float]]:
            states = tab.evaluate("[...document.querySelectorAll('audio')].map(a => [!a.paused, a.currentTime])")
            return [tuple(state) for state in states]

        tab.get_by_role("button", name="original").first.click()
        wait_until(lambda: tracks()[0][1] > 0.5)
        tab.get_by_role("button", name="original").first.click()
        tab.wait_for_timeout(100)
        assert [playing for playing, _ in tracks()] == [False] * 4
        now = tracks()[0][1]
        marked = tab.locator("canvas.grid").first.get_attribute("data-codes")
        assert marked == " ".join(str(level[int(now * rate)]) for level, rate in zip(codes, rates, strict=True))
        (clock,) = tab.locator(".axis span").all_inner_texts()[1:2]
        assert clock == f"{now:.2f} of {clip['seconds']:.2f} s"
        tab.get_by_role("button", name="decoded").first.click()
        wait_until(lambda: tracks()[1][1] > now + 0.3)
        assert [playing for playing, _ in tracks()] == [False, True, False, False]
        tab.locator(".picture").nth(2).click(position={"x": 100, "y": 20})
        width = tab.locator(".picture").nth(2).bounding_box()
        assert width is not None
        expected = 100 / width["width"] * data(page)["clips"][1]["seconds"]
        assert tracks()[2][1] == pytest.approx(expected, abs=0.01)
        picture = tab.screenshot(path=tmp_path / "page.png")
        assert len(set(picture)) > 100
        assert tab.title().endswith("2 clips"), "a script in a clip name ran"
        browser.close()
    assert messages == []
    assert [url for url in fetched if not url.startswith("data:")] == [page.as_uri()]
