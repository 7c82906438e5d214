"""A stream to play with, and a loop that plays it in the browser's server, for the tests of interactive video."""

import copy
import threading
import time
from contextlib import contextmanager

import torch

from pom_ext.play import Browser, play

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


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


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
