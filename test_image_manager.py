"""The promises of image_manager.py, in the order of its layers.

    python -m pytest -q

Without HTTP: settings, tokens, Intel HEX, the catalogue, the binaries. Through WebTest: the
routes, each status and body of the API. Over real sockets: downloads as devices make them, what
the server itself promises, abuse. With real processes: the command line, crashes, workers. Last,
that README and requirements say what is so.
"""

import base64
import concurrent.futures
import contextlib
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import multiprocessing
import os
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import uuid
import wsgiref.simple_server
import wsgiref.util
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import jwt
import pytest
from webtest import TestApp

import image_manager
from image_manager import (
    ROUTES,
    BadRequest,
    Binary,
    BinaryStore,
    CannotStart,
    Catalogue,
    Excerpt,
    Extent,
    HexFault,
    HexReader,
    MustWait,
    Segments,
    Settings,
    StorageFull,
    Tokens,
    Unauthorised,
    create_app,
    running,
    semver_key,
)

HERE = Path(__file__).parent
PROGRAM = HERE / "image_manager.py"
SECRET = "a secret of more than thirty-two characters"
KIB, MIB = 1 << 10, 1 << 20


# ------------------------------------------------------------------------------------- vocabulary

parametrize = pytest.mark.parametrize


def cases(arguments, table):
    """Run a test with each row of a table, {what is special about it: arguments}."""
    return parametrize(arguments, table.values(), ids=table)


needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def record(kind, offset, data=b"", newline="\n"):
    """Return a line of Intel HEX."""
    raw = bytes([len(data), offset >> 8, offset & 0xFF, kind]) + data
    return f":{(raw + bytes([-sum(raw) & 0xFF])).hex().upper()}{newline}"


END = record(1, 0)


def firmware(size=1000, seed=1, base=0, newline="\r\n", width=16):
    """Return (Intel HEX, its data): `size` bytes from address `base` on."""
    data = random.Random(seed).randbytes(size)
    lines = []
    for at in range(0, size, width):
        if at == 0 or (base + at) % 65536 < width:
            lines.append(record(4, 0, (base + at >> 16).to_bytes(2, "big"), newline))
        lines.append(record(0, base + at & 0xFFFF, data[at : at + width], newline))
    return ("".join(lines) + record(1, 0, newline=newline)).encode(), data


def hex_file(*records):
    """Return a file of these records and the last one."""
    return "".join([*records, END]).encode()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def form(content, name="image", filename="fw.hex", boundary="XyZ"):
    """Return (body, headers) of a form with one file."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"'
    body = f"{head}\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


JSON = {"Content-Type": "application/json"}
HTML = {"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
LABELS = {"label": "a", "fw_version": "1"}


def error(response, status, message):
    """Expect an error: its status, its whole body, its type."""
    assert response.status_int == status, response.text
    assert response.json == {"message": message, "status": status}
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"


def raising(error):
    """Return a function that raises this, whatever it is called with."""

    def fails(*_, **__):
        raise error

    return fails


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(action, threads=1):
    """Have threads do something again and again, as long as the block runs."""
    end = threading.Event()

    def work():
        while not end.is_set():
            action()

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work) for _ in range(threads)]
        try:
            yield
        finally:
            end.set()
    for thread in working:
        thread.result()


@pytest.fixture
def settings(tmp_path):
    return Settings(data=tmp_path / "data", jwt_secret=SECRET)


@pytest.fixture
def app(settings):
    with contextlib.closing(create_app(settings)) as application:
        yield application


class Client(TestApp):
    """WebTest, as a tenant; what comes behind the path of a request without a body are headers."""

    def get(self, url, headers=None, **others):
        return super().get(url, headers=headers, **others)

    def head(self, url, headers=None, **others):
        return super().head(url, headers=headers, **others)

    def delete(self, url, headers=None, **others):
        return super().delete(url, headers=headers, **others)

    def do_request(self, request, *others, **named):
        """Make a request; its answer must be one that /openapi.json describes."""
        application = self.app.application
        paths = image_manager.describe_api(application.settings.url_prefix, application)["paths"]
        asked = request.environ["PATH_INFO"].removeprefix(application.settings.url_prefix)
        asked = asked.rstrip("/")
        response = super().do_request(request, *others, **named)
        method = "get" if request.method == "HEAD" else request.method.lower()
        for path in sorted(paths, key=lambda path: "{" in path):
            if re.fullmatch(re.sub("{.*?}", "[^/]+", path), asked):
                if method not in paths[path]:
                    assert response.status_int in (204, 405)
                    break
                described = paths[path][method]["responses"][str(response.status_int)]
                kinds = described.get("content", {response.content_type: None})
                assert response.content_type in kinds or response.status_int in (204, 304)
                break
        return response

    def as_(self, service="admin", *rights):
        token = self.app.application.tokens.issue(service, [f"image:{right}" for right in rights])
        self.authorization = ("Bearer", token)
        return self

    def create(self, label="sensor", fw_version="1.0.0"):
        return self.post_json("/image", {"label": label, "fw_version": fw_version}).json["id"]

    def shown(self, image_id):
        return self.get(f"/image/{image_id}").json

    def ids(self, query=""):
        return [image["id"] for image in self.get(f"/image{query}").json]

    def upload(self, image_id, content, query="", **others):
        return self.put(f"/image/{image_id}/binary{query}", content, **others)

    def upload_form(self, image_id, body, headers, query="", **others):
        return self.post(f"/image/{image_id}/binary{query}", body, headers, **others)

    def download(self, image_id, query="", headers=None, **others):
        return self.get(f"/image/{image_id}/binary{query}", headers, **others)

    def stored(self, content=None, **others):
        """Create an image with a binary; return its id."""
        image_id = self.create(**others)
        self.upload(image_id, firmware()[0] if content is None else content)
        return image_id


def client_of(application, service="admin", *rights):
    client = Client(application)
    client.app.application = application
    return client.as_(service, *rights)


@pytest.fixture
def client(app):
    return client_of(app)


@contextlib.contextmanager
def store_in(folder, **settings):
    """Lend a client of a store that nobody serves."""
    with contextlib.closing(create_app(Settings(data=folder, **settings))) as app:
        yield client_of(app)


def call_bare(client, method, path, environ=None):
    """Make a request with no Content-Length, which WebTest would add; return (status, body)."""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, **(environ or {})}
    environ["HTTP_AUTHORIZATION"] = " ".join(client.authorization)
    wsgiref.util.setup_testing_defaults(environ)
    statuses = []
    body = client.app.application(environ, lambda status, *_: statuses.append(status))
    return statuses[0], b"".join(body)


def sqlite_in(folder):
    """Return another program's connection to the catalogue, which commits each statement at once."""
    database = sqlite3.connect(folder / "image_manager.db", isolation_level=None, timeout=5)
    return contextlib.closing(database)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def folder_is_clean(app, *image_ids):
    """Tell whether binaries/ and tmp/ hold the files of these images and nothing else."""
    names = {path.stem for path in app.binaries.folder.iterdir()}
    return names == set(image_ids) and not names_in(app.binaries.uploads)


@pytest.fixture
def server(settings):
    with running(settings) as server:
        yield server


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Connection(http.client.HTTPConnection):
    """A connection to a server that takes the tenant's token along."""

    def __init__(self, server, service="admin", timeout=10, **headers):
        url = urllib.parse.urlsplit(server.url)
        super().__init__(url.hostname, url.port, timeout=timeout)
        self.headers = {"Authorization": f"Bearer {server.token(service)}"} if service else {}
        self.headers |= headers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, method, path, body=None, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.request(method, path, body, {**self.headers, **named})
        response = self.getresponse()
        return Answer(response.status, response.headers, response.read())

    def post(self, path, members):
        return self.ask("POST", path, json.dumps(members), Content_Type="application/json")

    def get(self, path, **headers):
        """Return what is there, all of it or the range that was asked for."""
        answer = self.ask("GET", path, **headers)
        assert answer.status == (206 if "Range" in headers else 200), answer
        return answer.body

    def shown(self, image_id):
        return json.loads(self.get(f"/image/{image_id}"))

    def listed(self, query=""):
        return json.loads(self.get(f"/image{query}"))

    def create(self, label="sensor", fw_version="1.0.0"):
        answer = self.post("/image", {"label": label, "fw_version": fw_version})
        assert answer.status == 201, answer
        return answer.json["id"]

    def upload(self, image_id, content):
        return self.ask("PUT", f"/image/{image_id}/binary", content).status

    def download(self, image_id, query="", **headers):
        return self.get(f"/image/{image_id}/binary{query}", **headers)

    def stored(self, content, **others):
        image_id = self.create(**others)
        assert self.upload(image_id, content) == 200
        return image_id

    def link(self, image_id):
        """Return (path with its query, host) of a link."""
        url = urllib.parse.urlsplit(self.ask("POST", f"/image/{image_id}/binary/link").json["url"])
        return f"{url.path}?{url.query}", url.netloc


@pytest.fixture
def connection(server):
    with Connection(server) as connection:
        yield connection


class Other:
    """A server that is none of `running`: its address, and tokens for it."""

    def __init__(self, url, tokens=None):
        self.url, self.tokens = url, tokens

    def token(self, service="admin"):
        return self.tokens.issue(service)


def is_well(server):
    return urllib.request.urlopen(server.url + "/health", timeout=5).status == 200


def dial(server, timeout=10, buffer=None):
    """Return a socket, whose buffer for what it receives may be small."""
    url = urllib.parse.urlsplit(server.url)
    sock = socket.create_connection((url.hostname, url.port), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    return sock


def refuses_connections(server):
    """Expect a service that has got a signal to take no more connections."""
    time.sleep(0.3)
    with pytest.raises(OSError):
        dial(server).close()


@contextlib.contextmanager
def dials(server, count):
    with contextlib.ExitStack() as closing:
        yield [closing.enter_context(dial(server)) for _ in range(count)]


def will_reset(sock):
    """Have a socket break its connection off when it is closed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def is_readable(sock):
    return bool(select.select([sock], [], [], 0)[0])


def raw(start, *headers, version="HTTP/1.1", host="x", body=b""):
    """Return a request as the bytes of it."""
    lines = [f"{start} {version}", *([f"Host: {host}"] if host else []), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def bearer(server, *scope):
    return f"Authorization: Bearer {server.token(scope=scope)}"


HEALTH = raw("GET /health")


def fetch(server, image_id, *headers):
    """Return a request that downloads a binary."""
    return raw(f"GET /image/{image_id}/binary", bearer(server), *headers)


def put(server, length, image_id="x", rights=(), method="PUT", expect=False, token=None):
    """Return the header of an upload."""
    token = server.token(scope=rights) if token is None else token
    headers = [f"Content-Length: {length}"]
    headers += [f"Authorization: Bearer {token}"] if token else []
    headers += ["Expect: 100-continue"] if expect else []
    headers += ["Content-Type: multipart/form-data; boundary=x"] if method == "POST" else []
    return raw(f"{method} /image/{image_id}/binary", *headers)


def read_answer(sock, method="GET", version="HTTP/1.1"):
    """Return the next answer on a socket."""
    file = sock.makefile("rb", buffering=0)
    line = b""
    while not line.endswith(b"\r\n\r\n"):
        byte = file.read(1)
        if not byte:
            raise ConnectionError(f"closed after {line!r}")
        line += byte
    status_line, _, block = line.decode("latin-1").partition("\r\n")
    status = int(re.fullmatch(rf"{version} (\d\d\d) [A-Z][\w -]+", status_line)[1])
    assert status_line == f"{version} {status} {http.client.responses[status]}"
    headers = http.client.parse_headers(io.BytesIO(block.encode("latin-1")))
    body = b""
    while method != "HEAD" and len(body) < int(headers.get("Content-Length", 0)):
        body += file.read(int(headers["Content-Length"]) - len(body))
    return Answer(status, headers, body)


def ask(sock, request, method="GET", **others):
    """Send a request; return the answer, or that to the first of several on their way."""
    sock.sendall(request)
    return read_answer(sock, method, **others)


def ask_once(server, request, method="GET", **others):
    """Make a request on a connection of its own."""
    with dial(server) as sock:
        return ask(sock, request, method, **others)


def read_all(sock):
    """Return all that comes until the server closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def exchange(server, *requests, timeout=10):
    """Send raw bytes on one connection; return all that comes until the server closes."""
    with dial(server, timeout) as sock:
        sock.sendall(b"".join(requests))
        return read_all(sock)


ENVIRON = {name: os.environ[name] for name in os.environ if "IMAGE_MANAGER" not in name}


def run(*command, **others):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, timeout=60, **others
    )


class Service:
    """A process that serves; `before` is what is run to run it, `script` what Python runs to."""

    def __init__(self, data, *options, environ=None, before=(), script="", **others):
        program = [sys.executable, *(["-c", script] if script else []), PROGRAM]
        words = [*before, *program, "serve", "--data", data, "--port", "0", *options]
        self.data, self.lines, self.secret = Path(data), [], None
        others = {"stderr": subprocess.PIPE, **others}
        environ = {**ENVIRON, **(environ or {})}
        self.process = subprocess.Popen(list(map(str, words)), text=True, env=environ, **others)
        # Without buffers of pipes to fill: the log is read all the time.
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr or ():
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, seconds=15):
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.01)
        return found

    @functools.cached_property
    def url(self):
        return self.wait_for(r"listening on (http://\S+)")[1]

    def token(self, service="admin", scope=(), expires=3600):
        settings = Settings(data=self.data)
        secret = self.secret or image_manager.load_secret(self.data)
        return Tokens(settings, secret).issue(service, [f"image:{word}" for word in scope], expires)

    def send(self, number):
        self.process.send_signal(number)

    def spools(self):
        """Tell whether it has a file open in tmp/, where that can be known."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        for file in folder.iterdir() if folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                if str(self.data / "tmp") in os.readlink(file):
                    return True
        return False

    def end(self, number=signal.SIGTERM, seconds=40):
        if self.process.poll() is None:
            self.send(number)
        status = self.process.wait(seconds)
        self.reader.join()
        for pipe in filter(None, (self.process.stderr, self.process.stdout)):
            pipe.close()
        return status


@contextlib.contextmanager
def service(data, *options, **others):
    """Run a service, which must end well where it has not ended before."""
    server = Service(data, *options, **others)
    try:
        server.url
        yield server
    finally:
        ended = server.process.poll() is not None
        assert server.end() == 0 or ended


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def is_listening(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def silent_service(data, *options, **others):
    """Run a service whose log is not read, so that its port must be given."""
    port = free_port()
    server = Service(data, "--port", port, *options, **{"stderr": None, **others})
    server.url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_listening(port))
        yield server
    finally:
        assert server.end(seconds=10) == 0


def command(*words, environ=None, before=(), **others):
    """Run a command; return (status, standard output, standard error).

    In this process, as starting another takes longer than most of them, unless it is to be run
    by something else.
    """
    if before or others:
        environ = {**ENVIRON, **(environ or {})}
        done = run(*before, sys.executable, PROGRAM, *words, env=environ, text=True, **others)
        return done.returncode, done.stdout, done.stderr
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "environ", {**ENVIRON, **(environ or {})})
        patched.setattr(sys, "argv", [str(PROGRAM), *map(str, words)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = image_manager.main()
            except SystemExit as error:
                status = error.code
    return status, out.getvalue(), err.getvalue()


def one_sentence(done, *words):
    """Expect a command to have ended with status 2 and one line that says what to do."""
    status, out, err = done
    assert status == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, done
    for word in words:
        assert word in err


def no_start(data, *words, options=(), **others):
    """Expect that a service does not start on a folder, and why."""
    one_sentence(command("serve", "--data", data, "--port", "0", *options, **others), *words)


# ------------------------------------------------------------------------------------- settings


@parametrize("values", [
    {"port": 70000}, {"port": "eighty"}, {"port": -1}, {"port": True}, {"port": 8000.5}, {"port": None},
    {"workers": 0}, {"workers": "0"}, {"threads": 0}, {"threads": [4]},
    {"max_upload": 0}, {"max_upload": -1}, {"max_upload": "16X"}, {"max_upload": 1.5},
    {"data": "a\0b"}, {"data": None}, {"data": 5}, {"access_log": "a\0b"}, {"access_log": 1},
    {"url_prefix": "/image"}, {"url_prefix": "/health"}, {"url_prefix": "health/fw"},
    {"url_prefix": "/openapi.json"}, {"url_prefix": "a b"}, {"url_prefix": b"/fw"},
    {"url_prefix": "/../fw"}, {"url_prefix": "fw/.."}, {"url_prefix": "a/./b"}, {"url_prefix": "a//b"},
    {"public_url": "https://a/?b"}, {"public_url": "https://a/#b"},
    {"public_url": "fw.example.com"}, {"public_url": 'https://a"><'}, {"public_url": "https:///"}, {"host": 5}, {"host": None},
    {"allow_origin": "bench.example.com"}, {"allow_origin": "https://bench.example.com/page"},
    {"allow_origin": "https://a, https://b"}, {"trusted_proxy": "proxy.example.com"}, {"trusted_proxy": 5.5},
    {"require_intel_hex": "perhaps"}, {"require_intel_hex": 2}, {"require_intel_hex": None},
    {"jwt_audience": None}, {"jwt_secret": b"secret"}, {"jwt_secret": "\ud800"}, {"jwt_public_key": 7},
], ids=str)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_their_name(tmp_path, values):
    with pytest.raises(CannotStart, match=f"^{next(iter(values))} takes"):
        Settings(**{"data": tmp_path, **values})


NETWORKS = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "::1")))


@parametrize("values, meant", [
    ({"port": "8000"}, 8000), ({"workers": " 2 "}, 2), ({"jwt_public_key": "key.pem"}, Path("key.pem")),
    ({"max_upload": "16M"}, 16 * MIB), ({"max_upload": "1000"}, 1000), ({"max_upload": 1000}, 1000),
    ({"require_intel_hex": "no"}, False), ({"require_intel_hex": "Yes"}, True),
    ({"require_intel_hex": 1}, True), ({"require_intel_hex": 0}, False), ({"trusted_proxy": ""}, ()),
    ({"trusted_proxy": "10.0.0.0/8, ::1, "}, NETWORKS), ({"trusted_proxy": ["10.1.2.3/8"]}, NETWORKS[:1]),
    ({"url_prefix": "fw-image/"}, "/fw-image"), ({"public_url": "https://a/b/"}, "https://a/b"),
    # A prefix that only looks like a path of the API is fine.
    ({"url_prefix": "/images"}, "/images"), ({"url_prefix": "/image-manager"}, "/image-manager"),
    ({"url_prefix": "/a/image"}, "/a/image"), ({"url_prefix": "/healthy"}, "/healthy"), ({"url_prefix": "v1.0/.a"}, "/v1.0/.a"), ({"url_prefix": "fw"}, "/fw"),
], ids=str)  # fmt: skip
def test_settings_are_tidied_and_may_be_text_where_that_is_clear(tmp_path, values, meant):
    made = Settings(data=str(tmp_path), **values)
    found = getattr(made, next(iter(values)))
    assert found == meant and type(found) is type(meant) and made.data == tmp_path


def test_settings_do_not_show_the_secret(tmp_path):
    with pytest.raises(CannotStart) as refused:
        Settings(data=tmp_path, jwt_secret=SECRET + "\ud800")
    assert SECRET not in str(refused.value)
    assert SECRET not in repr(Settings(data=tmp_path, jwt_secret=SECRET))


@parametrize("text, size", [("1000", 1000), ("64K", 64 * KIB), ("512m", 512 * MIB), ("2G", 2048 * MIB)])  # fmt: skip
def test_sizes_are_powers_of_1024(text, size):
    assert image_manager.parse_size(text) == size


@parametrize("text", ["", "0", "-1", "1.5M", "1T", "M", "9" * 20])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="512M"):
        image_manager.parse_size(text)


# ------------------------------------------------------------------------------------- tokens


@pytest.fixture
def tokens(settings):
    return Tokens(settings, SECRET)


def sign(claims, key=SECRET, **options):
    return "Bearer " + jwt.encode(claims, key, **options)


def test_token_gives_its_tenant_and_all_rights(tokens):
    caller = tokens.verify(sign({"service": "lab", "sub": "rig 7"}))
    assert (caller.tenant, caller.subject) == ("lab", "rig 7")
    assert caller.rights == set(image_manager.RIGHTS)


@parametrize("scope, rights", [
    ("image:read", {"image:read"}),
    ("openid image:read image:write", {"image:read", "image:write"}),
    (["image:delete", "profile"], {"image:delete"}),
    ([" image:read", "image:write image:delete"], set(image_manager.RIGHTS)),
    *[(scope, set(image_manager.RIGHTS)) for scope in ("openid profile", "", [])],
])  # fmt: skip
def test_scope_limits_rights_where_it_names_ours(tokens, scope, rights):
    assert tokens.verify(sign({"service": "a", "scope": scope})).rights == rights


@parametrize("claims", [
    {"iat": time.time() + 9999}, {"iat": "yesterday", "jti": 7, "sub": {"a": [1]}}, {"exp": time.time() - 20},
    {"nbf": time.time() + 20}, {"aud": "whoever", "iss": "anyone"}, {"exp": 10**400},
])  # fmt: skip
def test_token_is_accepted_with(tokens, claims):
    assert tokens.verify(sign({"service": "a", **claims})).tenant == "a"


def forged(header, claims, key=SECRET):
    """Return a token of any header and claims, signed with a key or with nothing."""
    words = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in (header, claims)]
    signed = b".".join(word.rstrip(b"=") for word in words)
    mac = base64.urlsafe_b64encode(hmac.digest(key.encode(), signed, "sha256")) if key else b""
    return "Bearer " + (signed + b"." + mac.rstrip(b"=")).decode()


HS256 = {"alg": "HS256", "typ": "JWT"}
BAD_TOKENS = {
    "another key": sign({"service": "a"}, "another key of thirty-two characters or so"),
    "another algorithm": sign({"service": "a"}, SECRET * 2, algorithm="HS512"),
    **{
        f"alg {name}": forged({**HS256, "alg": name}, {"service": "admin"}, key="")
        for name in ("none", "None", "NONE", "nOnE")
    },
    "alg missing": forged({"typ": "JWT"}, {"service": "a"}),
    "alg a list": forged({"alg": ["HS256"]}, {"service": "a"}),
    "crit": forged({**HS256, "crit": ["exp"], "exp": 1}, {"service": "a"}),
    "crit known to the library": forged({**HS256, "crit": ["b64"], "b64": True}, {"service": "a"}),
    "expired": sign({"service": "a", "exp": time.time() - 40}),
    "expired long ago": sign({"service": "a", "exp": 0}),
    "not yet valid": sign({"service": "a", "nbf": time.time() + 90}),
    "a character more": sign({"service": "a"}).replace("Bearer ", "Bearer x"),
    "exp a string": forged(HS256, {"service": "a", "exp": "9999999999"}),
    "exp true": forged(HS256, {"service": "a", "exp": True}),
    "exp null": forged(HS256, {"service": "a", "exp": None}),
    "exp NaN": forged(HS256, {"service": "a", "exp": float("nan")}),
    "service missing": sign({"sub": "a"}),
    "service empty": sign({"service": ""}),
    "service null": sign({"service": None}),
    "service a list": sign({"service": ["a"]}),
    "service too long": sign({"service": "a" * 129}),
    "service with NUL": sign({"service": "a\0b"}),
    "service with a lone surrogate": forged(HS256, {"service": "\ud800"}),
    "scope with a typing error": sign({"service": "a", "scope": "image:raed"}),
    "scope in capitals": sign({"service": "a", "scope": "Image:Read"}),
    "scope with a blank": sign({"service": "a", "scope": [" image:raed"]}),
    "scope a number": sign({"service": "a", "scope": 7}),
    "scope of numbers": sign({"service": "a", "scope": [7]}),
    "claims a list": forged(HS256, ["service"]),
    "claims deep": "Bearer e30." + "W" * 60000 + ".e30",
    "encrypted": "Bearer a.b.c.d.e",
    "60 KB": "Bearer " + "a" * 60000,
    "not base64": "Bearer !!!.???.###",
    "two tokens": sign({"service": "a"}) + ", " + sign({"service": "a"}),
    "Basic": "Basic YTpi",
    "no scheme": sign({"service": "a"}).removeprefix("Bearer "),
    "only a scheme": "Bearer",
    "empty": "",
    "no ASCII": "Bearer \xe9\xff",
}


@parametrize("header", [{**HS256, "crit": ["secret"]}, {**HS256, "alg": "secret"}, {"secret": 1}], ids=str)  # fmt: skip
@parametrize("claims", [{"service": "a"}, {"service": ["secret"]}, {"scope": "image:secret"}, "secret"])  # fmt: skip
def test_refusal_of_a_token_repeats_nothing_of_it(tokens, header, claims):
    for key in (SECRET, "another key of thirty-two characters or so"):
        with pytest.raises(Unauthorised) as refused:
            tokens.verify(forged(header, claims, key))
        assert "secret" not in str(refused.value)


@parametrize("header", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_token_is_refused(tokens, header):
    with pytest.raises(Unauthorised, match="^Invalid authorization token: .") as raised:
        tokens.verify(header)
    assert raised.value.headers == {"WWW-Authenticate": "Bearer"}
    assert header[7:] not in str(raised.value) or len(header) < 12  # never says the token


@parametrize("claims", [{}, {"aud": "others", "iss": "gate"}, {"aud": "fw"}])
def test_audience_and_issuer_are_checked_where_asked_for(tmp_path, claims):
    strict = Tokens(Settings(data=tmp_path, jwt_audience="fw", jwt_issuer="gate"), SECRET)
    with pytest.raises(Unauthorised):
        strict.verify(sign({"service": "a", **claims}))
    assert strict.verify(sign({"service": "a", "aud": ["x", "fw"], "iss": "gate"}))
    assert strict.verify("Bearer " + strict.issue("a"))


def test_token_that_was_verified_expires_all_the_same(tokens, monkeypatch):
    header = "Bearer " + tokens.issue("a", seconds=10)
    assert tokens.verify(header) and tokens.verify(header)
    later = time.time() + 41
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(Unauthorised, match="expired"):
        tokens.verify(header)


@parametrize("links", [True, False], ids=["with hard links", "without"])
def test_secret_is_made_once_and_is_the_owners_alone(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", raising(PermissionError))
    secret = image_manager.load_secret(tmp_path)
    assert len(bytes.fromhex(secret)) == 32
    assert image_manager.load_secret(tmp_path) == secret
    assert names_in(tmp_path) == {"secret.key"}
    if os.name == "posix":
        assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600


def test_secret_that_cannot_be_made_leaves_nothing_behind(tmp_path, monkeypatch):
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, raising(OSError(errno.EIO, "I/O error")))
    with pytest.raises(CannotStart, match="make it readable"):
        image_manager.load_secret(tmp_path)
    assert not names_in(tmp_path)


@parametrize("content", [b"", b"short\n", b"\xff" * 40])
def test_secret_that_is_none_stops_the_start(tmp_path, content):
    (tmp_path / "secret.key").write_bytes(content)
    with pytest.raises(CannotStart, match=r"secret\.key"):
        image_manager.load_secret(tmp_path)


def key_pair(algorithm):
    """Return (private key, PEM of the public key)."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    private = {
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    }[algorithm]()
    kinds = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return private, private.public_key().public_bytes(*kinds)


def tokens_of(tmp_path, public_key):
    """Return what verifies with a public key, in a file that is missing where the key is None."""
    pytest.importorskip("cryptography")
    if public_key is not None:
        (tmp_path / "key.pem").write_bytes(public_key)
    return Tokens(Settings(data=tmp_path, jwt_public_key=tmp_path / "key.pem"), SECRET)


@parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_public_key_takes_only_its_own_algorithm(tmp_path, algorithm):
    private, public = key_pair(algorithm)
    tokens = tokens_of(tmp_path, public)
    assert tokens.verify(sign({"service": "a"}, private, algorithm=algorithm)).tenant == "a"
    for header in (sign({"service": "a"}), forged(HS256, {"service": "a"}, public.decode())):
        with pytest.raises(Unauthorised):
            tokens.verify(header)
    with pytest.raises(CannotStart, match="private key"):
        tokens.issue("a")


@parametrize("content", [b"", b"-----BEGIN PUBLIC KEY-----\nx\n", None])
def test_public_key_that_is_none_or_of_another_curve_stops_the_start(tmp_path, content):
    with pytest.raises(CannotStart, match="BEGIN PUBLIC KEY"):
        tokens_of(tmp_path, content)
    with pytest.raises(CannotStart, match="P-256"):
        tokens_of(tmp_path, key_pair("ES384")[1])


def test_public_key_without_cryptography_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(CannotStart, match=r"pip install \"pyjwt\[crypto\]\""):
        Tokens(Settings(data=tmp_path, jwt_public_key=tmp_path / "key.pem"), SECRET)


# ------------------------------------------------------------------------------------- Intel HEX


def read_hex(content, cuts=()):
    """Return (layout, {address: byte}) of a file fed in pieces."""
    content = content.encode() if isinstance(content, str) else content
    reader = HexReader()
    edges = [0, *cuts, len(content)]
    data = b"".join(reader.feed(content[a:b]) for a, b in itertools.pairwise(edges))
    data += reader.finish()
    layout, placed = types.SimpleNamespace(**reader.report()), {}
    layout.segments = [(int(run["address"], 16), run["size"]) for run in layout.segments]
    for extent in reader.pieces.extents():
        for at in range(extent.size):
            assert extent.address + at not in placed
            placed[extent.address + at] = data[extent.offset + at]
    assert list(placed) == sorted(placed)
    assert not reader.pieces.is_in_order() or data == bytes(placed.values())
    return layout, placed


def model(content):
    """Return {address: byte}, and how many records there are, as the plainest reader has it."""
    placed, records, base, mode = {}, 0, 0, "linear"
    for line in re.split("\r\n|\r|\n", content.decode("latin-1").removeprefix("\xef\xbb\xbf")):
        if not line.startswith(":"):
            continue
        records += 1
        raw = bytes.fromhex(line[1 : 11 + 2 * int(line[1:3], 16)])
        if raw[3] == 0:
            for at, byte in enumerate(raw[4:-1]):
                offset = raw[1] * 256 + raw[2] + at
                address = base + offset % 65536 if mode == "segment" else base + offset
                placed[address % 2**32 if mode == "linear" else address] = byte
        elif raw[3] == 1:
            break
        elif raw[3] == 2:
            base, mode = int.from_bytes(raw[4:6], "big") * 16, "segment"
        elif raw[3] == 4:
            base, mode = int.from_bytes(raw[4:6], "big") * 65536, "linear"
    return placed, records


@parametrize("newline", ["\n", "\r\n"])
@parametrize("width", [1, 16, 32, 255])
def test_hex_of_any_width_and_line_end_is_read(newline, width):
    content, data = firmware(3000, base=0x08000000, newline=newline, width=width)
    layout, placed = read_hex(content)
    assert bytes(placed[address] for address in sorted(placed)) == data
    assert vars(layout) == {
        "records": len(content.split()),
        "bytes": 3000,
        "start_address": None,
        "segments": [(0x08000000, 3000)],
        "warnings": [],
    }


@parametrize("line_end", ["\r", "\r\r\n", "\n  \n", "\r\n\t \r\n", "\n\n\n", "\r\n\r\n\n"], ids=repr)  # fmt: skip
def test_hex_of_lines_that_end_in_any_way_with_blank_ones_between_is_sound(line_end):
    content, data = firmware(5000)
    lines = content.decode().split()
    odd, end = line_end.join(lines).encode(), line_end.encode()
    for content in (odd, odd + end, end + odd, odd.lower(), odd.lower() + end):
        for cuts in ((), range(7, len(content), 41)):
            layout, placed = read_hex(content, cuts)
            assert bytes(placed.values()) == data and layout.records == len(lines)
            assert layout.warnings == []


def test_hex_of_nothing_but_its_end_is_sound():
    assert read_hex(END)[0].segments == []


SMALLEST = ":0400000001020304F2\n:00000001FF\n"


@cases("content, line, where", {
    "byte order mark": ("\ufeff" + SMALLEST, 1, "before the first"),
    "text": ("; device = mm-control\n\n" + SMALLEST, 1, "before the first"),
    "text behind blank lines": ("\n \nhello\nworld\n" + SMALLEST, 3, "before the first"),
    "text on the line of the end": (SMALLEST[:-1] + ";PIC16F876\n", 2, "behind the end-of-file"),
    "text after the end": (SMALLEST + "\n;PIC16F876\n;more", 4, "behind the end-of-file"),
    "Ctrl-Z": (SMALLEST + "\x1a", 3, "behind the end-of-file"),
    "NULs on the line of the end": (SMALLEST[:-1] + "\0" * 99, 2, "behind the end-of-file"),
    "many NULs": (SMALLEST + "\0" * 2000, 3, "behind the end-of-file"),
})  # fmt: skip
def test_hex_with_text_before_or_behind_is_sound_and_warns_with_the_line(content, line, where):
    content = content.encode()
    warning = f"Line {line}: what stands {where} record is not flashed"
    for cuts in ((), range(1, len(content))):
        layout, placed = read_hex(content, cuts)
        assert bytes(placed.values()) == b"\1\2\3\4"
        assert layout.warnings == [warning]


def test_hex_of_the_longest_record_behind_a_byte_order_mark_is_read_a_byte_at_a_time():
    content = ("\ufeff" + record(0, 0, bytes(255)) + END).replace("\n", "\r").encode()
    assert len(read_hex(content, range(1, len(content)))[1]) == 255


RECORDS = [b":", b":nonsense", b"\n" + SMALLEST.encode(), b"; device = mm-control\r" + SMALLEST.encode(),
           b"\xef\xbb\xbf" + SMALLEST.encode(), SMALLEST.encode("utf-16-le"), SMALLEST.encode("utf-16-be"),
           SMALLEST.encode("utf-16"), ("x\n" + SMALLEST).encode("utf-16-be")]  # fmt: skip
NO_RECORDS = [b"", b"note: 0400000001020304F2", b" :0400000001020304F2", b"a\n:040000000", b"a\n:04000000G1020304F2",
              b"\x7fELF" + bytes(range(256)) * 200, random.Random(5).randbytes(65536)]  # fmt: skip


@parametrize("begin, is_hex", [(x, True) for x in RECORDS] + [(x, False) for x in NO_RECORDS])
def test_hex_is_recognised_by_a_line_that_is_a_record(begin, is_hex):
    assert image_manager.looks_like_hex(begin) == is_hex


@parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_hex_in_utf_16_is_a_fault_that_says_so(coding):
    for before, line in (("", 1), ("; x\n", 2)):
        content = (before + SMALLEST).encode(coding)
        for cuts in ((), range(1, len(content))):
            with pytest.raises(HexFault, match=f"line {line}: the file is UTF-16: save it as"):
                read_hex(content, cuts)


def test_hex_records_of_other_types_are_checked_counted_and_named():
    universal = "".join([record(4, 0, b"\0\1"), record(0x0A, 0, b"\x99\0\xc0\xde"),
                         record(0, 0, b"abcd"), record(0x0D, 0, b"xyz") * 2,
                         record(0x0B, 0), record(0xFD, 0, bytes(255)), END])  # fmt: skip
    layout, placed = read_hex(universal)
    assert bytes(placed.values()) == b"abcd" and layout.records == 8 and layout.bytes == 4
    assert [warning.partition(" hold")[0] for warning in layout.warnings] == [
        "Line 2: what records of type 0A", "Line 4: what records of type 0D",
        "Line 6: what records of type 0B", "Line 7: what records of type FD",
    ]  # fmt: skip
    with pytest.raises(HexFault, match="line 2: checksum"):
        read_hex(universal.replace("9900C0DE", "9900C0DF"))
    with pytest.raises(HexFault, match="line 2: record is cut off"):
        read_hex(universal.replace("9900C0DE", "9900C0"))


GOOD = record(0, 0, b"\1\2\3\4")


@cases("content, fault", {
    "checksum": (GOOD[:-2] + "0\n" + END, "line 1: checksum is F0, should be F2"),
    "cut off": (GOOD + GOOD[:-4] + "\n" + END, "line 2: record is cut off"),
    "cut off at the end": (GOOD + END + "\n\n", None),
    "only a colon": (":\n" + END, "line 1: record is cut off"),
    "half a byte": (GOOD[:-2] + "\n" + END, "line 1: record is cut off"),
    "too long": (GOOD[:-1] + "00\n" + END, "line 1: record is longer than the 4 bytes"),
    "no colon": (GOOD + GOOD[1:] + END, "line 2: does not begin with a colon"),
    "a space before": (GOOD + " " + GOOD + END, "line 2: does not begin with a colon"),
    "a space after": (GOOD[:-1] + " \n" + END, "line 1: character 20 is no hexadecimal digit"),
    "a comment": (GOOD[:-1] + "; x\n" + END, "line 1: character 20 is no hexadecimal digit"),
    "no digit": (":0G" + GOOD[3:] + END, "line 1: character 3 is no hexadecimal digit"),
    "a colon within": (GOOD[:-3] + ":" + GOOD[-3:] + END, "line 1: character 18 is no hexadecimal"),
    "type 06 with a digit too few": (GOOD + record(6, 0)[:-2] + "\n" + END, "line 2: record is cut"),
    "type 01 with data": (GOOD + record(1, 0, b"\1"), "line 2: type 01 has 1 bytes, not 0"),
    "type 02 too short": (record(2, 0, b"\1") + END, "line 1: type 02 has 1 bytes, not 2"),
    "type 03 too long": (record(3, 0, bytes(5)) + END, "line 1: type 03 has 5 bytes, not 4"),
    "type 04 empty": (record(4, 0) + END, "line 1: type 04 has 0 bytes, not 2"),
    "type 05 too short": (record(5, 0, bytes(3)) + END, "line 1: type 05 has 3 bytes, not 4"),
    "no end": (GOOD + GOOD, "line 2: no end-of-file record"),
    "no end, no line end": (GOOD[:-1], "line 1: no end-of-file record"),
    "data after the end": (END + GOOD, "line 2: a second file begins here"),
    "data behind text after the end": (END + ";x\n" + GOOD, "line 3: a second file begins here"),
    "data on the line of the end": (END[:-1] + GOOD, "line 1: a second file begins here"),
    "end twice": (GOOD + END + "\n" + END, "line 4: a second file begins here"),
    "a digit behind the end": (GOOD + END[:-1] + "0\n", "line 2: record is longer than the 0"),
    "NUL": (GOOD + "\0\n" + END, "line 2: does not begin with a colon"),
    "text between": (GOOD + "\n;x\n" + GOOD + END, "line 3: does not begin with a colon"),
    "much text between": (GOOD + " " * 999 + "x" + " " * 999, "line 2: does not begin with a colon"),
    "no line end at all": (":" + "00" * 5000, "line 1: record is longer than the 0 bytes"),
})  # fmt: skip
@parametrize("around", [0, 400])
def test_hex_fault_names_its_line_and_says_what_is_wrong(content, fault, around):
    content = GOOD * around + content
    if fault is None:
        assert read_hex(content)
        return
    line, _, reason = fault.removeprefix("line ").partition(":")
    fault = f"^Corrupt Intel HEX: line {int(line) + around}:{re.escape(reason)}"
    for cuts in ((), range(1, min(len(content), 5000))):
        with pytest.raises(HexFault, match=fault):
            read_hex(content, cuts)


@parametrize("place", range(1, 60))  # without its colon the first line would be text
def test_hex_with_one_wrong_character_anywhere_is_a_fault(place):
    content = bytearray(("".join([GOOD * 3, record(4, 0, b"\x10\0"), END])).encode())
    content[place] ^= 0x01
    with pytest.raises(HexFault):
        read_hex(bytes(content))


@parametrize("newline", ["\n", "\r\n"])
def test_hex_with_blank_lines_everywhere_is_read_and_its_lines_are_counted(newline):
    for seed in range(30):
        rng = random.Random(seed)
        line = GOOD.replace("\n", newline)
        content = "".join(newline * rng.choice([0, 0, 1, 2, 5]) + line for _ in range(50)).encode()
        last = END.replace("\n", newline).encode() + newline.encode() * rng.randrange(3)
        cuts = sorted(rng.randrange(len(content)) for _ in range(rng.randrange(4)))
        assert read_hex(content + last, cuts)[0].records == 51
        number = content.count(b"\n") + 1
        with pytest.raises(HexFault, match=f"line {number}: record is cut off"):
            read_hex(content + b":00\n" + last, cuts)


@parametrize("seed", range(150))
def test_hex_is_read_as_the_plainest_reader_reads_it(seed):
    """With everything in it that may be in a file: line ends, types, orders, text around."""
    rng = random.Random(seed)
    rows, bank = [], [0, 16, 32, 0xFFF8, 0xFFFE, rng.randrange(65536)]
    for _ in range(rng.randrange(1, 40)):
        kind = rng.choice([0] * 12 + [2, 3, 4, 5, 0x0A, 0xFD])
        size = {0: rng.choice([0, 1, 4, 16, 16, 255]), 2: 2, 3: 4, 4: 2, 5: 4}.get(kind, 3)
        data = rng.randbytes(size)
        if kind in (2, 4):
            data = rng.choice([b"\0\0", b"\x10\0", b"\0\1", b"\xff\xff"])
        begin, run = rng.choice(bank), rng.choice([1, 1, 1, 5, 20, 60]) if kind == 0 else 1
        more = [record(0, (begin + at * size) % 65536, data) for at in range(run)]
        rng.choice([lambda: None, lambda: rng.shuffle(more), more.reverse])()
        rows += more if kind == 0 else [record(kind, begin, data)]
    written = sum(len(row) // 2 - 6 for row in rows if row[7:9] == "00")
    ends = rng.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r", "\n\n", "\n \t\n", "\r\r\n"]])
    content = "".join(row.strip() + rng.choice(ends) for row in [*rows, END])
    content = content.lower() if rng.randrange(2) else content
    content = rng.choice(["", "\ufeff", "\n", "; text\n"]) + content
    content = (content + rng.choice(["", "\x1a", ";text\n"])).encode()
    cuts = sorted(rng.randrange(len(content)) for _ in range(rng.randrange(6)))
    layout, placed = read_hex(content)
    assert read_hex(content, cuts) == (layout, placed)
    assert (placed, layout.records) == model(content)
    assert layout.bytes == written
    joined = [address for address in sorted(placed) if address - 1 not in placed]
    assert [address for address, _ in layout.segments] == joined
    assert sum(size for _, size in layout.segments) == len(placed)


@cases("content, memory", {
    "segment": (record(2, 0, b"\x10\0") + record(0, 0xFFFE, b"abcd") + record(0, 2, b"ef"),
                {0x1FFFE: 97, 0x1FFFF: 98, 0x10000: 99, 0x10001: 100, 0x10002: 101, 0x10003: 102}),
    "linear": (record(4, 0, b"\xff\xff") + record(0, 0xFFFF, b"xy"), {0xFFFFFFFF: 120, 0: 121}),
})  # fmt: skip
def test_hex_segment_base_wraps_at_64_kib_and_linear_base_at_4_gib(content, memory):
    layout, placed = read_hex(content + END)
    first, lowest = next(iter(memory)), min(memory)
    assert placed == memory
    assert layout.warnings == [f"The record at 0x{first:08X} wraps round to 0x{lowest:08X}"]


@parametrize("base", [record(2, 0, b"\x10\0"), record(4, 0, b"\xff\xff")], ids=["segment", "linear"])  # fmt: skip
def test_hex_run_whose_last_record_wraps_round_is_read_like_its_lines(base):
    lines = [base, *(record(0, 0xFE08 + at, bytes([at % 256]) * 16) for at in range(0, 512, 16))]
    whole, data = read_hex(hex_file(*lines))
    assert (whole, data) == read_hex(hex_file(*lines), list(itertools.accumulate(map(len, lines))))
    assert len(whole.segments) == 2 and len(whole.warnings) == 1


def test_hex_overlap_is_reported_and_the_later_record_wins():
    content = record(0, 0, b"abcdef") + record(0, 2, b"XY") + record(0, 3, b"Z") + END
    layout, placed = read_hex(content)
    assert bytes(placed[at] for at in range(6)) == b"abXZef"
    assert layout.bytes == 9 and layout.segments == [(0, 6)]
    assert layout.warnings[0] == "2 bytes at 0x00000002 are written more than once: the last wins"


def test_hex_that_warns_a_lot_says_that_there_are_more_and_names_other_types_all_the_same():
    lines = [record(0, at * 8, b"ab") * 2 for at in range(45)]
    warnings = read_hex(hex_file(*lines))[0].warnings
    assert len(warnings) == 41 and warnings[-1] == "There are more warnings like these"
    starts = [record(5, 0, number.to_bytes(4, "big")) for number in range(60)]
    warnings = read_hex(hex_file(*starts, record(0x0A, 0)))[0].warnings
    assert "type 0A" in warnings[-1] and warnings[-2] == "There are more warnings like these"


@parametrize("kind, data, address", [(3, b"\x12\x34\0\5", "0x00012345"), (5, b"\x08\0\1\0", "0x08000100")])  # fmt: skip
def test_hex_start_records_give_the_entry_point(kind, data, address):
    assert read_hex(hex_file(GOOD, record(kind, 0, data)))[0].start_address == address


def test_hex_with_several_start_addresses_names_them_and_the_last_counts():
    start = [record(5, 0, b"\x08\0\0\0"), record(3, 0, b"\0\x10\0\4"), record(5, 0, b"\0\0\1\4")]
    assert read_hex(hex_file(start[0], start[0], GOOD))[0].warnings == []
    layout, _ = read_hex(hex_file(*start, GOOD))
    warning = "start address 0x00000104 comes after 0x08000000; the last one counts"
    assert layout.start_address == "0x00000104" and layout.warnings == [f"Line 2: {warning}"]


def test_hex_with_a_segment_base_after_a_linear_one_names_both():
    linear, segment = record(4, 0, b"\x08\0"), record(2, 0, b"\x10\0")
    layout, placed = read_hex(hex_file(linear, segment, GOOD))
    warning = "base 0x00010000 of type 02 comes after 0x08000000 of type 04"
    assert layout.warnings == [f"Line 2: {warning}; some programs add the two"]
    assert min(placed) == 0x10000
    for harmless in ([segment, linear], [record(4, 0, b"\0\0"), segment]):
        assert read_hex(hex_file(*harmless, GOOD))[0].warnings == []


def scattered(pieces):
    """Return a file of single bytes, each with a gap behind it, in no order."""
    places = list(range(0, 2 * pieces, 2))
    random.Random(3).shuffle(places)
    places.sort(key=lambda at: at >> 16)
    return hex_file(*[
        record(4, 0, bank.to_bytes(2, "big")) + "".join(record(0, at & 0xFFFF, b"x") for at in group)
        for bank, group in itertools.groupby(places, key=lambda at: at >> 16)
    ])  # fmt: skip


def test_hex_in_too_many_pieces_is_refused_and_takes_bounded_memory(monkeypatch):
    assert image_manager.MAX_SEGMENTS == 262_144
    monkeypatch.setattr(image_manager, "MAX_SEGMENTS", 100)
    assert len(read_hex(scattered(100))[0].segments) == 100
    too_many = "^The data come in more separate pieces than can be checked"
    with pytest.raises(HexFault, match=too_many):
        read_hex(scattered(101))
    alternating = [record(0, at, b"x") for at in [*range(0, 200, 2), *range(1, 200, 2)]]
    assert read_hex(hex_file(*alternating))[0].segments == [(0, 200)]
    monkeypatch.setattr(image_manager, "MAX_PIECES", 150)
    with pytest.raises(HexFault, match=too_many):
        read_hex(hex_file(*alternating))


# ------------------------------------------------------------------------------------- catalogue


@pytest.fixture
def catalogue(tmp_path):
    with contextlib.closing(Catalogue(tmp_path / "image_manager.db")) as catalogue:
        yield catalogue


RISING = [
    "no version", "0.0.0-0", "0.0.1", "1.0.0-0.3.7", "1.0.0-2", "1.0.0-11", "1.0.0--", "1.0.0-alpha", "1.0.0-alpha.1",
    "1.0.0-alpha.beta", "1.0.0-alpha-1", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.9",
    "1.0.10", "1.2.0", "1.10.0", "2.0.0", "10.0.0", "9" * 23 + ".0.0", "1" * 999 + ".0.0", "1" * 1200 + ".0.0",
]  # fmt: skip


def test_semver_precedence_is_that_of_the_specification():
    keys = [semver_key(version) for version in RISING]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


@parametrize("one, other", [("v1.2.3", "1.2.3"), ("1.2.3+a.b", "1.2.3+c"), ("1.2.3-rc.1+5", "1.2.3-rc.1")])  # fmt: skip
def test_semver_ignores_a_leading_v_and_the_build(one, other):
    assert semver_key(one) == semver_key(other) != ""


@parametrize("version", [
    "1.2", "1.2.3.4", "01.2.3", "1.2.3-01", "1.2.3-", "1.2.3-a..b", "1.2.3+", "V1.2.3", "vv1.2.3", "1.2.3\n",
    " 1.2.3", "\u0661.2.3", "1.2.3-\u00e9", "latest", "",
])  # fmt: skip
def test_what_is_no_semver_is_below_all_that_is(version):
    assert semver_key(version) == ""


def test_catalogue_keeps_the_order_of_creation_under_concurrency(catalogue):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: catalogue.add("a", "l", str(n)), range(80)))
    listed = json.loads(catalogue.list_json("a", {}))
    assert [image["created"] for image in listed] == sorted(created for _, created in made)
    assert {image["id"] for image in listed} == {image_id for image_id, _ in made}


def add_together(catalogue, count):
    """Add images in threads that all wait for the write lock; return what each returns or raises."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool, catalogue._writing:
        added = [pool.submit(catalogue.add, "a", f"label {n}", "1.0.0") for n in range(count)]
        wait_until(lambda: len(catalogue._additions) == count)
    return [future.exception() or future.result() for future in added]


def test_additions_that_wait_for_the_disk_share_one_commit(catalogue, monkeypatch):
    commits, real = [], Catalogue._transaction
    monkeypatch.setattr(Catalogue, "_transaction", lambda self: commits.append(1) or real(self))
    added = add_together(catalogue, 8)
    listed = json.loads(catalogue.list_json("a", {}))
    assert len(commits) == 1
    assert sorted(added) == sorted((image["id"], image["created"]) for image in listed)


def test_additions_that_cannot_be_recorded_fail_all_together(catalogue, app):
    with catalogue_failing(catalogue, "COMMIT", "full"):
        assert {type(error) for error in add_together(catalogue, 3)} == {StorageFull}
    assert catalogue.total() == 0 and not catalogue.ever_used()
    catalogue.add("a", "label", "1.0.0")


def test_catalogue_has_an_index_for_each_filter_and_for_the_latest(catalogue):
    for column in ("created", "label", "fw_version", "confirmed"):
        plan = catalogue._row(
            f"EXPLAIN QUERY PLAN SELECT id FROM image WHERE tenant = :t AND {column} = :v", t=1, v=1
        )
        assert "USING INDEX" in plan[3]
    latest = catalogue._row("EXPLAIN QUERY PLAN " + image_manager.LATEST, tenant="a", label="b")
    assert "image_by_precedence" in latest[3]


def test_catalogue_commits_to_the_disk_before_it_returns(catalogue):
    assert catalogue._row("PRAGMA synchronous") == (2,)  # FULL
    assert catalogue._row("PRAGMA journal_mode") == ("wal",)


def test_catalogue_is_migrated_step_by_step_and_keeps_what_it_has(tmp_path, monkeypatch):
    path = tmp_path / "image_manager.db"
    with contextlib.closing(Catalogue(path)) as old:
        image_id, _ = old.add("a", "label", "1.0.0")
    step = "ALTER TABLE image ADD COLUMN note TEXT; UPDATE image SET note = 'kept'"
    monkeypatch.setattr(image_manager, "MIGRATIONS", (*image_manager.MIGRATIONS, step))
    for _ in range(2):
        with contextlib.closing(Catalogue(path)) as new:
            assert new._row("SELECT note FROM image WHERE id = :id", id=image_id) == ("kept",)


@parametrize("content", [b"no database" * 200, None])
def test_catalogue_that_is_none_stops_the_start(tmp_path, content):
    path = tmp_path / "image_manager.db"
    path.write_bytes(content) if content else path.mkdir()
    with pytest.raises(CannotStart, match=r"Cannot use .*image_manager\.db.*restore it.*-wal"):
        Catalogue(path)


@parametrize("statement, reason", [
    ("PRAGMA user_version = 99", "newer version"), ("CREATE TABLE songs (name TEXT)", "another program"),
])  # fmt: skip
def test_catalogue_of_another_program_or_version_stops_the_start(tmp_path, statement, reason):
    path = tmp_path / "image_manager.db"
    with sqlite_in(tmp_path) as other:
        other.execute(statement)
    before = path.read_bytes()
    with pytest.raises(CannotStart, match=reason):
        Catalogue(path)
    assert path.read_bytes()[100:] == before[100:]


def test_catalogue_opens_a_connection_where_another_thread_took_the_last_idle_one(catalogue):
    class Emptied(list):
        """Still has one when it is asked, and none when that is taken."""

        def __len__(self):
            return 1

    catalogue._idle = dict.fromkeys(catalogue._idle, Emptied())
    assert catalogue.total() == 0
    catalogue.close()


@contextlib.contextmanager
def made_by_1_0_0(folder):
    """Lend a connection to a catalogue of the first version."""
    with sqlite_in(folder) as old:
        old.executescript(image_manager.MIGRATIONS[0] + "; PRAGMA user_version = 1")
        yield old


def test_catalogue_made_by_1_0_0_is_migrated_whole(tmp_path):
    date = "2026-01-02T03:04:05.000006+00:00"
    report = json.dumps({"segments": [{"address": "0x00000010", "size": 4}]})
    rows = [
        ("a", "1.0.0", "1", 1, 44, "ab" * 32, date, report, "[[16, 4]]"),
        ("b", "2.0.0", "2", 0, None, None, None, None, None),
        ("empty", "2.0.0", "2", 1, 13, "cd" * 32, date, '{"segments": []}', "[]"),
        ("gone", "3.0.0", "3", 0, None, None, None, None, None),
    ]
    with made_by_1_0_0(tmp_path) as old:
        old.executemany(
            "INSERT INTO image (id, tenant, label, fw_version, precedence, created, updated,"
            " confirmed, size, sha256, stored, report, segments)"
            f" VALUES (?, 't', 'l', ?, ?, '{date}', '{date}', ?, ?, ?, ?, ?, ?)",
            rows,
        )
        old.execute("DELETE FROM image WHERE id = 'gone'")
    with contextlib.closing(Catalogue(tmp_path / "image_manager.db")) as catalogue:
        assert catalogue.faults() == [] and catalogue.ever_used()
        first, second, _ = json.loads(catalogue.list_json("t", {}))
        assert (first["sha256"], first["size"], first["updated"]) == ("ab" * 32, 44, date)
        assert (second["id"], second["confirmed"]) == ("b", False)
        image = catalogue.get("t", "a")
        assert image.raw_size == 4
        assert list(catalogue.segments(image).between(0, 99)) == [Extent(16, 4, 0)]
        assert catalogue.get("t", "empty").raw_size is None
        assert catalogue._row("SELECT seq FROM sqlite_sequence WHERE name = 'image'")[0] == 4
        assert catalogue._row("SELECT stored FROM image WHERE id = 'b'")[0] == date


def test_empty_catalogue_made_by_1_0_0_still_knows_that_it_was_used(tmp_path):
    with made_by_1_0_0(tmp_path) as old:
        old.execute("INSERT INTO sqlite_sequence VALUES ('image', 7)")
    with contextlib.closing(Catalogue(tmp_path / "image_manager.db")) as catalogue:
        assert catalogue.ever_used()
        catalogue.add("a", "b", "1")
        assert catalogue._row("SELECT seq FROM image")[0] == 8


def test_log_of_the_catalogue_leaves_room_for_deletions_also_after_a_long_read(client, app):
    """While another tool reads nothing can be merged, so that the log grows beyond what is kept free."""
    assert image_manager.RESERVE == 2 * MIB
    log = app.settings.data / "image_manager.db-wal"
    for _ in range(150):
        client.delete(f"/image/{client.create()}")
    assert 0 < log.stat().st_size < image_manager.RESERVE / 2
    with sqlite_in(app.settings.data) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM image").fetchone()
        for _ in range(150):
            client.create(label="x" * 128)
        assert log.stat().st_size > 2 * MIB
    for _ in range(60):
        client.create()
    assert log.stat().st_size <= image_manager.RESERVE / 2


def test_catalogue_says_what_was_removed_and_forgets_it_in_time(catalogue, monkeypatch):
    made = [catalogue.add("a", "label", "1")[0] for _ in range(3)]
    for image_id in made[:2]:
        catalogue.remove("a", image_id, lambda image: None)
    names = [f"{image_id}.hex" for image_id in made] + ["x.hex", f"{made[0]}.txt"]
    assert catalogue.strays(names) == dict(zip(names, (True, True, True, False, False)))
    with catalogue._transaction() as connection:
        connection.execute("UPDATE removed SET seq = 10000 WHERE seq = 2")
    catalogue.remove("a", made[2], lambda image: None)
    assert catalogue.strays(names) == dict(zip(names, (False, True, True, False, False)))


def test_catalogue_closes_its_connections_also_those_that_are_lent(tmp_path):
    catalogue = Catalogue(tmp_path / "image_manager.db")
    with catalogue._connection() as lent:
        catalogue.close()
        lent.execute("SELECT 1")
    with pytest.raises(sqlite3.ProgrammingError):
        lent.execute("SELECT 1")
    assert not any(catalogue._idle.values())


# ------------------------------------------------------------------------------------- binaries


@pytest.fixture
def store(tmp_path):
    return BinaryStore(tmp_path)


def received(store, content, pieces=7, image_id="one", **others):
    """Receive and publish a binary in pieces; return what it is."""
    with store.receive(others.pop("limit", MIB), **others) as upload:
        for at in range(0, len(content), max(len(content) // pieces, 1)):
            upload.write(content[at : at + max(len(content) // pieces, 1)])
        binary = upload.finish()
        store.publish(upload, image_id)
    return binary


def segments_of(binary):
    segments = json.loads(binary.report)["segments"]
    return [(int(segment["address"], 16), segment["size"]) for segment in segments]


def test_binary_is_stored_with_its_size_digest_and_raw_bytes(store):
    content, data = firmware(5000, base=0x1000)
    binary = received(store, content)
    assert (binary.size, binary.sha256) == (len(content), sha256(content))
    assert segments_of(binary) == [(0x1000, 5000)]
    assert (store.folder / "one.hex").read_bytes() == content
    assert (store.folder / "one.bin").read_bytes() == data
    assert not names_in(store.uploads)


def test_raw_bytes_stand_in_the_order_of_addresses_joined_and_without_overwritten_ones(store):
    lines = [record(0, 0x200, b"late"), record(0, 0x100, b"early"), record(0, 0x102, b"RL")]
    binary = received(store, "".join([*lines, END]).encode())
    assert (store.folder / "one.bin").read_bytes() == b"eaRLylate" and binary.raw_size == 9
    assert segments_of(binary) == [(0x100, 5), (0x200, 4)]
    assert not names_in(store.uploads)


@parametrize("pieces", [1, 100, 5000])
@parametrize("before", [0, 200, 64 * KIB - 11, 64 * KIB - 10])
def test_intel_hex_is_recognised_in_the_first_64_kib_however_they_arrive(store, pieces, before):
    content = b";" * (before - 1) + b"\n" * (before > 0) + firmware(9000)[0]
    binary = received(store, content, pieces)
    assert bool(binary.report) == (before <= 64 * KIB - 11)
    assert (store.folder / "one.bin").exists() == bool(binary.report)
    assert (store.folder / "one.hex").read_bytes() == content


@parametrize(
    "kind", ["shuffled", "descending", "one here, one there", "in two passes, overlapping"]
)
def test_records_in_any_order_are_read_and_raw_bytes_stored_in_that_of_their_addresses(store, kind):
    rng = random.Random(6)
    rows = [record(0, at, rng.randbytes(16)) for at in range(0, 65536, 16)]
    memory = b"".join(bytes.fromhex(row[9:-3]) for row in rows)
    if kind == "shuffled":
        rng.shuffle(rows)
    elif kind == "descending":
        rows.reverse()
    elif kind == "one here, one there":
        rows = rows[::2] + rows[1::2]
    else:
        rows = [record(0, at, b"x" * 8) for at in range(4, 65536, 16)] + rows
    binary = received(store, hex_file(record(4, 0, b"\x08\0"), *rows))
    assert segments_of(binary) == [(0x08000000, 65536)] and binary.raw_size == 65536
    assert bool(json.loads(binary.report)["warnings"]) == ("overlapping" in kind)
    assert (store.folder / "one.bin").read_bytes() == memory
    assert not names_in(store.uploads)


@cases("content, records", {
    "no data": (END.encode(), 1),
    "other types": (hex_file(record(0x0A, 0, b"\x99\0\xc0\xde"), GOOD), 3),
    "no Intel HEX": (b"no Intel HEX", None),
})  # fmt: skip
def test_what_gives_no_raw_bytes_leaves_none_of_an_earlier_binary(store, content, records):
    received(store, firmware()[0])
    binary = received(store, content)
    assert binary.raw_size is None and names_in(store.folder) == {"one.hex"}
    assert (json.loads(binary.report)["records"] if binary.report else None) == records
    assert not names_in(store.uploads)


@cases("content, refusal", {
    "faulty": (firmware(5000)[0][:-20], r"Corrupt Intel HEX: line 31\d: .*"),
    "in too many pieces": (scattered(101), "The data come in .*; .validate=false stores it unchecked"),
})  # fmt: skip
def test_refused_intel_hex_is_stored_only_unchecked(store, monkeypatch, content, refusal):
    monkeypatch.setattr(image_manager, "MAX_SEGMENTS", 100)
    with pytest.raises(BadRequest, match=f"^{refusal}"):
        received(store, content)
    binary = received(store, content, check=False)
    assert binary.report is None and binary.sha256 == sha256(content)
    assert names_in(store.folder) == {"one.hex"}


def test_files_reach_the_medium_on_macos_too(store, monkeypatch):
    """Its fsync() does not do that; F_FULLFSYNC does, where the file system knows it."""
    import fcntl

    calls = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda file, command: calls.append(command))
    received(store, firmware()[0])
    assert calls == [51] * 3  # the two files, and the folder
    unknown = OSError(errno.ENOTSUP, "Operation not supported")
    monkeypatch.setattr(fcntl, "fcntl", raising(unknown))
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    received(store, b"other", image_id="two")
    assert calls[3:] == ["fsync"] * 2


@parametrize("content", [b"\x7fELF", b"", b" :00000001FF\n", b"a\n:x"])
def test_any_other_file_is_stored_as_it_is(store, content):
    assert received(store, content).report is None
    assert (store.folder / "one.hex").read_bytes() == content
    assert names_in(store.folder) == {"one.hex"}


@parametrize("content", [b"\x7fELF", b"", b" " + END.encode()])
def test_only_intel_hex_is_stored_where_it_is_required(store, content):
    with pytest.raises(BadRequest, match="^Not an Intel HEX file$"):
        received(store, content, require=True, check=False)
    assert not names_in(store.uploads) and not names_in(store.folder)


def excerpt(tmp_path, content, segments, end, start=0):
    (tmp_path / "file").write_bytes(content)
    file = open(tmp_path / "file", "rb", buffering=0)
    return Excerpt(file, Segments(segments), start, end, b".")


def test_excerpt_reads_pieces_and_gaps_as_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(image_manager, "LARGEST_READ", 7)
    segments = [(91, 3), (103, 4), (107, 2), (120, 5), (200, 9)]
    whole = b"..." + b"abcd" + b"ef" + b"." * 11 + b"ghijk" + b"..."
    content = b"---abcdefghijk---------"
    with contextlib.closing(excerpt(tmp_path, content, segments, 128, 100)) as file:
        for begin, end in itertools.combinations_with_replacement(range(29), 2):
            file.narrow(begin, end)
            assert b"".join(iter(file.read, b"")) == whole[begin:end]
            assert file.seek(0, os.SEEK_END) == end - begin and file.read() == b""
            assert file.seek(0) == 0 and file.read(3) == whole[begin : min(begin + 3, end)]
            assert file.tell() == min(3, end - begin)


def test_excerpt_of_a_file_cut_off_is_an_error_not_a_short_read(tmp_path):
    with contextlib.closing(excerpt(tmp_path, b"abc", [(0, 5)], 5)) as file:
        assert file.read(2) == b"ab"
        with pytest.raises(OSError, match="cut off"):
            file.read(3)


def test_excerpt_over_a_wide_gap_takes_no_memory(tmp_path):
    segments = [(0, 1), (256 * MIB - 1, 1)]
    with contextlib.closing(excerpt(tmp_path, b"az", segments, 256 * MIB)) as file:
        assert len(file.read()) == image_manager.LARGEST_READ
        file.seek(-2, os.SEEK_END)
        assert file.read() == b".z"


# ------------------------------------------------------------------------------------- routes: life of an image


def test_the_life_of_an_image(client, app):
    created = client.post_json("/image/", {"label": "FW_Example", "fw_version": "1.0.0"})
    assert created.status_int == 201
    image_id = created.json["id"]
    assert str(uuid.UUID(image_id, version=4)) == image_id
    path = f"/image/{image_id}"
    assert created.headers["Location"] == created.json["url"] == path
    assert created.json.keys() == {"id", "label", "published_at", "url"}
    assert datetime.fromisoformat(created.json["published_at"]).utcoffset().seconds == 0
    assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{6}\+00:00", created.json["published_at"])
    shown = {
        "id": image_id, "label": "FW_Example", "fw_version": "1.0.0", "confirmed": False,
        "created": created.json["published_at"],
    }  # fmt: skip
    assert client.get(path).json == shown
    assert client.get("/image").json == [shown]
    error(client.get(path + "/binary", status=404), 404, "Image does not have an binary file")

    content, _ = firmware()
    body, headers = form(content)
    uploaded = client.post(path + "/binary", body, headers)
    assert uploaded.json == {"image": image_id, "message": "image uploaded", "checked": True}
    stored = client.get(path).json
    report = stored.pop("hex")
    updated = stored.pop("updated")
    now = {"confirmed": True, "size": len(content), "sha256": sha256(content), "checked": True}
    assert stored == {**shown, **now}
    assert updated > shown["created"] and report["bytes"] == 1000
    assert client.get("/image/binary/").json == [f"{image_id}.hex"]
    assert client.get(path + "/binary").body == content

    assert client.delete(path + "/binary").json == {"result": "ok"}
    cleared = client.get(path).json
    assert cleared.pop("updated") > updated and cleared == shown
    assert client.get("/image/binary").json == []
    assert client.delete(path + "/binary").json == {"result": "ok"}  # a retry

    client.upload(image_id, b"other bytes")
    removed = client.delete(path)
    assert removed.json.keys() == {"result", "removed_image"}
    assert removed.json["result"] == "ok" and removed.json["removed_image"]["size"] == 11
    for call in (client.get, client.delete):
        error(call(path, status=404), 404, f"No such image: {image_id}")
    assert client.get("/image").json == [] and folder_is_clean(app)


@parametrize("prefix", ["", "/fw-image"])
def test_every_path_works_with_and_without_a_slash_and_prefix(tmp_path, prefix):
    with store_in(tmp_path, url_prefix=prefix) as client:
        image_id = client.stored()
        readable = [route for route in ROUTES if route.method == "GET"]
        for base, route, slash in itertools.product({"", prefix}, readable, ("", "/")):
            path = base + route.path.replace("<image_id>", image_id) + slash
            expected = next(status for status in route.answers if status in (200, 307))
            client.get(path + "?label=sensor" * bool(route.needs), HTML, status=expected)
        made = client.post_json("/image", LABELS)
        assert made.headers["Location"] == made.json["url"] == f"{prefix}/image/{made.json['id']}"
        link = client.post(f"/image/{image_id}/binary/link").json["url"]
        assert link.startswith(f"http://localhost:80{prefix}/image/{image_id}/binary?")
        page = client.get(f"{prefix}/image?limit=1")
        assert f"<{prefix}/image?limit=1&offset=1>" in page.headers["Link"]


# ------------------------------------------------------------------------------------- routes: who may do what


def request_to(route, client, image_id, status=None, headers=None):
    """Make a request that a route would answer with success."""
    path = route.path.replace("<image_id>", image_id) + "?label=sensor" * bool(route.needs)
    content = firmware()[0]
    body, kind = {
        "image": (json.dumps(LABELS).encode(), JSON), "change": (json.dumps(LABELS).encode(), JSON),
        "form": form(content), "file": (content, {}),
    }.get(route.takes, (b"", {}))  # fmt: skip
    headers = {**kind, **(headers or {})}
    return client.request(path, method=route.method, body=body, headers=headers, status=status)


GUARDED = [route for route in ROUTES if route.right]
NAMES = [route.handler for route in GUARDED]


@parametrize("route", GUARDED, ids=NAMES)
def test_route_wants_a_token(route, client):
    image_id = client.stored()
    client.authorization = None
    response = request_to(route, client, image_id, 401)
    error(response, 401, "No authorization token has been supplied")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    response = request_to(route, client, image_id, 401, {"Authorization": "Bearer e30.e30.e30"})
    assert response.json["message"].startswith("Invalid authorization token: ")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@parametrize("route", GUARDED, ids=NAMES)
def test_route_wants_its_right_and_no_other(route, client, app):
    image_id = client.stored()
    others = [right[6:] for right in image_manager.RIGHTS if right != route.right]
    for rights in ([others[0]], [others[1]], others):
        response = request_to(route, client.as_("admin", *rights), image_id, 403)
        error(response, 403, f"This token does not give the right {route.right}")
        challenge = 'Bearer error="insufficient_scope"'
        assert response.headers["WWW-Authenticate"] == challenge
    assert client.as_("admin", "read").download(image_id).body == firmware()[0]
    client.as_("admin", route.right.removeprefix("image:"))
    assert request_to(route, client, image_id).status_int in (200, 201, 307)


@parametrize("route", GUARDED, ids=NAMES)
def test_route_shows_and_gives_nothing_to_another_tenant(route, client):
    image_id = client.stored()
    before = client.shown(image_id)
    response = request_to(route, client.as_("other"), image_id, "*")
    if "<image_id>" in route.path:
        error(response, 404, f"No such image: {image_id}")
    else:
        assert image_id not in response.text
    assert client.as_("admin").get(f"/image/{image_id}").json == before


def test_every_route_names_its_right_and_only_three_are_public():
    public = {route.handler for route in ROUTES if route.right == image_manager.PUBLIC}
    assert public == {"show_page", "health", "describe"}
    assert {route.right for route in GUARDED} == set(image_manager.RIGHTS)
    assert [route.handler for route in ROUTES if route.by_link] == ["download_binary"]
    assert "right" not in image_manager.Route._field_defaults


def test_health_is_for_all_and_leaves_nothing_behind(client, app):
    client.authorization = None
    for _ in range(3):
        assert client.get("/health").json == {"status": "ok"}
    assert folder_is_clean(app)
    assert client.head("/health").headers["Content-Length"] == "15"


def free_space(monkeypatch, free):
    """Have the disk say that so many bytes are free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, free))


def test_health_says_what_is_wrong(client, app, monkeypatch, caplog):
    def reason():
        message = client.get("/health", status=503).json["message"]
        assert message.startswith("Not healthy: ")
        return message

    with monkeypatch.context() as broken:
        free_space(broken, image_manager.RESERVE - 1)
        assert "full" in reason()
    access, unwritable = os.access, "The catalogue cannot be written: let the service's user write"
    with monkeypatch.context() as broken:
        broken.setattr(
            os, "access", lambda path, mode: str(path)[-3:] != ".db" and access(path, mode)
        )
        assert reason() == f"Not healthy: {unwritable} image_manager.db"
    for folder in (app.binaries.uploads, app.binaries.folder):
        shutil.rmtree(folder)
        assert reason() == f"Not healthy: {folder.name}/: No such file or directory"
        folder.mkdir()
    app.catalogue.disconnect()
    (app.settings.data / "image_manager.db").write_bytes(b"x" * 5000)
    assert reason().endswith("the log says why")
    assert caplog.messages[-1].endswith("(file is not a database)")


@parametrize("damage", ["replaced", "deleted"])
def test_catalogue_that_was_deleted_or_replaced_takes_no_changes(client, app, tmp_path, damage):
    """They would be lost when the service ends; what is stored can still be downloaded."""
    image_id = client.stored(b"x")
    message = "The catalogue was deleted or replaced: restart the service"
    damaged = app.settings.data / "image_manager.db"
    shutil.copy(damaged, tmp_path / "other")
    damaged.unlink()
    if damage == "replaced":
        shutil.copy(tmp_path / "other", damaged)
    error(client.get("/health", status=503), 503, f"Not healthy: {message}")
    error(client.post_json("/image", LABELS, status=503), 503, message)
    error(client.delete(f"/image/{image_id}", status=503), 503, message)
    assert client.download(image_id).body == b"x"
    assert damaged.exists() == (damage == "replaced")


# ------------------------------------------------------------------------------------- routes: images

MISSING, NULL = "Missing data for required field.", "Field may not be null."
NO_STRING, SHORT = "Not a valid string.", "Shorter than minimum length 1."
LONG, CONTROL = "Longer than maximum length 128.", "Contains control characters."


@parametrize("members, errors", [
    ({}, {"label": [MISSING], "fw_version": [MISSING]}),
    ({"label": "a"}, {"fw_version": [MISSING]}),
    ({"label": None, "fw_version": 1}, {"label": [NULL], "fw_version": [NO_STRING]}),
    ({"label": "", "fw_version": []}, {"label": [SHORT], "fw_version": [NO_STRING]}),
    ({"label": "a" * 129, "fw_version": "1"}, {"label": [LONG]}),
    ({"label": "a" * 128 + "\n", "fw_version": "\0"}, {"label": [LONG, CONTROL], "fw_version": [CONTROL]}),
    ({"label": "\x85", "fw_version": True}, {"label": [CONTROL], "fw_version": [NO_STRING]}),
    ({"label": "\ud800", "fw_version": "1"}, {"label": [NO_STRING]}),
], ids=ascii)  # fmt: skip
def test_faulty_image_is_refused_with_all_reasons(client, members, errors):
    response = client.post_json("/image", members, status=400)
    assert response.json == {"message": "failed to parse input", "errors": errors}
    present = {name: errors[name] for name in members if name in errors}
    image_id = client.create()
    if present:
        response = client.patch_json(f"/image/{image_id}", members, status=400)
        assert response.json == {"message": "failed to parse input", "errors": present}
    assert client.ids() == [image_id]


@parametrize("text", ["a" * 128, "ä" * 128, "\U0001f600", "'; DROP TABLE image; --", " "])
def test_any_other_text_will_do(client, text):
    image_id = client.create(text, text)
    assert client.shown(image_id)["label"] == text
    query = urllib.parse.urlencode({"label": text, "fw_version": text})
    assert client.ids(f"?{query}") == [image_id]


FINE, KIND = b'{"label": "a", "fw_version": "1"}', "application/json"


@cases("body, kind", {
    "empty": (b"", KIND),
    "no JSON": (b"label=a", KIND),
    "a list": (b"[]", KIND),
    "a string": (b'"label"', KIND),
    "another type": (FINE, "text/plain"),
    "no type": (FINE, ""),
    "a form": (FINE, "application/x-www-form-urlencoded"),
    "not UTF-8": (b'{"label": "\xff", "fw_version": "1"}', KIND),
    "UTF-16": (FINE.decode().encode("utf-16"), KIND),
    "deep": (b'{"a":' * 10000 + b"1" + b"}" * 10000, KIND),
    "deep lists": (b"[" * 60000, KIND),
    "NaN": (b'{"label": "a", "fw_version": "1", "x": NaN}', KIND),
    "a long number": (b'{"label": ' + b"1" * 5000 + b"}", KIND),
})  # fmt: skip
def test_what_is_no_json_object_is_refused(client, body, kind):
    message = "Payload must be valid JSON, and Content-Type set accordingly"
    for method, path in (("POST", "/image"), ("PATCH", f"/image/{client.create()}")):
        sent = {"method": method, "body": body, "headers": {"Content-Type": kind}}
        error(client.request(path, **sent, status=400), 400, message)


def test_json_with_parameters_and_other_members_is_fine(client):
    body = b'{"label": "a", "fw_version": "1", "confirmed": true, "id": "x"}'
    made = client.post("/image", body, {"Content-Type": "Application/JSON; charset=utf-8"})
    assert client.get(made.json["url"]).json["confirmed"] is False and made.json["id"] != "x"


def test_json_of_more_than_64_kib_is_too_large(client):
    body = json.dumps({**LABELS, "x": "y" * 65536}).encode()
    assert client.post("/image", body, JSON, status=413).json["status"] == 413
    assert client.post("/image", body[: 65536 - 2] + b'"}', JSON, status=201)


def test_change_of_label_and_version(client):
    image_id = client.stored(fw_version="2.0.0")
    path = f"/image/{image_id}"
    before = client.get(path).json
    changed = client.patch_json(path, {"label": "new"}).json
    shown = client.get(path).json
    assert shown == {**before, "label": "new", "updated": changed["updated"]}
    assert changed == {name: shown[name] for name in shown if name != "hex"}  # GET alone adds it
    assert client.get("/image?label=new").json == [changed]
    assert client.get("/image/latest?label=new").json == changed
    assert changed["updated"] > before["updated"]
    assert client.patch_json(path, {"fw_version": "0.1.0", "confirmed": False}).json["confirmed"]
    other = client.stored(label="new", fw_version="1.0.0")
    assert client.get("/image/latest?label=new").json["id"] == other
    for members in ({}, {"confirmed": True}):
        response = client.patch_json(path, members, status=400)
        errors = {"_schema": ["Nothing to change."]}
        assert response.json == {"message": "failed to parse input", "errors": errors}
    missing = str(uuid.uuid4())
    response = client.patch_json(f"/image/{missing}", {"label": "a"}, status=404)
    error(response, 404, f"No such image: {missing}")


def test_list_is_filtered_by_each_and_all(client):
    pairs = list(itertools.product("ab", "12"))
    made = a1, a2, b1, b2 = [client.create(*pair) for pair in pairs]
    client.upload(a2, b"x")
    assert client.ids() == made
    assert client.ids("?label=a") == [a1, a2]
    assert client.ids("?fw_version=2") == [a2, b2]
    assert client.ids("?confirmed=true") == [a2]
    assert client.ids("?confirmed=false&label=a") == [a1]
    assert client.ids("?confirmed=true&label=a&fw_version=2") == [a2]
    assert client.ids("?label=nothing") == []


def test_list_comes_in_pages_with_total_and_links(client):
    made = [client.create("a", str(number)) for number in range(7)]
    client.create("b")
    assert "X-Total-Count" not in client.get("/image?label=a").headers
    url, seen = "/image?label=a&limit=3", []
    for there in ({"next"}, {"next", "prev"}, {"prev"}):
        page = client.get(url)
        assert page.headers["X-Total-Count"] == "7"
        seen += [image["id"] for image in page.json]
        found = re.findall('<(.*?)>; rel="(.*?)"(?:, |$)', page.headers["Link"])
        links = {name: link for link, name in found}
        assert links.keys() == there
        url = links.get("next")
    assert seen == made
    assert [image["id"] for image in client.get(links["prev"]).json] == made[3:6]
    behind = client.get("/image?limit=3&offset=99").headers["Link"]
    assert behind == '</image?limit=3&offset=5>; rel="prev"'
    assert "Link" not in client.get("/image?label=a&limit=7").headers
    beyond = client.get("/image?limit=5&offset=100")
    assert beyond.json == [] and beyond.headers["X-Total-Count"] == "8"


@parametrize("query", [
    "?x=1", "?label=", "?label=a&label=a", "?label=a&label=b", "?confirmed=1", "?confirmed=", "?confirmed=True",
    "?limit=0", "?limit=1001", "?limit=-1", "?limit=x", "?limit=", "?limit=0x10", "?limit=1&limit=2", "?offset=1",
    "?limit=1&offset=-1", "?limit=1&offset=", "?limit=1&offset=" + "9" * 5000, "?limit=%D9%A1", "?label=%00",
    "?label=a%0A", "?label=%FF", "?label=%ED%A0%80", "?label=" + "a" * 129, "?fw_version=", "?label",
    "/latest", "/latest?label=", "/latest?label=a&current=", "/latest?label=a&x=1", "/latest?label=a&label=a",
])  # fmt: skip
def test_list_and_latest_refuse_any_other_query(client, query):
    error(client.get("/image" + query, status=400), 400, "Invalid query param supplied")


def test_latest_is_the_highest_version_that_has_a_binary(client):
    client.create("a", "9.9.9")
    for version in ("1.0.0-rc.1", "nightly", "1.2.0", "1.10.0", "v1.10.0-beta"):
        client.stored(b"x", label="a", fw_version=version)
    client.stored(b"x", label="b", fw_version="2.0.0")
    latest = client.get("/image/latest?label=a").json
    assert latest["fw_version"] == "1.10.0" and latest["confirmed"]
    again = client.stored(b"x", label="a", fw_version="v1.10.0+build")
    assert client.get("/image/latest?label=a").json["id"] == again  # of equals, the last
    client.delete(f"/image/{again}/binary")
    assert client.get("/image/latest?label=a").json == latest
    for version in ("1.10.0", "v1.10.0%2Bx", "1.11.0", "2.0.0-alpha"):
        response = client.get(f"/image/latest?label=a&current={version}", status=204)
        assert response.body == b"" and "Content-Length" not in response.headers
    for version in ("1.9.9", "1.10.0-rc.9", "nightly", "zzz", "1.10"):
        assert client.get(f"/image/latest?label=a&current={version}").json == latest
    nothing = client.get("/image/latest?label=none", status=404)
    error(nothing, 404, "No image with this label has a binary")


def test_latest_of_equal_versions_is_the_last_created_whatever_the_clock_said(client, monkeypatch):
    for day in ("2030-01-02", "2030-01-01"):
        now = f"{day}T00:00:00.000000+00:00"
        monkeypatch.setattr(image_manager, "now_text", lambda now=now: now)
        last = client.stored(b"x", fw_version="1.0.0")
    monkeypatch.undo()
    assert client.get("/image/latest?label=sensor").json["id"] == last


@parametrize("current", ["1.0.0+7", "1.0.0%2B7", "v1.0.0+7", "1.0.0+8", "1.1.0-a+7.b"])
def test_version_may_be_pasted_into_a_query_with_its_plus(client, current):
    """Else a device would be offered the very version that it runs, again and again."""
    image_id = client.stored(fw_version="1.0.0+7")
    client.get(f"/image/latest?label=sensor&current={current}", status=204)
    client.get(f"/image/latest/binary?label=sensor&current={current}", status=204)
    assert client.get("/image/latest?label=sensor&current=0.9.0+7").json["id"] == image_id


def test_plus_is_a_blank_where_that_makes_no_version(client):
    made = {version: client.stored(fw_version=version) for version in ("1.0.0+7", "1.0.0 7", "a b")}
    for query, version in (("1.0.0+7", "1.0.0+7"), ("1.0.0%207", "1.0.0 7"), ("a+b", "a b")):
        assert client.ids(f"?fw_version={query}") == [made[version]], query
    client.get("/image/latest?label=a+b", status=404)


def test_latest_binary_is_one_fixed_address_for_a_device(client, app):
    path, (content, data) = "/image/latest/binary?label=sensor", firmware()
    image_id = client.stored(content, fw_version="1.2.0")
    response = client.get(path + "&current=1.1.0", status=307)
    assert response.json == client.get("/image/latest?label=sensor").json
    assert response.headers["Cache-Control"] == "no-store"
    link = response.headers["Location"]
    assert link.startswith(f"http://localhost:80/image/{image_id}/binary?expires=")
    left = int(re.search("expires=([0-9]+)", link)[1]) - time.time()
    assert 3590 < left <= 3601
    head = client.head(path, status=307)
    assert head.headers["Location"].startswith(link.partition("?")[0])
    window = "&format=bin&start=0x10&end=32&fill=0x00"
    cut = client.get(path + window, status=307).headers["Location"]
    client.authorization = None
    assert client.get(link).body == content
    assert client.get(cut).body == data[16:32]
    client.get(path, status=401)
    client.as_("admin", "write").get(path, status=403)
    client.as_("other").get(path, status=404)
    client.as_("admin").get("/image/latest/binary", status=400)
    client.get(path + "&colour=red", status=400)
    client.get(path + "&current=1.2.0", status=204)
    expires = int(time.time()) + 100  # the link does not outlive the token
    token = sign({"service": "admin", "exp": expires})
    response = client.get(path, {"Authorization": token}, status=307)
    assert f"expires={expires}&" in response.headers["Location"]


def test_latest_where_nothing_is_semver_is_the_last_created(client):
    for version in ("zz", "aa", "mm"):
        client.stored(b"x", label="a", fw_version=version)
    assert client.get("/image/latest?label=a").json["fw_version"] == "mm"
    client.get("/image/latest?label=a&current=mm", status=204)
    client.get("/image/latest?label=a&current=zz", status=200)
    client.get("/image/latest?label=a&current=0.0.1", status=204)


@parametrize("asked, said", [
    ("efac", "efac"), ("..", ".."), ("%2e%2e", ".."), ("a%20b", "a b"), ("%C3%A4", "ä"), ("%FF", "\ufffd"),
    ("%00", "\0"), ("a" * 3000, "a" * 3000), ("%27%3B--", "';--"),
    ("57852F31-A906-4D5F-A0C3-FDE41FF64D00", "57852F31-A906-4D5F-A0C3-FDE41FF64D00"), (None, None),
])  # fmt: skip
def test_what_is_no_id_is_an_image_that_is_not_there(client, asked, said):
    capitals = client.create().upper()
    asked, said = asked or capitals, said or capitals
    for call in (client.get, client.delete):
        for path in (f"/image/{asked}", f"/image/{asked}/binary"):
            error(call(path, status=404), 404, f"No such image: {said}")
    error(client.upload(asked, b"x", status=404), 404, f"No such image: {said}")


@parametrize("method, path, message", [
    *[("GET", path, "No such path") for path in
      ("/", "/x", "/images", "/image/a/b", "/image//binary", "/image/a/binary/x", "/health/x")],
    # These begin like others, but are images that are not there.
    ("GET", "/image/binary/binary", "No such image: binary"), ("GET", "/image/latestt", "No such image: latestt"),
    ("POST", "/image/latest/binary/link", "No such image: latest"),
])  # fmt: skip
def test_unknown_path_is_404(client, method, path, message):
    error(client.request(path, method=method, status=404), 404, message)


@parametrize("method, path, allowed", [
    ("PUT", "/image", "GET, HEAD, POST"),
    ("POST", "/health", "GET, HEAD"),
    ("OPTIONS", "/image/x/binary", "DELETE, GET, HEAD, POST, PUT"),
    ("GET", "/image/x/binary/link", "POST"),
    ("HEAD", "/image/x/binary/link", "POST"),
    ("PATCH", "/image/x/binary", "DELETE, GET, HEAD, POST, PUT"),
    ("BREW", "/image/x", "DELETE, GET, HEAD, PATCH"),
    # These are paths of their own, no images.
    *[(method, path, "GET, HEAD") for method in ("PUT", "POST", "PATCH", "DELETE")
      for path in ("/image/latest", "/image/binary", "/image/latest/binary")],
])  # fmt: skip
def test_wrong_method_is_405_and_says_which_are_right(client, method, path, allowed):
    response = client.request(path, method=method, status=405)
    assert response.headers["Allow"] == allowed
    if method != "HEAD":
        error(response, 405, "Method not allowed")


def test_head_works_wherever_get_does(client):
    image_id = client.stored()
    for route in ROUTES:
        if route.method == "GET":
            path = route.path.replace("<image_id>", image_id)
            path += "?label=sensor" * bool(route.needs)
            got, head = client.get(path, HTML), client.head(path, HTML)
            assert head.status == got.status and head.body == b""
            assert head.headers["Content-Length"] == str(len(got.body))
            assert head.content_type == got.content_type


def test_bug_is_500_with_no_internals_and_its_traceback_is_logged(client, app, monkeypatch, caplog):
    monkeypatch.setattr(app.catalogue, "get_json", raising(RuntimeError("the very reason")))
    response = client.get(f"/image/{client.create()}", status=500, expect_errors=True)
    error(response, 500, "Internal server error: the log says more")
    assert "Traceback" in caplog.text and "RuntimeError: the very reason" in caplog.text


def test_every_change_and_refusal_is_logged_in_one_line_with_nothing_secret(client, app, caplog):
    caplog.set_level("INFO", "image_manager")
    client.extra_environ["REMOTE_ADDR"] = "192.0.2.7"
    token = sign({"service": "lab", "sub": 'rig\n"7"'})
    client.authorization = None
    headers = {"Authorization": token}
    made = client.post_json("/image", LABELS, headers=headers)
    path = made.json["url"]
    client.put(path + "/binary", b"x", headers)
    client.get(path, headers)
    client.delete(path + "/a%0Ab", headers, status=404)
    wrong = token[:-20] + ("A" if token[-20] != "A" else "B") + token[-19:]
    client.delete(path, {"Authorization": wrong}, status=401)
    client.get(path, {"Authorization": wrong}, status=401)
    client.delete(path + "/binary", headers)
    start = '192.0.2.7 tenant="lab" sub="rig\\n\\"7\\"" '
    reason = '"Invalid authorization token: Signature verification failed"'
    assert [line.getMessage() for line in caplog.records] == [
        f"{start}POST /image 201",
        f"{start}PUT {path}/binary 200",
        f"192.0.2.7 tenant=null sub=null DELETE {path} 401 {reason}",
        f"192.0.2.7 tenant=null sub=null GET {path} 401 {reason}",
        f"{start}DELETE {path}/binary 200",
    ]
    assert token.rpartition(".")[2][:15] not in caplog.text


# ------------------------------------------------------------------------------------- routes: upload


NO_FORM, NO_FILE = "Payload must be valid multipart/form-data", "Payload must contain a file"
XYZ = {"Content-Type": "multipart/form-data; boundary=XyZ"}


@parametrize("body, headers, message", [
    (b"x", {"Content-Type": "application/octet-stream"}, NO_FORM),
    (b"x", {"Content-Type": ""}, NO_FORM),
    (b"x", {"Content-Type": "multipart/form-data"}, NO_FORM),
    (b"x", XYZ, NO_FORM),
    (b"", XYZ, NO_FORM),
    (form(b"x")[0][:-9], XYZ, NO_FORM),
    (form(b"x")[0].replace(b"form-data", b"attachment"), XYZ, NO_FORM),
    # A form that is all head.
    (form(b"x")[0].replace(b"\r\n", b"\r\n" + b"X-A: b\r\n" * 20, 1), XYZ, NO_FORM),
    (form(b"x")[0].replace(b"\r\n", b"\r\nX-A: " + b"b" * 6000 + b"\r\n", 1), XYZ, NO_FORM),
    (b'--XyZ\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 2000 + form(b"x")[0], XYZ, NO_FORM),
    (b"--XyZ--\r\n", XYZ, NO_FILE),
    (b'--XyZ\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--XyZ--\r\n', XYZ, NO_FILE),
    (*form(b"x", name="file"), "File form does not have an image field"),
    (*form(b"x", filename=""), "Filename empty"),
    *[(*form(b"x", filename=name), "Invalid File: its name must end in .hex")
      for name in ("fw.bin", "hex", "fw.hex.exe")],
    (form(b"x")[0][:-9] + form(b"y")[0], XYZ, "Payload must contain one file named image, not two"),
])  # fmt: skip
def test_form_that_is_not_one_hex_file_named_image_is_refused(client, app, body, headers, message):
    image_id = client.create()
    error(client.upload_form(image_id, body, headers, status=400), 400, message)
    assert not client.shown(image_id)["confirmed"] and folder_is_clean(app)


@parametrize("name", ["fw.hex", "FW.HEX", "../../etc/x.Hex", "a b.hex", "q%22.hex", "\u00e4.hex"])
def test_form_with_any_name_that_ends_in_hex_is_taken_and_the_name_is_no_path(client, app, name):
    image_id = client.create()
    body, headers = form(b"content\r\n--Xy", filename=name)
    extra = b'--XyZ\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
    client.upload_form(image_id, extra + body, headers)
    assert client.download(image_id).body == b"content\r\n--Xy"
    assert folder_is_clean(app, image_id)


def named_form(disposition, header=""):
    """Return (body, headers) of a form whose file has this disposition, and another header."""
    head = f'--XyZ\r\nContent-Disposition: form-data; name="image"; {disposition}\r\n{header}\r\n'
    return head.encode("latin-1") + b"x\r\n--XyZ--\r\n", XYZ


@cases("disposition, status", {
    "extended": ("filename*=utf-8''Ger%C3%A4t.hex", 200),
    "extended behind plain": ("filename=\"a.txt\"; filename*=UTF-8''b.HEX", 200),
    "extended before plain": ("filename*=UTF-8''b.hex; filename=\"a.txt\"", 200),
    "extended in Latin-1": ("filename*=iso-8859-1'de'Ger%E4t.hex", 200),
    "extended in an unknown coding": ("filename*=klingon''a%FF.hex", 200),
    "extended in a coding of Python's own": ("filename*=idna''a..hex", 200),
    "extended in a coding that never works": ("filename*=undefined''a.hex", 200),
    "extended in a coding with a NUL": ("filename*=a%00b''a.hex", 200),
    "encoded word": ('filename="=?utf-8?B?R2Vyw6R0LmhleA==?="', 200),
    "encoded words": ('filename="=?iso-8859-1?q?Ger=E4t?= =?utf-8?q?=2Ehex?="', 200),
    "continued": ('filename*0="fw"; filename*1=".hex"', 200),
    "UTF-8": ('filename="Ger\xc3\xa4t.hex"', 200),
    "Latin-1": ('filename="Ger\xe4t.hex"', 200),
    "no coding at all": ('filename="\xff\xfe.hex"', 200),
    "quotes": ('filename="a\\"b.hex"', 200),
    "percent": ('filename="100%.hex"', 200),
    "no quotes": ("filename=fw.hex", 200),
    "extended wins": ("filename=\"a.hex\"; filename*=UTF-8''b.txt", 400),
    "another ending in an encoded word": ('filename="=?utf-8?B?YS50eHQ=?="', 400),
    "broken encoded word": ('filename="=?utf-8?B?x?="', 400),
    "another ending in Latin-1": ('filename="Ger\xe4t.txt"', 400),
})  # fmt: skip
def test_name_of_a_file_counts_by_its_ending_however_it_is_written(client, disposition, status):
    response = client.upload_form(client.create(), *named_form(disposition), status=status)
    if status == 400:
        error(response, 400, "Invalid File: its name must end in .hex")


@parametrize("header, status", [
    ("Content-Transfer-Encoding: base64", 400), ("Content-Transfer-Encoding: quoted-printable", 400),
    ("Content-Encoding: gzip", 400), ("Content-Encoding: identity", 200), ("Content-Transfer-Encoding: Binary", 200),
    ("Content-Transfer-Encoding: 8bit", 200), ("Content-Transfer-Encoding: 7bit", 200),
])  # fmt: skip
def test_file_that_a_form_holds_encoded_is_refused(client, app, header, status):
    image_id = client.create()
    body = named_form('filename="a.hex"', f"{header}\r\n")
    response = client.upload_form(image_id, *body, status=status)
    assert ("encoded" in response.json["message"]) == (status == 400)
    assert folder_is_clean(app, *([image_id] if status == 200 else []))


@parametrize("query", [
    "?sha265=" + "0" * 64, "?SHA256=" + "0" * 64, "?validate=true&x", "?Validate=false",
])  # fmt: skip
def test_check_that_is_mistyped_is_refused(client, app, query):
    image_id = client.create()
    response = client.upload(image_id, b"x", query, status=400)
    error(response, 400, "Invalid query param supplied")
    client.upload_form(image_id, *form(b"x"), query, status=400)
    assert folder_is_clean(app)


def test_boundary_keeps_its_case(client):
    client.upload_form(client.create(), *form(b"content", boundary="AbC"))


def uploaded(image_id, checked):
    return {"image": image_id, "message": "image uploaded", "checked": checked}


def test_put_stores_the_body_and_so_does_an_empty_file(client):
    for content in (firmware(70000)[0], b"", b"\0" * 100):
        image_id = client.create()
        assert client.upload(image_id, content).json == uploaded(image_id, content[:1] == b":")
        assert client.download(image_id).body == content
        assert client.shown(image_id)["size"] == len(content)


def test_put_whose_body_ends_early_or_has_no_length_is_refused(client, app):
    image_id = client.create()
    with pytest.MonkeyPatch.context() as loose:
        loose.setitem(client.extra_environ, "CONTENT_LENGTH", "100")
        response = client.upload(image_id, b"x", headers={"Content-Length": "100"}, status=400)
    error(response, 400, "The body ended before its Content-Length")
    status, body = call_bare(client, "PUT", f"/image/{image_id}/binary")
    assert status.startswith("411 ") and b"Content-Length" in body and folder_is_clean(app)


def test_same_bytes_again_succeed_and_other_bytes_are_refused(client, app):
    content, _ = firmware()
    image_id = client.stored(content)
    before = client.shown(image_id)
    again = client.upload_form(image_id, *form(content))
    assert again.json == client.upload(image_id, content).json == uploaded(image_id, True)
    error(client.upload(image_id, b"other", status=409), 409, "Binary already exists")
    assert client.shown(image_id) == before
    assert client.download(image_id).body == content and folder_is_clean(app, image_id)
    client.delete(f"/image/{image_id}/binary")
    client.upload(image_id, b"other")
    assert client.download(image_id).body == b"other"


def test_sha256_must_match(client, app):
    content, _ = firmware()
    image_id = client.create()
    response = client.upload(image_id, content, "?sha256=" + "0" * 64, status=400)
    error(response, 400, f"The SHA-256 of what was received is {sha256(content)}")
    for value in ("", "abc", "0" * 63, "0" * 65, "g" * 64):
        response = client.upload(image_id, content, f"?sha256={value}", status=400)
        error(response, 400, "Invalid query param supplied")
    assert folder_is_clean(app) and not client.shown(image_id)["confirmed"]
    client.upload(image_id, content, f"?sha256={sha256(content).upper()}")


def test_corrupt_intel_hex_is_refused_unless_told_otherwise(client, app):
    content = firmware()[0].replace(b"\r\n", b"\n")
    lines = content.splitlines(keepends=True)
    cut_off = b"".join(lines[:11]) + lines[11][:-5]
    image_id = client.create()
    remedy = "; ?validate=false stores it unchecked"
    message = f"Corrupt Intel HEX: line 12: record is cut off{remedy}"
    error(client.upload(image_id, cut_off, status=400), 400, message)
    response = client.upload_form(image_id, *form(b"".join(lines[:-1])), status=400)
    reason = f"line {len(lines) - 1}: no end-of-file record"
    error(response, 400, f"Corrupt Intel HEX: {reason}{remedy}")
    assert folder_is_clean(app)
    response = client.upload(image_id, cut_off, "?validate=no", status=400)
    error(response, 400, "Invalid query param supplied")
    client.upload(image_id, cut_off, "?validate=false")
    assert client.download(image_id).body == cut_off and "hex" not in client.shown(image_id)
    assert client.download(image_id, "?format=bin", status=422).json["status"] == 422
    sound = client.create()
    client.upload(sound, content, "?validate=false")
    assert client.shown(sound)["hex"]["bytes"] == 1000


def test_only_intel_hex_is_taken_where_it_is_required(tmp_path):
    with store_in(tmp_path, require_intel_hex=True) as client:
        image_id = client.create()
        for content, query in ((b"\x7fELF", ""), (b"", ""), (b"x", "?validate=false")):
            response = client.upload(image_id, content, query, status=400)
            error(response, 400, "Not an Intel HEX file")
        client.upload(image_id, firmware()[0])


def test_upload_larger_than_allowed_is_refused_and_nothing_is_left(tmp_path):
    with store_in(tmp_path, max_upload=10_000) as client:
        image_id = client.create()
        client.upload(image_id, b"x" * 10_001, status=413)
        response = client.upload_form(image_id, *form(b"x" * 10_001), status=413)
        error(response, 413, "The body is larger than the 10000 bytes allowed here")
        assert folder_is_clean(client.app.application)
        client.upload_form(image_id, *form(b"x" * 10_000))
        client.upload_form(image_id, b"--XyZ\r\n" + b"x" * 80_000, XYZ, status=413)


# ------------------------------------------------------------------------------------- routes: download


def modified(response):
    return email.utils.parsedate_to_datetime(response.headers["Last-Modified"])


def test_download_carries_digest_tag_and_name(client):
    content, _ = firmware()
    image_id = client.stored(content)
    response = client.download(image_id)
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    expected = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(len(content)),
        "Content-Disposition": 'attachment; filename="sensor-1.0.0.hex"',
        "ETag": f'"{sha256(content)}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
    }
    assert {name: response.headers[name] for name in expected} == expected
    stored = client.shown(image_id)["updated"]
    assert modified(response) == datetime.fromisoformat(stored).replace(microsecond=0)
    client.patch_json(f"/image/{image_id}", {"label": "new"})
    assert modified(client.download(image_id)) == modified(response)


TAG, OTHER_TAG = '"{tag}"', '"' + "0" * 64 + '"'
BEFORE, AT, AFTER = -86400, 0, 86400


# Condition headers (a number is a date that many seconds after Last-Modified): status
@parametrize("headers, status", [
    ({"If-None-Match": TAG}, 304), ({"If-None-Match": f"W/{TAG}"}, 304),
    ({"If-None-Match": f'"a", W/"b",{TAG} , "c"'}, 304), ({"If-None-Match": "*"}, 304),
    ({"If-None-Match": OTHER_TAG}, 200), ({"If-None-Match": "{tag}"}, 200), ({"If-None-Match": ""}, 200),
    ({"If-None-Match": '"a,{tag}"'}, 200), ({"If-Match": TAG}, 200), ({"If-Match": f'"a", {TAG}'}, 200),
    ({"If-Match": "*"}, 200), ({"If-Match": f"W/{TAG}"}, 412), ({"If-Match": OTHER_TAG}, 412),
    ({"If-Match": f'"a,b",,\t{TAG} ,'}, 200), *[({"If-Match": text + TAG}, 412) for text in ("x", "w/", '"x" ', '"x, ')],
    ({"If-None-Match": f'"x"{TAG}'}, 200), ({"If-None-Match": f"*, {TAG}"}, 200), ({"If-Match": ""}, 412), ({"If-Modified-Since": AT}, 304), ({"If-Modified-Since": AFTER}, 304),
    ({"If-Modified-Since": BEFORE}, 200), ({"If-Modified-Since": "no date"}, 200), ({"If-Unmodified-Since": AT}, 200),
    ({"If-Unmodified-Since": AFTER}, 200), ({"If-Unmodified-Since": BEFORE}, 412),
    ({"If-Unmodified-Since": "no date"}, 200),
    # RFC 9110, 13.2.2: the first of a pair makes the second count for nothing.
    ({"If-Match": TAG, "If-Unmodified-Since": BEFORE}, 200),
    ({"If-Match": OTHER_TAG, "If-Unmodified-Since": AFTER}, 412),
    ({"If-None-Match": OTHER_TAG, "If-Modified-Since": AFTER}, 200),
    ({"If-None-Match": TAG, "If-Modified-Since": BEFORE}, 304), ({"If-Match": OTHER_TAG, "If-None-Match": TAG}, 412),
    ({"If-Match": TAG, "If-None-Match": TAG}, 304), ({"If-Unmodified-Since": BEFORE, "If-None-Match": TAG}, 412),
    # Conditions come before ranges.
    ({"If-None-Match": TAG, "Range": "bytes=0-1"}, 304), ({"If-Match": OTHER_TAG, "Range": "bytes=0-1"}, 412),
    ({"If-None-Match": TAG, "Range": "bytes=999999-"}, 304), ({"If-Match": TAG, "Range": "bytes=0-1"}, 206),
    ({"If-Range": TAG, "Range": "bytes=0-1"}, 206), ({"If-Range": OTHER_TAG, "Range": "bytes=0-1"}, 200),
    ({"If-Range": f"W/{TAG}", "Range": "bytes=0-1"}, 200), ({"If-Range": AT, "Range": "bytes=0-1"}, 206),
    ({"If-Range": BEFORE, "Range": "bytes=0-1"}, 200), ({"If-Range": AFTER, "Range": "bytes=0-1"}, 200),
    ({"If-Range": "no date", "Range": "bytes=0-1"}, 200), ({"If-Range": OTHER_TAG, "Range": "bytes=999999-"}, 200),
], ids=str)  # fmt: skip
@parametrize("query", ["", "?format=bin"])
def test_conditions(client, headers, status, query):
    image_id = client.stored()
    path = f"/image/{image_id}/binary{query}"
    plain = client.get(path)
    date, tag = modified(plain).timestamp(), plain.headers["ETag"].strip('"')
    sent = {
        name: email.utils.formatdate(date + value, usegmt=True)
        if isinstance(value, int)
        else value.replace("{tag}", tag)
        for name, value in headers.items()
    }
    response = client.get(path, sent, status=status)
    if status in (200, 304):
        assert response.headers["ETag"] == f'"{tag}"'
        assert response.headers["Cache-Control"] == "private, no-cache"
    if status in (200, 206, 304):
        assert response.body == {200: plain.body, 206: plain.body[:2], 304: b""}[status]
    client.head(path, sent, status=200 if status == 206 else status)


def test_next_binary_has_a_later_date_whatever_the_clock_says(client, monkeypatch):
    """Else a date would stand for two binaries: a download would be mixed of both."""
    image_id, dates = client.create(), []
    path = f"/image/{image_id}/binary"
    for moment, content in (
        ("2030-01-01T12:00:00.900000+00:00", b"first firmware"),
        ("2030-01-01T12:00:00.950000+00:00", b"other firmware"),
        ("2001-01-01T00:00:00.000000+00:00", b"third firmware"),
    ):
        monkeypatch.setattr(image_manager, "now_text", lambda now=moment: now)
        client.upload(image_id, content)
        dates.append(client.get(path).headers["Last-Modified"])
        for earlier in dates[:-1]:
            assert client.get(path, {"If-Modified-Since": earlier}).body == content
            mixed = client.get(path, {"Range": "bytes=5-", "If-Range": earlier}, status=200)
            assert mixed.body == content
            client.get(path, {"If-Unmodified-Since": earlier}, status=412)
        client.upload(image_id, content)  # the same again changes no date
        assert client.get(path).headers["Last-Modified"] == dates[-1]
        client.delete(path)
    moments = [email.utils.parsedate_to_datetime(date) for date in dates]
    assert moments == sorted(set(moments))


@parametrize("date", [
    "Fri, 31 Dec 2100 23:59:59 +0000", "Fri, 31 Dec 2100 23:59:59 -0500", "Fri, 31 Dec 2100 23:59:59 EST",
    "Fri, 31 Dec 2100 23:59:59", "31 Dec 2100 23:59:59 GMT", "2100-12-31T23:59:59Z", "Fri, 41 Dec 2100 23:59:59 GMT",
])  # fmt: skip
def test_what_is_no_http_date_is_ignored(client, date):
    path = f"/image/{client.stored()}/binary"
    client.get(path, {"If-Modified-Since": date}, status=200)
    client.get(path, {"If-Range": date, "Range": "bytes=0-1"}, status=200)


@parametrize("label, version, name", [
    ("sensor", "1.2.0", "sensor-1.2.0"),
    ("sensor", "1.2.0-rc.1+7", "sensor-1.2.0-rc.1+7"),
    ("My sensor / B", "1 (test)", "My_sensor_B-1_test_"),
    ("Gerät", "v1", "Ger_t-v1"),
    ('a"; b=\\', "1", "a_b_-1"),
    ("x" * 120, "y", "x" * 100),
    ("日本", "語", "_-_"),
])  # fmt: skip
def test_download_is_called_by_label_and_version(client, app, label, version, name):
    image_id = client.stored(label=label, fw_version=version)
    for query, suffix in (("", ".hex"), ("?format=bin", ".bin")):
        header = client.download(image_id, query).headers["Content-Disposition"]
        assert header == f'attachment; filename="{name}{suffix}"'
    assert folder_is_clean(app, image_id)  # where it has its id all the same


@parametrize("content, query, checked", [
    (firmware()[0], "", True), (firmware()[0], "?validate=false", True),
    (b"\x7fELF", "", False), (firmware()[0][:-20], "?validate=false", False),
])  # fmt: skip
def test_image_says_whether_its_binary_was_found_to_be_sound(client, content, query, checked):
    image_id = client.create()
    assert "checked" not in client.shown(image_id)
    assert client.upload(image_id, content, query).json["checked"] is checked
    assert client.shown(image_id)["checked"] is checked
    assert [image["checked"] for image in client.get("/image").json] == [checked]


@parametrize("form_of_date", ["%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_dates_in_their_obsolete_forms_are_understood(client, form_of_date):
    image_id = client.stored()
    date = modified(client.download(image_id)).strftime(form_of_date)
    client.download(image_id, "", {"If-Modified-Since": date}, status=304)


# Range: (first, last) of the answer, None where it is ignored, 416
@parametrize("header, expected", [
    ("bytes=0-0", (0, 0)), ("bytes=0-499", (0, 499)), ("bytes=500-", (500, 999)),
    ("bytes=-1", (999, 999)), ("bytes=-1000", (0, 999)), ("bytes=-5000", (0, 999)),
    ("bytes=0-", (0, 999)), ("bytes=0-999", (0, 999)), ("bytes=0-5000", (0, 999)),
    ("bytes=999-999", (999, 999)), ("Bytes=1-2", (1, 2)), ("bytes= 1-2 ", (1, 2)),
    ("bytes=0-" + "9" * 5000, (0, 999)), ("bytes=-" + "9" * 5000, (0, 999)),
    ("bytes=" + "0" * 5000 + "1-2", (1, 2)),
    ("bytes=1000-", 416), ("bytes=1000-2000", 416), ("bytes=-0", 416), ("bytes=" + "9" * 5000 + "-", 416),
    ("bytes=2-1", None), ("bytes=-", None), ("bytes=", None), ("bytes=a-b", None), ("bytes=1", None),
    ("bytes=--1", None), ("bytes=1-2-3", None), ("bytes=0-1,2-3", None), ("bytes=0-1,", None),
    ("lines=0-1", None), ("0-1", None), ("bytes 0-1", None), ("bytes=\u0661-2", None), ("", None),
    ("bytes=1.0-2", None), ("bytes=+1-2", None), ("bytes=0x1-2", None),
], ids=lambda value: str(value)[:24])  # fmt: skip
@parametrize("query", ["", "?format=bin"])
def test_ranges(client, header, expected, query):
    content, data = firmware(1000) if query else (random.Random(2).randbytes(1000),) * 2
    image_id = client.stored(content)
    sent = {"Range": header.encode().decode("latin-1")}
    response = client.download(image_id, query, sent, status="*")
    if expected is None:
        assert response.status_int == 200 and response.body == data
        assert "Content-Range" not in response.headers
    elif expected == 416:
        error(response, 416, "The range lies outside the 1000 bytes")
        assert response.headers["Content-Range"] == "bytes */1000"
    else:
        first, last = expected
        assert response.status_int == 206 and response.body == data[first : last + 1]
        assert response.headers["Content-Range"] == f"bytes {first}-{last}/1000"
        assert response.headers["Content-Length"] == str(last + 1 - first)
    head = client.head(f"/image/{image_id}/binary{query}", {"Range": "bytes=0-1"}, status=200)
    assert head.headers["Content-Length"] == "1000"


@parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=0-1048575"])
def test_range_of_an_empty_binary_is_ignored(client, header):
    """nginx asks for each slice of a file so, also for the first of one that has none."""
    response = client.download(client.stored(b""), "", {"Range": header}, status=200)
    assert response.body == b"" and "Content-Range" not in response.headers


@parametrize("damage", ["missing", "too short", "too long", "a folder"])
@parametrize("suffix", ["hex", "bin"])
def test_damaged_binary_is_500_naming_it_and_the_same_bytes_mend_it(client, app, damage, suffix):
    content, data = firmware()
    image_id, other = client.stored(content), client.stored()
    path = app.binaries.folder / f"{image_id}.{suffix}"
    query, whole = ("", content) if suffix == "hex" else ("?format=bin", data)
    if damage in ("too short", "too long"):
        path.write_bytes(whole[:-1] if damage == "too short" else whole + b"x")
    else:
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    response = client.download(image_id, query, status=500)
    client.head(f"/image/{image_id}/binary{query}", status=500)
    assert image_id in response.json["message"]
    assert client.download(other).body == content
    if damage == "a folder":
        reason = f"The {suffix} file of image {image_id} cannot be read (Is a directory)"
        error(response, 500, f"{reason}: upload the same file again to restore it")
        path.rmdir()
    error(client.upload(image_id, b"x", status=409), 409, "Binary already exists")
    client.upload(image_id, content)
    assert client.download(image_id, query).body == whole


CHANGES = {
    "PATCH": ("PATCH", "", b'{"label": "b"}'),
    "DELETE": ("DELETE", "", b""),
    "DELETE binary": ("DELETE", "/binary", b""),
    "PUT": ("PUT", "/binary", b"stored"),
    "POST": ("POST", "/binary", b"stored"),
}


def change(client, name, image_id, headers, **others):
    method, path, body = CHANGES[name]
    body, kind = form(body) if method == "POST" else (body, JSON if method == "PATCH" else {})
    sent = {"method": method, "body": body, "headers": {**headers, **kind}}
    return client.request(f"/image/{image_id}{path}", **sent, **others)


@parametrize("name", CHANGES)
@parametrize("stored", [True, False], ids=["with a binary", "without"])
def test_change_is_made_only_where_its_conditions_hold(client, name, stored):
    """One that somebody else has changed in between must not be deleted, or sent to devices."""
    tag, before = f'"{sha256(b"stored")}"', email.utils.formatdate(time.time() - 9, usegmt=True)
    fails = [{"If-Match": '"other"'}, {"If-Match": f"W/{tag}"}]
    holds = [{"If-Unmodified-Since": "yesterday"}, {"If-Unmodified-Since": before[:-3] + "+0000"}]
    if stored:
        fails += [{"If-Unmodified-Since": before}, {"If-None-Match": tag}, {"If-None-Match": "*"}]
        holds += [{"If-Match": tag}, {"If-Match": f'"x", {tag}'}, {"If-Match": "*"}]
        holds += [{"If-Match": tag, "If-Unmodified-Since": before}, {"If-None-Match": '"other"'}]
    else:
        fails += [{"If-Match": "*"}, {"If-Match": tag}]
        holds += [{"If-Unmodified-Since": before}, {"If-None-Match": "*"}]
    image_id = client.stored(b"stored") if stored else client.create()
    shown = client.shown(image_id)
    for headers in fails:
        response = change(client, name, image_id, headers, status=412)
        error(response, 412, "The binary is not the one that the request's conditions ask for")
        assert client.shown(image_id) == shown
    for headers in holds:
        image_id = client.stored(b"stored") if stored else client.create()
        change(client, name, image_id, headers, status=200)


def test_condition_hides_no_other_error(client):
    failing = {"If-Match": '"other"'}
    image_id = client.stored(b"stored")
    change(client, "DELETE", "none", failing, status=404)
    client.upload(image_id, b"other bytes", headers=failing, status=409)
    client.upload(image_id, b":00\n", headers=failing, status=400)
    client.patch_json(f"/image/{image_id}", {}, headers=failing, status=400)
    client.authorization = None
    change(client, "DELETE", image_id, failing, status=401)
    change(client.as_("admin", "read"), "DELETE", image_id, failing, status=403)
    change(client.as_("other"), "DELETE", image_id, failing, status=404)


# ------------------------------------------------------------------------------------- routes: raw bytes


@pytest.fixture
def sparse(client):
    """An image with 8 bytes at 0x100, 4 at 0x110, and 4 at 0x10001000."""
    records = [record(0, 0x100, b"abcdefgh"), record(0, 0x110, b"ijkl"), record(4, 0, b"\x10\0")]
    return client.stored(
        hex_file(*records, record(0, 0x1000, b"mnop"), record(5, 0, b"\0\0\1\x01"))
    )


def test_report_shows_what_is_inside(client, sparse):
    places = {"0x00000100": 8, "0x00000110": 4, "0x10001000": 4}
    segments = [{"address": address, "size": size} for address, size in places.items()]
    found = {"records": 6, "bytes": 16, "start_address": "0x00000101", "warnings": []}
    assert client.shown(sparse)["hex"] == {**found, "segments": segments}


@parametrize("query, body, address", [
    ("start=0x100&end=0x114", b"abcdefgh" + b"\xff" * 8 + b"ijkl", "0x00000100"),
    ("end=276", b"abcdefgh" + b"\xff" * 8 + b"ijkl", "0x00000100"),
    ("start=258&end=0X106", b"cdef", "0x00000102"),
    ("start=0xFE&end=0x103&fill=0", b"\0\0abc", "0x000000FE"),
    ("start=0x106&end=0x112&fill=0x2E", b"gh........ij", "0x00000106"),
    ("start=0x10000FFE", b"\xff\xffmnop", "0x10000FFE"),
    ("start=0x10001003&end=0x10001006", b"p\xff\xff", "0x10001003"),
])  # fmt: skip
def test_window_of_raw_bytes(client, sparse, query, body, address):
    response = client.download(sparse, f"?format=bin&{query}")
    assert response.body == body and response.headers["X-Load-Address"] == address
    assert response.headers["Content-Disposition"] == 'attachment; filename="sensor-1.0.0.bin"'
    assert "Repr-Digest" not in response.headers


def test_raw_bytes_without_a_window_are_all_of_them(client):
    content, data = firmware(70_000, base=0x0800_0000)
    response = client.download(client.stored(content), "?format=bin")
    assert response.body == data and response.headers["X-Load-Address"] == "0x08000000"


def test_each_window_and_fill_has_its_own_tag(client, sparse):
    def tag(query):
        return client.download(sparse, query).headers["ETag"]

    windows = ("end=0x114", "end=0x115", "start=0xFF&end=0x114", "end=0x114&fill=0")
    tags = {tag(f"?format=bin&{window}") for window in windows}
    assert len({tag(""), *tags}) == 5
    assert tag("?format=bin&start=256&end=276&fill=255") in tags


@parametrize("query", [
    "format=hex", "format=", "format=bin&start=x", "format=bin&start=-1", "format=bin&end=", "start=0",
    "format=bin&fill=256", "format=bin&fill=0x", "format=bin&start=0x110&end=0x110", "end=5", "fill=0",
    "format=bin&start=0x111&end=0x110", "format=bin&end=" + "9" * 5000, "format=bin&start=0x1_0",
    "format=bin&format=bin", "format=bin&end=0x100000001", "format=bin&start=%D9%A1",
])  # fmt: skip
def test_window_that_is_none_is_refused(client, sparse, query):
    response = client.download(sparse, f"?{query}", status=400)
    error(response, 400, "Invalid query param supplied")


@parametrize("query", [
    "", "&start=0", "&start=0&end=0x100", "&start=0x108&end=0x110", "&end=0x90", "&start=0x20000000",
])  # fmt: skip
def test_window_too_large_or_with_no_data_is_422_and_names_the_segments(client, sparse, query):
    message = client.download(sparse, f"?format=bin{query}", status=422).json["message"]
    assert "0x00000100 to 0x00000108, 0x00000110 to 0x00000114, 0x10001000 to" in message


@parametrize("content, reason", [
    (b"\x7fELF", "no sound Intel HEX file"),
    (b"", "no sound Intel HEX file"),
    (END.encode(), "has no data"),
    (hex_file(record(0xFD, 0, b"signature"), GOOD), "records of other types"),
], ids=str)  # fmt: skip
def test_raw_bytes_of_what_has_none_are_422_and_the_reason(client, content, reason):
    image_id = client.stored(content)
    assert reason in client.download(image_id, "?format=bin", status=422).json["message"]
    client.download(image_id, "?format=bin&start=x", status=400)


def test_window_of_a_binary_replaced_meanwhile_never_mixes_the_two(client, app, monkeypatch):
    """What lies where is remembered by the digest of the binary, and must be of that very one."""
    old, new = hex_file(record(0, 0x100, b"old")), hex_file(record(0, 0x200, b"newer"))
    image_id = client.stored(old)
    get, swapped = Catalogue.get, []

    def get_and_replace(self, *names):
        image = get(self, *names)
        if not swapped:
            swapped.append(image)
            client.delete(f"/image/{image_id}/binary")
            client.upload(image_id, new)
        return image

    monkeypatch.setattr(Catalogue, "get", get_and_replace)
    response = client.download(image_id, "?format=bin")
    assert (response.body, response.headers["X-Load-Address"]) == (b"newer", "0x00000200")
    again = client.download(client.stored(old), "?format=bin")
    assert (again.body, again.headers["X-Load-Address"]) == (b"old", "0x00000100")


def test_same_bytes_again_mend_what_an_older_reader_has_recorded(client, app):
    """Its file of raw bytes is made anew, so the record must be as well."""
    content, data = firmware(3000)
    image_id = client.stored(content)
    with contextlib.closing(sqlite3.connect(app.settings.data / "image_manager.db")) as tool:
        tool.execute("UPDATE image SET report = NULL, raw_size = NULL")
        tool.commit()
    before = client.shown(image_id)
    assert not before["checked"]
    assert client.upload(image_id, content).json["checked"]
    assert client.download(image_id, "?format=bin").body == data
    after = client.shown(image_id)
    assert after["checked"] and after["updated"] == before["updated"]


def test_download_of_a_binary_replaced_by_one_as_long_is_of_one_of_them(client, monkeypatch):
    """Never the digest of one with the bytes of the other."""
    image_id, opened, swapped = client.stored(b"old"), BinaryStore.open, []

    def open_replaced(self, *names):
        if not swapped:
            swapped.append(client.delete(f"/image/{image_id}/binary"))
            client.upload(image_id, b"new")
        return opened(self, *names)

    monkeypatch.setattr(BinaryStore, "open", open_replaced)
    response = client.download(image_id)
    assert (response.body, response.headers["ETag"]) == (b"new", f'"{sha256(b"new")}"')


def test_window_of_262_144_pieces_is_served_by_a_few_reads(server, connection, monkeypatch):
    pieces, window = image_manager.MAX_SEGMENTS, "?format=bin"
    image_id = connection.stored(scattered(pieces))
    assert connection.download(image_id, window) == (b"x\xff" * pieces)[:-1]
    reads = []

    class File(io.FileIO):
        def read(self, size):
            reads.append(size)
            return super().read(size)

    monkeypatch.setattr(image_manager, "open", lambda name, *_, **__: File(name), raising=False)
    assert connection.download(image_id, window, Range="bytes=400000-400009") == b"x\xff" * 5
    window += "&start=100001&end=100010"
    assert connection.download(image_id, window) == b"\xffx" * 4 + b"\xff"
    assert reads == [5, 4]
    assert len(connection.shown(image_id)["hex"]["segments"]) == pieces


def test_record_of_very_many_segments_is_not_read_where_others_would_wait(catalogue):
    image_id, _ = catalogue.add("t", "l", "1")
    report = json.dumps({"segments": [{"address": "0x00000000", "size": 1}] * 5000})
    with catalogue.confirm("t", image_id, Binary(1, "ab", report, 1), lambda image: None):
        pass
    catalogue.never_wait()
    assert json.loads(catalogue.get_json("t", image_id))["confirmed"]
    with pytest.raises(MustWait):
        catalogue.get_json("t", image_id, image_manager.WITH_REPORT)


# ------------------------------------------------------------------------------------- routes: links


def link_path(client, image_id, **members):
    made = client.post_json if members else client.post
    url = made(f"/image/{image_id}/binary/link", *([members] if members else [])).json["url"]
    return urllib.parse.urlsplit(url)._replace(scheme="", netloc="").geturl()


def test_link_downloads_with_no_header_at_all(client):
    content, data = firmware()
    image_id = client.stored(content)
    path = link_path(client, image_id)
    assert len(path) < 160
    client.authorization = None
    response = client.get(path)
    assert response.body == content
    cache = re.fullmatch(r"public, max-age=(\d+), immutable", response.headers["Cache-Control"])
    assert 3590 <= int(cache[1]) <= 3600
    assert client.head(path).headers["Content-Length"] == str(len(content))
    assert client.get(path, {"Range": "bytes=1-2"}, status=206).body == content[1:3]
    unchanged = client.get(path, {"If-None-Match": response.headers["ETag"]}, status=304)
    assert unchanged.headers["Cache-Control"].startswith("public")
    assert client.get(path + "&format=bin").body == data
    assert client.get(path + "&format=bin&start=4&end=9").body == data[4:9]


def test_link_is_for_its_bytes_only(client):
    image_id, other = client.stored(b"first"), client.stored(b"second")
    path = link_path(client, image_id)
    reader = client_of(client.app.application)
    reader.authorization = None
    reader.get(path.replace(image_id, other), status=401)
    for method in ("DELETE", "PUT", "POST"):
        reader.request(path, method=method, status=401)
    client.delete(f"/image/{image_id}/binary")
    error(reader.get(path, status=404), 404, "Image does not have an binary file")
    client.upload(image_id, b"others")
    reader.get(path, status=404)
    client.delete(f"/image/{image_id}/binary")
    client.upload(image_id, b"first")
    assert reader.get(path).body == b"first"
    client.delete(f"/image/{image_id}")
    error(reader.get(path, status=404), 404, f"No such image: {image_id}")


def other_character(text, place):
    """Return a text whose character in this place is another one."""
    return text[:place] + ("A" if text[place] != "A" else "B") + text[place:][1:]


def test_link_that_was_altered_is_401(client):
    path = link_path(client, client.stored())
    client.authorization = None
    start, _, query = path.partition("?")
    query = dict(urllib.parse.parse_qsl(query))
    signature, expires = query["signature"], query["expires"]
    for altered in (
        {**query, "expires": str(int(expires) + 1)},
        {**query, "expires": expires + " "},
        {**query, "sha256": "A" + query["sha256"][1:]},
        *[{**query, "signature": text} for text in (signature[:-1], "", "ä")],
        *[{**query, "signature": other_character(signature, n)} for n in range(len(signature))],
        {"signature": signature},
    ):
        response = client.get(f"{start}?{urllib.parse.urlencode(altered)}", status=401)
        error(response, 401, "Invalid link: its signature does not match")
    client.get(path + "&signature=" + signature, status=400)
    client.get(path)


def test_link_expires_and_does_not_outlive_its_token(client, app, monkeypatch):
    image_id = client.stored()
    short = link_path(client, image_id, expires_in=60)
    client.authorization = ("Bearer", app.tokens.issue("admin", (), 90))
    made = client.post_json(f"/image/{image_id}/binary/link", {"expires_in": 2592000}).json
    now = datetime.now(timezone.utc)
    assert 80 < (datetime.fromisoformat(made["expires"]) - now).total_seconds() <= 90
    client.authorization = None
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    error(client.get(short, status=401), 401, "This link has expired")


@parametrize("seconds", [0, -1, 2592001, 1.5, "60", None, True, [], 10**30])
def test_link_for_no_sensible_time_is_refused(client, seconds):
    path = f"/image/{client.stored()}/binary/link"
    response = client.post_json(path, {"expires_in": seconds}, status=400)
    error(response, 400, "expires_in takes a whole number of seconds from 1 to 2592000")


def test_link_needs_a_binary_and_takes_json_or_nothing(client):
    path = f"/image/{client.create()}/binary/link"
    error(client.post(path, status=404), 404, "Image does not have an binary file")
    path = f"/image/{client.stored()}/binary/link"
    client.post(path, b"x", status=400)
    assert client.post_json(path, {}).json.keys() == {"url", "expires"}


@parametrize("public, prefix, host, begin", [
    ("", "", "fw.lan:8080", "http://fw.lan:8080/image/"),
    ("", "/fw-image", "[::1]:80", "http://[::1]:80/fw-image/image/"),
    ("https://fw.example.com", "/fw-image", "x", "https://fw.example.com/fw-image/image/"),
    ("https://example.com/store/", "", "x", "https://example.com/store/image/"),
])  # fmt: skip
def test_link_is_absolute(tmp_path, public, prefix, host, begin):
    with store_in(tmp_path, public_url=public, url_prefix=prefix) as client:
        image_id = client.stored()
        url = client.post(f"/image/{image_id}/binary/link", headers={"Host": host}).json["url"]
        assert url.startswith(begin + image_id + "/binary?expires=")


@parametrize("host", ["a b", 'a"b', "a/b", "a@b", "a:b", "<x>"])
def test_link_takes_no_host_that_is_none(client, host):
    path = f"/image/{client.stored()}/binary/link"
    response = client.post(path, headers={"Host": host}, status=400)
    error(response, 400, "The Host header names no host")


def test_chunked_body_is_refused_under_a_server_that_does_not_pass_it_on(client):
    """It would be taken for none, and a link for 60 seconds last an hour."""
    path = f"/image/{client.stored()}/binary/link"
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": io.BytesIO(b"")}
    response = client.post(path, extra_environ={**client.extra_environ, **chunked}, status=400)
    assert "send it with Content-Length" in response.json["message"]


@parametrize("body", [b'{"expires_in": 60}', b"", None])
def test_link_takes_a_chunked_body_under_a_server_that_passes_it_on(client, body):
    """Which says so by wsgi.input_terminated, and gives no length."""
    environ = {"wsgi.input": io.BytesIO(body or b""), "CONTENT_TYPE": "application/json"}
    if body is not None:
        environ |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    path = f"/image/{client.stored()}/binary/link"
    status, answer = call_bare(client, "POST", path, environ)
    assert status == "200 OK"
    expires = datetime.fromisoformat(json.loads(answer)["expires"]).timestamp()
    assert abs(expires - time.time() - (60 if body else 3600)) < 5


# ------------------------------------------------------------------------------------- routes: pages of other origins

PAGE = "https://bench.example.com"
EXPOSED = "Accept-Ranges, Content-Length, Content-Range, Content-Disposition, ETag, Repr-Digest, X-Load-Address"
FOR_ALL, FOR_NONE, FOR_PAGE = ("*", EXPOSED, None), (None, None, None), (PAGE, EXPOSED, "Origin")
ASKING = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}


def origin_headers(response):
    names = ("Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Vary")
    assert "Access-Control-Allow-Credentials" not in response.headers
    return tuple(response.headers.get(name) for name in names)


@parametrize("allowed", ["", PAGE, "https://other.example.com", "*"])
def test_link_is_for_pages_of_any_origin(tmp_path, allowed):
    with store_in(tmp_path, allow_origin=allowed) as client:
        image_id = client.stored()
        link = link_path(client, image_id)
        client.authorization = None
        for headers in ({"Origin": PAGE}, {"Origin": PAGE, "Range": "bytes=0-3"}, {}):
            assert origin_headers(client.get(link, headers)) == FOR_ALL
            assert origin_headers(client.head(link, headers)) == FOR_ALL
        altered = other_character(link, len(link) - 1)
        assert origin_headers(client.get(altered, {"Origin": PAGE}, status=401)) == FOR_ALL
        client.as_("admin").delete(f"/image/{image_id}")
        client.authorization = None
        assert origin_headers(client.get(link, {"Origin": PAGE}, status=404)) == FOR_ALL


@parametrize("allowed, others", [("", FOR_NONE), (PAGE, FOR_PAGE), ("*", FOR_ALL)])
def test_all_of_the_api_is_for_the_origin_that_is_allowed(tmp_path, allowed, others):
    with store_in(tmp_path, allow_origin=allowed) as client:
        binary, headers = f"/image/{client.stored()}/binary", {"Origin": PAGE}
        paths = ("/image", "/health", binary, "/image/none", "/none", "/image?x")
        for path, status in zip(paths, (200, 200, 200, 404, 404, 400)):
            assert origin_headers(client.get(path, headers, status=status)) == others, path
        assert origin_headers(client.delete(binary, headers)) == others
        client.authorization = None
        assert origin_headers(client.get("/image", headers, status=401)) == others
        kept = FOR_ALL if allowed == "*" else (None, None, "Origin" if allowed else None)
        for headers in ({"Origin": "https://other.example.com"}, {}):
            assert origin_headers(client.get("/image", headers, status=401)) == kept


def test_refusal_on_the_header_can_be_read_by_the_page_that_sent_it(tmp_path):
    with running(Settings(data=tmp_path, allow_origin=PAGE)) as server:
        request = raw("PUT /image/x/binary", "Content-Length: 9", f"Origin: {PAGE}")
        answer = exchange(server, request)
        assert told(answer)[0] == 401
        assert f"Access-Control-Allow-Origin: {PAGE}\r\n".encode() in answer


ALLOWED = "Authorization, Content-Type, Range, If-Match, If-None-Match, If-Range"


@parametrize("allowed, path, headers, expected", [
    ("", "/image/x/binary", ASKING, ("*", "GET, HEAD")),
    ("", "/image/x/binary/", ASKING, ("*", "GET, HEAD")),
    ("https://other.example.com", "/image/x/binary", ASKING, ("*", "GET, HEAD")),
    (PAGE, "/image/x/binary", ASKING, (PAGE, "DELETE, GET, HEAD, POST, PUT")),
    ("*", "/image/x/binary", ASKING, ("*", "DELETE, GET, HEAD, POST, PUT")),
    (PAGE, "/image", ASKING, (PAGE, "GET, HEAD, POST")),
    (PAGE, "/image/x", ASKING, (PAGE, "DELETE, GET, HEAD, PATCH")),
    (PAGE, "/image/latest/binary", ASKING, (PAGE, "GET, HEAD")),
    ("*", "/image/x/binary/link", ASKING, ("*", "POST")),
    ("", "/image", ASKING, 405),
    ("", "/image/x", ASKING, 405),
    ("", "/image/latest/binary", ASKING, 405),
    ("https://other.example.com", "/image", ASKING, 405),
    (PAGE, "/none", ASKING, 404),
    ("*", "/image", {"Origin": PAGE}, 405),
    ("*", "/image", {"Access-Control-Request-Method": "GET"}, 405),
    ("", "/image/x/binary", {}, 405),
])  # fmt: skip
def test_preflight_names_the_methods_of_its_path(tmp_path, allowed, path, headers, expected):
    status = expected if isinstance(expected, int) else 204
    with store_in(tmp_path, allow_origin=allowed) as client:
        client.authorization = None
        response = client.options(path, headers=headers, status=status)
    if status == 204:
        headers = response.headers
        found = headers["Access-Control-Allow-Origin"], headers["Access-Control-Allow-Methods"]
        assert found == expected and response.body == b""
        assert headers["Access-Control-Allow-Headers"] == ALLOWED
        assert headers.get("Vary") == ("Origin" if found[0] == PAGE else None)


# ------------------------------------------------------------------------------------- routes: OpenAPI


def test_openapi_describes_every_route_and_nothing_else(client):
    client.authorization = None
    description = client.get("/openapi.json").json
    assert description["openapi"].startswith("3.1")
    operations = {
        (method.upper(), path): operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    routes = {(route.method, re.sub("<(.*?)>", r"{\1}", route.path)) for route in ROUTES}
    assert operations.keys() == routes
    for operation in operations.values():
        assert operation["summary"] and operation["responses"]
        assert all(answer["description"] for answer in operation["responses"].values())
    named = re.findall('"#/components/schemas/(.*?)"', json.dumps(description))
    assert named and set(named) <= description["components"]["schemas"].keys()


def test_openapi_is_as_tight_as_the_service(client):
    description = client.get("/openapi.json").json
    paths, schemas = description["paths"], description["components"]["schemas"]

    def parameters(path, method="get"):
        return {each["name"]: each for each in paths[path][method]["parameters"]}

    def body(path, method):
        request = paths[path][method]["requestBody"]
        (content,) = request["content"].values()
        return request["required"], content["schema"]

    latest = parameters("/image/latest")
    assert latest["label"]["required"] and not latest["current"]["required"]
    assert parameters("/image/latest/binary")["label"]["required"]
    listed = {name: each["schema"] for name, each in parameters("/image").items()}
    assert listed["limit"] == {"type": "integer", "minimum": 1, "maximum": 1000}
    assert listed["offset"]["minimum"] == 0 and listed["confirmed"]["enum"] == ["true", "false"]
    assert parameters("/image/{image_id}/binary")["format"]["schema"]["enum"] == ["bin"]
    assert all(each["required"] for each in parameters("/image/{image_id}").values())
    for method in ("put", "post"):
        upload = parameters("/image/{image_id}/binary", method)
        assert upload["sha256"]["schema"]["pattern"] == "^[0-9a-fA-F]{64}$"
        assert upload["validate"]["schema"]["enum"] == ["true", "false"]
    required, create = body("/image", "post")
    label = create["properties"]["label"]
    assert required and create["required"] == ["label", "fw_version"]
    assert (label["minLength"], label["maxLength"]) == (1, 128)
    assert not re.search(label["pattern"], "a\x85b")
    assert body("/image/{image_id}", "patch")[1]["minProperties"] == 1
    required, link = body("/image/{image_id}/binary/link", "post")
    assert not required and link["properties"]["expires_in"]["minimum"] == 1
    assert body("/image/{image_id}/binary", "post")[1]["required"] == ["image"]
    assert "checked" in schemas["Uploaded"]["required"]
    assert "checked" in schemas["Image"]["properties"]


# ------------------------------------------------------------------------------------- server: HTTP


def impatient(monkeypatch, **limits):
    """Have servers that start from now on look more often whose time is over."""
    for name, value in {"LOOK": 0.05, **limits}.items():
        monkeypatch.setattr(image_manager, name, value)


def creation(server):
    """Return a request that creates an image, which must not be taken out of another's body."""
    body = b'{"label":"x","fw_version":"0.0"}'
    headers = [bearer(server), "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return raw("POST /image", *headers, body=body)


def nothing_was_created(server, before=0):
    with Connection(server) as connection:
        return len(connection.listed()) == before


def test_connection_stays_open_after_every_answer(server, connection):
    """204, 206, 304, 404, 412 and 416 too: devices that poll do so on one connection."""
    content, _ = firmware(100_000)
    image_id = connection.stored(content)
    local = connection.sock.getsockname()
    path, tag = f"/image/{image_id}/binary", f'"{sha256(content)}"'
    asked = [
        (path, {}, 200),
        (path, {"Range": "bytes=5-9"}, 206),
        (path, {"Range": "bytes=5-90000"}, 206),
        (path, {"If_None_Match": tag}, 304),
        (path, {"If_Match": '"x"'}, 412),
        (path, {"Range": "bytes=9999999-"}, 416),
        ("/image/latest?label=sensor&current=1.0.0", {}, 204),
        ("/image/none", {}, 404),
        ("/none", {}, 404),
        ("/image?x", {}, 400),
        ("/health", {"Authorization": "Bearer x"}, 200),
        ("/image", {"Authorization": "Bearer x"}, 401),
    ]
    for path, headers, status in asked:
        answered, sent, _ = connection.ask("GET", path, **headers)
        assert answered == status and "Transfer-Encoding" not in sent
        assert ("Content-Length" in sent) == (status not in (204, 304))
        assert connection.sock.getsockname() == local, (path, status)
        assert connection.ask("HEAD", path, **headers).status in (status, 200)
        assert connection.sock.getsockname() == local, (path, status)
    assert connection.ask("DELETE", f"/image/{image_id}").status == 200
    assert connection.sock.getsockname() == local


def test_http_1_0_is_spoken_also_with_keep_alive(server, connection):
    """Plainly as in the test of Arduino and U-Boot."""
    link, _ = connection.link(connection.stored(b"0123456789"))
    headers = ("Connection: keep-alive", "If-None-Match: *")
    with dial(server) as sock:
        for _ in range(2):
            request = raw(f"GET {link}", *headers, version="HTTP/1.0", host="")
            answer = ask(sock, request, version="HTTP/1.0")
            assert (answer.status, answer.headers["Connection"]) == (304, "Keep-Alive")


def test_pipelined_requests_are_answered_in_order_also_after_uploads(server, connection):
    image_id, content = connection.create(), firmware(3000)[0]
    paths = (f"/image/{image_id}/binary", "/none", "/health") * 30
    requests = [put(server, len(content), image_id) + content]
    requests += [raw(f"GET {path}", bearer(server)) for path in paths]
    with dial(server) as sock:
        sock.sendall(b"".join(requests))
        answers = [read_answer(sock) for _ in requests]
    assert [answer.status for answer in answers] == [200] + [200, 404, 200] * 30
    assert answers[1].body == content and answers[-1].body == b'{"status":"ok"}'


def test_request_that_arrives_byte_by_byte_is_taken(server, connection):
    image_id = connection.create()
    head = raw(f"PUT /image/{image_id}/binary", bearer(server), "Transfer-Encoding: chunked")
    with dial(server) as sock:
        for byte in b"\r\n\r\n" + head + b"5;a=b\r\nabcde\r\n3\r\nfgh\r\n0\r\nX: y\r\n\r\n":
            sock.sendall(bytes([byte]))
            time.sleep(0.001)
        assert read_answer(sock).status == 200
    assert connection.download(image_id) == b"abcdefgh"


def test_client_that_ends_its_side_gets_its_answers(server):
    with dial(server) as sock:
        sock.sendall(HEALTH * 3 + HEALTH[:20])
        sock.shutdown(socket.SHUT_WR)
        for _ in range(3):
            assert read_answer(sock).status == 200
        assert sock.recv(10) == b""


@parametrize("wish", ["close", "Close", "TE, close", "close, TE", "keep-alive, close"])
def test_connection_is_closed_where_that_is_asked_for(server, wish):
    answer = exchange(server, raw("GET /health", f"Connection: {wish}"))
    assert answer.startswith(b"HTTP/1.1 200 OK") and b"\r\nConnection: close\r\n" in answer


def test_slashes_in_front_are_one(server, connection):
    for path in ("//image", "///image/"):
        assert connection.post(path, LABELS).status == 201
        assert connection.get(path)


def test_chunked_upload_is_fine_and_chunks_may_be_small(server, connection):
    content, image_id = firmware(3000)[0], connection.create()
    path = f"/image/{image_id}/binary"
    chunks = (content[at : at + 100] for at in range(0, len(content), 100))
    connection.request("PUT", path, chunks, connection.headers, encode_chunked=True)
    assert connection.getresponse().read()
    assert connection.download(image_id) == content


def test_two_authorization_headers_are_401(server):
    answer = exchange(server, raw("GET /image", *[bearer(server)] * 2, "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 401 ")


# ------------------------------------------------------------------------------------- server: what is no request


def told(answer):
    """Return (status, message) of a raw answer, which must be JSON, the only one and the last."""
    assert answer.count(b"HTTP/1.1 ") + answer.count(b"HTTP/1.0 ") == 1, answer[:500]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head and b"Connection: close" in head
    status = int(head.split()[1])
    assert json.loads(body)["status"] == status
    return status, json.loads(body)["message"]


LENGTH, CHUNKED = "Content-Length: 1", "Transfer-Encoding: chunked"
MALFORMED = {
    "no request": (b"hello\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "lower-case method": (raw("get /"), 400),
    "two blanks": (raw("GET  /"), 400),
    "no path": (raw("GET health"), 400),
    "a path that is not ASCII": (raw("GET /image?label=Ger\xe4t"), 400),
    "CONNECT": (raw("CONNECT x:80"), 400),
    "header without a colon": (raw("GET /", "x"), 400),
    "header with a blank in its name": (raw("GET /", "x y: z"), 400),
    "header with a blank before its colon": (raw("GET /", "x : z"), 400),
    "header with a NUL": (raw("GET /", "x: a\0b"), 400),
    "bare CR": (raw("GET /", "a: b\rc"), 400),
    "bare LF": (raw("GET /", "a: b\nc: d"), 400),
    "LF line ends": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "folded header": (raw("GET /", "X: a", " b"), 400),
    "header too large": (raw("GET /", "a: " + "b" * 200_000), 431),
    "more lines than anybody sends": (raw("GET /", *["a:"] * 501), 431),
    "header without end": (b"GET / HTTP/1.1\r\na: " + b"b" * 200_000, 431),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/0.9": (raw("GET /", version="HTTP/0.9"), 505),
    "no Host": (raw("GET /", host=""), 400),
    "empty Host": (raw("GET /", "Host:", host=""), 400),
    "two Hosts": (raw("GET /", "Host: x"), 400),
    "two Hosts, one empty": (raw("GET /", "Host:"), 400),
    "Host with a path": (raw("GET /", host="x/y"), 400),
    "Host with a user": (raw("GET /", host="a@x"), 400),
    "Host with a blank": (raw("GET /", host="a b"), 400),
    "Host with a port that is none": (raw("GET /", host="x:y"), 400),
    "two Hosts in HTTP/1.0": (raw("GET /", "Host: y", version="HTTP/1.0"), 400),
    "absolute with no host": (raw("GET http:///health"), 400),
    "absolute with half a host": (raw("GET http://["), 400),
    "absolute with a user": (raw("GET http://a@x/health"), 400),
    "absolute without Host": (raw("GET http://x/health", host=""), 400),
    "Content-Length x": (raw("PUT /", "Content-Length: x"), 400),
    "Content-Length empty": (raw("PUT /", "Content-Length:"), 400),
    "Content-Length -1": (raw("PUT /", "Content-Length: -1"), 400),
    "Content-Length +1": (raw("PUT /", "Content-Length: +1"), 400),
    "Content-Length 1_0": (raw("PUT /", "Content-Length: 1_0"), 400),
    "Content-Length of thousands of digits": (raw("PUT /", "Content-Length: " + "9" * 5000), 400),
    "two Content-Lengths": (raw("PUT /", LENGTH, "Content-Length: 2"), 400),
    "the same Content-Length twice": (raw("PUT /", LENGTH, LENGTH), 400),
    "both": (raw("PUT /", LENGTH, CHUNKED, body=b"0\r\n\r\n"), 400),
    "both, in the other order": (raw("PUT /", CHUNKED, LENGTH, body=b"0\r\n\r\n"), 400),
    "chunked in HTTP/1.0": (raw("PUT /", CHUNKED, version="HTTP/1.0", body=b"0\r\n\r\n"), 400),
    "coding unknown": (raw("PUT /", "Transfer-Encoding: gzip"), 501),
    "coding unknown before chunked": (raw("PUT /", "Transfer-Encoding: gzip, chunked"), 501),
    "coding empty": (raw("PUT /", "Transfer-Encoding:", LENGTH), 400),
    "coding a comma": (raw("PUT /", "transfer-encoding: ,", LENGTH), 400),
    "chunked twice": (raw("PUT /", "Transfer-Encoding: chunked, chunked"), 400),
    "chunked in two headers": (raw("PUT /", CHUNKED, CHUNKED), 400),
    "line that takes a pattern minutes": (raw("GET a://" + "1" * 100_000 + " x"), 400),
    "blanks that take a pattern minutes": (raw("GET /", "X:" + " " * 100_000 + "\1"), 400),
}  # fmt: skip


@parametrize("request_, status", MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_is_told_so_and_nothing_behind_it_is_done(server, request_, status):
    began = time.monotonic()
    assert told(exchange(server, request_ + creation(server)))[0] == status
    assert nothing_was_created(server) and time.monotonic() - began < 2


@parametrize("request_, status", MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_behind_another_is_told_so_too(server, request_, status):
    """It is then taken up in another place, and must not end the server."""
    with dial(server) as sock:
        assert ask(sock, HEALTH + request_).status == 200
        assert read_answer(sock).status == status
    assert is_well(server)


@parametrize("begin, status", [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
    (b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", 400),  # SSLv2
    (b"\0", 400), (b" GET / HTTP/1.1\r\n", 400), (b"\nGET / HTTP/1.1\r\n", 400), (b"\rG", 400), (b"get", 400),
    (b"hello\r\n", 400), (b"GET / HTTP/1.1\n", 400), (b"GET / HTTP/1.1\r\nHost: x\n", 400), (b"GET /\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\rA", 400), (b"PRI * HTTP/2.0\r\n", 505), (b"GET / HTTP/3.0\r\n", 505),
], ids=repr)  # fmt: skip
@parametrize("at_once", [True, False])
def test_what_no_request_begins_with_is_refused_at_once(server, begin, status, at_once):
    """And not when the empty line comes that ends a header: of a TLS hello it never comes."""
    with dial(server, timeout=2) as sock:
        for piece in [begin] if at_once else [bytes([byte]) for byte in begin]:
            sock.sendall(piece)
            time.sleep(0 if at_once else 0.005)
        assert told(read_all(sock))[0] == status


@parametrize("begin", [b"", b"\r\n\r\n", b"\r", b"G", b"GET / HT", HEALTH[:-1]])
def test_what_a_request_may_begin_with_is_waited_for(server, begin):
    with dial(server, timeout=0.2) as sock, pytest.raises(TimeoutError):
        sock.sendall(begin)
        sock.recv(1)


def test_host_of_an_absolute_target_is_the_one_that_counts(server, connection):
    image_id = connection.stored(b"x")
    path = f"/image/{image_id}/binary/link"
    for target, host in ((path, "x"), (f"http://fw.example.com:81{path}", "fw.example.com:81")):
        answer = ask_once(server, raw(f"POST {target}", bearer(server), "Content-Length: 0"))
        assert answer.json["url"].startswith(f"http://{host}/image/")


@parametrize("host", ["x", "x:", "fw.example.com:8000", "[::1]:80", "127.0.0.1", "a_b"])
def test_any_authority_is_a_host(server, host):
    assert ask_once(server, raw("GET /health", host=host)).status == 200


TOKEN = "eyJhbGciOiJIUzI1NiJ9.secret.secret"


@parametrize("request_", [
    raw("GET /image", f"Authorization: Bearer {TOKEN}\r"),
    raw("GET /image", f"Authorization: Bearer {TOKEN}\n"),
    raw("GET /image", f"Authorization: Bearer {TOKEN}\0"),
    raw("GET /image", f"Authorization: Bearer {TOKEN}", f" {TOKEN}"),
    raw("GET /image", f"Authorization Bearer {TOKEN}"),
    raw("GET /image", f" Authorization: Bearer {TOKEN}"),
    raw("GET /image", f"Content-Length: {TOKEN}"),
    raw("PUT /image", f"Transfer-Encoding: {TOKEN}"),
    raw("GET /image", f"Authorization: {TOKEN}", "Connection: close"),
    raw("GET /image", f"Authorization: Basic {TOKEN}", "Connection: close"),
    raw("GET /image", f"Authorization: Bearer {TOKEN}", "Connection: close"),
    raw("GET /image", host=TOKEN + "/"),
    raw("POST /image", f"Content-Type: {TOKEN}", "Content-Length: 0", "Connection: close"),
    raw("GET /image", f"Range: {TOKEN}", f"If-Match: {TOKEN}", "Connection: close"),
], ids=repr)  # fmt: skip
def test_no_header_is_repeated_in_an_answer_or_in_the_log(server, request_, caplog):
    with caplog.at_level("DEBUG"):
        answer = exchange(server, request_)
    assert told(answer)[0] in (400, 401, 501) and b"secret" not in answer
    assert "secret" not in caplog.text


@parametrize("blanks", [" ", "\t", "   ", " " * 40, "\t \t " * 8000])
def test_legal_header_is_not_refused_for_its_blanks(server, blanks):
    began = time.monotonic()
    headers = [f"Authorization:{blanks}Bearer {server.token()}{blanks}", f"X:{blanks}"]
    headers += [f"Y: a{blanks[:100]}b", f"Connection:{blanks}close"]
    answer = exchange(server, raw("GET /image", *headers))
    assert answer.startswith(b"HTTP/1.1 200 OK") and time.monotonic() - began < 2


@parametrize("line", ["Content-Length: x", "x y: z"])
def test_malformed_head_request_gets_no_body(server, line):
    answer = exchange(server, raw("HEAD /", line))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 400 " in head[:13] and b"Content-Length: " in head and body == b""


@cases("chunks", {
    "no size": b"x\r\n",
    "empty size": b"\r\n5\r\n",
    "negative size": b"-5\r\n",
    "size with 0x": b"0x5\r\nabcde\r\n",
    "size with a blank before": b" 5\r\nabcde\r\n",
    "endless size": b"5" * 20 + b"\r\nabcde\r\n",
    "size with a blank behind": b"5 \r\nabcde\r\n0\r\n\r\n",
    "bare LF behind the size": b"5\nabcde\r\n0\r\n\r\n",
    "bare LF in the size": b"5\n\r\nabcde\r\n0\r\n\r\n",
    "bare CR in the size": b"5\r;a\r\nabcde\r\n0\r\n\r\n",
    "bare LF in an extension": b"5;a\nb\r\nabcde\r\n0\r\n\r\n",
    "NUL in an extension": b"5;a\0b\r\nabcde\r\n0\r\n\r\n",
    "longer than it says": b"5\r\nabcdefg\r\n0\r\n\r\n",
    "shorter than it says": b"5\r\nabc\r\n0\r\n\r\n",
    "bare LF behind a chunk": b"5\r\nabcde\n0\r\n\r\n",
    "endless extension": b"5;" + b"a" * 20_000,
    "endless line in the trailer": b"0\r\na:" + b"b" * 20_000,
    "bare LF in the trailer": b"0\r\na: b\n\r\n",
})  # fmt: skip
@parametrize("at_once", [True, False])
def test_bad_chunks_are_refused_and_nothing_behind_is_done(server, connection, chunks, at_once):
    image_id = connection.create()
    connection.ask("DELETE", f"/image/{image_id}")
    head = raw(f"PUT /image/{image_id}/binary", bearer(server), CHUNKED)
    with dial(server) as sock:
        for piece in [head + chunks] if at_once else [head, chunks[:2], chunks[2:]]:
            sock.sendall(piece)
            time.sleep(0 if at_once else 0.02)
        with contextlib.suppress(OSError):
            sock.sendall(creation(server))
        assert told(read_all(sock))[0] == 400
    assert nothing_was_created(server) and folder_is_clean(server.application)


def send_until_answered(sock, piece, most):
    """Send something again and again; return the answer, and how often it was sent."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < most and not is_readable(sock):
            sock.sendall(piece)
            sent += 1
            time.sleep(0.002)
    return read_answer(sock), sent


@parametrize("begin, more", [(b"", b"1;%s\r\nx\r\n"), (b"0\r\n", b"a: %s\r\n")])
def test_extensions_and_trailers_are_counted_too(small, begin, more):
    """Else a body of 64 KiB could take its sender as long as it likes."""
    with dial(small) as sock:
        sock.sendall(raw("POST /image", bearer(small), CHUNKED, body=begin))
        answer, _ = send_until_answered(sock, more % (b"a" * 8000), 1000)
        assert answer.status == 413


def test_client_that_leaves_while_it_is_told_to_continue_ends_only_itself(server):
    expecting = raw("GET /health", "Content-Length: 5", "Expect: 100-continue")
    for _ in range(20):
        with dial(server) as sock:
            will_reset(sock)
            sock.sendall(raw("GET /") + expecting)
    assert is_well(server)


def test_bug_of_one_connection_ends_only_that(server, monkeypatch, caplog):
    monkeypatch.setattr(image_manager, "AUTHORITY", None)
    assert told(exchange(server, HEALTH))[0] == 500
    monkeypatch.undo()
    assert "Traceback" in caplog.text and is_well(server)


def test_body_that_cannot_be_taken_is_told_so(server, connection):
    image_id = connection.create()
    shutil.rmtree(server.application.binaries.uploads)
    answer = connection.ask("PUT", f"/image/{image_id}/binary", b"x")
    assert answer.status == answer.json["status"] == 500
    assert connection.ask("GET", "/openapi.json").status == 200


# ------------------------------------------------------------------------------------- server: refusal on the header


@pytest.fixture
def small(tmp_path):
    """A server that takes files of 1 MB."""
    with running(Settings(data=tmp_path / "small", max_upload=1_000_000)) as server:
        yield server


@parametrize("expect", [True, False], ids=["expecting", "sending"])
@parametrize("method", ["PUT", "POST"])
@parametrize("values, status", [
    ({"token": ""}, 401), ({"token": "e30.e30.e30"}, 401), ({"rights": ("read", "delete")}, 403),
    ({"length": 1_100_000}, 413), ({"length": 10**30}, 413), ({"length": "9" * 4000}, 413),
    ({"length": "0" * 30 + "1100000"}, 413),
])  # fmt: skip
def test_upload_that_may_not_be_made_is_answered_on_its_header(
    small, values, status, method, expect
):
    values = {"length": 900_000, "method": method, "expect": expect, **values}
    began = time.monotonic()
    with dial(small) as sock:
        answer = ask(sock, put(small, **values) + b"x" * (0 if expect else 300_000))
        assert answer.status == answer.json["status"] == status
        assert answer.headers["Connection"] == "close" and sock.recv(10) == b""
    assert time.monotonic() - began < 5 and folder_is_clean(small.application)


def test_refused_sender_that_does_not_listen_gets_to_the_answer(small):
    """A plain client sends all it has before it reads."""
    with Connection(small, service=None) as connection:
        assert connection.upload("x", b"x" * 20 * MIB) == 401


def test_refused_sender_is_not_listened_to_for_ever(small, monkeypatch):
    impatient(monkeypatch, LINGER=0.2)
    with dial(small) as sock, pytest.raises(OSError):
        sock.sendall(put(small, 10**9, token=""))
        for _ in range(400):
            sock.sendall(b"x")
            time.sleep(0.01)


@parametrize("header, status", [("Content-Length: 5000", 401), ("Authorization", 411)])
def test_nothing_of_a_refused_body_is_a_request(server, connection, header, status):
    header = bearer(server) if header == "Authorization" else header
    request = raw(f"PUT /image/{connection.create()}/binary", header)
    assert told(exchange(server, request, creation(server) * 10))[0] == status
    assert nothing_was_created(server, before=1)


@parametrize("start, length, header, status, said", [
    ("POST /none", 10**9, "X: y", 404, "path"),
    ("PUT /image", 10**9, "X: y", 405, "ethod"),
    ("GET /image", 70_000, "X: y", 413, "large"),
    ("POST /image", 70_000, "X: y", 413, "large"),
    ("PUT /image/x/binary", 50_000, "Content-Range: bytes 1000-1999/2000", 400, "Content-Range"),
    ("PUT /image/x/binary", 50_000, "Content-Type: multipart/form-data; boundary=x", 415, "POST"),
    ("PUT /image/x/binary", 50_000, "Content-Type: Multipart/Mixed", 415, "POST"),
    ("PUT /image/x/binary", 50_000, "Content-Encoding: gzip", 415, "Content-Encoding"),
    ("POST /image/x/binary", 50_000, "Content-Encoding: br", 415, "Content-Encoding"),
    ("POST /image", 50_000, "Content-Encoding: gzip", 415, "Content-Encoding"),
    ("PATCH /image/x", 50_000, "Content-Encoding: x", 415, "Content-Encoding"),
    ("PUT /image/x/binary?sha265=0", 50_000, "X: y", 400, "query"),
])  # fmt: skip
def test_body_is_refused_on_its_header_wherever_it_goes(small, start, length, header, status, said):
    headers = [bearer(small), f"Content-Length: {length}", "Expect: 100-continue", header]
    answer = exchange(small, raw(start, *headers))
    assert told(answer)[0] == status and said in told(answer)[1]
    assert (b"\r\nAccept-Encoding: identity\r\n" in answer) == (said == "Content-Encoding")


@parametrize("header", [
    "Content-Encoding: identity", "Content-Type: application/x-www-form-urlencoded", "Content-Type: text/plain",
    "Content-Type: multipart",
])  # fmt: skip
def test_any_other_body_is_the_file(server, connection, header):
    image_id = connection.create()
    headers = [bearer(server), "Content-Length: 5", header]
    request = raw(f"PUT /image/{image_id}/binary", *headers, body=b"a=b&c")
    assert ask_once(server, request).status == 200
    assert connection.download(image_id) == b"a=b&c"


@parametrize("method, limit", [("PUT", 1_000_000), ("POST", 1_000_000 + 64 * KIB)])
def test_chunked_body_is_counted_while_it_arrives(small, method, limit):
    with dial(small) as sock:
        sock.sendall(raw(f"{method} /image/x/binary", bearer(small), CHUNKED))
        chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
        answer, sent = send_until_answered(sock, chunk, 100)
        assert answer.status == 413 and limit <= sent * 50_000 < 2_000_000


def test_upload_that_may_be_made_is_told_to_continue(small):
    with Connection(small) as connection:
        image_id = connection.create()
    with dial(small) as sock:
        assert ask(sock, put(small, 5, image_id, expect=True)).status == 100
        assert ask(sock, b"12345").status == 200
        nothing_to_wait_for = put(small, 0, image_id, expect=True)
        assert ask(sock, nothing_to_wait_for).status == 409


def test_full_disk_refuses_uploads_and_creations_at_once_but_not_deletions(server, connection):
    kept, gone = connection.stored(b"kept"), connection.stored(b"gone")
    empty = connection.create()
    with pytest.MonkeyPatch.context() as full:
        free_space(full, image_manager.RESERVE + 1000)
        assert ask_once(server, put(server, 1001, empty, expect=True)).status == 507
        free_space(full, image_manager.RESERVE - 1)
        answer = connection.post("/image", LABELS)
        assert answer.status == answer.json["status"] == 507
        assert connection.download(kept) == b"kept"
        assert connection.ask("DELETE", f"/image/{gone}").status == 200
        assert connection.ask("GET", "/health").status == 503
    assert folder_is_clean(server.application, kept)
    assert connection.upload(empty, b"x" * 1001) == 200


def test_bodies_that_are_spooled_together_do_not_fill_the_disk(server, connection, monkeypatch):
    """Each would fit alone, so that its header was accepted."""
    image_id = connection.create()
    with dial(server) as sock, monkeypatch.context() as full:
        sock.sendall(put(server, 900_000, image_id) + b"x" * 300_000)
        time.sleep(0.1)
        free_space(full, image_manager.RESERVE - 1)
        assert ask(sock, b"x" * 300_000).status == 507
    assert folder_is_clean(server.application)


def test_record_of_many_segments_must_fit_the_disk_too(client, app, monkeypatch):
    image_id = client.create()
    content = hex_file(*[record(0, at * 8, b"a") for at in range(4000)])
    free_space(monkeypatch, image_manager.RESERVE + 2 * len(content))
    client.upload(image_id, content, status=507)
    assert folder_is_clean(app)


@parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_while_a_body_is_spooled_is_507(server, connection, monkeypatch, number):
    image_id = connection.create()
    opened = tempfile.TemporaryFile

    class Full(io.BytesIO):
        write = raising(OSError(number, "full"))

    with monkeypatch.context() as full:
        full.setattr(tempfile, "TemporaryFile", lambda **k: Full() if "mode" in k else opened(**k))
        answer = connection.ask("PUT", f"/image/{image_id}/binary", b"x" * 200_000)
        assert answer.status == answer.json["status"] == 507
    connection.close()
    assert folder_is_clean(server.application)
    assert connection.upload(image_id, b"x" * 200_000) == 200


# ------------------------------------------------------------------------------------- server: connections


def test_many_idle_and_half_sent_connections_do_not_stop_the_others(server, connection):
    image_id = connection.stored(b"content")
    with dials(server, 300) as idle:
        for number, sock in enumerate(idle):
            sock.sendall(b"GET /image HTTP/1.1\r\nHost:"[: number % 28])
        for _ in range(20):
            assert connection.download(image_id) == b"content"


def memory(pid="self"):
    """Return the bytes that a process has in memory, its shared ones not counted."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * KIB


WIDE_GAP = hex_file(record(0, 0, b"begin"), record(4, 0, b"\x0c\0"), record(0, 0, b"end"))


def test_slow_readers_hold_no_thread_and_no_memory(server, connection):
    """Of a whole file, a long range, a window with gaps: 200 of them, who take nothing."""
    content = random.Random(3).randbytes(8 * MIB)
    image_id, gaps_id = connection.stored(content), connection.stored(WIDE_GAP, label="gaps")
    requests = [
        fetch(server, image_id) * 3,  # nor must a thread wait to begin on the second
        fetch(server, image_id, "Range: bytes=1000-"),
        raw(f"GET /image/{gaps_id}/binary?format=bin", bearer(server)),
    ]
    connection.download(image_id, Range="bytes=5-9")
    before, threads = memory(), threading.active_count()
    with dials(server, 200) as slow:
        for number, sock in enumerate(slow):
            sock.sendall(requests[number % 3])
        for _ in range(20):
            assert connection.download(image_id, Range="bytes=5-9") == content[5:10]
            assert connection.get("/image")  # which a thread answers
        assert memory() - before < 200 * 2 * 64 * KIB and threading.active_count() == threads
        for _ in range(3):  # and each gets what it asked for
            assert read_answer(slow[0]).body == content
        assert read_answer(slow[1]).body == content[1000:]


def test_long_answer_is_not_spooled_and_costs_a_slow_reader_its_memory_alone(tmp_path):
    """On a full disk its begin would be missing, and the room kept for deletions with it."""
    with service(tmp_path) as server, Connection(server) as connection:
        connection.create(label="a" * 128)
        with sqlite_in(tmp_path) as catalogue:
            columns = "tenant, label, fw_version, precedence, created"
            catalogue.execute(
                f"WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM n WHERE i < 12000)"
                f" INSERT INTO image (id, {columns}) SELECT 'id' || i, {columns} FROM image, n"
            )
        for _ in range(8):  # each thread keeps some memory for the next time
            whole = connection.get("/image")
        before = memory(server.process.pid)
        assert len(whole) > 2 * MIB
        with dials(server, 10) as slow:
            for sock in slow:
                sock.sendall(raw("GET /image", bearer(server)))
            wait_until(lambda: all(map(is_readable, slow)))
            assert connection.get("/image?limit=1") and not server.spools()
            assert memory(server.process.pid) - before < 15 * len(whole)
            assert read_answer(slow[0]).body == whole


def test_reader_that_takes_nothing_is_closed_in_time(server, connection, monkeypatch, caplog):
    impatient(monkeypatch, IDLE=0.1, SLOWEST=10 * MIB)
    image_id = connection.stored(bytes(20 * MIB))
    with dial(server) as sock:
        sock.sendall(fetch(server, image_id))
        wait_until(lambda: f"{image_id}.hex" in str(left_over()))
        wait_until(lambda: f"{image_id}.hex" not in str(left_over()))
        # The next client may get the same number of a file.
        assert all(is_well(server) for _ in range(5))
    assert not caplog.text


@parametrize("begin", [b"", HEALTH, HEALTH + b"GET", put], ids=repr)
def test_idle_connection_is_closed_in_time(server, monkeypatch, begin):
    impatient(monkeypatch, IDLE=0.1)
    with dial(server) as sock:
        sock.sendall(begin if isinstance(begin, bytes) else begin(server, 9) + b"x")
        if begin == HEALTH:
            assert read_answer(sock).status == 200
        read_all(sock)


@cases("begin, more", {
    "header": (b"", b"G"),
    "empty lines": (b"", b"\r\n"),
    "body": (raw("GET /health", "Content-Length: 60000"), b"x"),
    "chunks": (raw("GET /health", CHUNKED), b"1\r\nx\r\n"),
    "trailer": (raw("GET /health", CHUNKED) + b"0\r\n", b"a: b\r\n"),
})  # fmt: skip
def test_client_cannot_hold_its_place_with_a_byte_now_and_then(server, monkeypatch, begin, more):
    impatient(monkeypatch, IDLE=0.5)
    with dial(server) as sock, pytest.raises(OSError):
        sock.sendall(begin)
        for _ in range(400):
            sock.sendall(more)
            time.sleep(0.02)


def test_requests_of_clients_that_have_gone_are_not_answered_any_more(tmp_path, monkeypatch):
    """They would keep the threads from those who wait."""
    asked, total = [], Catalogue.total

    def slow_total(self):
        asked.append(self)
        time.sleep(0.05)
        return total(self)

    monkeypatch.setattr(Catalogue, "total", slow_total)
    with running(Settings(data=tmp_path, threads=1)) as server:
        for _ in range(100):
            with dial(server) as sock:
                will_reset(sock)
                sock.sendall(HEALTH)
                time.sleep(0.002)
        assert is_well(server)
    assert len(asked) < 60


@parametrize("resets", [True, False])
def test_client_that_leaves_at_any_moment_leaves_nothing_behind(server, connection, caplog, resets):
    image_id = connection.stored(bytes(MIB))
    upload = put(server, 500_000, image_id) + bytes(300_000)
    requests = [fetch(server, image_id), raw("GET /image", bearer(server)), upload, HEALTH * 50]
    for number in range(100):
        with dial(server, buffer=4096) as sock:
            if resets:
                will_reset(sock)
            sock.sendall(requests[number % 4])
            time.sleep(number / 10_000)
            if number % 4 < 2:
                sock.recv(number * 50 + 1)
    folders = [str(server.application.binaries.folder), str(server.application.binaries.uploads)]
    wait_until(lambda: not any(folder in str(left_over()) for folder in folders))
    assert connection.get("/health") and "Traceback" not in caplog.text


@parametrize("size", [10, 100_000, 5 * MIB])
def test_half_closed_client_that_reads_slowly_gets_all(server, connection, caplog, size):
    content = random.Random(11).randbytes(size)
    image_id = connection.stored(content)
    with dial(server, buffer=65536) as sock:
        sock.sendall(fetch(server, image_id))
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        assert read_answer(sock).body == content and sock.recv(1) == b""
    assert "Traceback" not in caplog.text


def test_body_of_tiny_chunks_lets_the_others_in_between(tmp_path):
    with service(tmp_path) as server, dial(server) as greedy, dial(server) as modest:
        greedy.sendall(raw("PUT /image/x/binary", bearer(server), CHUNKED))
        chunks = b"1\r\nx\r\n" * 100_000
        sender = threading.Thread(target=greedy.sendall, args=(chunks,), daemon=True)
        sender.start()
        waits = []
        for _ in range(20):
            began = time.monotonic()
            ask(modest, raw("GET /image/x", bearer(server)))
            waits.append(time.monotonic() - began)
        assert sorted(waits)[10] < 0.1


def test_body_that_arrives_slowly_is_taken(server, connection, monkeypatch):
    impatient(monkeypatch, IDLE=0.3)
    image_id = connection.create()
    with dial(server) as sock:
        sock.sendall(put(server, 10, image_id))
        for _ in range(10):
            time.sleep(0.1)
            sock.sendall(b"x")
        assert read_answer(sock).status == 200


def test_connections_above_the_limit_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(image_manager, "connection_limit", lambda: 5)
    with running(Settings(data=tmp_path)) as server, contextlib.ExitStack() as closing:
        with dials(server, 5):
            late = closing.enter_context(dial(server, timeout=0.3))
            late.sendall(HEALTH)
            with pytest.raises(TimeoutError):
                late.recv(1)
        late.settimeout(5)
        assert read_answer(late).status == 200


def limited(**limits):
    """Return the option of a process that may have no more than this, named as prlimit does."""
    import resource

    def limit():
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))

    return {"preexec_fn": limit}


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_unlimited_files_are_many_and_not_minus_one(monkeypatch):
    """As on macOS, where no more than a number may be asked for."""
    resource, asked = pytest.importorskip("resource"), []
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert image_manager.connection_limit() == 10_000
    image_manager.raise_file_limit()
    assert asked == [(20_200, resource.RLIM_INFINITY)]


@needs_proc
def test_limit_of_connections_follows_from_the_files_there_are(tmp_path):
    with service(tmp_path, **limited(NOFILE=64)) as server:
        with Connection(server) as connection:
            image_id = connection.stored(firmware()[0])
        with dial(server) as first, contextlib.ExitStack() as closing:
            with dials(server, 78):
                last = closing.enter_context(dial(server))
                time.sleep(0.3)
                before = processor_seconds(server.process.pid)
                time.sleep(0.5)
                assert processor_seconds(server.process.pid) - before < 0.2
                assert ask(first, fetch(server, image_id)).status == 200
            first.close()
            assert ask(last, fetch(server, image_id)).status == 200
        assert "Traceback" not in server.log and "error" not in server.log


@needs_proc
def test_service_that_is_out_of_files_says_so_once_and_goes_on(server, monkeypatch, caplog):
    """As where other processes have taken all that the system has."""
    accept, full = socket.socket.accept, [True]

    def no_more_files(self):
        if full:
            full.append(time.monotonic())
            raise OSError(errno.ENFILE, "Too many open files in system")
        return accept(self)

    with dial(server) as early:
        assert ask(early, HEALTH).status == 200
        monkeypatch.setattr(socket.socket, "accept", no_more_files)
        before = processor_seconds(os.getpid())
        with dial(server) as late:
            late.sendall(HEALTH)
            time.sleep(2.2)
            assert ask(early, HEALTH).status == 200
            assert len(full) <= 5 and processor_seconds(os.getpid()) - before < 0.5
            full.clear()
            assert read_answer(late).status == 200
    assert caplog.text.count("Too many open files in system") == 1


@parametrize("of", ["the listener", "a client"])
def test_socket_that_cannot_be_watched_does_not_close_the_service(server, monkeypatch, caplog, of):
    """As where epoll_ctl() finds no memory for it."""
    selector = selectors.DefaultSelector
    register, failing = selector.register, [of == "a client"]

    def no_memory(self, file, *others):
        with socket.socket(fileno=os.dup(file)) as sock:
            try:
                is_client = bool(sock.getpeername())
            except OSError:
                is_client = False
        if failing and is_client == failing[0]:
            failing.clear()
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return register(self, file, *others)

    with Connection(server) as connection:
        assert connection.get("/health")
        monkeypatch.setattr(selector, "register", no_memory)
        if of == "a client":
            with pytest.raises(ConnectionError):
                ask_once(server, HEALTH)
        else:
            assert ask_once(server, HEALTH).status == 200
        assert ask_once(server, HEALTH).status == 200 and not failing
        assert connection.get("/health")
    assert caplog.text.count("Cannot allocate memory") == 1


@contextlib.contextmanager
def catalogue_locked(folder):
    """Have another process's connection keep everybody out of the catalogue."""
    with sqlite_in(folder) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield


@parametrize("by_link", [True, False])
def test_who_finds_the_catalogue_locked_keeps_no_other_waiting(server, connection, by_link):
    image_id = connection.stored(b"x")
    link, _ = connection.link(image_id)
    request = raw(f"GET {link}") if by_link else fetch(server, image_id)
    connection.close()
    server.application.catalogue.disconnect()  # with one open, nobody can lock the others out
    with dials(server, 3) as waiting, dials(server, 3):
        with catalogue_locked(server.application.settings.data):
            for sock in waiting:
                sock.sendall(request)
            time.sleep(0.2)
            began = time.monotonic()
            assert urllib.request.urlopen(server.url + "/openapi.json").status == 200
            assert time.monotonic() - began < 1 and not any(map(is_readable, waiting))
        assert [read_answer(sock).status for sock in waiting] == [200] * 3


def test_service_that_finds_the_catalogue_locked_heeds_its_signals(tmp_path):
    with service(tmp_path) as server, dial(server) as sock:
        with catalogue_locked(tmp_path):
            sock.sendall(raw("GET /image/x", bearer(server)))
            time.sleep(0.2)
            server.send(signal.SIGTERM)
            refuses_connections(server)
        assert read_answer(sock).status == 404


def test_pipeline_of_one_client_lets_the_others_in_between(tmp_path):
    with service(tmp_path) as server, dial(server) as greedy, dial(server) as modest:
        quick = raw("GET /image/x", bearer(server))
        sender = threading.Thread(target=greedy.sendall, args=(quick * 5000,), daemon=True)
        sender.start()
        read_answer(greedy)
        for _ in range(30):
            assert ask(modest, quick).status == 404
        greedy.settimeout(0)
        received = 0
        with contextlib.suppress(BlockingIOError):
            while block := greedy.recv(MIB):
                received += block.count(b"HTTP/1.1 404")
        assert received < 2500, "the others waited for most of the pipeline"


def test_client_that_sends_fast_lets_the_others_in_between(server, connection):
    image_id, answered = connection.create(), 0
    with dial(server) as greedy, dial(server) as modest:
        greedy.sendall(put(server, 200 * MIB, image_id))
        sender = threading.Thread(target=greedy.sendall, args=(bytes(200 * MIB),))
        sender.start()
        while sender.is_alive():
            assert ask(modest, HEALTH).status == 200
            answered += 1
        assert read_answer(greedy).status == 200 and answered > 10


@parametrize("path, query, quick", [
    ("/image/x", "", True), ("/image/x/binary", "expires=1&signature=a", True), ("/image/latest", "label=a", True),
    ("/fw/image/x/", "", True), ("/image", "", False), ("//image", "", False), ("image/", "", False),
    ("/fw/image", "", False), ("//fw/image/binary/", "", False), ("/health", "", False), ("//health/", "", False),
    ("/image/x/binary", "format=bin", False), ("/image/x/binary", "f%6Frmat=bin", False),
])  # fmt: skip
def test_only_what_is_quick_is_answered_in_the_loop(tmp_path, path, query, quick):
    with store_in(tmp_path, url_prefix="/fw") as client:
        for method in ("GET", "HEAD", "POST"):
            found = client.app.application.is_quick(method, path, query)
            assert found == (quick and method != "POST")


# ------------------------------------------------------------------------------------- server: access log


LOG_LINE = re.compile(
    r'(\S+) - (\S+) \[(\d\d/\w{3}/\d{4}(?::\d\d){3} [+-]\d{4})\] "(.*?)" (\d{3}) (\S+) "(.*?)" "(.*)"'
)


@contextlib.contextmanager
def logging_server(tmp_path, **settings):
    """Run a server with an access log; yield it and what returns the lines, taken apart."""
    path = tmp_path / "access.log"

    def lines(count):
        wait_until(lambda: path.read_text().count("\n") >= count)
        found = [LOG_LINE.fullmatch(line) for line in path.read_text().splitlines()]
        assert all(found) and len(found) == count, path.read_text()
        return [line.groups() for line in found]

    with running(Settings(data=tmp_path, access_log=str(path), **settings)) as server:
        yield server, lines


def test_access_log_has_a_line_for_each_answer_in_the_combined_format(tmp_path):
    with logging_server(tmp_path) as (server, lines):
        with Connection(server, "a lab/ä") as connection:
            image_id = connection.stored(b"0123456789")
            path = f"/image/{image_id}/binary"
            connection.get(path, User_Agent='curl "7" \\ \xe4', Referer="http://a/b")
            connection.get(path, Range="bytes=2-4")
            connection.ask("HEAD", path)
            connection.ask("GET", "/health", Authorization="")
            connection.ask("GET", "/image", Authorization="Bearer " + TOKEN)
            secret = server.application.tokens._secret
            token = sign({"service": "lab", "sub": "rig 7/b"}, secret)
            connection.ask("GET", "/image/none?a=b", Authorization=token)
            token = sign({"service": "lab", "scope": "image:read"}, secret)
            connection.ask("DELETE", path, Authorization=token)
        exchange(server, b"GET /\r\n")
        found = lines(10)
    assert {line[0] for line in found} == {"127.0.0.1"}
    moment = datetime.strptime(found[0][2], "%d/%b/%Y:%H:%M:%S %z")
    assert abs(moment.timestamp() - time.time()) < 60
    tenant = "a%20lab%2F%C3%A4"
    assert [(line[1], *line[3:6]) for line in found] == [
        (tenant, "POST /image HTTP/1.1", "201", found[0][5]),
        (tenant, f"PUT {path} HTTP/1.1", "200", found[1][5]),
        (tenant, f"GET {path} HTTP/1.1", "200", "10"),
        (tenant, f"GET {path} HTTP/1.1", "206", "3"),
        (tenant, f"HEAD {path} HTTP/1.1", "200", "-"),
        ("-", "GET /health HTTP/1.1", "200", "15"),
        ("-", "GET /image HTTP/1.1", "401", found[6][5]),
        ("lab/rig%207%2Fb", "GET /image/none?a=b HTTP/1.1", "404", found[7][5]),
        ("lab", f"DELETE {path} HTTP/1.1", "403", found[8][5]),
        ("-", "-", "400", found[9][5]),
    ]
    assert found[2][6:] == ("http://a/b", 'curl \\"7\\" \\\\ \\xe4')
    assert "secret" not in str(found)


@parametrize("name", ["signature", "%73ignature", "s%69gnature"])
def test_access_log_does_not_show_what_makes_a_link_work(tmp_path, name):
    with logging_server(tmp_path) as (server, lines):
        with Connection(server) as connection:
            link, _ = connection.link(connection.stored(b"x"))
            path, rest, signature = re.split("[?]|&signature=", link)
            assert connection.get(f"{path}?{rest}&{name}={signature}&a=b", Authorization="") == b"x"
            assert connection.get(f"{path}?{name}={signature}&{rest}", Authorization="") == b"x"
        last, first = lines(5)[3:]
    assert (last[1], last[4]) == (first[1], first[4]) == ("link", "200")
    assert last[3] == f"GET {path}?{rest}&a=b HTTP/1.1"
    assert first[3] == f"GET {path}?{rest} HTTP/1.1"


@parametrize("before, after", [("&amp;", "="), (";", "="), ("%26", "="), ("&", "%3D"), ("", "=")])
def test_access_log_does_not_show_secrets_that_stand_where_they_should_not(tmp_path, before, after):
    with logging_server(tmp_path) as (server, lines):
        with Connection(server) as connection:
            link, _ = connection.link(connection.stored(b"x"))
            path, _, signature = re.split("[?]|&signature=", link)
            connection.ask("GET", f"{path}?a=b{before}Signature{after}{signature}")
            token = server.token()
            connection.ask("GET", f"/image/{token}?access_token={token}")
    mangled, misplaced = lines(5)[3:]
    assert mangled[3] == f"GET {path}?a=b HTTP/1.1"
    assert misplaced[3] == "GET /image/?access_token= HTTP/1.1"


def test_access_log_counts_what_was_sent_of_a_download_that_broke_off(tmp_path):
    with logging_server(tmp_path) as (server, lines):
        with Connection(server) as connection:
            image_id = connection.stored(bytes(64 * MIB))
        with dial(server, buffer=65536) as sock:
            sock.sendall(fetch(server, image_id))
            sock.recv(1000)
        line = lines(3)[2]
    assert line[4] == "200" and 0 <= int(line[5].replace("-", "0")) < 64 * MIB


PROXIES = "127.0.0.1,10.0.0.0/8"


@parametrize("proxies, given, address", [
    ("", "198.51.100.7", "127.0.0.1"),
    (PROXIES, "", "127.0.0.1"),
    (PROXIES, "198.51.100.7", "198.51.100.7"),
    (PROXIES, "203.0.113.9, 198.51.100.7", "198.51.100.7"),
    (PROXIES, "198.51.100.7, 10.1.2.3", "198.51.100.7"),
    (PROXIES, "198.51.100.7,, ", "198.51.100.7"),
    (PROXIES, "198.51.100.7, 10.1.2.3, 127.0.0.1", "198.51.100.7"),
    (PROXIES, "2001:db8::7, 10.1.2.3", "2001:db8::7"),
    (PROXIES, "198.51.100.7:5555, 10.1.2.3:80", "198.51.100.7"),
    (PROXIES, "[2001:db8::7]:5555", "2001:db8::7"),
    (PROXIES, "[2001:db8::7]", "2001:db8::7"),
    (PROXIES, "10.9.9.9, 10.1.2.3", "10.9.9.9"),
    (PROXIES, "unknown", "127.0.0.1"),
    (PROXIES, "198.51.100.7, unknown, 10.1.2.3", "10.1.2.3"),
    (PROXIES, '198.51.100.7, "x', "127.0.0.1"),
    (PROXIES, "198.51.100.7, ::ffff:10.1.2.3", "198.51.100.7"),
    (PROXIES, 'fe80::1%x tenant="boss"', "fe80::1"),  # behind the % of a zone there may be anything
])  # fmt: skip
def test_address_is_the_last_that_is_no_trusted_proxy(tmp_path, caplog, proxies, given, address):
    caplog.set_level("INFO", "image_manager")
    headers = {"X-Forwarded-For": given} if given else {}
    with logging_server(tmp_path, trusted_proxy=proxies) as (server, lines):
        with Connection(server, **headers) as connection:
            connection.ask("DELETE", "/image/x")
        assert lines(1)[0][0] == address
    assert caplog.records[-1].getMessage().startswith(f"{address} tenant=")


def test_access_log_is_for_its_owner_and_group_and_a_field_of_it_has_an_end(tmp_path):
    with logging_server(tmp_path) as (server, lines):
        with Connection(server) as connection:
            connection.get("/health", User_Agent="\xe9" * 50_000)
        assert len(lines(1)[0][-1]) == 2000 * len("\\xe9")
        assert (tmp_path / "access.log").stat().st_mode & 0o137 == 0


@needs_hangup
@parametrize("workers, before", [(1, []), (2, []), (1, ["nohup"]), (2, ["nohup"])], ids=str)
def test_access_log_is_opened_again_on_hangup(tmp_path, workers, before):
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"

    def lines(log):
        return log.read_text().count("\n")

    words = ["--workers", workers, "--access-log", path]
    with service(tmp_path / "data", *words, before=before) as server:
        assert is_well(server)
        wait_until(lambda: lines(path) == 1)
        path.rename(moved)
        assert is_well(server)
        wait_until(lambda: lines(moved) == 2)
        server.send(signal.SIGHUP)
        wait_until(path.exists)
        time.sleep(0.2)
        assert all(is_well(server) for _ in range(10))
        wait_until(lambda: lines(path) == 10)
        path.unlink()
        path.mkdir()
        server.send(signal.SIGHUP)
        wait_until(lambda: "the access log goes on in its old file: " in server.log)
        assert lines(moved) == 2 and server.process.poll() is None


@parametrize("workers", [1, 2])
def test_access_log_that_cannot_be_written_stops_the_start_but_nothing_later(tmp_path, workers):
    options = ["--workers", workers, "--access-log", tmp_path / "no" / "log"]
    no_start(tmp_path, "Cannot write", "no/log", options=options)
    if Path("/dev/full").exists():
        with running(Settings(data=tmp_path, access_log="/dev/full")) as server:
            assert is_well(server)


def test_access_log_may_be_standard_output(tmp_path):
    with service(tmp_path, "--access-log", "-", stdout=subprocess.PIPE) as server:
        assert is_well(server)
        assert LOG_LINE.fullmatch(server.process.stdout.readline().rstrip("\n"))


def test_line_of_the_log_is_one_write_so_that_those_of_workers_do_not_mix(monkeypatch):
    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, block):
            written.append(bytes(block))
            return len(block)

    written = []
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Raw(), write_through=True))  # as python -u
    image_manager.StandardError().emit(image_manager.logging.makeLogRecord({"msg": "one line"}))
    assert written == [b"one line\n"]


def test_log_of_the_service_has_times_with_their_zone(tmp_path):
    with service(tmp_path) as server, Connection(server) as connection:
        connection.create()
        moment, caller = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}", 'tenant="admin" sub=null'
        server.wait_for(rf"{moment} 127\.0\.0\.1 {caller} POST /image 201")


# ------------------------------------------------------------------------------------- server: devices


def churn(server, threads=1):
    """Have others create, upload, download and delete, as long as the block runs."""
    paths = itertools.cycle(["", "/binary"])

    def store_and_delete():
        with Connection(server) as other:
            gone = other.stored(firmware(3000)[0])
            other.download(gone)
            other.ask("DELETE", f"/image/{gone}{next(paths)}")

    return meanwhile(store_and_delete, threads)


@pytest.fixture
def fleet(server, connection):
    """(server, an image's link, its id, its bytes), while others come and go."""
    content = random.Random(4).randbytes(300_001)
    image_id = connection.stored(content)
    link, _ = connection.link(image_id)
    with churn(server):
        yield server, link, image_id, content


@parametrize("size", [255, 1024, 4096, 999_999])
def test_zephyr_downloader_in_fragments_on_one_connection(fleet, size):
    """nRF Connect SDK: Host, Range and Connection are all it sends; it has 1 KiB for a header.

    The last size is for the whole file in one fragment: that is 206 too.
    """
    server, link, _, content = fleet
    content = content[: size * 200] if size == 255 else content
    received = b""
    with dial(server) as sock:
        while len(received) < len(content):
            first, last = len(received), len(received) + size - 1
            part = f"Range: bytes={first}-{last}"
            answer = ask(sock, raw(f"GET {link}", part, "Connection: keep-alive"))
            assert answer.status == 206
            assert len(str(answer.headers)) + len("HTTP/1.1 206 Partial Content") < 1024
            last = min(last, 300_000)
            assert answer.headers["Content-Range"] == f"bytes {first}-{last}/300001"
            received += answer.body
    assert sha256(received[: len(content)]) == sha256(content)


def test_esp_https_ota_in_parts(fleet):
    server, link, _, content = fleet
    head = ask_once(server, raw(f"HEAD {link}", "User-Agent: ESP32"), "HEAD")
    assert head.status == 200
    total, received = int(head.headers["Content-Length"]), b""
    while len(received) < total:
        end = "" if total - len(received) <= 65536 else len(received) + 65535
        answer = ask_once(server, raw(f"GET {link}", f"Range: bytes={len(received)}-{end}"))
        assert answer.status == 206
        received += answer.body
    assert sha256(received) == sha256(content)


def test_rauc_streams_with_bounded_ranges_and_polls(fleet):
    server, _, image_id, content = fleet
    with dial(server) as sock:
        begin = ask(sock, fetch(server, image_id, "Range: bytes=0-3"))
        assert begin.status == 206 and begin.body == content[:4]
        assert begin.headers["Content-Range"] == "bytes 0-3/300001"
        received = bytearray(len(content))
        places = list(range(0, len(content), 8192))
        random.Random(5).shuffle(places)
        for place in places:
            part = fetch(server, image_id, f"Range: bytes={place}-{place + 8191}")
            received[place : place + 8192] = ask(sock, part).body
        assert sha256(received) == sha256(content)
        poll = fetch(server, image_id, f"If-None-Match: {begin.headers['ETag']}")
        assert [ask(sock, poll).status for _ in range(3)] == [304] * 3


def test_mender_goes_on_where_it_broke_off(fleet):
    server, _, image_id, content = fleet
    with dial(server) as sock:
        sock.sendall(fetch(server, image_id))
        file = sock.makefile("rb")
        while (line := file.readline()) != b"\r\n":
            assert line
        received = file.read(123_457)
    while len(received) < len(content):
        answer = ask_once(server, fetch(server, image_id, f"Range: bytes={len(received)}-"))
        assert answer.headers["Content-Range"] == f"bytes {len(received)}-300000/300001"
        received += answer.body[:100_000]
    assert sha256(received) == sha256(content)


@cases("headers", {
    "Arduino": ["User-Agent: ESP8266-http-Update", "x-ESP8266-mode: sketch"],
    "U-Boot": ["User-Agent: U-Boot"],
})  # fmt: skip
def test_arduino_and_u_boot_speak_http_1_0(fleet, headers):
    server, link, _, content = fleet
    answer = exchange(server, raw(f"GET {link}", *headers, version="HTTP/1.0", host=""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n") and sha256(body) == sha256(content)
    assert b"\r\nContent-Length: 300001\r\n" in head and b"\r\nConnection: close" in head


def needs_tool(name):
    if not shutil.which(name):
        pytest.skip(f"needs {name}")


@parametrize("tool", ["curl", "wget", "urllib"])
def test_tools_download_and_resume(fleet, tmp_path, tool):
    server, link, image_id, content = fleet
    target, header = tmp_path / "fw.hex", bearer(server)
    if tool == "urllib":
        assert urllib.request.urlopen(server.url + link).read() == content
        return
    needs_tool(tool)
    target.write_bytes(content[:100_003])
    if tool == "wget":
        run("wget", "-q", "-c", "-O", target, server.url + link, check=True)
    else:
        url = f"{server.url}/image/{image_id}/binary"
        ranged = run("curl", "-sS", "-r", "10-19", "-H", header, url, check=True)
        assert ranged.stdout == content[10:20]
        run("curl", "-sS", "-f", "-C", "-", "-o", target, "-H", header, url, check=True)
    assert target.read_bytes() == content


@parametrize("tool", ["curl -sSL -H", "wget -q -O - --header"])
def test_tools_follow_the_fixed_address_to_the_latest_binary(fleet, tool):
    server, _, image_id, content = fleet
    needs_tool(tool.split()[0])
    url = f"{server.url}/image/latest/binary?label=sensor&current=0.9.0+7"
    changes = {"fw_version": "99.0.0"}
    server.application.catalogue.change("admin", image_id, changes, lambda _: None)
    assert run(*tool.split(), bearer(server), url, check=True).stdout == content


def test_what_tools_send_that_is_not_the_file_is_not_stored(server, connection, tmp_path):
    """A resumed upload, a form by PUT, an encoded body: each is a file that nobody meant."""
    needs_tool("curl")
    file, image_id = tmp_path / "fw.hex", connection.create()
    file.write_bytes(firmware(20_000)[0])
    curl = ["curl", "-sS", "-o", tmp_path / "out", "-w", "%{http_code}", "-H", bearer(server)]
    curl += [f"{server.url}/image/{image_id}/binary"]
    for options, status in (
        (["-C", "1000", "-T", file], "400"),
        (["-X", "PUT", "-F", f"image=@{file}"], "415"),
        (["-T", file, "-H", "Content-Encoding: gzip"], "415"),
        (["-T", file, "-H", 'If-Match: "other"'], "412"),
        (["-F", f"image=@{file};encoder=base64"], "400"),
    ):
        assert run(*curl, *options, text=True).stdout == status, options
        assert not connection.shown(image_id)["confirmed"]
    assert folder_is_clean(server.application)
    form = f"image=@{file}"
    for options in (["-T", file], ["-F", form], ["-F", f"{form};filename=Gerät.hex"]):
        assert run(*curl, *options, text=True).stdout == "200", options
        assert "image uploaded" in (tmp_path / "out").read_text()


def test_download_that_has_begun_ends_well_though_its_image_is_deleted(server, connection):
    content = random.Random(6).randbytes(8 * MIB)
    image_id = connection.stored(content)
    with Connection(server) as reader:
        reader.connect()
        reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        reader.request("GET", f"/image/{image_id}/binary", headers=reader.headers)
        response = reader.getresponse()
        received = response.read(1000)
        assert connection.ask("DELETE", f"/image/{image_id}/binary").status == 200
        assert connection.upload(image_id, b"other") == 200
        assert connection.ask("DELETE", f"/image/{image_id}").status == 200
        received += response.read()
    assert sha256(received) == sha256(content)


def test_raw_bytes_come_in_ranges_over_a_wide_gap(server, connection):
    path, total = f"/image/{connection.stored(WIDE_GAP)}/binary?format=bin", 0x0C000003
    assert connection.ask("HEAD", path).headers["Content-Length"] == str(total)
    before = memory()
    cases = {0: b"begin\xff", 100 * MIB: b"\xff" * 6, total - 6: b"\xff\xff\xffend"}
    for first, expected in cases.items():
        assert connection.get(path, Range=f"bytes={first}-{first + 5}") == expected
    connection.request("GET", path, headers=connection.headers)
    response, size = connection.getresponse(), 0
    while block := response.read(MIB):
        size += len(block)
    assert size == total and memory() - before < 32 * MIB


# ------------------------------------------------------------------------------------- races


def race(server, *actions):
    """Do things at the same time, each on a connection of its own; return what they return."""
    barrier = threading.Barrier(len(actions))

    def act(action):
        with Connection(server) as connection:
            connection.connect()
            barrier.wait()
            return action(connection)

    with concurrent.futures.ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(act, actions))


@pytest.fixture(params=["threads", "processes"])
def rivals(request, tmp_path):
    """A server whose threads, or whose processes, can race."""
    threads = request.param == "threads"
    data = tmp_path / "data"
    with running(Settings(data=data)) if threads else service(data, "--workers", "2") as server:
        yield server


def test_uploads_that_race_store_one_binary_whole(rivals, tmp_path):
    contents = [bytes([65 + number]) * 200_000 for number in range(4)]
    for _ in range(5):
        with Connection(rivals) as connection:
            image_id = connection.create()

            def uploading(body, image_id=image_id):
                return lambda connection: connection.upload(image_id, body)

            statuses = race(rivals, *map(uploading, contents))
            assert sorted(statuses) == [200, 409, 409, 409]
            stored = contents[statuses.index(200)]
            assert connection.download(image_id) == stored
            assert race(rivals, *[uploading(stored)] * 3) == [200] * 3
            assert f"{image_id}.hex" in names_in(tmp_path / "data" / "binaries")
    assert not names_in(tmp_path / "data" / "tmp")


def test_upload_that_races_a_deletion_leaves_all_or_nothing(rivals, tmp_path):
    for number in range(10):
        with Connection(rivals) as connection:
            old, new = firmware(20_000, seed=number)[0], firmware(20_000, seed=number + 100)[0]
            image_id = connection.stored(old)
            path = f"/image/{image_id}/binary"
            target = path if number % 2 else f"/image/{image_id}"
            deleted, uploaded, read = race(
                rivals,
                lambda c: c.ask("DELETE", target),
                lambda c: c.ask("PUT", path, new),
                lambda c: c.ask("GET", path),
            )
            assert deleted.status == 200 and uploaded.status in (200, 404, 409)
            now = connection.ask("GET", path)
            for answer in (read, now):
                assert answer.status in (200, 404)
                if answer.status == 200:
                    assert answer.headers["ETag"] == f'"{sha256(answer.body)}"'
            if now.status == 200:
                assert now.body == new
            else:
                assert not list((tmp_path / "data" / "binaries").glob(f"{image_id}*"))


def test_creations_over_processes_keep_their_order(rivals):
    race(rivals, *[lambda c: [c.create() for _ in range(10)]] * 4)
    with Connection(rivals) as connection:
        created = [image["created"] for image in connection.listed()]
    assert len(created) == 40 and created == sorted(created)


# ------------------------------------------------------------------------------------- what fails on the way


FAILING_CALLS = [
    "tempfile.NamedTemporaryFile",
    "os.fsync",
    "os.replace",
    "os.open",
    "Upload._store",
]


@parametrize("number", [errno.EIO, errno.ENOSPC])
@parametrize("name", FAILING_CALLS)
def test_upload_whose_calls_fail_leaves_nothing_behind(client, app, monkeypatch, name, number):
    """Each call of the upload fails in turn: first the first, then the second, ..."""
    content = firmware(3000)[0]
    module, _, function = name.partition(".")
    where = getattr(image_manager, module)
    real = getattr(where, function)
    for nth in range(20):
        image_id, count = client.create(), itertools.count()

        def fails(*values, count=count, nth=nth, **others):
            if next(count) == nth:
                raise OSError(number, os.strerror(number))
            return real(*values, **others)

        with monkeypatch.context() as broken:
            broken.setattr(where, function, fails)
            response = client.upload(image_id, content, status="*", expect_errors=True)
        if next(count) <= nth:
            assert nth > 0 and response.status_int == 200  # there is no such call any more
            return
        assert response.status_int == (507 if number == errno.ENOSPC else 500)
        assert not client.shown(image_id)["confirmed"] and folder_is_clean(app)
        client.upload(image_id, content)
        client.delete(f"/image/{image_id}")
    pytest.fail("the upload never succeeded")


WORDS = {"full": "database or disk is full", "locked": "database is locked", "damaged": "malformed"}
TROUBLES = parametrize("trouble, status", [("full", 507), ("locked", 503), ("damaged", 500)])


@contextlib.contextmanager
def catalogue_failing(catalogue, moment, trouble):
    """Have SQLite fail once, at the next statement that begins so."""

    class Failing:
        def __init__(self, real):
            self.__dict__["real"] = real

        def __getattr__(self, attribute):
            return getattr(self.real, attribute)

        def execute(self, sql, *values):
            if sql.startswith(moment) and failing:
                failing.pop()
                raise sqlite3.OperationalError(WORDS[trouble])
            return self.real.execute(sql, *values)

    opened, failing = Catalogue._open, [True]
    with pytest.MonkeyPatch.context() as broken:
        catalogue.disconnect()
        broken.setattr(Catalogue, "_open", lambda *values: Failing(opened(*values)))
        yield
    assert not failing


@TROUBLES
@parametrize("moment", ["BEGIN", "UPDATE", "COMMIT"])
def test_upload_that_cannot_be_recorded_leaves_nothing_behind(client, app, trouble, status, moment):
    image_id = client.create()
    with catalogue_failing(app.catalogue, moment, trouble):
        assert client.upload(image_id, firmware()[0], status=status).json["status"] == status
        assert folder_is_clean(app) and not client.shown(image_id)["confirmed"]
    client.upload(image_id, firmware()[0])


@TROUBLES
@parametrize("moment", ["BEGIN", "UPDATE", "DELETE", "COMMIT"])
def test_deletion_that_cannot_be_recorded_deletes_nothing(client, app, trouble, status, moment):
    image_id = client.stored()
    path = f"/image/{image_id}" + "/binary" * (moment == "UPDATE")
    with catalogue_failing(app.catalogue, moment, trouble):
        assert client.delete(path, status=status).json["status"] == status
        assert client.download(image_id).body == firmware()[0]
    client.delete(path)
    assert folder_is_clean(app)


def test_damaged_record_is_500_and_the_rest_is_served(client, monkeypatch, caplog):
    sound, broken = client.create(), client.create()
    real = Catalogue._row

    def row(self, sql, **values):
        if values.get("id") == broken:
            with self._connection():
                raise sqlite3.DatabaseError("database disk image is malformed")
        return real(self, sql, **values)

    monkeypatch.setattr(Catalogue, "_row", row)
    message = "The catalogue cannot be read or written: the log says why"
    error(client.get(f"/image/{broken}", status=500), 500, message)
    assert client.shown(sound)["id"] == sound and "malformed" in caplog.text


def test_catalogue_locked_by_another_process_is_503_and_then_works(client, app, monkeypatch):
    monkeypatch.setattr(image_manager, "PATIENCE", 0.1)
    app.catalogue.disconnect()
    image_id = client.stored()
    with sqlite_in(app.settings.data) as other:
        other.execute("BEGIN IMMEDIATE")
        response = client.post_json("/image", LABELS, status=503)
        error(response, 503, "The catalogue is busy: try again")
        client.delete(f"/image/{image_id}", status=503)
        client.download(image_id, status=200)
    client.delete(f"/image/{image_id}")


def test_deletion_that_cannot_remove_the_file_leaves_no_row_and_is_swept(client, app, monkeypatch):
    image_id = client.stored()
    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", raising(OSError(errno.EIO, "I/O error")))
        client.delete(f"/image/{image_id}", status=500, expect_errors=True)
    client.get(f"/image/{image_id}", status=404)
    assert f"{image_id}.hex" in names_in(app.binaries.folder)
    image_manager.clean_up(app)
    assert folder_is_clean(app)


def test_answers_come_after_the_disk(client, app, monkeypatch):
    """File synced, then named, then the folder synced, then the row; then the answer."""
    events = []

    def noting(name, real):
        def noted(*values, **others):
            events.append(name)
            return real(*values, **others)

        return noted

    image_id = client.create()
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    real = Catalogue._transaction

    @contextlib.contextmanager
    def transaction(self):
        with real(self) as connection:
            yield connection
        events.append("committed")

    monkeypatch.setattr(Catalogue, "_transaction", transaction)
    client.upload(image_id, firmware()[0])
    assert events == ["fsync", "fsync", "replace", "replace", "fsync", "committed"]


# ------------------------------------------------------------------------------------- embedding


def left_over():
    """Return this process's threads and open files, which must be as they were."""
    folder = Path("/proc/self/fd")
    files = folder.iterdir() if folder.exists() else ()
    names = sorted(os.readlink(path) for path in files if path.exists())
    threads = {thread.name for thread in threading.enumerate()}
    return threads, [name for name in names if "/proc/" not in name]


@parametrize("raises", [False, True])
def test_running_leaves_no_thread_file_or_lock(tmp_path, raises):
    before, handlers = left_over(), list(image_manager.logging.getLogger().handlers)
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), running(Settings(data=tmp_path)) as server:
            with Connection(server) as connection:
                connection.stored(firmware(100_000)[0])
            if raises:
                raise ZeroDivisionError
    assert left_over() == before
    assert image_manager.logging.getLogger().handlers == handlers


def test_running_ends_though_an_upload_is_in_flight(tmp_path):
    before = left_over()
    with running(Settings(data=tmp_path)) as server:
        with Connection(server) as connection:
            image_id = connection.create()
        with dial(server) as sock:
            sock.sendall(put(server, 500_000, image_id) + b"x" * 300_000)
            time.sleep(0.1)
            began = time.monotonic()
            sock.close()
    assert time.monotonic() - began < 10 and left_over() == before
    assert not names_in(tmp_path / "tmp")


def test_servers_side_by_side_stay_apart(server, connection, tmp_path):
    connection.create()
    with running(Settings(data=tmp_path / "b")) as other, Connection(other) as elsewhere:
        assert elsewhere.listed() == []
        token = f"Bearer {server.token()}"
        assert elsewhere.ask("GET", "/image", Authorization=token).status == 401


def test_second_service_on_a_folder_is_refused(tmp_path):
    settings = Settings(data=tmp_path)
    with running(settings):
        with pytest.raises(CannotStart, match="Another service uses"), running(settings):
            pass
        create_app(settings).close()  # which takes no lock
    with running(settings):
        pass


@needs_fork
@parametrize("used", [False, True], ids=["unused", "used before"])
@parametrize("end", ["closes", "ends"])
def test_application_may_be_made_before_a_fork(tmp_path, used, end):
    """As servers with a preload do it: no connection to SQLite may cross that."""
    script = f"""
import os, sys, threading, time, wsgiref.simple_server, wsgiref.util
from image_manager import *
app = create_app(Settings(data={str(tmp_path)!r}, jwt_secret={SECRET!r}))
def use(path):
    environ = {{"PATH_INFO": path, "HTTP_AUTHORIZATION": "Bearer " + app.tokens.issue("admin")}}
    wsgiref.util.setup_testing_defaults(environ)
    return b"".join(app(environ, lambda *_: None))
if {used}:
    assert b'"ok"' in use("/health") and use("/image") == b"[]"
server = wsgiref.simple_server.make_server("127.0.0.1", 0, app)
print(server.server_port, flush=True)
if os.fork() == 0:
    server.serve_forever()
time.sleep(0.5)
if {end!r} == "closes":
    app.close()
    time.sleep(60)
"""
    words, environ = [sys.executable, "-c", script], {**ENVIRON, "PYTHONPATH": str(HERE)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
    parent = subprocess.Popen(words, text=True, env=environ, **options)
    try:
        url = f"http://127.0.0.1:{parent.stdout.readline().strip()}"
        server = Other(url, Tokens(Settings(data=tmp_path), SECRET))
        with Connection(server) as connection:
            made = [connection.create()]
            time.sleep(1)
            made.append(connection.create())
            tool = (
                "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM image')"
            )
            run(sys.executable, "-c", tool, tmp_path / "image_manager.db", check=True)
            made.append(connection.create())
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    with store_in(tmp_path) as client:
        assert client.ids() == made


def fork_and_end():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


@needs_fork
def test_forks_amid_requests_leave_the_catalogue_in_use(catalogue):
    """Connections are closed before each, and opened again by whoever reads meanwhile."""

    def read():
        catalogue.total()
        time.sleep(0.001)

    with meanwhile(read, threads=6):
        for _ in range(100):
            fork_and_end()
            time.sleep(0.002)
    assert catalogue.add("t", "l", "1")


def test_application_that_is_made_leaves_no_file_open(tmp_path):
    before = left_over()
    with contextlib.closing(create_app(Settings(data=tmp_path))):
        assert left_over() == before


@needs_fork
def test_child_that_outlives_the_server_does_not_keep_its_port(tmp_path):
    with running(Settings(data=tmp_path)) as server:
        files = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
        files = [file for file in files if file > 2 and os.path.exists(f"/proc/self/fd/{file}")]
        child = subprocess.Popen(["sleep", "60"], close_fds=False, pass_fds=files)  # as of a fork
    try:
        with pytest.raises(ConnectionRefusedError):
            dial(server).close()
    finally:
        child.kill()
        child.wait()


def test_token_of_a_rig_lives_as_long_as_its_server(server):
    def claims(**options):
        return jwt.decode(server.token(**options), options={"verify_signature": False})

    assert "exp" not in claims()
    limited = claims(expires=60)
    assert limited["exp"] - limited["iat"] == 60


def test_running_takes_scopes_and_a_given_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(data=tmp_path, port=taken.getsockname()[1], url_prefix="/fw")
        with pytest.raises(CannotStart, match="Cannot listen"), running(settings):
            pass
    with running(settings) as server:
        assert server.url == f"http://127.0.0.1:{settings.port}/fw"
        token = f"Bearer {server.token(scope=['read'])}"
        with Connection(server, None, Authorization=token) as connection:
            assert connection.post("/fw/image", {}).status == 403


@parametrize("host", ["localhost", "::1"])
def test_other_addresses_can_be_listened_on(tmp_path, host):
    try:
        with running(Settings(data=tmp_path, host=host)) as server:
            assert is_well(server)
    except CannotStart:
        pytest.skip(f"no {host} here")


def test_two_colons_listen_on_ipv4_too(tmp_path):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with running(Settings(data=tmp_path, host="::", access_log=str(tmp_path / "log"))) as server:
        port = urllib.parse.urlsplit(server.url).port
        for host in ("127.0.0.1", "[::1]"):
            assert is_well(Other(f"http://{host}:{port}"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["127.0.0.1", "::1"]


def test_address_of_one_interface_can_be_listened_on(tmp_path):
    address = ["ip", "address", "{}", "fe80::77/64", "dev", "lo"]
    if not shutil.which("ip") or run(*[word.format("add") for word in address]).returncode:
        pytest.skip("needs an address that is local to an interface")
    try:
        time.sleep(0.1)
        with running(Settings(data=tmp_path, host="fe80::77%lo")) as server:
            assert server.url.startswith("http://[fe80::77%lo]:")
            scope, port = socket.if_nametoindex("lo"), urllib.parse.urlsplit(server.url).port
            with socket.socket(socket.AF_INET6) as sock:
                sock.connect(("fe80::77", port, 0, scope))
                assert ask(sock, HEALTH).status == 200
    finally:
        run(*[word.format("del") for word in address])


@needs_posix  # the platform where nothing has to be missing
def test_calls_that_windows_does_not_have_are_not_needed(tmp_path, monkeypatch):
    opened = os.open

    def no_folders(path, *others, **named):
        if os.path.isdir(path):
            raise PermissionError
        return opened(path, *others, **named)

    for name in ("pread", "sendfile", "fork", "openpty"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.delattr(signal, "pthread_sigmask")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(os, "open", no_folders)
    monkeypatch.setattr(os, "link", raising(PermissionError))
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.SelectSelector)
    content, data = firmware(200_000)
    with running(Settings(data=tmp_path)) as server, Connection(server) as connection:
        image_id = connection.stored(content)
        assert connection.download(image_id) == content
        assert connection.download(image_id, Range="bytes=100-109") == content[100:110]
        assert connection.download(image_id, "?format=bin") == data
        assert connection.ask("DELETE", f"/image/{image_id}/binary").status == 200
    assert image_manager.main(["verify", "--data", str(tmp_path)]) == 0


def test_importing_starts_nothing_and_touches_nothing(tmp_path):
    code = "import threading, logging, image_manager;"
    code += "print(threading.active_count(), logging.getLogger().handlers)"
    environ = {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", "IMAGE_MANAGER_PORT": "x"}
    environ = {**os.environ, **environ}
    done = run(sys.executable, "-c", code, cwd=tmp_path, env=environ, check=True, text=True)
    assert done.stdout == "1 []\n" and not names_in(tmp_path)


def test_application_works_under_another_server(app):
    """The standard library's, whose file wrapper knows no end but that of the file."""

    class Quiet(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *_):
            pass

    content, data = firmware(200_000)
    with wsgiref.simple_server.make_server("127.0.0.1", 0, app, handler_class=Quiet) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with Connection(
                Other(f"http://127.0.0.1:{other.server_port}", app.tokens)
            ) as connection:
                image_id = connection.stored(content)
                assert connection.download(image_id) == content
                for first, last in ((0, 9), (100, 200_100), (400_000, len(content) - 1)):
                    part = connection.download(image_id, Range=f"bytes={first}-{last}")
                    assert part == content[first : last + 1]
                assert connection.download(image_id, "?format=bin") == data
                body, headers = form(content)
                path, kind = f"/image/{image_id}/binary", headers["Content-Type"]
                assert connection.ask("POST", path, body, Content_Type=kind).status == 200
        finally:
            other.shutdown()
            thread.join()


# ------------------------------------------------------------------------------------- page


@pytest.mark.parametrize("prefix", ["", "/fw-image"])
def test_page_is_shown_to_who_asks_for_html_alone(settings, prefix):
    with contextlib.closing(create_app(Settings(data=settings.data, url_prefix=prefix))) as app:
        client = client_of(app)
        client.authorization = None
        for path in {"/", prefix or "/", prefix + "/"}:
            page = client.get(path, HTML)
            assert page.content_type == "text/html" and page.charset == "utf-8"
            assert client.head(path, HTML).headers["Content-Length"] == str(len(page.body))
            for accept in ("*/*", "application/json", "text/plain", "", "text/html-not"):
                response = client.get(path, {"Accept": accept}, status=404)
                error(response, 404, "No such path")
                assert response.headers["Vary"] == page.headers["Vary"] == "Accept"
        assert client.post("/", headers=HTML, status=405).headers["Allow"] == "GET, HEAD"


def test_page_may_load_nothing_but_its_own_script_and_style(client):
    page = client.get("/", HTML)
    policy = dict(
        part.partition(" ")[::2] for part in page.headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": hash_source(page.text, "script"),
        "style-src": hash_source(page.text, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert page.headers["Cache-Control"] == "no-cache"
    assert "Set-Cookie" not in page.headers
    assert not re.search(r"innerHTML|outerHTML|document\.write|eval\(| style=|@import", page.text)


def hash_source(text, tag):
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


class Browser:
    """Chromium without a window, driven by its DevTools protocol over two pipes."""

    def __init__(self, program, folder):
        import fcntl

        commands, answers = os.pipe(), os.pipe()
        # It reads from file 3 and writes to 4, which may be taken by these very pipes.
        spare = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands[0], answers[1])]
        files = [(os.POSIX_SPAWN_DUP2, end, place) for end, place in zip(spare, (3, 4))]
        files += [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_WRONLY, 0) for n in (1, 2)]
        words = [program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                 "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}"]  # fmt: skip
        self._process = os.posix_spawn(program, words, ENVIRON, file_actions=files, setpgroup=0)
        for end in (commands[0], answers[1], *spare):
            os.close(end)
        self._commands = open(commands[1], "wb", buffering=0)
        self._answers = open(answers[0], "rb", buffering=0)
        self._numbers, self._messages, self.events = itertools.count(1), queue.Queue(), []
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self):
        rest = b""
        while block := self._answers.read(MIB):
            *messages, rest = (rest + block).split(b"\0")
            for message in map(json.loads, messages):
                self._messages.put(message) if "id" in message else self.events.append(message)

    def ask(self, method, session=None, **parameters):
        """Give a command; return its result."""
        message = {"id": next(self._numbers), "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._messages.get(timeout=30)
            if answer["id"] == message["id"]:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def close(self):
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._listener.join()
        self._commands.close()
        self._answers.close()


# The path of axe.min.js, of the npm package axe-core; where it is given, no story may be skipped.
AXE = os.environ.get("AXE")


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program or not hasattr(os, "posix_spawn"):
        (pytest.fail if AXE else pytest.skip)("needs Chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with contextlib.closing(Browser(program, folder)) as browser:
            yield browser


class Tab:
    """A tab that shows a server's page; what is on it is found as a person finds it."""

    FIND = """
    const visible = found => found.filter(one => one.getClientRects().length);
    const button = name => visible([...document.querySelectorAll("button, a")])
        .filter(one => one.textContent === name).pop();
    const field = name => visible([...document.querySelectorAll("label")])
        .find(one => one.firstChild.textContent === name)?.querySelector("input, select");
    const text = () => document.body?.innerText ?? "";
    const alert = () => document.querySelector("[role=alert]")?.innerText || "";
    """

    def __init__(self, browser, server, token="", path="/", width=1360):
        self.browser, self.server = browser, server
        self._context = browser.ask("Target.createBrowserContext")["browserContextId"]
        self._target = browser.ask(
            "Target.createTarget", url="about:blank", browserContextId=self._context
        )["targetId"]
        found = browser.ask("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.load("Page.navigate", url=server.url + path)
        if token:
            self.fill("Token", token)
            self.click("Use token")

    def ask(self, method, **parameters):
        return self.browser.ask(method, self._session, **parameters)

    def load(self, command, **parameters):
        """Have a page loaded; before it is, there is nothing that could be asked."""
        before = len(self.events("Page.loadEventFired"))
        self.ask(command, **parameters)
        wait_until(lambda: len(self.events("Page.loadEventFired")) > before)
        self.wait("button('Use token') || button('Forget token')")

    def js(self, expression):
        script = f"(() => {{ {self.FIND}; return {expression.strip()}; }})()"
        done = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, (expression, done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, expression, seconds=10):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({expression})"):
            assert time.monotonic() < end, (expression, self.js("text()"))
            time.sleep(0.02)

    def sees(self, *texts):
        for text in texts:
            self.wait(f"text().includes({json.dumps(text)})")

    def fill(self, name, text):
        self.wait(f"field({json.dumps(name)})")
        self.js(f"field({json.dumps(name)}).select()")
        self.ask("Input.insertText", text=text)

    def click(self, name):
        self.wait(f"button({json.dumps(name)}) && !button({json.dumps(name)}).disabled")
        self.js(f"button({json.dumps(name)}).click()")

    def press(self, key, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                     windowsVirtualKeyCode=code)  # fmt: skip

    def choose(self, path):
        self.wait("field('File')")
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
        self.sees(path.name)

    def save_downloads_in(self, folder):
        where = {"browserContextId": self._context, "downloadPath": str(folder)}
        self.browser.ask("Browser.setDownloadBehavior", behavior="allow", **where)

    def open(self, image_id):
        self.js(f"location.hash = {json.dumps(image_id)}")
        self.sees(image_id)

    def events(self, method):
        return [event["params"] for event in self.browser.events
                if event.get("sessionId") == self._session and event["method"] == method]  # fmt: skip

    def close(self):
        """End; nothing may have gone wrong in the page, and nothing come from elsewhere."""
        thrown = self.events("Runtime.exceptionThrown") + self.events("Runtime.consoleAPICalled")
        entries = [event["entry"] for event in self.events("Log.entryAdded")]
        thrown += [entry for entry in entries if entry["source"] != "network"]
        asked = {event["request"]["url"] for event in self.events("Network.requestWillBeSent")}
        elsewhere = [url for url in asked if not url.startswith((self.server.url, "data:"))]
        self.browser.ask("Target.disposeBrowserContext", browserContextId=self._context)
        assert not thrown and not elsewhere and not any("favicon" in url for url in asked)


@pytest.fixture
def bench(browser, tmp_path):
    """Lend a server and what opens tabs on it."""
    with running(Settings(data=tmp_path / "data")) as server, contextlib.ExitStack() as closing:

        def tab(*scope, **others):
            token = server.token(scope=scope)
            return closing.enter_context(contextlib.closing(Tab(browser, server, token, **others)))

        yield server, tab


def write(path, content):
    path.write_bytes(content)
    return path


def layout_of_gaps():
    """Return a file with 20 bytes at 0x100, 4 at 0x08000000, and an entry point."""
    lines = [record(0, 0x100, bytes(range(65, 85))), record(4, 0, b"\x08\0"),
             record(0, 0, b"\xff\xffab"), record(5, 0, b"\x08\0\0\x02"), END]  # fmt: skip
    return "".join(lines).encode()


def test_page_lets_in_by_a_token_alone_and_forgets_it(bench, browser):
    server, tab = bench
    with contextlib.closing(Tab(browser, server)) as stranger:
        assert stranger.js("document.activeElement.id") == "token"
        stranger.fill("Token", "nonsense")
        stranger.press("Enter", 13, "\r")
        stranger.wait("alert().includes('Invalid authorization token')")
        stranger.fill("Token", "Bearer " + server.token("lab"))
        stranger.click("Use token")
        stranger.sees("Tenant lab", "No image is stored yet.")
        stranger.load("Page.reload")
        stranger.sees("Tenant lab")
        stranger.click("Forget token")
        stranger.wait("button('Use token')")
        assert stranger.js("[sessionStorage.length, localStorage.length, document.cookie]") == [
            0,
            0,
            "",
        ]
        stranger.load("Page.reload")
        stranger.wait("button('Use token')")


def test_page_takes_a_file_in_one_step_and_shows_what_is_in_it(bench, tmp_path):
    _, tab = bench
    page = tab()
    page.choose(write(tmp_path / "sensor-v1.2.0-rc.1.hex", layout_of_gaps()))
    assert page.js("[field('Label').value, field('Version').value]") == ["sensor", "1.2.0-rc.1"]
    page.fill("Label", "my sensor")
    page.choose(write(tmp_path / "fw_nightly.hex", layout_of_gaps()))
    assert page.js("[field('Label').value, field('Version').value]") == ["my sensor", ""]
    page.fill("Version", "2.0.0")
    page.click("Upload")
    page.sees("my sensor 2.0.0 is stored.", "Checked: sound Intel HEX", "confirmed", "entry point",
              "0x08000003",
              "0x08000000", "24 bytes", "gap of 128.0 MiB")  # fmt: skip
    assert page.js("document.querySelector('svg[role=img]').getAttribute('aria-label')") == (
        "Memory map: 2 segments with 24 bytes from 0x00000100 to 0x08000004, entry point 0x08000002"
    )
    page.wait("document.querySelector('#dump')")
    dump = page.js("document.querySelector('#dump').textContent").splitlines()
    letters = " ".join(f"{number:02X}" for number in range(65, 81))
    assert dump[0] == f"00000100  {letters}  ABCDEFGHIJKLMNOP"
    assert dump[1] == "00000110  51 52 53 54" + " .." * 12 + "  QRST" + " " * 12
    assert dump[2].strip() == ".. gap of 128.0 MiB"
    assert dump[3] == "08000000  FF FF 61 62" + " .." * 12 + "  ··ab" + " " * 12
    assert page.js("document.querySelector('svg .entry').getBBox().y > 200")
    page.sees("128.0 MiB, gaps filled with FF")
    assert page.js("field('Go to').placeholder") == "0x00000100"
    page.fill("Go to", "0x200")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('#dump').textContent.startsWith('08000000')")
    page.fill("Go to", "266")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('#dump').textContent.startsWith('00000100')")
    page.fill("Go to", "0x9000000")
    page.press("Enter", 13, "\r")
    page.wait("alert().includes('The data end at 0x08000004')")
    for text, begin in (("00000110", "00000110"), ("1F", "00000100")):  # as a dump and people write
        page.fill("Go to", text)
        page.press("Enter", 13, "\r")
        page.wait(f"document.querySelector('#dump').textContent.startsWith('{begin}')")
    for text in ("-5", "1g", "0x123456789", "12345678901", "here"):
        page.fill("Go to", text)
        page.press("Enter", 13, "\r")
        page.wait("alert().includes('Go to takes an address')")
    asked = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
    windows = [url.partition("?")[2] for url in asked if "format=bin" in url]
    assert set(windows) == {
        "format=bin&start=256&end=288",
        "format=bin&start=272&end=288",
        "format=bin&start=134217728&end=134217744",
    }


def test_page_shows_a_refusal_with_the_line_and_leaves_nothing_behind(bench, tmp_path):
    server, tab = bench
    page = tab()
    lines = firmware(50_000)[0].split(b"\r\n")
    for end, number in ((b"\r\n", 2000), (b"\n", 0), (b"\r", 1)):
        bad = [*lines[:number], lines[number][:-4] + b"x" * 600, *lines[number + 1 :]]
        page.choose(write(tmp_path / "bad-1.0.0.hex", end.join(bad)))
        page.click("Upload")
        page.wait(f"alert().includes('line {number + 1}: ')")
        shown = bad[number][:500].decode() + " … (cut off here)"
        assert page.js("document.querySelector('[role=alert] pre').textContent") == shown
        assert server.application.catalogue.total() == 0
    good = write(tmp_path / "bad-1.0.0.hex", firmware()[0])
    page.choose(good)
    page.click("Upload")
    page.sees("bad 1.0.0 is stored.", "Checked: sound Intel HEX")


def test_page_says_which_image_was_left_where_it_may_not_delete(bench, tmp_path):
    server, tab = bench
    page = tab("read", "write")
    page.sees("This token may not delete")
    page.choose(write(tmp_path / "bad-1.0.0.hex", b":00000001"))
    page.click("Upload")
    page.wait("alert().includes('was left without a binary')")
    (image,) = json.loads(server.application.catalogue.list_json("admin", {}))
    assert image["id"] in page.js("alert()")
    page.sees("1 of 1 images")
    page.open(image["id"])
    page.sees("Upload the binary")
    assert page.js("!button('Delete image') && !field('Label') && !field('Version')")
    page.choose(write(tmp_path / "good.hex", firmware()[0]))
    page.click("Upload")
    page.sees("Checked: sound Intel HEX")


def test_page_shows_progress_and_an_upload_can_be_cancelled(bench, tmp_path):
    server, tab = bench
    page = tab()
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2_000_000}
    page.ask("Network.emulateNetworkConditions", **slow)
    page.choose(write(tmp_path / "large-1.0.0.bin", bytes(4 * MIB)))
    page.click("Upload")
    page.wait("/[1-9]\\d? %/.test(text()) && document.querySelector('progress').value > 0")
    page.click("All images")
    page.sees("1 of 1 images")
    page.click("Cancel")
    page.wait("alert().includes('The upload was cancelled')")
    page.sees("No image is stored yet.")
    wait_until(lambda: server.application.catalogue.total() == 0)
    page.ask("Network.emulateNetworkConditions", **{**slow, "uploadThroughput": -1})
    held = threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        publish = BinaryStore.publish
        patched.setattr(BinaryStore, "publish", lambda *a: held.wait(10) and publish(*a))
        page.click("Upload")
        page.sees("All is sent: the server checks it")
        held.set()
        page.sees("Not checked: stored as it is", "4.0 MiB (4194304 bytes)")


def test_page_says_that_a_connection_broke(bench, tmp_path):
    _, tab = bench
    page = tab()
    page.choose(write(tmp_path / "a-1.0.0.hex", firmware()[0]))
    page.ask("Network.emulateNetworkConditions", offline=True, latency=0,
             downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
    page.click("Upload")
    page.wait("alert().includes('The connection is broken')")
    page.click("All images")
    page.wait("alert().includes('The connection is broken')")
    page.ask("Network.emulateNetworkConditions", offline=False, latency=500,
             downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
    page.click("Upload")
    page.sees("Uploading a-1.0.0.hex")
    assert page.js("alert()") == ""


def test_page_shows_a_refusal_of_the_header_while_it_still_sends(browser, tmp_path):
    settings = Settings(data=tmp_path / "data", max_upload=MIB)
    with running(settings) as server:
        with contextlib.closing(Tab(browser, server, server.token())) as page:
            page.choose(write(tmp_path / "large-1.0.0.bin", bytes(100 * MIB)))
            page.click("Upload")
            page.wait("alert().includes('larger than the 1048576 bytes')")
    assert server.application.catalogue.total() == 0


def test_page_takes_a_file_that_is_dropped_and_one_that_is_chosen_again(bench, tmp_path):
    server, tab = bench
    page = tab()
    drop = """
    (() => {
        const data = new DataTransfer();
        data.items.add(new File(["x"], "dropped-1.2.3.bin"));
        const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        return document.body.dispatchEvent(event);
    })()"""
    assert page.js(drop) is False  # or the browser would show the file
    page.sees("dropped-1.2.3.bin, 1 byte")
    assert page.js("[field('Label').value, field('Version').value]") == ["dropped", "1.2.3"]
    path = write(tmp_path / "a-1.0.0.hex", b":00000001")
    page.choose(path)
    page.click("Upload")
    page.wait("alert().includes('record is cut off')")
    write(path, firmware()[0])
    page.choose(path)
    page.sees(f"a-1.0.0.hex, 2.8 KiB ({path.stat().st_size} bytes)")
    page.click("Upload")
    page.sees("Checked: sound Intel HEX")
    page.js(drop)
    page.sees("dropped-1.2.3.bin, 1 byte", "1 of 1 images")


def test_page_stores_unchecked_what_is_refused_where_that_is_wished(bench, tmp_path):
    _, tab = bench
    page = tab()
    page.choose(write(tmp_path / "a-1.0.0.hex", b":00000001"))
    page.click("Upload")
    page.wait("button('Store it unchecked')")
    page.js("[button('Store it unchecked')].map(one => [one.click(), one.click()])")
    page.sees("Not checked: stored as it is", "00000000  3A 30 30 30 30 30 30 30 31 ..")
    page.js("location.hash = ''")
    page.sees("unchecked", "1 of 1 images")


def test_page_shows_nothing_where_it_does_not_belong(bench, monkeypatch):
    """What comes late: a link, bytes of a dump, an error; and a dialog of another image."""
    server, tab = bench
    client = client_of(server.application)
    one = client.stored(firmware(20_000)[0], label="one")
    two = client.stored(firmware(seed=2)[0], label="two")
    page = tab()
    page.open(one)
    with monkeypatch.context() as slow:
        sign = Tokens.sign
        slow.setattr(Tokens, "sign", lambda *a: time.sleep(0.4) or sign(*a))
        page.click("Make a link")
        page.open(two)
        time.sleep(0.6)
        assert page.js("!field('Link')")
    page.js("location.hash = 'no-such-image'")
    page.open(two)
    time.sleep(0.1)
    assert page.js("alert()") == ""
    page.click("Delete image")
    page.sees("Delete two 1.0.0 and its binary?")
    page.open(one)
    page.wait("!document.querySelector('dialog')")
    with monkeypatch.context() as slow:
        opened, calls = BinaryStore.open, iter([0.4])
        slow.setattr(BinaryStore, "open", lambda *a: time.sleep(next(calls, 0)) or opened(*a))
        page.wait("document.querySelector('#dump')?.textContent.startsWith('00000000')")
        page.click("Next")
        page.fill("Go to", "0x1000")
        page.press("Enter", 13, "\r")
        page.wait("document.querySelector('#dump').textContent.startsWith('00001000')")
        time.sleep(0.5)
        assert page.js("document.querySelector('#dump').textContent.startsWith('00001000')")
    page.click("Next")
    page.wait("document.querySelector('#dump').textContent.startsWith('00001200')")
    assert client.get(f"/image/{two}").json["confirmed"]


def test_page_goes_on_with_an_upload_while_one_looks_elsewhere(bench, tmp_path, monkeypatch):
    server, tab = bench
    other = client_of(server.application).stored(label="other")
    page = tab()
    page.choose(write(tmp_path / "new-1.0.0.hex", firmware()[0]))
    publish, held = BinaryStore.publish, threading.Event()
    monkeypatch.setattr(BinaryStore, "publish", lambda *a: held.wait(10) and publish(*a))
    page.click("Upload")
    page.sees("the server checks it")
    assert page.js("!button('Cancel')")  # it would come too late
    page.open(other)
    page.sees("the server checks it", "other 1.0.0")
    page.wait("document.activeElement.id === 'title' && field('Go to')")
    page.fill("Go to", "0x10")
    held.set()
    page.sees("new 1.0.0 is stored. It is sound Intel HEX.")
    assert page.js("field('Go to').value") == "0x10"
    assert page.js("location.hash") == "#" + other


def test_page_cancels_an_upload_before_the_image_is_there(bench, tmp_path, monkeypatch):
    server, tab = bench
    page = tab()
    page.choose(write(tmp_path / "new-1.0.0.hex", firmware()[0]))
    add = Catalogue.add
    monkeypatch.setattr(Catalogue, "add", lambda *a, **b: time.sleep(0.3) or add(*a, **b))
    page.click("Upload")
    page.click("Cancel")
    page.wait("alert().includes('The upload was cancelled')")
    wait_until(lambda: server.application.catalogue.total() == 0)


def test_page_stores_nothing_in_an_image_it_was_not_meant_for(bench, tmp_path, monkeypatch):
    server, tab = bench
    other, _ = server.application.catalogue.add("admin", "pump", "9.9.9")
    page = tab()
    page.choose(write(tmp_path / "valve-1.0.0.hex", b":00000001"))
    add = Catalogue.add
    monkeypatch.setattr(Catalogue, "add", lambda *a, **b: time.sleep(0.3) or add(*a, **b))
    page.click("Upload")
    page.open(other)
    page.wait("alert().includes('record is cut off')")
    assert page.js("!button('Store it unchecked')")
    page.js("location.hash = ''")
    page.sees("pump")
    get = Catalogue.get_json
    monkeypatch.setattr(Catalogue, "get_json", lambda *a: time.sleep(0.4) or get(*a))
    page.js(f"location.hash = '{other}'")
    page.click("Upload")  # of the list, which is still shown
    page.sees("pump 9.9.9")
    page.wait("alert().includes('record is cut off')")
    assert not client_of(server.application).get(f"/image/{other}").json["confirmed"]


def test_page_keeps_a_token_though_the_one_before_is_refused_late(bench, browser, monkeypatch):
    server, _ = bench
    verify = Tokens.verify
    monkeypatch.setattr(
        Tokens, "verify", lambda s, h: time.sleep(0.4 * (h == "Bearer wrong")) or verify(s, h)
    )
    with contextlib.closing(Tab(browser, server)) as page:
        page.fill("Token", "wrong")
        page.click("Use token")
        page.js(f"sessionStorage.setItem('token', {server.token()!r})")
        page.ask("Page.reload")
        page.sees("No image is stored yet.")
        page.click("Forget token")
        page.fill("Token", "wrong")
        page.click("Use token")
        page.wait("alert().includes('Invalid authorization token') && button('Use token')")


def test_page_takes_away_what_it_has_created_before_it_forgets_the_token(bench, tmp_path):
    server, tab = bench
    page = tab()
    page.ask("Network.emulateNetworkConditions", offline=False, latency=0,
             downloadThroughput=-1, uploadThroughput=500_000)  # fmt: skip
    page.choose(write(tmp_path / "large-1.0.0.bin", bytes(2 * MIB)))
    page.click("Upload")
    page.wait("/[1-9] %/.test(text())")
    page.click("Forget token")
    page.wait("button('Use token')")
    wait_until(lambda: server.application.catalogue.total() == 0)


@pytest.mark.parametrize("token", ["a.bnVsbA.c", "a.W10.c", "a.e30.c\u200b"])
def test_page_survives_an_odd_token_and_an_odd_address(bench, browser, token):
    server, tab = bench
    with contextlib.closing(Tab(browser, server, token)) as stranger:
        stranger.wait("alert().includes('Invalid authorization token') && button('Use token')")
        assert "No image" not in stranger.js("text()")
    page = tab()
    page.js("location.hash = '%E0'")
    page.wait("alert().includes('No such image')")


def test_page_reads_a_scope_that_is_a_list(bench, browser):
    server, _ = bench
    token = forged(HS256, {"service": "admin", "scope": ["image:read", "image:write"]},
                   server.application.tokens._secret).partition(" ")[2]  # fmt: skip
    with contextlib.closing(Tab(browser, server, token)) as page:
        page.sees("This token may not delete")
        assert "may not write" not in page.js("text()")
    mistyped = forged(HS256, {"service": "admin", "scope": "image:raed"},
                      server.application.tokens._secret).partition(" ")[2]  # fmt: skip
    with contextlib.closing(Tab(browser, server, mistyped)) as page:
        page.wait("alert().includes('what begins with image: in scope is not image:read')")
        assert page.js("field('Token').value") == mistyped  # to be mended
        page.js("location.hash = '0'")
        time.sleep(0.1)
        page.wait("alert().includes('in scope')")


def test_page_shows_warnings_and_offers_bin_only_where_it_can_be_had(bench, tmp_path):
    server, tab = bench
    client = client_of(server.application)
    apart = [record(0, 0, b"here"), record(4, 0, b"\x10\1"), record(0, 0, b"far"), END]
    far = client.stored("".join(apart).encode(), label="far")
    odd = record(0x0A, 0, b"\1") + record(5, 0, b"\0\0\0\4") + record(5, 0, b"\0\0\0\5")
    other = client.stored((odd + GOOD + END).encode(), label="other")
    page = tab()
    page.open(far)
    page.sees("bin from 0x00000000 to 0x00000003", "bin from 0x10010000 to 0x10010002")
    assert "gaps filled" not in page.js("text()")
    page.save_downloads_in(tmp_path)
    page.click("bin")
    wait_until(lambda: (tmp_path / "far-1.0.0.bin").exists(), 20)
    wait_until(lambda: (tmp_path / "far-1.0.0.bin").read_bytes() == b"far")
    page.open(other)
    page.sees("with 2 warnings", "what records of type 0A hold is unknown", "Memory map")
    page.wait("!button('bin') && !document.querySelector('#dump') && !alert()")


def test_page_cuts_each_long_gap_and_marks_an_entry_point_without_data(bench):
    server, tab = bench
    rows = [record(4, 0, bytes([0, 16 * n])) + record(0, 0, bytes(200)) for n in range(12)]
    content = "".join([*rows, record(5, 0, b"\0\1\0\0"), END]).encode()
    page = tab()
    page.open(client_of(server.application).stored(content))
    page.wait("document.querySelectorAll('svg .cut').length === 11")
    page.wait("document.querySelectorAll('svg .entry').length === 1")
    heights = (
        "[...document.querySelectorAll('svg .data')].map(one => Number(one.getAttribute('height')))"
    )
    assert page.js(heights) == [20] * 12
    rows = [record(0, 200 * n, bytes(200)) for n in range(5)]
    content = "".join([*rows, record(4, 0, b"\x10\0"), record(0, 0, b"x"), END]).encode()
    page.open(client_of(server.application).stored(content))
    page.wait("document.querySelectorAll('svg .data').length === 2")  # however small
    rows = [record(0, 0x100, bytes(200)), record(5, 0, b"\x08\0\0\5")]
    page.open(client_of(server.application).stored(hex_file(*rows)))
    page.sees("0x08000005, where there are no data")
    page.wait("document.querySelectorAll('svg .entry').length === 0")


def test_page_downloads_from_its_own_origin_though_links_name_another(browser, tmp_path):
    settings = Settings(data=tmp_path / "data", public_url="https://fw.example.com/it's")
    with running(settings) as server:
        image_id = client_of(server.application).stored()
        with contextlib.closing(Tab(browser, server, server.token())) as page:
            page.open(image_id)
            page.save_downloads_in(tmp_path)
            page.click("hex")
            wait_until(lambda: (tmp_path / "sensor-1.0.0.hex").exists(), 20)
            page.click("Make a link")
            page.wait('field("Link")?.value.startsWith("https://fw.example.com/it\'s/image/")')
            link, *words = page.js("[field('Link').value, field('With curl').value]")
            assert shlex.split(words[0])[-1] == link
            assert "on this machine alone" not in page.js("text()")
            page.js("field('Valid for').dispatchEvent(new Event('change'))")
            page.wait("!field('Link')")  # it is not for the time that is chosen now


def test_page_makes_links_and_commands_that_work(bench, tmp_path):
    server, tab = bench
    page = tab()
    content = layout_of_gaps()
    page.choose(write(tmp_path / "fw-1.0.0.hex", content))
    page.fill("Label", "it's $(reboot) `x` \u202e;")
    page.click("Upload")
    page.sees("it's $(reboot) `x` [U+202E];")
    choice = "field('Valid for')"
    page.js(f"({choice}.value = 86400, {choice}.dispatchEvent(new Event('change')))")
    page.click("Make a link")
    page.wait("field('Link')")
    link = page.js("field('Link').value")
    assert urllib.request.urlopen(link).read() == content
    page.sees("Whoever has this link can download until ", "It works on this machine alone")
    expires = int(urllib.parse.parse_qs(link.partition("?")[2])["expires"][0])
    assert abs(expires - time.time() - 86400) < 60
    for name, tool in (("With curl", "curl"), ("With wget", "wget")):
        if shutil.which(tool):
            folder = tmp_path / tool
            folder.mkdir()
            run("sh", "-ec", page.js(f"field('{name}').value"), cwd=folder, check=True)
            assert (folder / "it_s_reboot_x_-1.0.0.hex").read_bytes() == content
    copies = page.js(
        "[...document.querySelectorAll('button')].filter(b => b.textContent === 'Copy').length"
    )
    assert copies == 3
    page.js(
        "document.oncopy = () => window.copied = getSelection().toString() || document.activeElement.value"
    )
    page.js("navigator.__proto__.__defineGetter__('clipboard', () => undefined)")
    page.click("Copy")
    page.sees("Copied")
    assert page.js("window.copied").startswith("wget -O")
    folder = tmp_path / "downloads"
    page.save_downloads_in(folder)
    for name, wanted in (("hex", content), ("bin", None)):
        page.click(name)
        path = folder / f"it_s_reboot_x_-1.0.0.{name}"
        wait_until(lambda path=path: path.exists() and path.stat().st_size > 0, 20)
        if wanted:
            assert path.read_bytes() == wanted


def test_page_deletes_after_it_has_asked(bench):
    server, tab = bench
    client = client_of(server.application)
    image_id = client.stored()
    page = tab()
    page.open(image_id)
    page.click("Delete binary")
    page.wait("document.querySelector('dialog[open]')")
    page.press("Escape", 27)
    page.wait("!document.querySelector('dialog')")
    page.click("Delete image")
    page.click("Cancel")
    page.wait("!document.querySelector('dialog')")
    assert client.get(f"/image/{image_id}").json["confirmed"]
    page.click("Delete binary")
    page.click("Delete")
    page.sees("Not confirmed", "Deleted: the binary of sensor 1.0.0.")
    page.click("Delete image")
    page.sees("Delete sensor 1.0.0?")
    page.click("Delete")
    page.sees("No image is stored yet.", "Deleted: sensor 1.0.0.")
    client.get(f"/image/{image_id}", status=404)


def test_page_offers_a_token_what_it_may_do_and_says_the_rest(bench):
    server, tab = bench
    image_id = client_of(server.application).stored()
    page = tab("read")
    page.sees("This token may not write", "This token may not delete", "sensor")
    assert page.js("!button('Upload')")
    page.open(image_id)
    page.wait("button('Make a link') && !button('Delete image') && !button('Delete binary')")
    blind = tab("write")
    blind.sees("This token may not read")
    blind.wait("button('Upload') && !field('Filter')")


def test_page_lists_the_newest_first_and_filters_while_one_types(bench):
    server, tab = bench
    add = server.application.catalogue.add
    ids = [add("admin", f"label {number}", f"1.{number}.0")[0] for number in range(450)]
    add("admin", "<b>&amp;\u202e\u2066", '"><img src=x onerror=alert(1)>')
    page = tab()
    page.sees("451 of 451 images", "<b>&amp;[U+202E][U+2066]", '"><img src=x onerror=alert(1)>')
    rows = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[1].textContent)"
    assert page.js(rows)[1:4] == ["1.449.0", "1.448.0", "1.447.0"]
    assert len(page.js(rows)) == 200
    page.click("Show more")
    assert len(page.js(rows)) == 400
    page.fill("Filter", "LABEL 12")
    page.wait(f"{rows}.length === 11")
    page.fill("Filter", "label 123 1.123")  # as the page calls the image
    page.wait(f"{rows}.length === 1")
    page.fill("Filter", ids[7][:13].upper())
    page.wait(f"{rows}.length === 1")
    page.js("document.querySelector('tbody a').focus()")
    page.press("Enter", 13, "\r")
    page.sees(ids[7], "label 7 1.7.0")
    assert page.js("location.hash") == "#" + ids[7]
    page.load("Page.reload")
    page.sees("label 7 1.7.0")
    page.js("history.back()")
    page.wait("field('Filter')")
    page.js("document.querySelectorAll('tbody a')[150].click()")
    page.sees("Not confirmed")
    page.js("history.back()")
    page.wait("document.activeElement === document.querySelectorAll('tbody a')[150]")
    for total in (452, 453):
        add("admin", "the latest", "1.0.0")
        page.click("All images")
        page.sees(f"of {total} images")
    page.fill("Filter", " ")
    for name in ("Show more", "label 52"):
        page.js("button('Show more').focus()")
        page.press("Enter", 13, "\r")
        assert page.js("document.activeElement.textContent") == name
    assert page.js("!button('Show more')")
    page.js("location.hash = 'no-such-image'")
    page.wait("alert().includes('No such image')")


def test_page_draws_thousands_of_segments_and_counts_those_it_does_not_list(bench):
    server, tab = bench
    image_id = client_of(server.application).stored(scattered(1500))
    page = tab()
    page.open(image_id)
    page.sees("and 500 more segments")
    page.wait("document.querySelector('#dump')")
    assert page.js("document.querySelectorAll('svg rect').length") < 700
    assert page.js("document.querySelector('#dump').textContent").count("78 .. 78 ..") >= 32


def test_page_works_with_100_000_images(bench):
    server, tab = bench
    with contextlib.closing(
        sqlite3.connect(server.application.settings.data / "image_manager.db")
    ) as tool:
        tool.executemany(
            "INSERT INTO image (id, tenant, label, fw_version, precedence, created)"
            " VALUES (?, 'admin', ?, '1.0.0', '', ?)",
            (
                (f"id-{n}", f"label {n}", f"2026-01-01T00:00:00.{n:06}+00:00")
                for n in range(100_000)
            ),
        )
        tool.commit()
    page = tab()
    page.wait("text().includes('100000 of 100000 images')", 20)
    page.fill("Filter", "label 99")
    page.wait("text().includes('1111 of 100000 images')")


@pytest.mark.parametrize("prefix", ["", "/fw-image"])
def test_page_works_at_both_addresses(browser, tmp_path, prefix):
    with running(Settings(data=tmp_path, url_prefix="/fw-image")) as server:
        there = server._replace(url=server.url.removesuffix("/fw-image"))
        client_of(server.application).stored()
        with contextlib.closing(Tab(browser, there, server.token(), prefix + "/")) as page:
            page.sees("sensor")
            page.js("document.querySelector('tbody a').click()")
            page.sees("Memory map", "Contents")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_page_fits_a_phone_and_has_no_fault_that_axe_knows(bench, tmp_path, mode):
    server, tab = bench
    client = client_of(server.application)
    for number in range(5):
        client.stored(label=f"label {number}")
    image_id = client.stored(layout_of_gaps())
    page = tab(width=390)
    page.ask(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}]
    )

    def fits():
        wide, has = page.js("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= has
        if AXE:
            page.ask("Runtime.evaluate", expression=Path(AXE).read_text())
            found = page.js("axe.run().then(found => found.violations.map(one => one.id"
                            " + ': ' + one.nodes.map(node => node.html).join(' ')))")  # fmt: skip
            assert found == []

    page.sees("sensor", "6 of 6 images")
    assert page.js("[...document.querySelectorAll('tr')].every(row => row.offsetHeight)")
    background = page.js("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 25, 29)"}[mode]
    fits()
    page.choose(write(tmp_path / "bad-1.0.0.hex", b":" + b"0" * 600))
    page.click("Upload")
    page.wait("alert().includes('cut off here')")
    fits()
    page.open(image_id)
    page.click("Make a link")
    page.wait("field('With curl') && document.querySelector('#dump')")
    fits()
    page.click("Delete image")
    page.wait("document.querySelector('dialog[open]')")
    assert page.js("document.activeElement.textContent") == "Cancel"
    fits()
    page.click("Cancel")
    page.js("location.hash = ''")
    page.click("Forget token")
    page.fill("Token", server.token("t" * 128))
    page.click("Use token")
    page.choose(write(tmp_path / f"{'f' * 180}.hex", b"x"))
    fits()


def test_page_can_be_used_by_the_keyboard_alone(bench):
    server, tab = bench
    image_id = client_of(server.application).stored()
    page = tab()
    page.load("Page.reload")
    page.sees("sensor")
    reached = set()
    for _ in range(40):
        page.press("Tab", 9)
        reached.add(page.js("document.activeElement.textContent || document.activeElement.id"))
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if "sensor" in reached:
            break
    assert {"Forget token", "file", "label", "version", "filter", "sensor"} <= reached
    page.press("Enter", 13, "\r")
    page.sees(image_id)
    page.wait("document.activeElement.tagName === 'H2'")
    page.wait("button('Next')")
    for name in ("Make a link", "First"):
        page.js(f"button('{name}').focus()")
        page.press("Enter", 13, "\r")
        wanted = "Copy" if name == "Make a link" else name
        page.wait(f"document.activeElement.textContent === '{wanted}'")
        time.sleep(0.1)
        assert page.js("document.activeElement.textContent") == wanted


# ------------------------------------------------------------------------------------- command line


def read_only(path):
    """Return what to put before a command that finds a path on a read-only file system."""
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", script, str(path)]
    if not shutil.which("unshare") or run(*before, "true").returncode:
        pytest.skip("needs mounts of its own")
    return before


def test_first_start_makes_all_and_says_where_and_how(tmp_path):
    data = tmp_path / "new" / "data"
    with service(data) as server:
        assert is_well(server)
        hint = server.wait_for("get a token with: (.*)")[1]
        assert len(server.lines) <= 5
        printed = run(*shlex.split(hint), check=True, text=True, cwd=tmp_path).stdout
        assert printed.count("\n") == 1
        with Connection(server, None, Authorization=f"Bearer {printed.strip()}") as connection:
            assert connection.listed() == []
    assert names_in(data) == {"binaries", "tmp", "image_manager.db", "secret.key", "service.lock"}


def test_what_cannot_start_says_so_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    no_start(tmp_path / "file", "Cannot write in", "--data")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "image_manager.db").write_bytes(b"no database" * 100)
    no_start(tmp_path / "bad", "restore it from a backup")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        no_start(tmp_path / "a", f"port {port}", "--port", options=["--port", port])
    for host in ("no.such.host.invalid", "a..b", "a" * 70):
        no_start(tmp_path / "h", "Cannot listen", "--host", options=["--host", host])
    environ = {"IMAGE_MANAGER_JWT_SECRET": os.fsdecode(b"\xff" * 40)}
    one_sentence(command("token", "--data", tmp_path / "s", environ=environ), "jwt_secret")
    (tmp_path / "locked" / "service.lock").mkdir(parents=True)
    no_start(tmp_path / "locked", "Cannot lock")
    with service(tmp_path / "used"):
        no_start(tmp_path / "used", "Another service uses")
    key = ["--jwt-public-key", tmp_path / "none"]
    no_start(tmp_path / "k", "jwt-public-key", options=key)


@parametrize("name, said", [
    ("image_manager.db", "let this user write it"), ("service.lock", "Cannot lock"), ("binaries", "Cannot write in"),
    ("", "Cannot write in"),
])  # fmt: skip
def test_store_that_cannot_be_written_stops_the_start(tmp_path, name, said):
    with running(Settings(data=tmp_path)):
        pass
    no_start(tmp_path, said, before=read_only(tmp_path / name))


def test_binaries_on_another_file_system_stop_the_start(tmp_path):
    """A rename between two is no single step, and fails at the first upload."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs another file system")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        (tmp_path / "binaries").symlink_to(folder)
        no_start(tmp_path, "on two mounts")


def in_a_shell_of_its_own(script, *words):
    """Run a script of sh that may mount what nobody else sees; return (status, output, errors)."""
    if not shutil.which("unshare") or run("unshare", "-m", "true").returncode:
        pytest.skip("needs mounts of its own")
    command = ["unshare", "-m", "sh", "-ec", script, *map(str, words)]
    done = run(*command, env=ENVIRON, text=True)
    return done.returncode, done.stdout, done.stderr


def test_binaries_mounted_apart_stop_the_start_though_the_file_system_is_one(tmp_path):
    """As a volume of a container may be."""
    for name in ("binaries", "elsewhere"):
        (tmp_path / name).mkdir()
    script = 'mount --bind "$0/elsewhere" "$0/binaries"; exec "$1" "$2" serve --port 0 --data "$0"'
    done = in_a_shell_of_its_own(script, tmp_path, sys.executable, PROGRAM)
    one_sentence(done, "on two mounts")
    assert not names_in(tmp_path / "tmp")


@parametrize("command", ["serve --port 0", "verify"])
def test_full_disk_at_the_start_is_called_so(tmp_path, command):
    script = f"""
mount -t tmpfs -o size=2m none "$0"
"$1" -c 'import pathlib, sys; sys.path.insert(0, sys.argv[2])
import image_manager as m; m.create_app(m.Settings(data=pathlib.Path(sys.argv[1]))).close()' "$0" "$3"
dd if=/dev/zero of="$0/fill" bs=4k 2> /dev/null || true
exec "$1" "$2" {command} --data "$0"
"""
    done = in_a_shell_of_its_own(script, tmp_path, sys.executable, PROGRAM, HERE)
    one_sentence(done, "disk is full", "make room")


def test_locked_catalogue_at_the_start_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(image_manager, "PATIENCE", 0.1)
    create_app(Settings(data=tmp_path)).close()
    with catalogue_locked(tmp_path), pytest.raises(CannotStart, match="another program has locked"):
        create_app(Settings(data=tmp_path))


@needs_posix
def test_pipe_that_is_full_from_the_beginning_does_not_stop_the_start(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    with silent_service(tmp_path, stderr=writing) as server:
        os.close(writing)
        assert is_well(server)
    os.close(reading)


@needs_hangup
@parametrize("workers", [1, 2])
def test_service_started_by_nohup_outlives_its_terminal(tmp_path, workers):
    with service(tmp_path, "--workers", workers, before=["nohup"]) as server:
        server.send(signal.SIGHUP)
        time.sleep(0.3)
        assert is_well(server)


TOO_OLD = ("version_info = (3, 9, 18)", "needs Python 3.10 or newer")
PACKAGES = ["bottle", "jwt", "waitress", "multipart"]


@parametrize("lack, said", [TOO_OLD, *[(f"modules[{name!r}] = None", name) for name in PACKAGES]])
def test_python_that_is_too_old_and_a_missing_package_are_told_so(lack, said):
    script = f"import runpy, sys; sys.{lack}; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run(sys.executable, "-c", script, PROGRAM, text=True)
    remedy = "pip install -r" if said in PACKAGES else ""
    one_sentence((done.returncode, done.stdout, done.stderr), said, remedy)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@parametrize("broken", ["2>/dev/full", "2>&-", "2>&- >&- <&-"])
@parametrize("workers", [1, 2])
def test_standard_error_that_is_full_or_closed_stops_nothing(tmp_path, broken, workers):
    shell = ["bash", "-c", f'exec "$0" "$@" {broken}']
    with silent_service(tmp_path, "--workers", workers, before=shell) as server:
        with Connection(server) as connection:
            image_id = connection.stored(b"x")
            assert connection.ask("GET", "/image", Authorization="Bearer x").status == 401
            assert connection.ask("DELETE", f"/image/{image_id}").status == 200


def test_token_that_the_start_hints_at_works_from_any_folder(tmp_path):
    """With a secret from the environment, an audience and an issuer."""
    (tmp_path / "elsewhere").mkdir()
    environ = {"IMAGE_MANAGER_JWT_SECRET": SECRET}
    options = ["--jwt-audience", "fw devices", "--jwt-issuer", "us"]
    relative = os.path.relpath(tmp_path / "data")
    with service(relative, *options, environ=environ) as server:
        hint = server.wait_for("get a token with: (.*)")[1]
        assert "IMAGE_MANAGER_JWT_SECRET" in server.wait_for("which needs .*").string
        assert SECRET not in server.log
        environ = {**ENVIRON, **environ}
        done = run(*shlex.split(hint), cwd=tmp_path / "elsewhere", env=environ, text=True)
        assert done.stderr == "" and done.stdout.count("\n") == 1
        with Connection(server, None, Authorization=f"Bearer {done.stdout.strip()}") as connection:
            assert connection.listed() == []


def test_token_needs_to_read_only(tmp_path):
    with running(Settings(data=tmp_path)):
        pass
    status, out, err = command("token", "--data", tmp_path, before=read_only(tmp_path))
    assert (status, out.count("\n"), err) == (0, 1, "")


@parametrize("words, said", [
    ("--port x", "takes a whole number"),
    ("--port 99999", "port takes a whole number from 0 to 65535"),
    ("serve --max-upload 1T", "512M"),
    ("serve --workers 0", "workers takes a whole number"),
    ("serve --colour", "--colour"),
    ("sing", "serve"),
    ("token --scope raed", "read, write and delete"),
    ("token --expires tomorrow", "30d"),
    ("token --service ''", "service"),
    ("backup", "destination"),
    ("verify --data /nonexistent", "--data"),
    ("backup --data /nonexistent x", "--data"),
    ("IMAGE_MANAGER_PORT=sixty serve", "port takes a whole number from 0 to 65535, not 'sixty'"),
    ("IMAGE_MANAGER_MAX_UPLOAD=big serve", "max_upload takes"),
    ("IMAGE_MANAGER_REQUIRE_INTEL_HEX=maybe serve", "require_intel_hex takes"),
])  # fmt: skip
def test_bad_options_and_environments_are_told_what_is_allowed(words, said):
    words = shlex.split(words)
    environ = dict(word.split("=") for word in words if word.startswith("IMAGE_MANAGER"))
    one_sentence(command(*words[len(environ) :], environ=environ), said, *environ.values())


def test_environment_sets_options_and_the_command_line_wins(tmp_path):
    environ = {
        "IMAGE_MANAGER_DATA": str(tmp_path / "from-environment"),
        "IMAGE_MANAGER_URL_PREFIX": "/ignored",
        "IMAGE_MANAGER_REQUIRE_INTEL_HEX": "yes",
        "IMAGE_MANAGER_JWT_SECRET": SECRET,
        "IMAGE_MANAGER_JWT_AUDIENCE": "fw",
    }
    with service(tmp_path / "data", "--url-prefix", "/fw", environ=environ) as server:
        assert server.url.endswith("/fw")
        status, out, _ = command("token", "--data", tmp_path / "data", environ=environ)
        assert jwt.decode(out.strip(), SECRET, ["HS256"], audience="fw")["service"] == "admin"
        with Connection(server, None, Authorization=f"Bearer {out.strip()}") as connection:
            assert connection.upload(connection.create(), b"x") == 400
    assert not (tmp_path / "data" / "secret.key").exists()
    status, out, _ = command("token", environ=environ)
    assert status == 0 and not (tmp_path / "from-environment").exists()


def test_token_prints_a_token_and_nothing_else(tmp_path):
    status, out, err = command("token", "--data", tmp_path)
    assert (status, out.count("\n"), err.count("\n")) == (0, 1, 1)
    assert f"made {tmp_path / 'secret.key'}, as there was none" in err
    secret = (tmp_path / "secret.key").read_text().strip()
    assert jwt.decode(out.strip(), secret, ["HS256"])

    def claims(*options):
        status, out, err = command("token", "--data", tmp_path, *options)
        assert (status, err) == (0, "")
        return jwt.decode(out.strip(), secret, ["HS256"])

    plain = claims()
    assert plain["service"] == "admin" and "scope" not in plain
    assert abs(plain["exp"] - time.time() - 30 * 86400) < 60
    lab = claims("--service", "lab", "--scope", "read,write", "--expires", "12h")
    assert (lab["service"], lab["scope"]) == ("lab", "image:read image:write")
    assert abs(lab["exp"] - time.time() - 12 * 3600) < 60
    assert "exp" not in claims("--expires", "never")


@needs_posix
@parametrize("output, other", [("stderr", "stdout"), ("stdout", "stderr")])
def test_log_that_nobody_reads_stops_nothing(tmp_path, output, other):
    reading, writing = os.pipe()
    pipes = {output: writing, other: subprocess.DEVNULL}
    with silent_service(tmp_path, "--access-log", "-", **pipes) as server:
        os.close(writing)
        with Connection(server, service=None, timeout=5) as connection:
            for _ in range(1500):
                answer = connection.ask("GET", "/image/x", Authorization="Bearer a.b.c")
                assert answer.status == 401
    os.close(reading)


def test_help_is_a_page_worth_reading_for_each_command():
    status, out, _ = command("--help")
    assert status == 0 and all(word in out for word in ("serve", "token", "verify", "backup"))
    for name in ("serve", "token", "verify", "backup"):
        status, out, _ = command(name, "--help")
        assert status == 0 and "--data" in out
    out = command("serve", "--help")[1]
    for field in image_manager.dataclasses.fields(Settings):
        if field.name != "jwt_secret":
            assert "--" + field.name.replace("_", "-") in out
    assert "8000" in out and "512M" in out and "IMAGE_MANAGER_PORT" in out
    assert command("--version")[1] == f"image manager {image_manager.__version__}\n"


def test_platform_without_fork_serves_with_one_worker_only(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(os, "fork", raising=False)
    assert image_manager.main(["serve", "--data", str(tmp_path), "--workers", "2"]) == 2
    assert "--workers 1" in capsys.readouterr().err


@parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGHUP", marks=needs_hangup)])
@parametrize("workers", [1, 2])
def test_signal_lets_requests_finish_and_idle_clients_are_no_hindrance(tmp_path, workers, name):
    content = random.Random(7).randbytes(8 * MIB)
    with service(tmp_path, "--workers", workers) as server, Connection(server) as connection:
        image_id, other = connection.stored(content), connection.create()
        with dials(server, 3) as (_, half, upload), dial(server, buffer=65536) as slow:
            half.sendall(b"GET /image HT")
            slow.sendall(fetch(server, image_id))
            upload.sendall(put(server, 200_000, other) + b"x" * 100_000)
            time.sleep(0.3)
            server.send(getattr(signal, name))
            refuses_connections(server)
            assert ask(upload, b"x" * 100_000).status == 200
            assert sha256(read_answer(slow).body) == sha256(content)
            began = time.monotonic()
            assert server.process.wait(10) == 0 and time.monotonic() - began < 5
        assert server.end() == 0 and "Traceback" not in server.log


@parametrize("workers", [1, 2])
def test_term_loses_no_request_that_was_sent(tmp_path, workers):
    with service(tmp_path, "--workers", workers) as server, dials(server, 60) as socks:
        for sock in socks[:30]:
            ask(sock, HEALTH)
        for sock in socks:
            sock.sendall(HEALTH)
        server.send(signal.SIGTERM)
        assert [read_answer(sock).status for sock in socks] == [200] * 60
        assert server.end() == 0 and "Traceback" not in server.log


@needs_posix
def test_term_loses_no_connection_that_waits_and_no_pipelined_request(tmp_path):
    with service(tmp_path) as server, dial(server) as sock:
        ask(sock, HEALTH)
        server.send(signal.SIGSTOP)
        with dials(server, 30) as waiting:
            for other in waiting:
                other.sendall(raw("GET /image/x"))
            sock.sendall(raw("GET /image/x") * 40)
            server.send(signal.SIGTERM)
            server.send(signal.SIGCONT)
            assert [read_answer(each).status for each in [sock] * 40 + waiting] == [401] * 70
        assert server.end() == 0


@parametrize("workers", [1, 2])
def test_second_interrupt_ends_at_once(tmp_path, workers):
    with service(tmp_path, "--workers", workers) as server:
        with Connection(server) as connection:
            image_id = connection.stored(bytes(8 * MIB))
        with dial(server) as slow:
            slow.sendall(fetch(server, image_id))
            time.sleep(0.2)
            server.send(signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None  # it waits for the download
            began = time.monotonic()
            assert server.end(signal.SIGINT) == 130 and time.monotonic() - began < 2


def test_request_that_takes_for_ever_does_not_keep_the_service_from_ending(tmp_path):
    script = (
        "import runpy, sys, time; sys.argv = sys.argv[1:]; sys.path.insert(0, %r);"
        "import image_manager; image_manager.GRACE = 0.5;"
        "image_manager.Application.health = lambda *_: time.sleep(60);"
        "sys.exit(image_manager.main())" % str(HERE)
    )
    with service(tmp_path, script=script) as server, dial(server) as sock:
        sock.sendall(HEALTH)
        time.sleep(0.2)
        assert server.end(seconds=5) == 0


def test_lost_catalogue_stops_the_start_and_nothing_is_swept(tmp_path):
    data, kept = tmp_path / "data", tmp_path / "kept.db"
    database, said = data / "image_manager.db", "restore image_manager.db"
    with service(data) as server, Connection(server) as connection:
        image_id = connection.stored(b"precious")
    shutil.copy(database, kept)
    with store_in(tmp_path / "other"):
        pass
    database.unlink()
    for _ in range(2):
        with pytest.raises(CannotStart, match=said):
            create_app(Settings(data=data))
        one_sentence(command("verify", "--data", data), said)
    for replace in (
        database.unlink,
        lambda: database.write_bytes(b""),
        lambda: shutil.copy(tmp_path / "other" / "image_manager.db", database),
    ):
        replace()
        for _ in range(2):
            no_start(data, said)
        assert (data / "binaries" / f"{image_id}.hex").read_bytes() == b"precious"
    shutil.copy(kept, database)
    with service(data) as server, Connection(server) as connection:
        assert connection.download(image_id) == b"precious"


def test_start_removes_only_what_the_catalogue_says_is_left_over(tmp_path):
    with store_in(tmp_path) as client:
        kept, plain = client.stored(firmware()[0]), client.stored(b"plain")
        empty, cleared, gone = client.create(), client.stored(b"x"), client.stored(b"x")
        client.delete(f"/image/{cleared}/binary")
        client.delete(f"/image/{gone}")
    stray = uuid.uuid4()
    left = [f"{empty}.hex", f"{plain}.bin", f"{cleared}.bin", f"{gone}.hex"]
    unknown = [f"{stray}.hex", f"{stray}.bin", "notes.txt", f"{empty}.txt"]
    for name in left + unknown:
        (tmp_path / "binaries" / name).write_bytes(b"x")
    (tmp_path / "tmp" / "abc.hex").write_bytes(b"x")
    (tmp_path / "secret.key123.draft").write_bytes(b"x")
    for folder in ("tmp", "binaries"):
        (tmp_path / folder / "lost+found").mkdir()
    status, out, _ = command("verify", "--data", tmp_path)
    assert status == 1 and out.count("left over: ") == out.count("unknown: ") == 4
    with service(tmp_path) as server:
        assert "4 files in" in server.wait_for("belong to no image").string
        kept_names = {f"{kept}.hex", f"{kept}.bin", f"{plain}.hex", "lost+found"}
        assert names_in(tmp_path / "binaries") == kept_names | set(unknown)
        assert not list((tmp_path / "tmp").glob("*.hex"))
        assert not list(tmp_path.glob("*.draft"))
    assert command("verify", "--data", tmp_path)[1].count("unknown: ") == 4


def test_start_with_an_older_catalogue_removes_no_upload_that_it_does_not_know(tmp_path):
    """As where it is restored from a backup, which is what the service advises."""
    database = tmp_path / "image_manager.db"
    with store_in(tmp_path) as client:
        client.stored(b"first")
    shutil.copy(database, tmp_path / "kept.db")
    with store_in(tmp_path) as client:
        later = [client.stored(firmware(seed=seed)[0]) for seed in range(3)]
    shutil.copy(tmp_path / "kept.db", database)
    with service(tmp_path) as server:
        assert server.wait_for(r"(\d+) files in \S+ belong to no image")[1] == "6"
    said = command("verify", "--data", tmp_path)[1]
    for image_id in later:
        assert (tmp_path / "binaries" / f"{image_id}.hex").exists()
        assert f"unknown: {tmp_path}/binaries/{image_id}.hex" in said


@parametrize("stale", [
    "image_by_precedence", "sqlite_autoindex_image_1", "image", "image, image_by_precedence",
])  # fmt: skip
def test_start_with_a_stale_page_removes_no_upload(tmp_path, stale):
    """As from a card that lied about a write."""
    database = tmp_path / "image_manager.db"
    with store_in(tmp_path) as client:
        client.stored(b"first")
        later = [client.create() for _ in range(3)]
    old = database.read_bytes()
    with store_in(tmp_path) as client:
        for image_id in later:
            client.upload(image_id, firmware()[0])
    new = bytearray(database.read_bytes())
    with sqlite_in(tmp_path) as catalogue:
        (size,) = catalogue.execute("PRAGMA page_size").fetchone()
        for name in stale.split(", "):
            sql = "SELECT rootpage FROM sqlite_master WHERE name = ?"
            (page,) = catalogue.execute(sql, (name,)).fetchone()
            new[(page - 1) * size : page * size] = old[(page - 1) * size : page * size]
    database.write_bytes(new)
    server = Service(tmp_path)
    wait_until(lambda: server.process.poll() is not None or "listening" in server.log)
    server.end()
    for image_id in later:
        assert {f"{image_id}.hex", f"{image_id}.bin"} <= names_in(tmp_path / "binaries")


@pytest.fixture
def another_user():
    """Lend a folder, and what has a function run as a user who owns nothing in it."""

    def run_as_another(function):
        def as_another():
            os.setgid(65534)
            os.setuid(65534)
            function()

        child = multiprocessing.get_context("fork").Process(target=as_another)
        child.start()
        child.join(20)
        assert child.exitcode == 0

    if getattr(os, "geteuid", lambda: 1)() != 0:
        pytest.skip("needs to become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder), run_as_another


@parametrize("mode", [0o644, 0o600])
def test_verify_and_backup_need_no_more_rights_than_reading_and_say_who_lacks_them(
    another_user, mode
):
    folder, run_as_another = another_user
    with store_in(folder / "data") as client:
        image_id = client.stored()
    for path in (folder / "data").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "data" / "binaries" / f"{image_id}.hex").chmod(mode)

    def look():
        for found in (
            image_manager.verify_store(folder / "data", lambda *_: None),
            image_manager.back_up_store(folder / "data", folder / "copy"),
        ):
            said = f"unreadable: the files of image {image_id} (Permission denied): let this user"
            faults = [] if mode == 0o644 else [f"{said} read them"]
            assert found == (1, faults)

    run_as_another(look)


def test_heading_over_what_sqlite_finds_is_no_fault_of_its_own(tmp_path, monkeypatch):
    found = [("*** in database main ***\nTree 3 page 3: out of order",), ("row 1 missing",)]
    with contextlib.closing(Catalogue(tmp_path / "image_manager.db")) as catalogue:
        connection = types.SimpleNamespace(
            execute=lambda _: types.SimpleNamespace(fetchall=lambda: found)
        )
        lent = contextlib.nullcontext(connection)
        monkeypatch.setattr(catalogue, "_connection", lambda: lent)
        assert catalogue.faults() == ["Tree 3 page 3: out of order", "row 1 missing"]


def test_damaged_catalogue_stops_the_start_and_is_named_by_verify_and_backup(tmp_path):
    data, database = tmp_path / "data", tmp_path / "data" / "image_manager.db"
    with store_in(data) as client:
        for number in range(200):
            client.create(label=f"label {number}")
        image_id = client.stored(b"x")
    content = bytearray(database.read_bytes())
    content[8192:16384] = random.Random(1).randbytes(8192)
    database.write_bytes(content)
    for words in (["verify"], ["backup", tmp_path / "copy"]):
        status, out, _ = command(*words, "--data", data)
        assert status == 1 and "damaged: the catalogue (" in out
    no_start(data, "catalogue", "backup")
    with pytest.raises(CannotStart, match="backup"), running(Settings(data=data)):
        pass
    assert (data / "binaries" / f"{image_id}.hex").read_bytes() == b"x"


def test_last_image_deleted_is_no_lost_catalogue(tmp_path):
    with store_in(tmp_path) as client:
        image_id = client.stored(b"x")
        client.delete(f"/image/{image_id}")
    (tmp_path / "binaries" / f"{image_id}.hex").write_bytes(b"x")  # killed before it was removed
    with service(tmp_path):
        assert not names_in(tmp_path / "binaries")


def test_bodies_are_spooled_in_the_folder_and_memory_stays_where_it_was(tmp_path):
    with service(tmp_path) as server, Connection(server) as connection:
        connection.stored(b"warm")
        before, image_id = memory(server.process.pid), connection.create()
        block, peaks = random.Random(8).randbytes(MIB), []

        def blocks():
            for number in range(200):
                yield block
                peaks.append(memory(server.process.pid))
                assert number != 100 or server.spools()

        path, length = f"/image/{image_id}/binary", {"Content-Length": str(200 * MIB)}
        connection.request("PUT", path, blocks(), {**connection.headers, **length})
        answer = json.loads(connection.getresponse().read())
        assert answer == uploaded(image_id, False)
        connection.request("GET", path, headers=connection.headers)
        response, digest = connection.getresponse(), hashlib.sha256()
        while piece := response.read(MIB):
            digest.update(piece)
            peaks.append(memory(server.process.pid))
        assert digest.hexdigest() == sha256(block * 200)
        assert max(peaks) - before < 32 * MIB


@needs_posix
def test_file_that_the_disk_does_not_take_is_507_and_the_service_goes_on(tmp_path):
    """A real refusal of the operating system, for the spooled body and for the file."""
    with service(tmp_path, **limited(FSIZE=MIB)) as server, Connection(server) as connection:
        image_id = connection.create()
        answer = connection.ask("PUT", f"/image/{image_id}/binary", b"x" * 2 * MIB)
        assert answer.status == answer.json["status"] == 507
        connection.close()
        assert connection.upload(image_id, b"x" * 500_000) == 200
        assert connection.download(image_id) == b"x" * 500_000
        assert not names_in(tmp_path / "tmp")


@parametrize("workers", [1, 2])
def test_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path, workers):
    rng, stored, deleted = random.Random(9), {}, set()
    for _ in range(3):
        server = Service(tmp_path, "--workers", workers)
        stop, doubtful = threading.Event(), set()

        def work(seed, server=server, stop=stop, doubtful=doubtful):
            mine = random.Random(seed)
            broken_off = contextlib.suppress(OSError, http.client.HTTPException)
            with broken_off, Connection(server) as client:
                while not stop.is_set():
                    content = firmware(mine.randrange(100, 60_000), seed=mine.random())[0]
                    image_id = client.stored(content)
                    stored[image_id] = sha256(content)
                    if mine.random() < 0.4:
                        doubtful.add(image_id)
                        if client.ask("DELETE", f"/image/{image_id}").status == 200:
                            deleted.add(image_id)
                            doubtful.discard(image_id)

        server.url
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            working = [pool.submit(work, rng.random()) for _ in range(4)]
            time.sleep(0.3 + rng.random() / 2)
            server.process.kill()
            stop.set()
        assert not any(work.exception() for work in working)
        server.end()
        with service(tmp_path) as again, Connection(again) as connection:
            listed = {image["id"]: image for image in connection.listed("?confirmed=true")}
            for image_id, digest in stored.items():
                if image_id in deleted:
                    assert image_id not in listed
                elif image_id not in doubtful:
                    assert listed[image_id]["sha256"] == digest
                elif image_id not in listed:
                    deleted.add(image_id)
            assert {path.stem for path in (tmp_path / "binaries").iterdir()} == set(listed)
            assert not list((tmp_path / "tmp").glob("*.hex"))
        assert command("verify", "--data", tmp_path)[0] == 0
    assert len(stored) > 20 and deleted


# ------------------------------------------------------------------------------------- workers


def workers_of(server):
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    return [int(pid) for pid in children.read_text().split()]


def test_lost_worker_is_made_good(tmp_path):
    with service(tmp_path, "--workers", "2") as server:
        wait_until(lambda: len(workers_of(server)) == 2)
        time.sleep(0.5)
        lost, kept = workers_of(server)
        os.kill(lost, signal.SIGKILL)
        assert all(is_well(server) for _ in range(20))
        wait_until(lambda: len(workers_of(server)) == 2 and lost not in workers_of(server))
        assert kept in workers_of(server)
        server.wait_for(f"worker {lost} ended")


@needs_posix
def test_child_that_is_no_worker_is_none_of_the_services_business(tmp_path):
    """As where a container's start script leaves one behind."""
    shell = ["sh", "-c", 'sleep 0.5 & exec "$0" "$@"']
    with service(tmp_path, "--workers", "2", before=shell) as server:
        time.sleep(1)
        assert is_well(server)
        states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers_of(server)]
        assert len(states) == 2 and "Z" not in states


def test_workers_end_when_the_first_process_is_killed_and_the_next_start_works_at_once(tmp_path):
    with service(tmp_path, "--workers", "2") as server:
        port = urllib.parse.urlsplit(server.url).port
        wait_until(lambda: len(workers_of(server)) == 2)
        time.sleep(0.3)
        workers = workers_of(server)
        server.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        server.end()
    with service(tmp_path, "--port", port) as again:
        assert is_well(again)


# ------------------------------------------------------------------------------------- verify and backup


@pytest.fixture
def shelf(tmp_path):
    """A store in use: (service, its connection, {id: content} of three images)."""
    with service(tmp_path / "data") as server, Connection(server) as connection:
        contents = [firmware(5000, seed=1)[0], b"plain", firmware(70_000, seed=2)[0]]
        yield server, connection, {connection.stored(content): content for content in contents}


def test_verify_is_satisfied_with_a_sound_store_in_use_and_changes_nothing(shelf):
    server, _, _ = shelf
    files = [path for path in server.data.rglob("*") if path.is_file() and path.suffix != ".db-shm"]
    before = [path.stat().st_mtime_ns for path in files]
    assert command("verify", "--data", server.data) == (0, "3 binaries checked, 0 faults\n", "")
    assert before == [path.stat().st_mtime_ns for path in files]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@parametrize("name, damage, said", [
    ("{id}.hex", Path.unlink, "hex file of image {id} is missing"),
    ("{id}.bin", Path.unlink, "bin file of image {id} is missing"),
    ("{id}.hex", lambda path: path.write_bytes(b"x"), "1 bytes long instead of"),
    ("{id}.hex", flip, "the hex file of image {id} has other bytes"),
    ("{id}.bin", flip, "the bin file of image {id} has other bytes"),
    ("stray.hex", Path.touch, "unknown: "),
])  # fmt: skip
def test_verify_names_each_damage_and_what_can_be_done(shelf, name, damage, said):
    server, _, contents = shelf
    image_id = next(iter(contents))
    damage(server.data / "binaries" / name.format(id=image_id))
    status, out, err = command("verify", "--data", server.data)
    assert status == 1 and err == "" and said.format(id=image_id) in out
    assert out.endswith("3 binaries checked, 1 faults\n")
    assert "upload the same file again" in out or "move it away" in out


def test_verify_raises_no_false_alarm_beside_a_server_that_deletes(shelf):
    server, _, _ = shelf
    with churn(server, threads=3):
        found = [command("verify", "--data", server.data) for _ in range(4)]
    assert [status for status, _, _ in found] == [0] * 4, found


def test_verify_that_has_no_room_to_look_says_so(shelf, monkeypatch):
    server, _, _ = shelf
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(image_manager.tempfile, "TemporaryFile", raising(full))
    one_sentence(command("verify", "--data", server.data), "No space left")


@needs_posix
def test_verify_shows_its_progress_on_a_terminal(shelf):
    server, _, _ = shelf
    main, terminal = os.openpty()
    words = [sys.executable, PROGRAM, "verify", "--data", server.data]
    done = subprocess.run(words, stderr=terminal, stdout=subprocess.PIPE, timeout=30)
    os.close(terminal)
    assert b"3 of 3" in os.read(main, 10_000) and done.returncode == 0
    os.close(main)


def holds(server, contents):
    """Tell whether a server has these images, {id: content}."""
    with Connection(server) as connection:
        return {image_id: connection.download(image_id) for image_id in contents} == contents


def test_backup_of_a_store_in_use_is_complete_and_can_be_served(shelf, tmp_path):
    server, connection, contents = shelf
    copy, token = tmp_path / "copy", connection.headers
    with churn(server):
        status, out, err = command("backup", "--data", server.data, copy)
    assert status == 0 and err == "" and " 0 faults" in out
    with service(copy) as other, Connection(other, None, **token) as reader:
        assert "left over" not in other.log and holds(other, contents)
        assert reader.listed()  # with a token of before
    assert command("verify", "--data", copy)[0] == 0
    if os.name == "posix":
        assert (copy / "secret.key").stat().st_mode & 0o777 == 0o600
    one_sentence(command("backup", "--data", server.data, copy), "has something in it")
    inside = server.data / "tmp" / "copy"
    one_sentence(command("backup", "--data", server.data, inside), "lies in the store itself")
    assert not inside.exists()


def test_verify_and_backup_work_on_a_read_only_file_system(tmp_path):
    """The moment when one wants them, with a log that was not merged before the crash."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    with service(data) as server:
        with Connection(server) as connection:
            contents = [firmware(5000, seed=1)[0], b"plain"]
            stored = {connection.stored(content): content for content in contents}
        server.process.kill()
        server.end()
    assert (data / "image_manager.db-wal").stat().st_size
    before = read_only(data)
    for _ in range(2):
        done = command("verify", "--data", data, before=before)
        assert done == (0, "2 binaries checked, 0 faults\n", "")
    status, out, err = command("backup", "--data", data, copy, before=before)
    assert (status, err) == (0, "") and "2 binaries copied, 0 faults" in out
    with service(copy) as server:
        assert holds(server, stored)
    (data / "image_manager.db-shm").unlink(missing_ok=True)
    assert command("verify", "--data", data, before=before)[0] == 0


@needs_posix
def test_backup_writes_nothing_beside_the_store(shelf, tmp_path, monkeypatch):
    """Its disk may be full: that is when one wants a backup."""
    folders, real = [], tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda *a, **b: folders.append(b["dir"]) or real(*a, **b)
    )
    assert command("backup", tmp_path / "copy", "--data", shelf[0].data)[0] == 0
    assert folders and all(tmp_path / "copy" in [Path(f), *Path(f).parents] for f in folders)


def test_backup_has_the_modes_of_the_store_and_its_secret_is_never_readable(shelf, tmp_path):
    server, _, _ = shelf
    copy, words = tmp_path / "copy", ["backup", "--data", server.data, tmp_path / "copy"]
    for path in (server.data / "binaries").iterdir():
        path.chmod(0o640)
    (server.data / "image_manager.db").chmod(0o600)
    if shutil.which("strace"):
        watch = ["strace", "-f", "-e", "trace=openat,chmod,fchmod"]
        trace = run(*watch, sys.executable, PROGRAM, *words, text=True).stderr
        made = [line for line in trace.splitlines() if "copy/secret.key" in line]
        assert made and "0600" in made[0] and not any("0644" in line for line in made)
    else:
        command(*words)
    assert {path.stat().st_mode & 0o777 for path in (copy / "binaries").iterdir()} == {0o640}
    for name in ("image_manager.db", "secret.key"):
        assert (copy / name).stat().st_mode & 0o777 == 0o600


def test_backup_tells_of_damage_and_copies_the_rest(shelf, tmp_path):
    server, _, contents = shelf
    image_id, *others = contents
    flip(server.data / "binaries" / f"{image_id}.hex")
    status, out, _ = command("backup", "--data", server.data, tmp_path / "copy")
    assert status == 1 and image_id in out and "3 binaries copied, 1 faults" in out
    for other in others:
        assert (tmp_path / "copy" / "binaries" / f"{other}.hex").read_bytes() == contents[other]


# ------------------------------------------------------------------------------------- what is written

README = (HERE / "README.md").read_text()


def blocks(language, text=README):
    """Return the fenced blocks of a language in the README."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder with nothing but the program, served by the README's first command."""
    folder, environ = tmp_path_factory.mktemp("fresh"), {**ENVIRON, "IMAGE_MANAGER_PORT": "0"}
    shutil.copy(PROGRAM, folder)
    python = shlex.quote(sys.executable)
    start = blocks("sh")[0].rpartition("&&")[2].replace(".venv/bin/python", python)
    with open(folder / "log", "w") as log:
        words = ["bash", "-c", "exec " + start]
        process = subprocess.Popen(words, cwd=folder, stderr=log, env=environ)
    wait_until(lambda: "get a token with" in (folder / "log").read_text())
    url = re.search(r"listening on (\S+)", (folder / "log").read_text())[1]
    yield folder, url
    process.terminate()
    assert process.wait(10) == 0


def bash(fresh, script):
    """Run lines of the README where the service of that folder is the one on port 8000."""
    folder, url = fresh
    script = script.replace("http://127.0.0.1:8000", url)
    script = script.replace(".venv/bin/python", shlex.quote(sys.executable))
    done = run("bash", "-euo", "pipefail", "-c", script, cwd=folder, text=True)
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


def test_readme_every_command_works_as_pasted(fresh):
    if not shutil.which("curl") or b"--fail-with-body" not in run("curl", "--help", "all").stdout:
        pytest.skip("needs curl 7.76")
    scripts = [block for block in blocks("sh") if "pip install" not in block]
    for tool in ("wget", "wrk"):
        if not shutil.which(tool):
            scripts = [re.sub(f"^{tool}.*\n", "", block, flags=re.MULTILINE) for block in scripts]
    out = bash(fresh, "\n".join(scripts))
    assert '"message":"image uploaded"' in out and '"result":"ok"' in out
    folder, _ = fresh
    firmware_hex = (folder / "firmware.hex").read_bytes()
    patterns = ("copy.hex", "fw-????????-*.hex", "latest.hex", "fw-too-*.hex")
    names = [path for pattern in patterns for path in folder.glob(pattern)]
    assert len(names) == (4 if shutil.which("wget") else 3)
    assert [(folder / name).read_bytes() for name in names] == [firmware_hex] * len(names)
    assert (folder / "fw.bin").read_bytes() == b"\1\2\3\4"
    assert (folder / "window.bin").read_bytes() == b"\1\2\3\4" + bytes(12)


def test_readme_ci_job_publishes_with_a_token_that_can_only_write(fresh):
    folder, url = fresh
    lines = re.findall(r"^    - '(.*)'$", blocks("yaml")[0], re.MULTILINE)
    (folder / "build").mkdir()
    token = bash(fresh, ".venv/bin/python image_manager.py token --scope write").strip()
    script = f"FW_URL={url} FW_TOKEN={token} TAG=7.7.7\n" + "\n".join(lines)
    (folder / "build" / "firmware.hex").write_bytes(firmware()[0])
    assert "image uploaded" in bash(fresh, script)
    (folder / "build" / "firmware.hex").write_bytes(b":00\n")
    words = ["bash", "-euo", "pipefail", "-c", script.replace("--retry 5", "")]
    done = run(*words, cwd=folder, text=True)
    assert done.returncode and "Corrupt Intel HEX: line 1" in done.stdout


def test_readme_fixture_works(tmp_path):
    fixture = next(block for block in blocks("python") if "pytest.fixture" in block)
    test = "\n\ndef test_it(firmware_store):\n    import urllib.request\n"
    test += "    assert urllib.request.urlopen(firmware_store.url + '/health').status == 200\n"
    test += "    assert firmware_store.token(service='admin', scope=['read'])\n"
    (tmp_path / "test_rig.py").write_text(fixture + test)
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = run(*pytest_alone, cwd=tmp_path, env=environ, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_readme_nginx_serves_a_fleet_from_one_fetch(tmp_path):
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not nginx:
        pytest.skip("needs nginx")
    content = random.Random(10).randbytes(2_500_000)
    with service(tmp_path / "data") as server:
        port, text = free_port(), blocks("nginx")[0]
        # Those of the system would be taken from an nginx that runs there.
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
        for words, others in {
            "/var/cache/nginx-firmware": str(tmp_path / "cache" / "x"),
            "http://127.0.0.1:8000": server.url,
            "listen 8080": f"listen 127.0.0.1:{port}",
            "/var/log/nginx": str(tmp_path),
            "http {": "http {" + folders,
        }.items():
            text = text.replace(words, others)
        (tmp_path / "nginx.conf").write_text(text)
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        for folder in (*tmp_path.parents[:2], tmp_path):
            folder.chmod(0o755)
        user = os.environ.get("USER", "root")
        options = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; user {user};"
        words = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", options]
        front = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: is_listening(port))
            secret = image_manager.load_secret(server.data)
            near = Other(f"http://127.0.0.1:{port}", Tokens(Settings(data=server.data), secret))
            with Connection(near) as connection:
                image_id = connection.stored(content)  # uploads pass through
                link, host = connection.link(image_id)
                assert host == f"127.0.0.1:{port}"
                assert connection.download(image_id) == content
            with Connection(near, service=None) as device:
                assert device.get(link) == content
                server.send(signal.SIGSTOP)  # from here on nginx is alone
                try:
                    assert device.get(link) == content
                    part = device.ask("GET", link, Range="bytes=1000000-1100000")
                    assert part.status == 206 and part.body == content[1000000:1100001]
                    assert part.headers["Content-Range"] == "bytes 1000000-1100000/2500000"
                finally:
                    server.send(signal.SIGCONT)
                assert device.ask("GET", other_character(link, len(link) - 1)).status == 401
        finally:
            front.terminate()
            front.wait(10)


def test_readme_lists_every_route_and_setting():
    def row(route):
        path = re.sub("<(.*?)>", r"{\1}", route.path)
        return route.method, path, route.right.removeprefix("image:") or "none"

    rows = re.findall(r"^\| `(.*?)` \| (\w+) \|", README, re.MULTILINE)
    found = {(*re.sub(r"\?.*", "", route).split(), right) for route, right in rows}
    assert found == set(map(row, ROUTES))
    cells = re.findall(r"^\| (`(?:--|IMAGE_MANAGER_).*?) \|", README, re.MULTILINE)
    named = re.findall(r"`(?:--|IMAGE_MANAGER_)([\w-]+)`", " ".join(cells))
    fields = {field.name for field in image_manager.dataclasses.fields(Settings)}
    assert {name.replace("-", "_").lower() for name in named} == fields
    variables = re.findall(r"IMAGE_MANAGER_(\w+)", README)
    assert {name.lower() for name in variables} <= fields


def test_openapi_names_the_members_that_images_have_and_take(client):
    schemas = image_manager.SCHEMAS
    image_id = client.create()
    created = client.post_json("/image", LABELS).json
    client.upload(image_id, firmware()[0])
    assert client.shown(image_id).keys() == schemas["Image"]["properties"].keys()
    assert created.keys() == schemas["Created"]["properties"].keys()
    for name in ("image", "change"):
        assert image_manager.BODIES[name][1]["properties"].keys() == set(image_manager.REQUIRED)


def test_manual_names_functions_and_tests_that_are_there():
    manual = image_manager.__doc__
    lives = manual.partition("The life of one upload")[2].partition("What it promises")[0]
    named = re.findall(
        r"\b([A-Z]\w+\.\w+)\b|^    ([a-z]\w+) {2}|\((\w+_\w+)\)", lives, re.MULTILINE
    )
    for name in map("".join, named):
        functools.reduce(getattr, name.split("."), image_manager)
    assert len(named) >= 18
    tests = re.findall(r"test_\w+", manual)
    assert len(tests) == 10 and all(callable(globals().get(name)) for name in tests)


def test_requirements_are_those_of_the_program_and_of_the_tests():
    listed = re.findall(r"^(\w[^#\n]*?)\s*$", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    metadata = re.search(
        r"^# dependencies = \[\n(.*?)^# \]$", PROGRAM.read_text(), re.MULTILINE | re.DOTALL
    )
    needed = re.findall('"(.*?)"', metadata[1])
    assert needed == listed[: len(needed)]
    assert {re.split("[<>=]", name)[0] for name in listed[len(needed) :]} == {"pytest", "webtest"}


def test_top_level_holds_five_entries_beside_dot_files():
    if not (HERE / ".git").exists():
        pytest.skip("not a checkout")
    names = run("git", "ls-files", cwd=HERE, text=True).stdout.split()
    assert {name.partition("/")[0] for name in names if not name.startswith(".")} == {
        "README.md", "data", "image_manager.py", "requirements.txt", "test_image_manager.py",
    }  # fmt: skip
    assert [name for name in names if name.startswith("data/")] == ["data/.gitignore"]
