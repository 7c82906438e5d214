"""Interactive video: keys and scripts, the loop, and its screens."""

import copy
import http.client
import io
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from pom_ext.play import Browser, Keys, Picture, Terminal, Turn, Window, play, script
from pom_ext.play.keys import GAME_KEYS, parts_of
from pom_ext.play.loop import Pacer, to_pixels

PONG = ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
BREAKOUT = ("NOOP", "FIRE", "RIGHT", "LEFT")
DIRECTIONS = ("UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT")
ALL = ("NOOP", "FIRE", *DIRECTIONS, *(name + "FIRE" for name in DIRECTIONS))
DIGITS = tuple("0123456789")
PATIENCE = 20  # seconds before a test gives up on what must come


class Scene:
    """A stream whose frame f for label l is filled with the colour (f, 20 * l, 99), modulo 256. Remembers its labels."""

    nbytes = 12345

    def __init__(self, seconds=0.002, frames=1):
        self.frame, self.seconds, self.frames, self.labels = 0, seconds, frames, []

    def next(self, labels=None):
        time.sleep(self.seconds)
        assert labels is None or (labels.shape == (1,) and labels.dtype == torch.int64)
        self.labels = [*self.labels, None if labels is None else int(labels)]
        self.frame += 1
        colour = torch.tensor(self.colour(self.frame, int(labels or 0)))
        return colour.view(1, 3, 1, 1, 1).expand(1, 3, self.frames, 6, 8) / 127.5 - 1

    @staticmethod
    def colour(frame, label):
        return (frame % 256, 20 * label, 99)

    def fork(self, seed=None):
        return copy.copy(self)

    def rewind(self, kept):
        labels = self.labels
        self.__dict__.update(vars(kept))
        self.labels = labels


class Player:
    """A screen for tests: gives these turns, then ends; keeps what it is shown."""

    def __init__(self, *turns):
        self.turns, self.shown = list(turns), []

    def turn(self):
        return self.turns.pop(0) if self.turns else None

    def show(self, picture):
        self.shown.append(picture)


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self):
        self.now, self.sleeps = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds
        self.sleeps.append(seconds)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


# Keys and scripts


@pytest.mark.parametrize(
    "classes, held, action",
    [
        (ALL, "", "NOOP"),
        (ALL, "up right fire", "UPRIGHTFIRE"),
        (ALL, "down left", "DOWNLEFT"),
        (ALL, "left right", "NOOP"),
        (ALL, "up down fire", "FIRE"),
        (ALL, "left right up", "UP"),
        (PONG, "up", "RIGHT"),
        (PONG, "down", "LEFT"),
        (PONG, "down fire", "LEFTFIRE"),
        (PONG, "up right", "RIGHT"),
        (PONG, "up down", "NOOP"),
        (PONG, "fire", "FIRE"),
        (BREAKOUT, "right fire", "FIRE"),  # the game has no RIGHTFIRE; the first class of the two
        (("NOOP", "UP", "RIGHT", "UPRIGHTFIRE"), "up right", "UP"),
        (("LEFT", "NOOP", "UP"), "", "NOOP"),
        (("LEFT", "UP"), "right", "LEFT"),  # nothing fits: label 0
        (("NOOP", "UP", "DOWN"), "right fire", "NOOP"),
        (ALL, "3 nonsense", "NOOP"),
    ],
)
def test_held_keys_mean_the_best_action(classes, held, action):
    assert classes[Keys(classes).label(held.split())] == action


@given(st.sets(st.sampled_from(ALL[1:])), st.sets(st.sampled_from(GAME_KEYS)))
def test_no_action_presses_a_key_that_is_not_held(actions, held):
    classes = ["NOOP", *sorted(actions)]
    pressed = parts_of(classes[Keys(classes).label(held)])
    vertical = any(parts_of(name) & {"up", "down"} for name in classes)
    wanted = held if vertical else {{"up": "right", "down": "left"}.get(key, key) for key in held}
    assert pressed <= wanted
    exact = [name for name in classes if parts_of(name) == wanted]
    assert not exact or pressed == wanted


def test_keys_with_a_meaning_are_named():
    assert Keys(ALL).names == GAME_KEYS and Keys(PONG).names == GAME_KEYS
    assert Keys(("NOOP", "UP", "DOWN")).names == ("up", "down")
    assert Keys(BREAKOUT[:1] + BREAKOUT[2:]).names == ("up", "down", "left", "right")
    assert Keys(DIGITS).names == DIGITS and not Keys(DIGITS).game
    assert Keys().names == () and not Keys().game


def test_the_class_of_a_number_stays_chosen():
    keys = Keys(("cat", "dog", "UP"))
    assert [keys.label(held) for held in ([], ["2"], [], ["1"], ["up"], ["7"], [])] == [0, 2, 2, 1, 1, 1, 1]


def test_a_model_without_classes_is_given_no_label():
    assert Keys().label({"up", "1"}) is None


def test_scripts():
    assert script("NOOP*2,RIGHT*3,LEFT", PONG) == [0, 0, 2, 2, 2, 3]
    assert script(" 5 * 2 , NOOP", PONG) == [5, 5, 0]
    assert script("3,1", ("1", "2", "3", "4")) == [2, 0], "names before numbers"


@pytest.mark.parametrize(
    "text, message",
    [
        ("NOOP,JUMP*3", r"actions: expected items such as NOOP\*10, got 'JUMP\*3'; .* NOOP, FIRE, .* or 0 to 5"),
        ("6", "got '6'; .* or 0 to 5"),
        ("-1", "got '-1'"),
        ("", "got ''"),
        ("NOOP,", "got ''"),
        ("NOOP*0", r"actions: expected 1 to 1000000 repetitions in 'NOOP\*0', got '0'"),
        ("NOOP*", "repetitions in .*, got ''"),
        ("NOOP*x", "repetitions in .*, got 'x'"),
        ("NOOP*99999999999", "repetitions in .*, got '99999999999'"),
    ],
)
def test_what_is_wrong_with_a_script_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        script(text, PONG)


def test_a_model_without_classes_takes_no_script():
    with pytest.raises(ValueError, match="actions: the model has no classes to choose from, got 'UP'"):
        script("UP", ())


# The loop


def test_the_loop_draws_what_the_keys_say_and_measures_it():
    clock, stream = Clock(), Scene()
    seconds = iter([0.25, 0.125, 0.125, 0.5])
    drawn = stream.next
    stream.next = lambda labels: (setattr(clock, "now", clock.now + next(seconds)), drawn(labels))[1]
    player = Player(Turn(), Turn(frozenset({"up"})), Turn(frozenset({"down", "fire"})), Turn())
    statistics = play(stream, player, PONG, clock=clock, sleep=clock.sleep)
    assert stream.labels == [0, 2, 5, 0]
    assert [picture.action for picture in player.shown] == ["NOOP", "RIGHT", "LEFTFIRE", "NOOP"]
    assert [picture.frame for picture in player.shown] == [1, 2, 3, 4]
    assert [picture.milliseconds for picture in player.shown] == [250, 125, 125, 500]
    assert [picture.fps for picture in player.shown] == [0, 4, pytest.approx(2 / 0.375), 6]
    assert all(picture.nbytes == Scene.nbytes for picture in player.shown)
    assert player.shown[2].pixels.shape == (6, 8, 3) and player.shown[2].pixels.dtype == np.uint8
    assert player.shown[2].pixels[5, 7].tolist() == list(Scene.colour(3, 5))
    assert statistics.frames == 4 and statistics.median == 187.5 and statistics.fps == 4
    assert statistics.p99 == pytest.approx(np.percentile([250, 125, 125, 500], 99))
    assert str(statistics).startswith("4 frames, 187.5 ms each (median), ")
    assert clock.sleeps == []


def test_time_that_the_player_pauses_is_not_counted():
    clock, stream = Clock(), Scene()
    drawn = stream.next
    stream.next = lambda labels: (setattr(clock, "now", clock.now + 0.5), drawn(labels))[1]

    class Slow(Player):
        def turn(self):
            clock.now += 60
            return super().turn()

    statistics = play(stream, Slow(Turn(), Turn()), clock=clock)
    assert statistics.fps == 2 and statistics.median == 500


def test_a_loop_without_frames():
    statistics = play(Scene(), Player())
    assert statistics.frames == 0 and statistics.fps == 0 and str(statistics) == "no frames"


def test_the_loop_ends_after_frames_or_script():
    stream, endless = Scene(0), Player(*[Turn(frozenset({"up"}))] * 50)
    assert play(stream, endless, PONG, frames=3).frames == 3 and stream.labels == [2, 2, 2]
    assert play(stream, endless, PONG, script=[0, 3]).frames == 2 and stream.labels == [2, 2, 2, 0, 3]
    assert play(stream, endless, PONG, script=[0, 3], frames=1).frames == 1
    assert len(endless.turns) == 44, "no turn is asked for after the end"


def test_reset_goes_back_to_where_the_loop_began():
    stream = Scene(0)
    stream.next()
    player = Player(Turn(), Turn(), Turn(reset=True), Turn())
    play(stream, player, PONG, script=[1, 2, 3])
    assert [picture.frame for picture in player.shown] == [2, 3, 2, 3]
    assert stream.labels == [None, 1, 2, 1, 2], "the script begins again, too"


def test_a_model_without_classes():
    stream, player = Scene(0), Player(Turn(frozenset({"up"})))
    play(stream, player)
    assert stream.labels == [None] and player.shown[0].action == ""


def test_every_frame_of_a_step_is_shown():
    clock, stream = Clock(), Scene(0, frames=2)
    player = Player(Turn(), Turn())
    statistics = play(stream, player, fps=4, clock=clock, sleep=clock.sleep)
    assert [picture.frame for picture in player.shown] == [1, 2, 3, 4] and statistics.frames == 4
    assert clock.sleeps == [0.25] * 4 and statistics.fps == 4


def test_an_error_of_the_stream_ends_the_loop_and_leaves_the_last_good_frame():
    stream, player = Scene(0), Player(*[Turn()] * 9)
    drawn = stream.next

    def fails(labels):
        if stream.frame == 2:
            raise RuntimeError("no more positions")
        return drawn(labels)

    stream.next = fails
    with pytest.raises(RuntimeError, match="no more positions"):
        play(stream, player)
    assert stream.frame == 2 and len(player.shown) == 2


@pytest.mark.parametrize(
    "options, name", [({"fps": 0}, "fps"), ({"fps": float("nan")}, "fps"), ({"frames": 0}, "frames")]
)
def test_wrong_arguments_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        play(Scene(), Player(), **options)


def test_a_pacer_keeps_to_fixed_points_in_time():
    clock = Clock()
    pacer = Pacer(4, clock, clock.sleep)
    for work, wait in [(0.0625, 0.1875), (0.125, 0.125), (0, 0.25)]:
        clock.now += work
        pacer.wait()
        assert clock.sleeps[-1] == wait
    clock.now += 0.375  # late: no wait, and the next frame does not hurry
    pacer.wait()
    assert len(clock.sleeps) == 3
    clock.now += 0.125
    pacer.wait()
    assert clock.sleeps[3:] == [0.125] and clock.now == 101.375


def test_pixels_are_clamped_and_grey_is_made_colour():
    video = torch.tensor([-9.0, -1, 0, 1, 9]).view(1, 1, 1, 1, 5)
    assert to_pixels(video).tolist() == [[[[value] * 3 for value in (0, 0, 128, 255, 255)]]]
    for shape in [(2, 3, 1, 4, 4), (1, 2, 1, 4, 4), (1, 3, 4, 4)]:
        with pytest.raises(ValueError, match="stream: expected one video"):
            to_pixels(torch.zeros(shape))


def test_a_terminal_writes_a_line_for_each_frame():
    lines = []
    with Terminal(lines.append) as terminal:
        play(Scene(0), terminal, PONG, script=[2, 0])
    assert len(lines) == 2 and lines[0].startswith("frame 1 ") and lines[0].endswith(" fps   RIGHT")


# The window


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with Window("Pong") as window:
        yield window


def picture(pixels, **numbers):
    return Picture(pixels, **{"frame": 7, "milliseconds": 12.34, "fps": 20.0, "nbytes": 1, "action": "UP", **numbers})


def press(*names, up=False):
    import pygame

    for name in names:
        kind = pygame.KEYUP if up else pygame.KEYDOWN
        pygame.event.post(pygame.event.Event(kind, key=pygame.key.key_code(name)))


def test_a_window_shows_frames_enlarged(window):
    import pygame

    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    window.show(picture(pixels))
    surface = pygame.display.get_surface()
    assert surface.get_size() == (640, 480)
    shown = pygame.surfarray.array3d(surface).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, pixels.repeat(160, 0).repeat(160, 1))
    assert pygame.display.get_caption()[0] == "Pong   frame 7   12.3 ms   20.0 fps   UP"


def test_a_window_of_another_shape_centres_the_frame(window):
    import pygame

    window.show(picture(np.full((4, 4, 3), 200, np.uint8)))
    pygame.display.set_mode((100, 60), pygame.RESIZABLE)
    window.show(picture(np.full((4, 4, 3), 200, np.uint8)))
    shown = pygame.surfarray.array3d(pygame.display.get_surface())[:, 30, 0]
    assert shown.tolist() == [0] * 20 + [200] * 60 + [0] * 20


def test_a_window_takes_keys(window):
    window.show(picture(np.zeros((4, 4, 3), np.uint8)))
    assert window.turn() == Turn()
    press("up", "space")
    assert window.turn() == Turn(frozenset({"up", "fire"}))
    press("up", up=True)
    assert window.turn() == Turn(frozenset({"fire"}))
    press("space", up=True)
    press("a")
    press("a", up=True)
    press("7", "r")
    assert window.turn() == Turn(frozenset({"left", "7"}), reset=True), "short presses are not lost"
    press("7", up=True)
    assert window.turn() == Turn()
    press("escape")
    assert window.turn() is None


def test_a_window_pauses_and_steps_and_closes(window):
    import pygame

    window.show(picture(np.zeros((4, 4, 3), np.uint8)))
    press("p", "n")
    assert window.turn() == Turn()
    timer = threading.Timer(0.1, lambda: press("up"))
    timer.start()
    threading.Timer(0.2, lambda: press("p")).start()
    assert window.turn() == Turn(frozenset({"up"})), "waits for the second p"
    assert window.turn() == Turn(frozenset({"up"}))
    pygame.event.post(pygame.event.Event(pygame.WINDOWFOCUSLOST))
    assert window.turn() == Turn()
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert play(Scene(), window, PONG).frames == 0


def test_a_missing_display_is_said(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "nonsense")
    with pytest.raises(OSError, match="window: there is no display .*browser"), Window():
        pass


# The server


@contextmanager
def playing(stream, classes=PONG, **options):
    """A Browser in which a loop plays the stream, in a thread of its own; browser.outcome is how the loop ended."""
    browser, entered = Browser(classes, title="Scene", **options), threading.Event()

    def run():
        try:
            with browser:
                entered.set()
                browser.outcome = play(stream, browser, classes)
        except RuntimeError as error:
            browser.outcome = error

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(PATIENCE)
    try:
        yield browser
    finally:
        browser.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Client:
    """A page, without a browser."""

    def __init__(self, browser):
        origin = browser.url.rstrip("/")
        self.connection = connect(browser.url.replace("http", "ws") + "play", origin=origin, open_timeout=PATIENCE)

    def __enter__(self):
        self.socket = self.connection.__enter__()
        return self

    def __exit__(self, *error):
        self.connection.__exit__(*error)

    def send(self, **wish):
        self.socket.send(json.dumps(wish))

    def take(self):
        return json.loads(self.socket.recv(PATIENCE))

    def message(self, name):
        """The next message with this entry; frames before it are shown."""
        while True:
            message = self.take()
            if "frame" in message:
                message["png"] = self.socket.recv(PATIENCE)
                with suppress(ConnectionClosed):  # there may still be messages from before
                    self.send(shown=message["frame"])
            if name in message:
                return message

    def frame(self, fits):
        """The next frame that fits."""
        while not fits(message := self.message("frame")):
            pass
        return message


def test_frames_arrive_with_their_numbers():
    with playing(Scene()) as browser, Client(browser) as client:
        hello = client.message("title")
        assert hello == {"title": "Scene", "classes": list(PONG), "keys": list(GAME_KEYS), "game": True}
        first = client.message("frame")
        message = client.frame(lambda message: message["frame"] > 10)
        assert first["frame"] >= 1 and message["nbytes"] == Scene.nbytes and message["action"] == "NOOP"
        assert message["milliseconds"] >= 2 and message["fps"] > 0
        pixels = np.asarray(Image.open(io.BytesIO(message["png"])))
        assert pixels.shape == (6, 8, 3) and (pixels == Scene.colour(message["frame"], 0)).all()


def test_frames_are_not_held_back_to_be_sent_together():
    with playing(Scene()) as browser, Client(browser) as client:
        client.message("frame")
        (connection,) = browser._server.server_state.connections
        assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_keys_change_the_label_that_the_stream_is_given():
    stream = Scene()
    with playing(stream) as browser, Client(browser) as client:
        client.send(keys=["up", "fire"])
        message = client.frame(lambda message: message["action"] != "NOOP")
        assert message["action"] == "RIGHTFIRE" and stream.labels[message["frame"] - 1] == 4
        client.send(keys=[])
        client.frame(lambda message: message["action"] == "NOOP")


def test_reset_pause_and_step():
    stream = Scene()
    with playing(stream) as browser, Client(browser) as client:
        client.frame(lambda message: message["frame"] >= 3)
        client.send(pause=True, reset=True)
        assert client.frame(lambda message: message["frame"] == 1)["action"] == "NOOP"
        until(lambda: stream.frame == 1)
        before = len(stream.labels)
        client.send(keys=["down"])
        client.send(keys=[])
        client.send(step=True)
        assert client.message("frame")["action"] == "LEFT", "a press between two turns is not lost"
        client.send(step=True)
        message = client.message("frame")
        assert message["frame"] == 3 and message["action"] == "NOOP"
        assert stream.labels[before:] == [3, 0], "a pause draws only the steps"
        client.send(pause=False)
        assert client.message("paused")["paused"] is False
        client.frame(lambda message: message["frame"] > 9)


def test_a_slow_page_misses_frames_and_is_sent_the_latest():
    stream = Scene()
    with playing(stream) as browser, Client(browser) as client:
        while "frame" not in (message := client.take()):
            pass
        client.socket.recv(PATIENCE)
        until(lambda: stream.frame >= message["frame"] + 50)
        at_least = stream.frame - 1  # this one may not be shown yet
        client.send(shown=message["frame"])
        assert client.message("frame")["frame"] >= at_least


def test_the_loop_pauses_while_no_page_is_open():
    stream = Scene()
    with playing(stream) as browser:
        assert stream.frame == 0
        with Client(browser) as first, Client(browser) as second:
            first.message("frame")
            second.message("frame")
        until(lambda: not browser._pages)
        then = stream.frame
        time.sleep(0.3)  # a hundred frames, if it did not pause
        assert stream.frame <= then + 1
        with Client(browser) as client:
            client.frame(lambda message: message["frame"] > then + 5)


def test_the_end_is_told_to_the_page():
    stream = Scene()
    with playing(stream) as browser, Client(browser) as client:
        client.message("frame")
        browser.stop()
        assert client.message("ended") == {"ended": ""}
        with pytest.raises(ConnectionClosed):
            client.message("anything")
    assert browser.outcome.frames == stream.frame


def test_an_error_is_told_to_the_page():
    stream = Scene()
    stream.next = lambda labels: (_ for _ in ()).throw(RuntimeError("no more positions"))
    with playing(stream) as browser, Client(browser) as client:
        assert client.message("ended") == {"ended": "RuntimeError: no more positions"}
    assert str(browser.outcome) == "no more positions"


@pytest.mark.parametrize("text", ["", "up", "[1]", '{"quit": 1}', '{"keys": 3}', '{"keys": [[]]}', b"\x00"])
def test_a_message_that_is_not_understood_closes_that_page_only(text):
    with playing(Scene()) as browser, Client(browser) as bad, Client(browser) as good:
        bad.socket.send(text)
        with pytest.raises(ConnectionClosed, match="1008"):
            bad.message("anything")
        good.frame(lambda message: message["frame"] > 3)


def answer(browser, path, **headers):
    """Status and headers of the server's answer."""
    connection = http.client.HTTPConnection(*browser.url[len("http://") : -1].rsplit(":", 1), timeout=PATIENCE)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    connection.close()
    return response.status, response.headers


def test_only_this_machine_and_its_own_page_are_served():
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    with playing(Scene()) as browser:
        host = browser.url[len("http://") : -1]
        port = host.rsplit(":", 1)[1]
        for name in (host, f"localhost:{port}", "localhost"):
            assert answer(browser, "/", Host=name)[0] == 200, name
        for name in ("evil.example", f"evil.example:{port}", ""):
            assert answer(browser, "/", Host=name)[0] == 400, name
        for name, origin, status in [
            (host, f"http://{host}", 101),
            (f"localhost:{port}", f"http://localhost:{port}", 101),
            (host, "http://evil.example", 403),
            (host, "http://127.0.0.1:1", 403),  # another server on this machine
            (host, "null", 403),
            (f"evil.example:{port}", f"http://evil.example:{port}", 400),
        ]:
            assert answer(browser, "/play", Host=name, Origin=origin, **upgrade)[0] == status, (name, origin)
        assert answer(browser, "/play", Host=host, **upgrade)[0] == 403, "no origin"
        assert answer(browser, "/other")[0] == 404
        policy = answer(browser, "/")[1]["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_other_hosts_are_refused(host):
    with pytest.raises(ValueError, match="host: expected a loopback address .*forward the port"):
        Browser(PONG, host=host)


def test_a_wrong_or_taken_port_is_said():
    with pytest.raises(ValueError, match="port: expected 0 .*got 70000"):
        Browser(port=70000)
    with Browser(host="localhost") as first:
        assert first.url.startswith("http://127.0.0.1:")
        port = int(first.url.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(OSError, match=f"port: cannot listen on 127.0.0.1 port {port} "), Browser(port=port):
            pass
    with Browser(port=port):
        pass  # free again


def test_control_c_ends_the_loop_cleanly():
    with Browser(PONG) as browser:
        waiting = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        waiting.start()
        assert play(Scene(), browser, PONG).frames == 0
    assert not browser._thread.is_alive()
