"""Every knob of the HTTP side, once. The engine's are `ridgeline.config.EngineConfig`."""

from __future__ import annotations

import hashlib
import hmac
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.types import SERVICE_CLASSES, ConfigError, ServiceClass

LOG_FORMATS = ("text", "json")


def _check(ok: bool, name: str, seen: object, accepted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {seen!r}; accepted: {accepted}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may use the server. Only the key's SHA-256 is kept, so that no log or error can show the key.

    `max_requests` bounds how many requests the key may have open at once. `service_class` is that of requests
    that ask for none, and the highest that any of the key may have.
    """

    name: str
    digest: bytes
    max_requests: int | None = None
    service_class: ServiceClass | None = None

    @classmethod
    def of(
        cls,
        name: str,
        key: str,
        max_requests: int | None = None,
        service_class: ServiceClass | None = None,
    ) -> ApiKey:
        _check(bool(key) and key.isascii() and key.isprintable() and " " not in key, "API key", name, _KEY)
        ok = max_requests is None or (type(max_requests) is int and max_requests > 0)
        _check(ok, f"max_requests of API key {name!r}", max_requests, "a positive number")
        known = service_class is None or service_class in SERVICE_CLASSES
        _check(known, f"class of API key {name!r}", service_class, ", ".join(SERVICE_CLASSES))
        return cls(name, hashlib.sha256(key.encode()).digest(), max_requests, service_class)


_KEY = "one of printable ASCII without spaces"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the HTTP process.

    `port` 0 takes a free one. `served_model_names` are what `model` may say; the first is what answers say
    (default: the model's own name). Without `api_keys` everybody who reaches the port is served.
    `allowed_hosts` adds names to those that a Host header may always have: those of this machine's loopback,
    the bound one, and addresses; `*` allows all. `allowed_origins` are the web pages that may call from a
    browser. `max_queue` is how many sequences may wait beyond those that run, `max_queue_tokens` how many
    prompt tokens, `queue_timeout_s` how long.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[ApiKey, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    max_queue: int = 256
    max_queue_tokens: int = 262_144
    queue_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    log_format: str = "text"
    log_prompts: bool = False
    max_body_bytes: int = 4 << 20
    max_bodies_bytes: int = 128 << 20  # of all requests that are being read
    max_nesting: int = 64
    max_headers: int = 100
    max_header_bytes: int = 32 << 10
    max_connections: int = 4096
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 30.0
    text_threads: int = 2
    max_text_jobs: int = 512  # texts that may wait for those threads

    def __post_init__(self) -> None:
        _check(bool(self.host), "host", self.host, "a name or an address")
        _check(type(self.port) is int and 0 <= self.port < 65536, "port", self.port, "0 to 65535")
        _check(self.max_queue >= 0, "max_queue", self.max_queue, "0 or more")
        _check(self.max_queue_tokens > 0, "max_queue_tokens", self.max_queue_tokens, "a positive number")
        _check(
            self.queue_timeout_s > 0, "queue_timeout", self.queue_timeout_s, "a positive number of seconds"
        )
        _check(self.drain_timeout_s >= 0, "drain_timeout", self.drain_timeout_s, "0 or more seconds")
        _check(self.log_format in LOG_FORMATS, "log_format", self.log_format, ", ".join(LOG_FORMATS))
        names = [key.name for key in self.api_keys]
        _check(len(set(names)) == len(names), "names of API keys", names, "each name once")

    def key_of(self, given: str) -> ApiKey | None:
        """The key that was given, compared in a time that does not depend on it."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.api_keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def keys_of(texts: Iterable[str]) -> tuple[ApiKey, ...]:
    """Keys as they are given on the command line; each text may have several between commas."""
    keys = [key.strip() for text in texts for key in text.split(",") if key.strip()]
    return tuple(ApiKey.of(f"key{number}", key) for number, key in enumerate(keys, start=1))


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a TOML (`.toml`) or JSON file: `keys.NAME.key`, and `keys.NAME.max_requests` and
    `keys.NAME.class` if there are limits. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"API key file {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        # The library's message may quote the line, and with it a key.
        raise ConfigError(f"API key file {path} is malformed; accepted: JSON, or TOML in a .toml") from None
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"API key file {path} has no keys; accepted: an object `keys` of named entries")
    return tuple(_key(path, name, entry) for name, entry in entries.items())


def _key(path: Path, name: str, entry: Any) -> ApiKey:
    known = isinstance(entry, dict) and set(entry) <= {"key", "max_requests", "class"}
    if not known or not isinstance(entry.get("key"), str):
        accepted = "key, and max_requests and class"
        raise ConfigError(f"API key file {path}: {name!r} is malformed; accepted: {accepted}")
    return ApiKey.of(name, entry["key"], entry.get("max_requests"), entry.get("class"))
