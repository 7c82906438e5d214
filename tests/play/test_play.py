"""Interactive video: keys and scripts, the loop, and its window."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from play_cases import ALL, BREAKOUT, DIGITS, PONG, Scene

from pom_ext.play import Keys, Picture, Terminal, Turn, Window, play, script
from pom_ext.play.keys import GAME_KEYS, parts_of
from pom_ext.play.loop import Pacer, to_pixels


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
