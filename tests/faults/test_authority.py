"""Who may do what: keys on every route, other spellings, strangers' pages, and what is logged of whom."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serving import FakeServer, server_process, with_server

from faults.house import House, error_of
from faults.routes import VALID, described, operations, raw, request, routes, status_of
from ridgeline.server import config as server_config
from ridgeline.server.config import ServerConfig, keys_of

OPEN = {("GET", "/live"), ("HEAD", "/live"), ("GET", "/health"), ("HEAD", "/health")}
KEY, OTHER = "sk-right-0123456789abcdef", "sk-other-0123456789abcdef"
WRONG_KEYS = (
    KEY,
    "Bearer",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY}-",
    f"Bearer {KEY.upper()}",
    f"Basic {KEY}",
    f"Bearer {KEY}, Bearer {OTHER}",
    f"Bearer {KEY} {OTHER}",
    f"Bearer {KEY},{OTHER}",
    "Bearer \xff\xfe",
    "Bearer null",
    "Bearer " + "x" * 10_000,
)


@pytest.fixture(scope="module")
def locked_house(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with a key from its environment, and another from a file, whose name would forge a line."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps({"keys": {"al\r\nice \x1b[31m": {"key": OTHER}}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIDGELINE_API_KEY", KEY)
        opened = House.open(tiny_llama, "--api-key-file", file, authorization=f"Bearer {KEY}")
        house = opened.__enter__()
    try:
        yield house
    finally:
        opened.__exit__(None, None, None)


@pytest.fixture
def locked(locked_house: House) -> Iterator[House]:
    yield locked_house
    locked_house.check()


def everything(house: House) -> list[tuple[str, str]]:
    """Each method on each path: those that the server describes, and some that it does not have."""
    with house.web() as web:
        described = web.get("/openapi.json").json()
    paths = [path.replace("{model}", "llama") for path in described["paths"]]
    paths += ["/openapi.json", "/nothing", "/", "/docs", "/redoc", "/v1", "/.env", "/favicon.ico"]
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
    return [(method, path) for path in dict.fromkeys(paths) for method in methods]


def test_row_60_every_route_needs_a_key(locked: House) -> None:
    asked = everything(locked)
    assert set(asked) > OPEN
    assert {("POST", path) for path in VALID} < set(asked)
    with httpx.Client(base_url=locked.url, timeout=30) as web:
        for method, path in asked:
            body = json.dumps(VALID.get(path, {})).encode() if method == "POST" else None
            query = {"follow": "false"} if path == "/v1/steps" else None  # its answer would have no end
            wrong = WRONG_KEYS if (method, path) in (("GET", "/v1/models"), ("POST", "/tokenize")) else ()
            for given in (None, "Bearer sk-wrong", *wrong):
                headers = {} if given is None else {"authorization": given.encode("latin-1")}
                answer = web.request(method, path, headers=headers, content=body, params=query)
                if (method, path) in OPEN:
                    assert answer.status_code == 200, (method, path)
                    continue
                assert answer.status_code == 401, (method, path, given)
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert error_of(answer, 401)["code"] == "invalid_api_key"
            for key in (KEY, OTHER):
                headers = {"authorization": f"bearer {key}"}
                answer = web.request(method, path, headers=headers, content=body, params=query)
                assert answer.status_code in (200, 404, 405), (method, path, answer.text)


def test_row_60_nothing_else_is_a_key(locked: House) -> None:
    with httpx.Client(base_url=locked.url) as web:
        for headers in (
            {"x-api-key": KEY},
            {"api-key": KEY},
            {"cookie": f"key={KEY}"},
            {"proxy-authorization": KEY},
        ):
            error_of(web.get("/v1/models", headers=headers), 401)
        error_of(web.get(f"/v1/models?api_key={KEY}&key={KEY}&authorization=Bearer%20{KEY}"), 401)
        twice = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")]
        error_of(web.get("/v1/models", headers=twice), 401)


SPELLINGS = (
    "//v1/models",
    "///v1/models",
    "/v1//models",
    "/./v1/models",
    "/v1/./models",
    "/v1/../v1/models",
    "/v1/models/",
    "/v1/models/.",
    "/v1%2fmodels",
    "/%76%31/models",
    "/V1/models",
    "/v1/models%00",
    "/v1/models;x=1",
    "/v1/models?/health",
    "/health/../v1/models",
    "/health/..%2fv1/models",
    "/health%2f..%2fv1/models",
    "/health/",
    "/health/v1/models",
    "/health;/v1/models",
    "/health%00",
    "/health%20",
    "/health%0d%0a",
    "/Health",
    "/LIVE",
    "//live",
    "/%6cive",
    "/live.",
    "/live/../openapi.json",
    "/v1/../health",
    "\\v1\\models",
    "http://localhost/v1/models",
    "http://localhost/health",
    "http://evil.example/live",
    "https://localhost//live",
    "*",
    "v1/models",
    "?",
    "#/health",
)


def test_row_61_no_spelling_is_a_way_around(locked: House) -> None:
    for target in SPELLINGS:
        for method in ("GET", "HEAD", "OPTIONS", "POST"):
            answer = raw(locked, request(method, target))
            assert status_of(answer) in (400, 401, 404), (method, target, answer[:200])
            assert b'"data"' not in answer
            assert b"openapi" not in answer
    for target in ("/health?x=1", "/live?/../v1/models"):  # a query changes nothing
        assert status_of(raw(locked, request("GET", target))) == 200
        assert status_of(raw(locked, request("POST", target))) == 401
    for broken in ("/v1/models\x00", "/live\x00/v1/models", "/li ve", "/live\t", "/\xe9"):
        assert status_of(raw(locked, request("GET", broken))) == 400, broken


def test_row_61_methods_that_are_overridden(locked: House) -> None:
    headers = ("X-HTTP-Method-Override: GET", "X-Original-URL: /health", "X-Rewrite-URL: /live")
    more = ("X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: localhost", "Forwarded: for=127.0.0.1")
    for path in ("/v1/models", "/v1/chat/completions", "/metrics"):
        assert status_of(raw(locked, request("GET", path, *headers, *more))) == 401
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: eA==",
        "Sec-WebSocket-Version: 13",
    )
    assert status_of(raw(locked, request("GET", "/v1/models", *upgrade))) == 401
    assert status_of(raw(locked, request("GET", "/v1/models", "Upgrade: h2c", "HTTP2-Settings: AA"))) == 401
    assert status_of(
        raw(locked, b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n"[:-2] + CLOSE)
    ) in (400, 401)
    two = request("GET", "/live", close=False) + request("GET", "/v1/models")
    answers = raw(locked, two)
    assert answers.count(b"HTTP/1.1 200") == answers.count(b"HTTP/1.1 401") == 1


CLOSE = b"Connection: close\r\n\r\n"


def test_row_61_odd_hosts(house: House) -> None:
    odd = ("", "evil.example", "localhost.", "localhost:x", "a@localhost", "localhost/..", "[::1", "::1")
    for host in (
        *odd,
        "localhost:80:80",
        "localhost, evil.example",
        "127.1",
        "0x7f000001",
        "2130706433",
        "\xe9",
    ):
        answer = raw(house, request("GET", "/v1/models", host=host))
        assert status_of(answer) in (400, 403), host
    twice = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n" + CLOSE
    none = b"GET /v1/models HTTP/1.1\r\n" + CLOSE
    old = b"GET /v1/models HTTP/1.0\r\n\r\n"
    for content in (twice, none, old):
        assert status_of(raw(house, content)) in (400, 403)
    for path in ("//v1/models", "/V1/models", "/v1%2fmodels/x", "/v1/../health", "/health/../v1/models"):
        assert status_of(raw(house, request("GET", path))) == 404, path


# ------------------------------------------------------------------------------------------------- keys


def test_row_62_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key that there is, whichever was given, by digests of one length."""
    compared: list[tuple[int, int]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return hmac.compare_digest(given, known)

    class Counted:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(server_config, "hmac", Counted)
    config = ServerConfig(api_keys=keys_of(["a,b,c,d"]))
    for given, index in (("a", 0), ("d", 3), ("x", None), ("", None), ("b" * 10_000, None)):
        compared.clear()
        found = config.key_of(given)
        assert found == (None if index is None else config.api_keys[index])
        assert compared == [(32, 32)] * 4


def test_row_62_keys_are_told_to_nobody(locked: House) -> None:
    """Not in logs, errors or the list of processes: the secret and what comes close to it."""
    said = ""
    with locked.web() as web:
        for headers in ({}, {"authorization": f"Bearer {OTHER}"}, {"authorization": f"Bearer {KEY}x"}):
            for path in ("/v1/models", f"/{KEY}?key={KEY}", "/openapi.json", "/metrics"):
                said += web.get(
                    path.replace(KEY, "x") if path == "/openapi.json" else path, headers=headers
                ).text
            for route in routes(locked):
                said += web.post(route.path, json=route.with_(temperature="x"), headers=headers).text
    locked.sing()
    marker = {"x-request-id": "the-end-62"}
    with locked.web() as web:
        web.get("/v1/models", headers={**locked.headers, **marker})
    locked.server.await_log("id=the-end-62", "key=key1")
    for text in (said, *(line for line in locked.server.log if f"path=/{KEY}" not in line)):
        assert KEY not in text.replace(f"/{KEY}", "")
        assert OTHER not in text
    processes = [psutil.Process(locked.server.process.pid), locked.server.engine]
    assert not any(key in " ".join(each.cmdline()) for each in processes for key in (KEY, OTHER))


# ---------------------------------------------------------------------------------------------- browsers


def test_row_63_strangers_pages(tiny_llama: Path) -> None:
    """By their own names, and by names that were made to resolve to this machine."""

    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:

            async def status(**headers: str) -> int:
                return (await client.get("/v1/models", headers=headers)).status_code

            known = (
                "localhost",
                f"LOCALHOST:{server.port}",
                "127.0.0.1:1",
                "[::1]:8000",
                "10.1.2.3",
                "box.lan",
            )
            for host in known:
                assert await status(host=host) == 200, host
            rebound = ("evil.example", "localhost.evil.example", "box.lan.", "127.0.0.1.evil.example")
            for host in (*rebound, "a@localhost", "localhost:x", ""):
                assert await status(host=host) == 403, host
            assert await status(host="localhost", origin="http://localhost") == 200
            assert await status(origin="https://app.example") == 200
            near = ("https://app.example.evil", "http://app.example", "https://app.example:444")
            for origin in (*near, "https://evil.example", "null", "http://localhost:1", "", "file://"):
                assert await status(origin=origin) == 403, origin
            for path, body in VALID.items():
                strange = {"origin": "https://evil.example", "content-type": "text/plain"}
                answer = await client.post(path, json=body, headers=strange)
                assert error_of(answer, 403)["code"] == "origin_not_allowed"
            asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
            allowed = await client.options("/v1/chat/completions", headers=asked)
            assert allowed.status_code == 204
            assert allowed.headers["access-control-allow-origin"] == "https://app.example"
            assert "access-control-allow-credentials" not in allowed.headers
            refused = await client.options("/v1/models", headers={**asked, "origin": "https://evil.example"})
            assert refused.status_code == 403
            assert not any(name.startswith("access-control") for name in refused.headers)

    settings = {"allowed_hosts": ("box.lan",), "allowed_origins": ("https://app.example",)}
    with_server(tiny_llama, scenario, **settings)


def test_row_63_cors_is_off(house: House) -> None:
    with house.web() as web:
        for method, path, _ in operations(house):
            for origin, statuses in ((house.url, (405,)), ("https://evil.example", (403,))):
                headers = {"origin": origin, "access-control-request-method": method}
                answer = web.options(path.replace("{model}", "llama"), headers=headers)
                assert answer.status_code in statuses, (path, origin)
                assert not any(name.startswith("access-control") for name in answer.headers)
        answer = web.get("/v1/models", headers={"origin": house.url})
        assert answer.status_code == 200
        assert not any(name.startswith("access-control") for name in answer.headers)


# -------------------------------------------------------------------------------------------------- logs

FORGED = "\r\n2026-01-01T00:00:00.000Z info request id=forged \x1b[31mred\x1b]0;title\x07\u2028\x85\u202e"


def test_row_65_lines_cannot_be_forged(tiny_llama: Path) -> None:
    with server_process(tiny_llama, "--log-prompts") as server:
        with httpx.Client(base_url=server.url, timeout=30) as web:
            path = "".join(f"%{byte:02x}" for byte in f"/x{FORGED}".encode())
            web.get(path, headers={"user-agent": "a\x1b[31m", "referer": "b\x1b[31m"})
            web.get("/%ff%fe%ed%a0%80", headers={"x-request-id": "a\x1b[31m"})
            for name, body in VALID.items():
                web.post(name, json={**body, "model": FORGED, FORGED: 1})
                web.post(name, json={**body, "model": FORGED})
            chat = {"messages": [{"role": "user", "content": FORGED}], "max_tokens": 1, "user": FORGED}
            web.post("/v1/chat/completions", json=chat)
            web.post("/v1/completions", json={"prompt": FORGED, "max_tokens": 1})
            for given in ("a b", "a\x85b", "id=x", 'a"b', "x" * 129, "a,b", ""):
                told = web.get("/version", headers={"x-request-id": given.encode("latin-1")})
                assert told.headers["x-request-id"] != given
            web.get("/version", headers={"x-request-id": "the-end"})
        server.await_log("the-end", "/version")
        assert all(line.isprintable() and line for line in server.log)
        assert not any(line.startswith("2026-01-01T") for line in server.log)
        server.await_log(r"\r\n2026-01-01T00:00:00.000Z info")


def test_row_65_header_lines_cannot_be_forged(house: House) -> None:
    """What is told back in a header is of harmless characters only."""
    for given in ("a\x0bb: c", "a\x1b[31m", "a\x00b", "\x7f", "\u00e9"):
        answer = raw(house, request("GET", "/version", f"X-Request-Id: {given}"))
        head = answer.split(b"\r\n\r\n")[0]
        assert status_of(answer) in (200, 400)
        assert all(byte in b"\r\n" or 32 <= byte < 127 for byte in head), head


def test_row_65_names_of_keys(locked: House) -> None:
    with httpx.Client(base_url=locked.url) as web:
        headers = {"authorization": f"Bearer {OTHER}", "x-request-id": "by-alice"}
        assert web.get("/v1/models", headers=headers).status_code == 200
    line = locked.server.await_log("id=by-alice")
    assert r"al\r\nice" in line
    assert all(line.isprintable() for line in locked.server.log)


# -------------------------------------------------------------------------------------------------- names

UPWARDS = ("../x", "..", "a/../b", "../../../../etc/passwd", "..\\..\\windows", "a/..", "x\x00/../y", "x\ny")


@pytest.mark.parametrize("name", UPWARDS)
def test_row_66_names_that_lead_upwards(house: House, name: str) -> None:
    with house.web() as web:
        for route in routes(house):
            error = error_of(web.post(route.path, json=route.with_(model=name)), 400)
            assert error["param"] == "model"
            for field in ("adapter", "lora", "lora_path", "chat_template", "file"):
                error = error_of(web.post(route.path, json=route.with_(**{field: name})), 400)
                assert error["param"] == field
        encoded = "".join(f"%{byte:02x}" for byte in name.encode())
        error_of(web.get(f"/v1/models/{encoded}"), 400, 404)


def test_row_66_other_paths_name_no_files(house: House) -> None:
    assert described(house)["openapi"]
    within = ("../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "%2fetc%2fpasswd", "..%5c..%5cx", "~root")
    targets = [f"/v1/models/{path}" for path in within]
    for target in (*targets, "/../../etc/passwd", "/static/../../etc/passwd"):
        answer = raw(house, request("GET", target))
        assert status_of(answer) in (400, 404), target
        assert b"root:" not in answer
