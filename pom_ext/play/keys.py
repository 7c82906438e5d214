"""Labels of a model from the keys that a player holds, or from a script."""

import re

DIRECTIONS = ("up", "down", "left", "right")
GAME_KEYS = (*DIRECTIONS, "fire")
OPPOSITES = (frozenset({"up", "down"}), frozenset({"left", "right"}))
MOST_REPETITIONS = 1_000_000


def parts_of(name):
    """The keys of an action of the Arcade Learning Environment: {"up", "fire"} for "UPFIRE", the empty set for "NOOP".

    None if the name is not an action.
    """
    if name == "NOOP":
        return frozenset()
    match = re.fullmatch("(UP|DOWN)?(RIGHT|LEFT)?(FIRE)?", name)
    return frozenset(part.lower() for part in match.groups() if part) if name and match else None


class Keys:
    """Maps the keys that a player holds to a label of the model.

    If all classes are actions of a game, the label is the action that presses all held keys, or as many of them as
    possible; of several such actions, the first. Opposite directions cancel. In a game without UP and DOWN, such as
    Pong, the keys up and down mean RIGHT and LEFT. With no key held the label is that of NOOP, or 0.

    For other classes, the key of a number selects the class of this number until the next key. The first class is 0.

    Args:
        classes: names of the labels 0, 1, ...; empty for a model without classes.

    Attributes:
        names: the keys that have a meaning: of `GAME_KEYS`, or "0", "1", ... for each class.
        game: whether the classes are actions of a game.
    """

    def __init__(self, classes=()):
        self.classes = tuple(classes)
        parts = [parts_of(name) for name in self.classes]
        self.game = bool(parts) and None not in parts
        if self.game:
            self._labels = {part: label for label, part in reversed(list(enumerate(parts)))}
            used = frozenset().union(*parts)
            self._sideways = {"up": "right", "down": "left"} if not used & {"up", "down"} else {}
            self.names = tuple(key for key in GAME_KEYS if self._sideways.get(key, key) in used)
        else:
            self.names = tuple(str(label) for label in range(len(self.classes)))
        self._chosen = 0

    def label(self, held):
        """The label for a set of held keys, None for a model without classes. Keys without a meaning are ignored."""
        if not self.classes:
            return None
        held = [key for key in self.names if key in held]
        if not self.game:
            self._chosen = int(held[-1]) if held else self._chosen
            return self._chosen
        wanted = {self._sideways.get(key, key) for key in held}
        for pair in OPPOSITES:
            if pair <= wanted:
                wanted -= pair
        # The parts are in the order of their labels, and max returns the first of equals.
        fitting = [part for part in sorted(self._labels, key=self._labels.get) if part <= wanted]
        return self._labels[max(fitting, key=len)] if fitting else 0


def script(text, classes):
    """The labels of a script such as "NOOP*10,RIGHT*5,2": names or numbers of classes, with repetitions.

    Raises:
        ValueError: there are no classes, or an item is no class or has no valid repetition; the message names it.
    """
    classes, labels = list(classes), []
    if not classes:
        raise ValueError(f"actions: the model has no classes to choose from, got {text!r}")
    for item in text.split(","):
        name, star, times = (part.strip() for part in item.partition("*"))
        if name in classes:  # names before numbers, since a class can be named "7"
            label = classes.index(name)
        elif name.isdecimal() and int(name) < len(classes):
            label = int(name)
        else:
            raise ValueError(
                f"actions: expected items such as {classes[0]}*10, got {item.strip()!r}; the actions are "
                f"{', '.join(classes)}, or 0 to {len(classes) - 1}"
            )
        if star and not (times.isdecimal() and len(times) < 9 and 1 <= int(times) <= MOST_REPETITIONS):
            raise ValueError(
                f"actions: expected 1 to {MOST_REPETITIONS} repetitions in {item.strip()!r}, got {times!r}"
            )
        labels += [label] * (int(times) if star else 1)
    return labels
