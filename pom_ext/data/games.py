"""Atari games, played at random and recorded."""

import torch
import torch.nn.functional as F

from .._random import seeded_generator
from .datasets import VideoDataset


class GamePlay(VideoDataset):
    """A game of the Atari 2600, emulated by `ale_py`, played at random and recorded.

    The player holds every action for a while, so that paddles travel, and presses fire when a game waits for it. One
    frame of a clip is four frames of the game (the brighter of the last two, since sprites flicker), scaled to a
    square. `labels[f]` of a clip is the action that led to its frame f. No clip spans two games.

    Args:
        game: name in `ale_py.roms`, such as "pong" or "breakout".
        frames: frames per clip.
        size: side in pixels.
        recorded: frames to play.
        seed: random seed of the player.

    Raises:
        ValueError: an unknown game, or a recording shorter than a clip.
    """

    actions, fps = True, 15.0
    skip, shortest, longest = 4, 2, 12  # game frames per clip frame; clip frames for which an action is held

    def __init__(self, game="pong", frames=8, size=64, recorded=6000, seed=0):
        if min(frames, recorded) < 1 or size < 8:
            raise ValueError(
                f"frames, size, recorded: expected at least 1, 8 and 1, got {frames}, {size} and {recorded}"
            )
        self.shape = (3, frames, size, size)
        self.pictures, self.labels, self.classes, games = self._play(game, recorded, seed)
        self.starts = [start for first, end in games for start in range(first, end - frames + 1)]
        if not self.starts:
            raise ValueError(
                f"recorded: no game of {game!r} in {recorded} frames is as long as a clip of {frames}; record more"
            )

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        part = slice(self.starts[index], self.starts[index] + self.shape[1])
        return self.pictures[part].permute(1, 0, 2, 3).float() / 127.5 - 1, self.labels[part]

    def _play(self, game, recorded, seed):
        """Record the game.

        Returns:
            pictures (recorded, 3, size, size) uint8; labels (recorded,); names of actions; (first, end) of each game.
        """
        emulator = _load_game(game)
        choices = emulator.getMinimalActionSet()
        names = tuple(action.name for action in choices)
        fire = names.index("FIRE") if "FIRE" in names else 0
        generator = seeded_generator(seed)
        pictures, labels, games, first, hold, action = [], [], [], 0, 2, fire
        lives = emulator.lives()
        for number in range(recorded):
            if emulator.game_over():
                games.append((first, number))
                first, hold, action = number, 2, fire
                emulator.reset_game()
            elif emulator.lives() < lives:
                hold, action = 2, fire
            lives = emulator.lives()
            if hold == 0:
                action = int(torch.randint(len(choices), (), generator=generator))
                hold = int(torch.randint(self.shortest, self.longest + 1, (), generator=generator))
            hold -= 1
            screens = []
            for _ in range(self.skip):
                emulator.act(choices[action])
                screens = [*screens[-1:], torch.from_numpy(emulator.getScreenRGB())]
            pictures.append(self._shrink(torch.maximum(*screens)))
            labels.append(action)
        games.append((first, recorded))
        return torch.stack(pictures), torch.tensor(labels), names, games

    def _shrink(self, screen):
        picture = screen.permute(2, 0, 1)[None].float()  # (1, 3, 210, 160)
        return F.interpolate(picture, size=self.shape[2:], mode="area")[0].round().to(torch.uint8)


def _load_game(game):
    """An emulator with the game, ready to play."""
    import ale_py
    from ale_py import roms

    known = roms.get_all_rom_ids()
    if game not in known:
        near = [name for name in known if name[:1] == game[:1]] or known
        raise ValueError(f"game: expected one of {len(known)}, such as {', '.join(sorted(near)[:12])}, got {game!r}")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setFloat("repeat_action_probability", 0.0)  # otherwise the emulator sometimes ignores an action
    emulator.loadROM(roms.get_rom_path(game))
    return emulator
