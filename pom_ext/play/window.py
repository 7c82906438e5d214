"""The screen of an interactive loop as a window on the desktop."""

import os

from .loop import Turn

PIXELS = 640  # approximate longer side of a new window
PAUSE_MILLISECONDS = 20  # interval between checks of the keys while the player pauses
KEYS = {
    "up": ("up", "w"),
    "down": ("down", "s"),
    "left": ("left", "a"),
    "right": ("right", "d"),
    "fire": ("space",),
    **{str(digit): (str(digit), f"[{digit}]") for digit in range(10)},  # [0] is the key 0 of the number pad
}


class Window:
    """A window that shows enlarged frames and reads keys.

    Arrows or WASD, space and digits are the player's keys. R resets, P pauses, N draws one frame during a pause, escape
    ends. The methods are those of `Browser`; call all of them from one thread.

    Raises:
        OSError: on entering, if there is no display.
    """

    def __init__(self, title="PoM"):
        self.title = title

    def __enter__(self):
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        import pygame

        try:
            pygame.display.init()
        except pygame.error as error:
            raise OSError(f"window: there is no display ({error}); play in a browser instead") from error
        pygame.display.set_caption(self.title)
        self._names = {pygame.key.key_code(code): name for name, codes in KEYS.items() for code in codes}
        self._held, self._paused = set(), False
        return self

    def __exit__(self, *error):
        import pygame

        pygame.display.quit()

    def turn(self):
        """The `Turn` of the player, or None if the window was closed. Waits while the player pauses."""
        import pygame

        pressed, reset, step = set(), False, False
        while True:
            for event in pygame.event.get():
                if event.type == pygame.QUIT:
                    return None
                if event.type == pygame.KEYUP:
                    self._held.discard(self._names.get(event.key))
                if event.type == pygame.WINDOWFOCUSLOST:  # the window will not be told that these keys are released
                    self._held.clear()
                if event.type == pygame.KEYDOWN:
                    if event.key == pygame.K_ESCAPE:
                        return None
                    reset |= event.key == pygame.K_r
                    step |= event.key == pygame.K_n
                    self._paused ^= event.key == pygame.K_p
                    if event.key in self._names:
                        self._held.add(self._names[event.key])
                        pressed.add(self._names[event.key])  # counts for this turn even if it is released before
            if not self._paused or reset or step:
                return Turn(frozenset(self._held | pressed), reset)
            pygame.time.wait(PAUSE_MILLISECONDS)

    def show(self, picture):
        """Show a `Picture`, enlarged to the window, with its numbers in the title. Does not wait."""
        import pygame

        height, width = picture.pixels.shape[:2]
        if pygame.display.get_surface() is None:
            scale = max(1, PIXELS // max(height, width))
            pygame.display.set_mode((width * scale, height * scale), pygame.RESIZABLE)
        surface = pygame.display.get_surface()  # a new surface after the window was resized
        room = surface.get_size()
        scale = min(room[0] / width, room[1] / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        enlarged = pygame.transform.scale(pygame.surfarray.make_surface(picture.pixels.swapaxes(0, 1)), size)
        surface.fill((0, 0, 0))
        surface.blit(enlarged, ((room[0] - size[0]) // 2, (room[1] - size[1]) // 2))
        pygame.display.flip()
        pygame.display.set_caption(f"{self.title}   {picture}")
