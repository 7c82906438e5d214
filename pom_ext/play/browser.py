"""The screen of an interactive loop as a web page on the same machine."""

import asyncio
import base64
import hashlib
import io
import json
import re
import socket
import threading
from importlib import resources
from ipaddress import ip_address

from .keys import Keys
from .loop import Turn

MESSAGE_BYTES = 4096  # longest message from a page
GOODBYE_SECONDS = 2  # time for pages to receive the last message


class Page:
    """One open page. The lock of the `Browser` protects its fields, which two threads use."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()  # set when there may be something to send
        self.ready = True  # whether the page has shown the last frame that it received
        self.held = frozenset()
        self.pressed = frozenset()  # keys pressed since the last turn, so that no short press is lost

    def notify(self):
        self.loop.call_soon_threadsafe(self.news.set)


class Browser:
    """A web page that shows frames and sends keys. Its web server accepts connections from this machine only.

    The server runs in its own thread; call `turn` and `show` from the thread that draws. A page receives the latest
    frame when it has shown the previous one, so a slow page skips frames instead of falling behind. The loop pauses
    while no page is open.

    Args:
        classes: names of the model's labels, for the buttons on the page.
        title: title of the page.
        host: a loopback address.
        port: port of the server; 0 picks a free port.

    Attributes:
        url: address of the page, after entering.

    Raises:
        ValueError: other machines can reach the host. To play from another machine, forward the port with ssh -L.
        OSError: on entering, if the port is taken.
    """

    def __init__(self, classes=(), *, title="PoM", host="127.0.0.1", port=0):
        host = "127.0.0.1" if host == "localhost" else host
        if not _is_loopback(host):
            raise ValueError(
                f"host: expected a loopback address such as 127.0.0.1 or ::1, got {host}; "
                "to play from another machine, forward the port: ssh -L 8000:127.0.0.1:8000"
            )
        if not 0 <= port <= 65535:
            raise ValueError(f"port: expected 0 (any free one) to 65535, got {port}")
        self.keys, self.title, self.host, self.port = Keys(classes), title, host, port
        self.url = None
        self._changed = threading.Condition()  # its lock protects the fields below
        self._pages = set()
        self._picture = None
        self._paused = self._step = self._reset = False
        self._ended = None  # last message to the pages, once the loop has ended

    def __enter__(self):
        import uvicorn

        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise OSError(
                f"port: cannot listen on {self.host} port {self.port} ({error}); 0 takes a free one"
            ) from error
        listener.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # otherwise a frame can wait 40 ms for an acknowledgement
        name = f"[{self.host}]" if family == socket.AF_INET6 else self.host
        self.url = f"http://{name}:{listener.getsockname()[1]}/"
        config = uvicorn.Config(
            self._app(name),
            log_level="error",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
            ws_max_size=MESSAGE_BYTES,
            ws_per_message_deflate=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="web server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        with self._changed:
            self._ended = f"{kind.__name__}: {error}" if error else ""
            self._tell_pages()
            self._changed.wait_for(lambda: not self._pages, timeout=GOODBYE_SECONDS)
        self._server.should_exit = True
        self._thread.join()

    def turn(self):
        """The `Turn` of the player, or None after `stop`. Waits while the player pauses or no page is open."""

        def wanted():
            return self._ended is not None or (self._pages and (not self._paused or self._step or self._reset))

        with self._changed:
            self._changed.wait_for(wanted)
            if self._ended is not None:
                return None
            turn = Turn(frozenset().union(*(page.held | page.pressed for page in self._pages)), self._reset)
            for page in self._pages:
                page.pressed = frozenset()
            self._step = self._reset = False
            return turn

    def show(self, picture):
        """Show a `Picture` on every page. Does not wait."""
        with self._changed:
            self._picture = picture
            self._tell_pages()

    def stop(self):
        """Make the next `turn` return None. Can be called from any thread."""
        with self._changed:
            self._ended = ""
            self._changed.notify_all()

    def _tell_pages(self):
        for page in self._pages:
            page.notify()

    def _app(self, name):
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse
        from starlette.routing import Route, WebSocketRoute

        text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        headers = {
            "Content-Security-Policy": _policy(text),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

        async def page(request):
            return HTMLResponse(text, headers=headers)

        # Against DNS rebinding: another site can point its name to this machine, but the browser sends it as the host.
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", name])
        return Starlette(routes=[Route("/", page), WebSocketRoute("/play", self._serve)], middleware=[hosts])

    async def _serve(self, connection):
        """Serve one page until it is closed."""
        # Pages of other sites can open a websocket to this server too, but the browser sends their origin.
        if connection.headers.get("origin") != f"http://{connection.headers['host']}":
            await connection.close()  # before accept, the answer is "403 Forbidden"
            return
        await connection.accept()
        page = Page()
        with self._changed:
            self._pages.add(page)
            self._changed.notify_all()
        sender = asyncio.create_task(self._send(page, connection))
        try:
            await self._receive(page, connection)
        finally:
            sender.cancel()
            with self._changed:
                self._pages.discard(page)
                self._changed.notify_all()

    async def _send(self, page, connection):
        """Send the page every change of the title, the pause and the frame."""
        from starlette.websockets import WebSocketDisconnect

        paused = picture = None
        try:
            await connection.send_json(
                {"title": self.title, "classes": self.keys.classes, "keys": self.keys.names, "game": self.keys.game}
            )
            while True:
                with self._changed:
                    now_paused, latest, ended = self._paused, self._picture, self._ended
                if now_paused != paused:
                    paused = now_paused
                    await connection.send_json({"paused": paused})
                if page.ready and latest is not picture:
                    page.ready, picture = False, latest
                    png = await asyncio.to_thread(_png, picture.pixels)
                    facts = {key: value for key, value in vars(picture).items() if key != "pixels"}
                    await connection.send_json(facts)
                    await connection.send_bytes(png)
                if ended is not None:
                    await connection.send_json({"ended": ended})
                    await connection.close()
                    return
                await page.news.wait()
                page.news.clear()
        except WebSocketDisconnect:
            pass  # _receive handles it

    async def _receive(self, page, connection):
        """Read the messages of the page until it is closed. An invalid message closes it."""
        while True:
            message = await connection.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                wish = json.loads(message.get("text") or "")
                with self._changed:
                    self._take(page, wish)
                    self._changed.notify_all()
            except (ValueError, TypeError) as error:
                await connection.close(1008, f"expected a wish of a page: {error}"[:100])
                return

    def _take(self, page, wish):
        known = {"keys", "shown", "reset", "pause", "step"}
        if not isinstance(wish, dict) or not wish.keys() <= known:
            raise ValueError(f"an object with some of {sorted(known)}")
        if "keys" in wish:
            page.held = frozenset(wish["keys"]) & set(self.keys.names)
            page.pressed |= page.held
        if "shown" in wish:
            page.ready = True
            page.notify()
        if "pause" in wish:
            self._paused = bool(wish["pause"])
            self._tell_pages()
        self._step |= "step" in wish
        self._reset |= "reset" in wish


def _is_loopback(host):
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _policy(page):
    """A Content-Security-Policy that allows the page's own style and script and nothing else."""

    def source(tag):
        content = re.search(f"<{tag}>(.*)</{tag}>", page, re.DOTALL).group(1)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()
