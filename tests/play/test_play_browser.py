"""The page of interactive video in a real browser, headless."""

import re
import shutil
import time
from contextlib import contextmanager

import pytest
from play_cases import BREAKOUT, DIGITS, PATIENCE, Scene, playing, until
from playwright.sync_api import Error, expect, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)  # else the one that playwright has downloaded
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=ARGUMENTS)
        except Error as error:
            pytest.fail(
                f"these tests drive Chromium, and {installed or 'none'} was found to start ({error}); install the package "
                "chromium of the system, or run: playwright install chromium"
            )
        yield browser
        browser.close()


@contextmanager
def opened(chromium, url, **options):
    """The page at url. Anything that it says on the console is an error of the test."""
    context = chromium.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
    page, said = context.new_page(), []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert said == []


def number(page):
    """The number of the frame on the page."""
    text = page.locator("#frame").inner_text().replace(",", "")
    return int(text) if text.isdecimal() else 0


def pixels(page):
    """Width, height and the distinct colours of the picture."""
    return page.evaluate("""() => {
        const canvas = document.getElementById("picture");
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
        const colours = new Set();
        for (let i = 0; i < data.length; i += 4) colours.add(data.slice(i, i + 3).join());
        return [canvas.width, canvas.height, [...colours]];
    }""")


def colour(frame, label=0):
    return ",".join(map(str, Scene.colour(frame, label)))


def pause(page):
    page.keyboard.press("p")
    expect(page.locator("#status")).to_have_text("paused")


def settle(page, stream):
    """Pause, and wait for the frame that was on its way."""
    pause(page)
    until(lambda: page.wait_for_timeout(30) or number(page) == stream.frame)


def test_frames_are_shown_with_their_numbers(chromium):
    stream = Scene(0.005)
    with playing(stream) as browser, opened(chromium, browser.url) as page:
        expect(page).to_have_title("Scene")
        until(lambda: page.wait_for_timeout(20) or number(page) > 20)
        expect(page.locator("#status")).to_have_text("live")
        settle(page, stream)
        frame = number(page)
        assert pixels(page) == [8, 6, [colour(frame)]]
        page.get_by_role("button", name="Step").click()
        expect(page.locator("#frame")).to_have_text(str(frame + 1))
        assert pixels(page) == [8, 6, [colour(frame + 1)]]
        expect(page.locator("#bytes")).to_have_text("12.1 KiB")
        expect(page.locator("#growth")).to_have_text("state, constant")
        assert float(page.locator("#milliseconds").inner_text()) >= 5
        assert float(page.locator("#fps").inner_text()) > 0
        assert re.fullmatch(r"[\d.]+ to [\d.]+ ms", page.locator("#range").inner_text())
        page.keyboard.press("p")
        until(lambda: page.wait_for_timeout(20) or number(page) > frame + 5)


def test_the_picture_is_enlarged_to_whole_pixels(chromium):
    with playing(Scene(0.005)) as browser, opened(chromium, browser.url) as page:
        until(lambda: page.wait_for_timeout(20) or number(page) > 0)
        canvas, stage = page.locator("#picture"), page.locator("#stage").bounding_box()
        box = canvas.bounding_box()
        assert box["width"] / 8 == box["height"] / 6 == min(stage["width"] // 8, stage["height"] // 6)
        assert canvas.evaluate("canvas => getComputedStyle(canvas).imageRendering") == "pixelated"


def test_keys_reach_the_stream_and_the_action_is_shown(chromium):
    stream = Scene(0.005)
    with playing(stream) as browser, opened(chromium, browser.url) as page:
        action, up = page.locator("#action"), page.get_by_role("button", name="Up")
        expect(action).to_have_text("NOOP")
        page.keyboard.down("ArrowUp")
        expect(action).to_have_text("RIGHT")
        assert stream.labels[-1] == 2
        expect(up).to_have_attribute("aria-pressed", "true")
        page.keyboard.down("Space")
        expect(action).to_have_text("RIGHTFIRE")
        page.keyboard.down("w")  # the same direction by another key; it stays while one of the two is down
        page.keyboard.up("ArrowUp")
        page.keyboard.up("Space")
        expect(action).to_have_text("RIGHT")
        page.keyboard.up("w")
        expect(action).to_have_text("NOOP")
        expect(up).to_have_attribute("aria-pressed", "false")
        page.keyboard.down("s")
        expect(action).to_have_text("LEFT")
        page.evaluate("dispatchEvent(new Event('blur'))")  # the window does not see it released
        expect(action).to_have_text("NOOP")


def test_buttons_do_what_keys_do(chromium):
    stream = Scene(0.005)
    with playing(stream) as browser, opened(chromium, browser.url) as page:
        action = page.locator("#action")
        page.get_by_role("button", name="Down").hover()
        page.mouse.down()
        expect(action).to_have_text("LEFT")
        page.get_by_role("button", name="Fire").hover()  # slides there
        expect(action).to_have_text("FIRE")
        page.mouse.up()
        expect(action).to_have_text("NOOP")
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#notice")).to_have_text("Paused")
        page.keyboard.press("Space")  # fires, and does not press the button that was clicked
        expect(page.locator("#status")).to_have_text("paused")
        page.get_by_role("button", name="Resume").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("live")
        page.get_by_role("button", name="Up").focus()
        page.keyboard.down("Enter")
        expect(action).to_have_text("RIGHT")
        page.keyboard.up("Enter")
        expect(action).to_have_text("NOOP")


def test_reset_begins_again(chromium):
    stream = Scene(0.005)
    with playing(stream) as browser, opened(chromium, browser.url) as page:
        until(lambda: page.wait_for_timeout(20) or number(page) > 3)
        settle(page, stream)
        page.keyboard.press("r")
        expect(page.locator("#frame")).to_have_text("1")
        assert pixels(page)[2] == [colour(1)] and stream.frame == 1
        page.keyboard.press("n")
        expect(page.locator("#frame")).to_have_text("2")
        page.get_by_role("button", name="Reset").click()
        expect(page.locator("#frame")).to_have_text("1")


def test_closing_the_page_pauses_the_stream(chromium):
    stream = Scene()
    with playing(stream) as browser:
        with opened(chromium, browser.url) as page:
            until(lambda: page.wait_for_timeout(20) or number(page) > 3)
        until(lambda: not browser._pages)
        then = stream.frame
        time.sleep(0.3)  # a hundred frames, if it did not pause
        assert stream.frame <= then + 1


def test_a_lost_connection_is_said_and_found_again(chromium):
    stream = Scene(0.005)
    with opened(chromium, "about:blank") as page:
        with playing(stream) as browser:
            port = int(browser.url.rstrip("/").rsplit(":", 1)[1])
            page.goto(browser.url)
            until(lambda: page.wait_for_timeout(20) or number(page) > 3)
            page.evaluate("socket.close()")
            expect(page.get_by_role("alert")).to_contain_text("Connection lost")
            expect(page.get_by_role("button", name="Reset")).to_be_disabled()
            expect(page.get_by_role("alert")).to_be_hidden()
            expect(page.locator("#status")).to_have_text("live")
        expect(page.get_by_role("alert")).to_have_text("The stream has ended.")
        with playing(Scene(), port=port):
            page.reload()
            expect(page.locator("#status")).to_have_text("live")


def test_an_error_of_the_stream_is_shown(chromium):
    stream = Scene(0.005)
    drawn = stream.next

    def fails(labels):
        if stream.frame == 5:
            raise RuntimeError("no more <b>positions</b>")
        return drawn(labels)

    stream.next = fails
    with playing(stream) as browser, opened(chromium, browser.url) as page:
        expect(page.get_by_role("alert")).to_have_text("The stream ended. RuntimeError: no more <b>positions</b>")
    assert "positions" in str(browser.outcome)


def test_classes_are_chosen_by_number(chromium):
    with playing(Scene(0.005), DIGITS) as browser, opened(chromium, browser.url) as page:
        shown = page.locator("#action")
        expect(shown).to_have_text("0")
        page.keyboard.press("7")
        expect(shown).to_have_text("7")
        page.get_by_role("button", name="3", exact=True).click()
        expect(shown).to_have_text("3")
        expect(page.get_by_role("button", name="3", exact=True)).to_have_attribute("aria-pressed", "true")
        expect(page.get_by_role("button", name="7", exact=True)).to_have_attribute("aria-pressed", "false")
        expect(page.get_by_role("button", name="Fire")).to_be_hidden()


def test_a_model_without_classes_has_no_buttons(chromium):
    with playing(Scene(0.005), ()) as browser, opened(chromium, browser.url) as page:
        until(lambda: page.wait_for_timeout(20) or number(page) > 3)
        expect(page.locator("#pads")).to_be_hidden()
        expect(page.locator("#action")).to_be_hidden()


@pytest.mark.parametrize("classes", [BREAKOUT, DIGITS])
def test_a_phone_shows_all_at_once_and_takes_touches(chromium, classes):
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    stream = Scene(0.005)
    with playing(stream, classes) as browser, opened(chromium, browser.url, **phone) as page:
        until(lambda: page.wait_for_timeout(20) or number(page) > 3)
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert size == [390, 800], "nothing needs scrolling"
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390
        page.get_by_role("button", name="Right" if classes == BREAKOUT else "2").tap()
        until(lambda: 2 in stream.labels)
        page.get_by_role("button", name="Pause").tap()
        expect(page.locator("#status")).to_have_text("paused")


def test_everything_has_an_accessible_name(chromium):
    with playing(Scene(0.005)) as browser, opened(chromium, browser.url) as page:
        expect(page.locator("#status")).to_have_text("live")
        tree = page.locator("body").aria_snapshot()
        for name in ("Up", "Down", "Left", "Right", "Fire", "Reset", "Pause", "Step"):
            assert f'button "{name}"' in tree
        assert 'img "The video, drawn for the action NOOP"' in tree and 'heading "Scene"' in tree
        assert 'img "Time of the last 200 frames"' in tree and "status: live" in tree
