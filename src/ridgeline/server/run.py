"""The life of the server: it listens, loads, serves, and on a signal drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn

from ridgeline.config import EngineConfig
from ridgeline.server import logs
from ridgeline.server.app import create_app
from ridgeline.server.config import ServerConfig
from ridgeline.server.engine_client import EngineClient
from ridgeline.server.protocol import ACCEPTS, protocol_for
from ridgeline.server.service import Service
from ridgeline.server.text import TextSide
from ridgeline.types import ConfigError

_BACKLOG = 2048
"""Connections that the system holds for us until we accept them."""
_CLOSE_S = 2.0
"""What connections get to take in their last bytes."""


def serve(engine: EngineConfig, config: ServerConfig) -> None:
    """Serve until a signal says otherwise. Raises RidgelineError when the server cannot start."""
    with logs.on_stderr(config.log_format):
        text = TextSide.load(engine.model, config)
        _raise_descriptor_limit(config.max_connections)
        with contextlib.closing(listen(config)) as listener:
            asyncio.run(_serve(engine, config, text, listener))


async def _serve(engine: EngineConfig, config: ServerConfig, text: TextSide, listener: socket.socket) -> None:
    server = Server(EngineClient(engine), config, text, listener)
    gc.collect()
    gc.freeze()  # what stays for ever is not looked through again, which would hold up everybody for 0.1 s
    await server.run()


class Server:
    """One HTTP process and its engine."""

    def __init__(
        self, client: EngineClient, config: ServerConfig, text: TextSide, listener: socket.socket
    ) -> None:
        self._config = config
        self._listener = listener
        self._client = client
        self.service = Service(self._client, text, config)
        self._http = _Http(
            uvicorn.Config(
                create_app(self.service, self.service.metrics.answered),
                http=protocol_for(config),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=config.max_header_bytes,
                timeout_keep_alive=int(config.keep_alive_s),
                timeout_graceful_shutdown=int(_CLOSE_S),
                backlog=ACCEPTS,
            )
        )
        self._signals = 0
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Raises EngineDeadError, with the cause, when the model cannot be loaded."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(self.service.threads)  # one bounded pool, not asyncio's beside it
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        http = asyncio.create_task(self._http.serve([self._listener]))
        address, port = self._listener.getsockname()[:2]
        logs.event("listening", host=address, port=port, models=",".join(self.service.text.names))
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((starting, stopping, http), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
            await asyncio.wait((stopping, http), return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            starting.cancel()
            stopping.cancel()
            await self._client.close()  # whoever still waits is told so
            self._http.should_exit = True
            await http
            self.service.close()
            logs.event("stopped")

    async def _start(self) -> None:
        began_s = time.monotonic()
        card = await self._client.start()
        logs.event(
            "ready",
            device=card.device,
            max_model_len=card.max_model_len,
            max_num_seqs=card.max_num_seqs,
            seconds=time.monotonic() - began_s,
        )

    def stop(self) -> None:
        """Begin to drain, and then end."""
        self.service.drain()
        self._stop.set()

    def _on_signal(self, name: str) -> None:
        self._signals += 1
        logs.event("signal", signal=name, open_requests=self.service.open_requests)
        self.stop()
        if self._signals > 1:
            self._http.abort()

    async def _drain(self) -> None:
        """Let open requests end, up to the limit, or to a second signal."""
        self.service.drain()
        end_s = time.monotonic() + self._config.drain_timeout_s
        while self.service.open_requests and self._signals < 2 and time.monotonic() < end_s:
            await asyncio.sleep(0.05)
        if self.service.open_requests:
            logs.event("drain cut short", logging.WARNING, open_requests=self.service.open_requests)


class _Http(uvicorn.Server):
    """uvicorn's server, whose signals are ours to handle."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # asyncio has set it to what it accepts in a turn

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort(self) -> None:
        """End at once, without waiting for anybody."""
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def listen(config: ServerConfig) -> socket.socket:
    """The listening socket. Raises ConfigError when the address cannot be had."""
    where = f"{config.host}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {where}: {error.strerror}; --port takes another") from None
    listener.setblocking(False)
    return listener


def _raise_descriptor_limit(connections: int) -> None:
    """Each connection is a descriptor, and the usual limit of 1024 is less than we take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
