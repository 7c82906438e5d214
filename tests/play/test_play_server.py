"""The server of interactive video, without a browser: what it sends, what it takes, and whom it refuses."""

import http.client
import io
import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from play_cases import PATIENCE, PONG, Scene, playing, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from pom_ext.play import Browser, play
from pom_ext.play.keys import GAME_KEYS


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


@pytest.fixture
def interruptible():
    """Also where a shell has started the tests in the background, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_control_c_ends_the_loop_cleanly(interruptible):
    with Browser(PONG) as browser:
        waiting = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        waiting.start()
        assert play(Scene(), browser, PONG).frames == 0
    assert not browser._thread.is_alive()
