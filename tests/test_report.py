"""`snax report`: what is in the page, and that it plays, seen by a browser."""

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

# What would run, were it not escaped where it stands.
EVIL = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">.wav"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two clips, one of them called what a stranger might call it."""
    folder = tmp_path_factory.mktemp("report")
    snax.save(small.model(), folder / "model")
    evil = folder / EVIL.replace("/", "\N{DIVISION SLASH}")  # no name has a slash
    shutil.copy(recordings.DATA / "speech_3s.wav", evil)
    inputs = [str(recordings.DATA / "guit_em9.flac"), str(evil)]
    out = folder / "report.html"
    assert cli.main(["report", *inputs, "-m", str(folder / "model"), "-o", str(out)]) == 0
    assert cli.main(["report", *inputs, "-m", str(folder / "model"), "-o", str(out)]) == 2, "it is there already"
    return out


def data(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="clips">(.*)</script>', page.read_text())
    assert found
    return json.loads(found[1])


def codes_of(clip: Any) -> list[np.ndarray]:
    return [np.frombuffer(base64.b64decode(level), "<u2") for level in clip["codes"]]


def test_what_is_in_it(page: Path) -> None:
    """Both sounds of each clip to 16 bits, the codes, and nothing from anywhere else."""
    assert not re.search(r"https?://|src=[^x]", page.read_text())
    for clip, source in zip(data(page)["clips"], ("guit_em9.flac", "speech_3s.wav"), strict=True):
        heard = snax.data.audio.read(recordings.DATA / source, small.CONFIG.sampling_rate)
        codes = small.model().encode(heard[None])
        for ours, expected in zip(codes_of(clip), codes, strict=True):
            np.testing.assert_array_equal(ours, expected[0])
        decoded = np.asarray(small.model().decode(codes))[0, :, : heard.shape[1]]
        for name, expected in (("original", heard), ("decoded", decoded)):
            content = base64.b64decode(clip["tracks"][name]["audio"].partition(",")[2])
            played, rate = soundfile.read(io.BytesIO(content), dtype="float32")
            assert rate == small.CONFIG.sampling_rate
            # Half a step of 16 bits, and what float32 does to decoded audio in a batch of other length.
            np.testing.assert_allclose(played, np.clip(expected[0], -1, 1), rtol=0, atol=1.1 / 2**15)


def wait_until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="needs Chromium: apt install chromium")
def test_it_plays(page: Path, tmp_path: Path) -> None:
    """A click plays, the codes that are marked are those that sound, another click plays the other sound from there;
    nothing is fetched, no error is said, and no name is run."""
    clip = data(page)["clips"][0]
    codes = codes_of(clip)
    rates = small.CONFIG.code_rates
    with sync_playwright() as playwright:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=[*quiet, "--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        tab = browser.new_page(viewport={"width": 1150, "height": 900})
        said, fetched = list[str](), list[str]()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(page.as_uri())

        def sounds() -> list[tuple[bool, float]]:
            found = tab.evaluate("[...document.querySelectorAll('audio')].map(a => [!a.paused, a.currentTime])")
            return [tuple(each) for each in found]

        tab.get_by_role("button", name="original").first.click()
        wait_until(lambda: sounds()[0][1] > 0.5)
        tab.get_by_role("button", name="original").first.click()
        tab.wait_for_timeout(100)
        assert [playing for playing, _ in sounds()] == [False] * 4
        now = sounds()[0][1]
        marked = tab.locator("canvas.grid").first.get_attribute("data-codes")
        assert marked == " ".join(str(level[int(now * rate)]) for level, rate in zip(codes, rates, strict=True))
        (clock,) = tab.locator(".axis span").all_inner_texts()[1:2]
        assert clock == f"{now:.2f} of {clip['seconds']:.2f} s"
        tab.get_by_role("button", name="decoded").first.click()
        wait_until(lambda: sounds()[1][1] > now + 0.3)
        assert [playing for playing, _ in sounds()] == [False, True, False, False]
        tab.locator(".picture").nth(2).click(position={"x": 100, "y": 20})
        width = tab.locator(".picture").nth(2).bounding_box()
        assert width is not None
        expected = 100 / width["width"] * data(page)["clips"][1]["seconds"]
        assert sounds()[2][1] == pytest.approx(expected, abs=0.01)
        picture = tab.screenshot(path=tmp_path / "page.png")
        assert len(set(picture)) > 100
        assert tab.title().endswith("2 clips"), "a name was run"
        browser.close()
    assert said == []
    assert [url for url in fetched if not url.startswith("data:")] == [page.as_uri()]
