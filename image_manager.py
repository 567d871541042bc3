#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "bottle>=0.13.4,<0.14",
#     "pyjwt>=2.10,<3",
#     "waitress>=3.0.2,<4",
#     "multipart>=1.2,<3",
# ]
# ///
"""A firmware image store: one file, one folder, curl or a browser as its client.

It keeps firmware images for devices to download: label and version in SQLite, the .hex binaries
as files, tenants kept apart by JSON Web Tokens. It speaks the API of dojot's image-manager v0.6.0
and goes beyond it: ranges, conditions, digests, signed links, and Intel HEX that is understood.

Run it           python image_manager.py                    on 127.0.0.1:8000, storing in data/
                 python image_manager.py --help             what else there is
Embed it         with running(Settings(data=folder)) as server: ...      see `running`
                 application = create_app(Settings(data=folder))         any WSGI server

The API is the table ROUTES, each line with the right that it needs; what can be set is the class
Settings. From here to the end each layer knows only those above it:

    errors            all that can go wrong, each with its HTTP status
    settings          one frozen object, made once and passed in
    tokens            who calls and what they may do; signed links
    memory            data by address: pieces in any order, segments, what overlaps
    Intel HEX         records in, layout and data or the first fault out
    catalogue         the images' metadata in SQLite: all SQL is here
    binaries          the files: received, published, read in excerpts
    HTTP              requests and answers, conditions, ranges and bodies, as the RFCs have them
    API               the table of all routes, and its description as OpenAPI
    admission         which route, who asks, may they: all that the header of a request tells
    application       the handlers of the routes; the two stores meet only here
    logs              the access log, and the service's own on standard error
    threads           a few that run what the server must not wait for
    server            one thread that owns all sockets
    processes         the lock, workers, signals; a server in a thread of yours
    maintenance       verify and back up a store
    page              the document for people at the bench: style, script, HTML
    command line      serve, token, verify, backup

The folder

    image_manager.db      the catalogue (WAL, synchronous=FULL)
    secret.key            signs tokens and links; readable by its owner alone
    binaries/<id>.hex     as uploaded, named by ids of our own, never by what a client sent
    binaries/<id>.bin     of Intel HEX: its data bytes, segments joined without the gaps
    tmp/                  bodies and uploads under way; emptied at the start
    service.lock          held while a service has the folder

To add

    a route       a line of ROUTES and a method of Application; PARAMETERS, BODIES and SCHEMAS
                  for what it takes and gives that is new
    a column      a script at the end of MIGRATIONS (never change one; ALTER TABLE adds columns),
                  then ADD, CHANGE or CONFIRM, which write it, and what reads it: IMAGE_JSON for
                  clients, COLUMNS and the tuple Image for the service itself
    a member      of images: its column; Catalogue.add and change; parse_members, which checks it;
                  SCHEMAS and BODIES; imageView of the page; the README. One that must be given:
                  REQUIRED as well; one to filter by: FILTERS, list_images and an index
    a check       of an upload's bytes: Upload.write and finish; of a request: Application._upload
    a setting     a field of Settings; its option and environment variable follow from it

The life of one upload

    Connection._header           reads the header, in the loop
    Admission.admit              refuses by the header alone: token, right, size, room on the disk
    Request.receive              takes the body, above 64 KiB into a file in tmp/
    Application.upload_file      runs in a thread from here on
    Upload.write                 hashes and stores a block; HexReader.feed checks it
    Upload.finish                puts the raw bytes in order and syncs the files
    Catalogue.confirm            in one transaction: the files' names (BinaryStore.publish), the row
    Connection._send             sends the answer, in the loop

The life of one download

    Admission.admit              knows the caller by Tokens.verify, or a link by Tokens.verify_link
    Application.download_binary  reads the row, opens the file, and begins anew where the row has
                                 changed: never the digest of one binary, the bytes of another
    BinaryStore.open             refuses a file of another length; its digest verify alone compares
    place_window                 finds the bytes that format=bin asks for
    download_response            evaluates conditions (not_modified) and range (requested_range)
    Excerpt.read                 gives the bytes, gaps filled
    Connection._send_body        sends one piece by sendfile, anything else as the client takes it

What it promises, and the test that proves it

 1. An answer of 200 or 201 comes after the disk: file, name and row are synced before it.
    test_answers_come_after_the_disk
 2. A crash leaves at worst a stray file, which the next start removes; never a row without its
    file. The catalogue lost or empty beside binaries stops the start, and nothing is removed.
    test_kill_at_any_moment_loses_nothing_that_was_acknowledged
    test_lost_catalogue_stops_the_start_and_nothing_is_swept
 3. A stored binary never changes. The same bytes sent again succeed, others are refused.
    test_same_bytes_again_succeed_and_other_bytes_are_refused
 4. No route without a right: a tenant sees nothing of another, a token does only what it says.
    test_route_wants_its_right_and_no_other
    test_route_shows_and_gives_nothing_to_another_tenant
 5. Nothing a client sends becomes a path, a piece of SQL, or a header unchecked.
    test_form_with_any_name_that_ends_in_hex_is_taken_and_the_name_is_no_path
 6. An upload that may not be made is answered on its header: nothing is awaited or stored.
    test_upload_that_may_not_be_made_is_answered_on_its_header
 7. What does not fit the disk leaves nothing behind, and deleting always has room.
    test_full_disk_refuses_uploads_and_creations_at_once_but_not_deletions
 8. A download that has begun ends well, whatever happens to its image.
    test_download_that_has_begun_ends_well_though_its_image_is_deleted
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - who runs it by hand is told why, and at once
    print("image manager: needs Python 3.10 or newer: run it with another python3", file=sys.stderr)
    sys.exit(2)

import argparse
import array
import asyncio
import base64
import binascii
import bisect
import collections
import configparser
import contextlib
import dataclasses
import email.errors
import email.header
import email.message
import email.utils
import errno
import functools
import hashlib
import heapq
import hmac
import http
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import tempfile
import threading
import time
import urllib.parse
import uuid
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

try:
    import jwt
    import multipart
    from bottle import HTTPError, HTTPResponse, Router, WSGIFileWrapper
    from waitress.adjustments import Adjustments
    from waitress.parser import HTTPRequestParser, ParsingError, TransferEncodingNotImplemented
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"image manager: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

__version__ = "1.1.0"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 256 * KIB  # bytes read, hashed and written at a time
JSON_LIMIT = 64 * KIB  # the largest JSON body, and the most that a form may hold beside its file
RESERVE = 2 * MIB  # uploads and creations leave this much disk free, so that deleting has room

log = logging.getLogger("image_manager")


# ------------------------------------------------------------------------------------- errors


class CannotStart(Exception):
    """A start-up error; its message is one sentence that says what to do."""


class ServiceError(Exception):
    """Base of all errors that a client sees: HTTP status, message and headers of the answer.

    A subclass sets defaults. There is one for each error that is caught somewhere, or raised in
    more than one place; all others are a ServiceError with a status.
    """

    status, message = 500, "Internal server error: the log says more"
    headers: Mapping[str, str] = {}

    def __init__(self, message: str = "", headers: Mapping[str, str] = {}, status: int = 0) -> None:
        super().__init__(message or self.message)
        self.headers, self.status = headers or self.headers, status or self.status

    def body(self) -> dict[str, Any]:
        return {"message": str(self), "status": self.status}


class BadRequest(ServiceError):
    status, message = 400, "Invalid query param supplied"


class FaultyImage(BadRequest):
    """Members of an image object break the rules; the reasons are given for each field."""

    message = "failed to parse input"

    def __init__(self, errors: dict[str, list[str]]) -> None:
        super().__init__()
        self.errors = errors

    def body(self) -> dict[str, Any]:
        return {"message": self.message, "errors": self.errors}


class Unauthorised(ServiceError):
    status, message = 401, "No authorization token has been supplied"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}  # RFC 9110, 11.6.1


class InvalidToken(Unauthorised):
    def __init__(self, reason: object) -> None:
        super().__init__(f"Invalid authorization token: {reason}")


class NotFound(ServiceError):
    status, message = 404, "No such path"


class NoSuchImage(NotFound):
    def __init__(self, image_id: str) -> None:
        super().__init__(f"No such image: {image_id}")


class NoBinary(NotFound):
    message = "Image does not have an binary file"


class PreconditionFailed(ServiceError):
    status, message = 412, "The binary is not the one that the request's conditions ask for"


class TooLarge(ServiceError):
    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body is larger than the {limit} bytes allowed here")


class Unprocessable(ServiceError):
    status, message = 422, "The binary is no sound Intel HEX file, so that it has no addresses"


class Damaged(ServiceError):
    status, message = 500, "The catalogue cannot be read or written: the log says why"


class Unavailable(ServiceError):
    status, message = 503, "The catalogue is busy: try again"


class ReadOnly(Unavailable):
    message = "The catalogue cannot be written: let the service's user write image_manager.db"


class MustWait(Unavailable):
    """A thread that must not wait has met a locked catalogue, or a long report."""


class StorageFull(ServiceError):
    status, message = 507, "The disk is full: delete images or make room, then try again"


# No space left on the device, the file system's limit for one file, and a user's quota.
DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextlib.contextmanager
def full_disk_as_error() -> Iterator[None]:
    """Turn the operating system's errors for a full disk into StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise StorageFull from error
        raise


# ------------------------------------------------------------------------------------- settings


# Each of these functions returns a setting that is given as text, as on the command line, or as a
# Python value. They raise ValueError with what the setting takes: "takes a path".


def text_like(pattern: str, wanted: str) -> Callable[[object], str]:
    """Return a function that reads a text of this form; it returns the pattern's group 1."""

    def parse(value: object) -> str:
        match = re.fullmatch(pattern, value, re.ASCII) if isinstance(value, str) else None
        if not match:
            raise ValueError(f"takes {wanted}")
        return match[1]

    return parse


def number_from(low: int, high: int) -> Callable[[object], int]:
    """Return a function that reads a whole number in these limits."""

    def parse(value: object) -> int:
        text = str(value).strip()
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"takes a whole number from {low} to {high}")
        return int(text)

    return parse


parse_text = text_like("([^\0\ud800-\udfff]*)", "text in UTF-8")
# Visible ASCII: for an address without a query, a fragment, and " < > as they stand around it in
# texts; for an origin without a path and without the comma that would make it a list.
parse_url = text_like(
    "((?:https?://[!$-.0-;=@-~][!$-;=@-~]*?)?)/*", "an address such as https://fw.example.com"
)
parse_origin = text_like(
    r"(\*|[a-z][a-z0-9+.-]*://[!-+.0-~-]+|)", "* or an origin such as https://bench.example.com"
)
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_prefix(value: object) -> str:
    """Return a path with a slash before it and none behind, "" for none."""
    path = parse_text(value).strip("/")
    words = r"(?!(?:image|health|openapi\.json)(?:/|$))(?:(?!\.\.?(?:/|$))[\w.~-]+(?:/(?!$)|$))+"
    if path and not re.fullmatch(words, path, re.ASCII):
        raise ValueError("takes a path such as /fw-image, none of the API's own")
    return path and "/" + path


def parse_path(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or "\0" in os.fspath(value):
        raise ValueError("takes a path")
    return Path(value)


def parse_size(value: object) -> int:
    """Return the bytes of 1000, 64K, 512M or 2G (powers of 1024)."""
    match = re.fullmatch("([1-9][0-9]{0,14})([KMG]?)", str(value).strip().upper())
    if not match:
        raise ValueError("takes bytes, or a number with K, M or G such as 512M")
    return int(match[1]) * {"": 1, "K": KIB, "M": MIB, "G": GIB}[match[2]]


def parse_switch(value: object) -> bool:
    words, word = configparser.ConfigParser.BOOLEAN_STATES, str(value).strip().lower()
    if word not in words:
        raise ValueError("takes 1, true, yes or on, or else 0, false, no or off")
    return words[word]


def parse_networks(value: Any) -> tuple[Network, ...]:
    """Return the networks of a list, or of a text with commas between: 10.0.0.0/8, ::1."""
    try:
        words = map(str.strip, value.split(",") if isinstance(value, str) else map(str, value))
        return tuple(ipaddress.ip_network(word, False) for word in words if word)
    except (ValueError, TypeError) as error:
        raise ValueError("takes an address or a network such as 10.0.0.0/8") from error


def option(default: Any, parse: Callable[[Any], Any], meaning: str) -> Any:
    """Declare a field of Settings that the command line and the environment can set."""
    return dataclasses.field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that can be set: made once and passed in. It reads no environment.

    Values may be text, as on the command line. Raises CannotStart for those that make no sense.
    """

    data: Path = option(dataclasses.MISSING, parse_path, "folder of the store")
    host: str = option("127.0.0.1", parse_text, "address to listen on; 0.0.0.0 or :: for all")
    port: int = option(0, number_from(0, 65535), "port to listen on; 0 picks a free one")
    url_prefix: str = option("", parse_prefix, "path below which the API answers too: /fw-image")
    public_url: str = option("", parse_url, "what signed links begin with: https://fw.example.com")
    workers: int = option(1, number_from(1, 64), "processes that serve")
    threads: int = option(4, number_from(1, 256), "threads of each process")
    max_upload: int = option("512M", parse_size, "largest file taken: bytes, or with K, M, G")
    require_intel_hex: bool = option(False, parse_switch, "refuse files that are not Intel HEX")
    jwt_public_key: Path | None = option(None, parse_path, "PEM file of whoever signs the tokens")
    jwt_audience: str = option("", parse_text, "audience (aud) that tokens must name")
    jwt_issuer: str = option("", parse_text, "issuer (iss) that tokens must name")
    allow_origin: str = option("", parse_origin, "origin whose pages may use the API; * for any")
    access_log: str = option("", parse_text, "file for a line about each answer; - for stdout")
    trusted_proxy: tuple[Network, ...] = option(
        (), parse_networks, "proxy, or network of such, whose X-Forwarded-For names the client"
    )
    # Not an option: every user of a machine can read its command lines.
    jwt_secret: str = dataclasses.field(default="", repr=False, metadata={"parse": parse_text})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:  # not set, and need not be
                continue
            try:
                value = field.metadata["parse"](value)
            except ValueError as error:
                given = f", not {value!r}" if field.repr else ""
                raise CannotStart(f"{field.name} {error}{given}") from error
            object.__setattr__(self, field.name, value)  # the class is frozen


def make_folder(path: Path) -> None:
    """Make a folder unless it is there; raises CannotStart where that, or writing in it, fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        remedy = "make it a folder that can be written, or name another with --data"
        raise CannotStart(f"Cannot write in {path} ({error.strerror}): {remedy}") from error


def sync(file: int) -> None:
    """Write an open file through to the disk; on macOS fsync() does not: see its fcntl(2)."""
    try:
        import fcntl

        fcntl.fcntl(file, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
    except (ImportError, AttributeError, OSError):  # not macOS, or a disk that cannot do it
        os.fsync(file)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last through a power cut."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; NTFS keeps a journal of its names
        return
    try:
        sync(folder)
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------- tokens

READ, WRITE, DELETE = RIGHTS = ("image:read", "image:write", "image:delete")
LEEWAY = 30  # seconds that the clock of whoever made a token may be off
LONGEST_LINK = 30 * 86400  # seconds
# Only the messages of these errors are shown: those of others may quote parts of the token.
QUOTABLE_ERRORS = (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidAudienceError,
                   jwt.InvalidIssuerError, jwt.MissingRequiredClaimError)  # fmt: skip
# What PyJWT would check beyond the signature: iat, sub and jti may have any form here, and the
# times are checked at each use of a token, also of one whose signature is known to be right.
UNCHECKED = ("verify_iat", "verify_sub", "verify_jti", "verify_exp", "verify_nbf")


def text_faults(value: object) -> list[str]:
    """Return all that is wrong with a label, a version or the name of a tenant."""
    if value is None:
        return ["Field may not be null."]
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        return ["Not a valid string."]
    faults = {
        "Shorter than minimum length 1.": not value,
        "Longer than maximum length 128.": len(value) > 128,
        "Contains control characters.": re.search("[\x00-\x1f\x7f-\x9f]", value),
    }
    return [reason for reason, found in faults.items() if found]


class Caller(NamedTuple):
    """Who asks, as a verified token or a signed link says."""

    tenant: str
    rights: frozenset[str] = frozenset(RIGHTS)
    subject: object = None  # the claim sub, which may have any form
    not_before: float = -math.inf  # seconds since the epoch
    expires: float = math.inf
    sha256: str = ""  # with a signed link: the digest of the only binary that it gives


def load_secret(folder: Path) -> str:
    """Return the secret in a data folder, made if there is none; raises CannotStart."""
    path = folder / "secret.key"
    try:
        if not path.exists():
            make_folder(folder)
            make_secret(path)
        secret = path.read_text().strip()
        if len(secret) < 32:
            raise ValueError("it has less than 32 characters")
    except (OSError, ValueError) as error:
        remedy = "make it readable; or restore it, or delete it, which ends all tokens"
        raise CannotStart(f"Cannot use {path} ({error}): {remedy}") from error
    return secret


def make_secret(path: Path) -> None:
    """Make a file with a new secret, which appears whole or not at all."""
    # Such a file has mode 0600; by its name clean_up() finds it after a crash.
    draft = tempfile.NamedTemporaryFile(
        "w", prefix=path.name, suffix=".draft", dir=path.parent, delete=False
    )
    try:
        with draft:
            draft.write(secrets.token_hex(32) + "\n")
            draft.flush()
            sync(draft.fileno())
        # A link, unlike a rename, never replaces a secret that another process has just made.
        try:
            os.link(draft.name, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links, such as FAT
            os.replace(draft.name, path)
    finally:
        Path(draft.name).unlink(missing_ok=True)
    sync_folder(path.parent)


def load_public_key(path: Path) -> tuple[Any, str]:
    """Return the public key in a PEM file, and the algorithm it is for; raises CannotStart."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        remedy = 'pip install "pyjwt[crypto]"'
        raise CannotStart(f"jwt-public-key needs one more package: {remedy}") from error
    try:
        key = load_pem_public_key(path.read_bytes())
        if isinstance(key, rsa.RSAPublicKey):
            return key, "RS256"
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1":
            return key, "ES256"
        if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
            return key, "EdDSA"
        raise ValueError("another kind of key")
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        wanted = "an RSA, P-256 or Ed25519 key in a file with -----BEGIN PUBLIC KEY-----"
        raise CannotStart(f"jwt-public-key takes {wanted}, not {path} ({error})") from error


class Tokens:
    """Verifies and makes JSON Web Tokens and signed links."""

    def __init__(self, settings: Settings, secret: str) -> None:
        self._secret, self._key, algorithm = secret, secret, "HS256"
        if settings.jwt_public_key:
            self._key, algorithm = load_public_key(settings.jwt_public_key)
        audience, issuer = settings.jwt_audience or None, settings.jwt_issuer or None
        self._issued_claims = {"aud": audience, "iss": issuer}
        self._checks: dict[str, Any] = {
            "algorithms": [algorithm],  # by the key, never by the token: RFC 8725, 3.1
            "audience": audience,
            "issuer": issuer,
            "options": {"verify_aud": bool(audience), **dict.fromkeys(UNCHECKED, False)},
        }
        self._link_key = hmac.digest(secret.encode(), b"image manager: signed links", "sha256")
        # Verifying a signature takes a third of a short request, and one that was right stays so:
        # of a token that is known, only the times are checked again. Failures are not cached, so
        # that a flood of bad tokens cannot evict good ones.
        self._caller_of = functools.lru_cache(maxsize=1024)(self._decode)

    def verify(self, header: str | None) -> Caller:
        """Return whose token an Authorization header carries; raises Unauthorised."""
        if header is None:
            raise Unauthorised
        # RFC 6750, 2.1. Two such headers arrive joined by a comma, which no token contains.
        match = re.fullmatch(r"Bearer +([\w.~+/=-]+) *", header, re.ASCII | re.IGNORECASE)
        if not match:
            raise InvalidToken("the header is not of the form: Bearer <token>")
        caller = self._caller_of(match[1])
        now = time.time()
        if caller.expires <= now - LEEWAY:
            raise InvalidToken("Signature has expired")
        if caller.not_before > now + LEEWAY:
            raise InvalidToken("The token is not yet valid (nbf)")
        return caller

    def _decode(self, token: str) -> Caller:
        """Return whose a token is, if its signature is right; does not look at its times."""
        try:
            decoded = jwt.decode_complete(token, self._key, **self._checks)
        except QUOTABLE_ERRORS as error:
            raise InvalidToken(error) from error
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise InvalidToken("it is no JSON Web Token that is taken here") from error
        claims = decoded["payload"]
        if "crit" in decoded["header"]:  # RFC 7515, 4.1.11: extensions that must be understood
            raise InvalidToken("no extension that crit can name is understood here")
        if text_faults(claims.get("service")):
            raise InvalidToken("the claim service must be a name of 1 to 128 characters")
        times = [claims.get("nbf", -math.inf), claims.get("exp", math.inf)]
        # Python's JSON reads NaN as a number too, and any comparison with it is false.
        if not all(type(t) in (int, float) and -math.inf <= t <= math.inf for t in times):
            raise InvalidToken("the claims nbf and exp must be numbers")
        return Caller(claims["service"], self._rights(claims), claims.get("sub"), *times)

    def _rights(self, claims: dict[str, Any]) -> frozenset[str]:
        """Return what the claim scope allows: all, unless a word of it begins with image:."""
        scope = claims.get("scope", "")
        words = scope if isinstance(scope, list) else [scope]
        if not all(isinstance(word, str) for word in words):
            raise InvalidToken("the claim scope must be a string or a list of strings")
        ours = {word for word in " ".join(words).split() if word.lower().startswith("image:")}
        if not ours <= set(RIGHTS):  # a typing error must not open the door
            raise InvalidToken(f"what begins with image: in scope is not {', '.join(RIGHTS)}")
        return frozenset(ours or RIGHTS)

    def issue(self, service: str, rights: Iterable[str] = (), seconds: int | None = None) -> str:
        """Return a token for a tenant, for ever if `seconds` is None; raises CannotStart."""
        if self._key is not self._secret:
            raise CannotStart("With jwt-public-key, tokens come from who has the private key")
        scope = " ".join(rights)
        if text_faults(service) or not set(scope.split()) <= set(RIGHTS):
            raise CannotStart("A token takes a service of 1 to 128 characters, and known rights")
        now = int(time.time())
        claims = {"service": service, "iat": now, "scope": scope, **self._issued_claims}
        claims = {name: value for name, value in claims.items() if value}
        if seconds is not None:
            claims["exp"] = now + seconds
        return jwt.encode(claims, self._secret)

    def sign(self, image_id: str, sha256: str, expires: int) -> str:
        """Return the query of a link to the binary with this digest, which lasts until `expires`.

        The digest is part of it: after the binary is deleted, a genuine link is still 404, and a
        forged one 401. Parameters that choose a part of that binary need no signature.
        """
        digest = base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode().rstrip("=")
        signature = self._signature(image_id, digest, str(expires))
        return f"expires={expires}&sha256={digest}&signature={signature}"

    def verify_link(self, image_id: str, query: Mapping[str, str]) -> tuple[str, int]:
        """Return the SHA-256 (hexadecimal) and the expiry of a signed link; raises Unauthorised."""
        digest, expires = query.get("sha256", ""), query.get("expires", "")
        expected = self._signature(image_id, digest, expires)
        if not hmac.compare_digest(expected.encode(), query["signature"].encode()):
            raise Unauthorised("Invalid link: its signature does not match")
        if int(expires) <= time.time():
            raise Unauthorised("This link has expired")
        return base64.urlsafe_b64decode(digest + "=").hex(), int(expires)

    def _signature(self, *parts: str) -> str:
        # Cut to 128 bits, as RFC 2104, section 5, allows: so a URL that also holds a whole digest
        # still fits into the 160 characters that a bootloader may have room for.
        mac = hmac.digest(self._link_key, "\n".join(parts).encode(), "sha256")[:16]
        return base64.urlsafe_b64encode(mac).decode().rstrip("=")


# ------------------------------------------------------------------------------------- memory

MEMORY_SIZE = 1 << 32  # bytes: the addresses of Intel HEX have 32 bits


class Extent(NamedTuple):
    """A run of data: its address, its size, and its offset in a file."""

    address: int
    size: int
    offset: int


def hex_address(address: int) -> str:
    return f"0x{address:08X}"


class Pieces:
    """Data that come in any order; where two are for one address, the later wins."""

    def __init__(self) -> None:
        # In the order of the file. Arrays hold millions in a tenth of the memory of lists.
        self._addresses, self.sizes = array.array("Q"), array.array("Q")

    def __len__(self) -> int:
        return len(self.sizes)

    def add(self, address: int, size: int) -> None:
        """Add the next data of the file; data that follow on directly lengthen the last piece."""
        if self.sizes and self._addresses[-1] + self.sizes[-1] == address:
            self.sizes[-1] += size
        elif size:
            self._addresses.append(address)
            self.sizes.append(size)

    def by_address(self) -> Iterator[tuple[int, int, int]]:
        """Yield (address, size, offset in the order of the file) of the pieces, by address."""
        offsets = array.array("Q", itertools.accumulate(self.sizes, initial=0))
        for number in sorted(range(len(self.sizes)), key=self._addresses.__getitem__):
            yield self._addresses[number], self.sizes[number], offsets[number]

    def overlaps(self) -> Iterator[tuple[int, int]]:
        """Yield (address, size) of what is written more than once, in the order of addresses."""
        reached = 0
        for address, size, _ in self.by_address():
            if address < reached:
                yield address, min(address + size, reached) - address
            reached = max(reached, address + size)

    def is_in_order(self) -> bool:
        """Tell whether the file has the data in the order of addresses, and none twice."""
        ends = map(operator.add, self._addresses, self.sizes)
        return all(map(operator.le, ends, self._addresses[1:]))

    def extents(self) -> Iterator[Extent]:
        """Yield the data in the order of addresses, each with its offset in the order of the file.

        It walks through the addresses, from where one piece begins to where the next one does. Of
        the pieces that cover what lies between, the one that the file has last holds the data.
        """
        # A heap of (-offset, begin, end): its first item is the piece that the file has last.
        covering: list[tuple[int, int, int]] = []
        pieces = itertools.chain(self.by_address(), [(MEMORY_SIZE, 0, 0)])
        for (at, size, offset), (until, _, _) in itertools.pairwise(pieces):
            heapq.heappush(covering, (-offset, at, at + size))
            while covering and at < until:
                minus_offset, begin, end = covering[0]
                end = min(end, until)
                if end > at:
                    yield Extent(at, end - at, at - begin - minus_offset)
                    at = end
                else:
                    heapq.heappop(covering)


class Segments:
    """Runs of data in the order of addresses, which stand one after the other in a .bin file."""

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        """Take (address, size) in the order of addresses; what touches or overlaps is joined."""
        self.begins, self.ends = array.array("Q"), array.array("Q")
        for address, size in runs:
            if self.ends and address <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], address + size)
            else:
                self.begins.append(address)
                self.ends.append(address + size)
        sizes = map(operator.sub, self.ends, self.begins)
        self.offsets = array.array("Q", itertools.accumulate(sizes, initial=0))

    def between(self, begin: int, end: int) -> Iterator[Extent]:
        """Yield the extents that lie between two addresses, cut off at both."""
        for index in range(bisect.bisect_right(self.ends, begin), len(self.ends)):
            address = self.begins[index]
            first, last = max(address, begin), min(self.ends[index], end)
            if first >= last:
                return
            yield Extent(first, last - first, self.offsets[index] + first - address)


# ------------------------------------------------------------------------------------- Intel HEX
# After Intel's Hexadecimal Object File Format Specification, revision A of 1988. A record is a
# line: a colon, then in hexadecimal digits its count of data bytes (1 byte), address (2, high byte
# first), type (1), the data, and a checksum (1) that makes the sum of all its bytes 0 modulo 256:
#
#     :0400000001020304F2     the data 01 02 03 04 for address 0000
#
# Types: 00 data, 01 end of file, 02 and 04 the base that is added to the addresses that follow
# (times 16, times 65536), 03 and 05 the start address of the program.
#
# HexReader takes a file in blocks. Runs of data records of one length, which is nearly all of a
# file, are checked and taken at once (_take_data_records). All other lines, and runs in which
# anything is strange, are taken one by one (_take_line), which also finds the line of a fault.

# A file is read as Intel HEX where it begins with a colon or has a line that looks like a record.
# The pattern finds a record in UTF-16 too, so that it can be refused with a sentence that says so.
DETECTION_LIMIT = 64 * KIB
FIRST_RECORD = re.compile(
    rb"\A:|(?:\A|[\r\n])(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\0?:\0?(?:[0-9A-Fa-f]\0?){10}"
)
UTF_16 = re.compile(rb":\0(?:[0-9A-Fa-f]\0){9}")
# A record is all of its line, but a byte order mark may stand before it, and text behind the one
# that ends the file.
RECORD = re.compile(rb"(?is)(\xef\xbb\xbf)?(:00[0-9A-F]{4}01[0-9A-F]{2}(?![0-9A-F])|:.*)")
NO_DIGIT = re.compile(b"[^0-9A-Fa-f]")
BLANKS = b" \t"
PAYLOAD_SIZE = {1: 0, 2: 2, 3: 4, 4: 2, 5: 4}  # bytes; the record types that have one fixed size
LONGEST_RECORD = 3 + 1 + 2 * (255 + 5)  # characters, including a byte order mark
MIN_RUN = 16  # records; fewer are read as fast one by one
MAX_RUN_PAYLOAD = 250  # bytes: the sum of a record's bytes must fit 16 bits
MAX_SEGMENTS = 1 << 18
MAX_PIECES = 1 << 21  # as written, before they are joined; sorting so many takes 100 MiB
TOO_SCATTERED = (
    f"The data come in more separate pieces than can be checked: {MAX_SEGMENTS:,}, "
    f"or {MAX_PIECES:,} as they are written"
)
MAX_WARNINGS = 40


class HexFault(Exception):
    """The first fault of a file, or another reason why it cannot be taken as Intel HEX."""


def looks_like_hex(begin: bytes) -> bool:
    """Tell whether a file whose first DETECTION_LIMIT bytes are given is meant as Intel HEX."""
    return FIRST_RECORD.search(begin) is not None


class HexReader:
    """Reads an Intel HEX file in blocks of any size.

    feed() and finish() return the data in the order of the file; `pieces` tells where they belong.
    They and report() raise HexFault.
    """

    def __init__(self) -> None:
        self.pieces = Pieces()
        self._rest = b""  # the beginning of a line whose end has not come yet
        self._line = self._records = 0  # how many have been taken
        self._ended = False  # whether the end-of-file record has been taken
        # The last base, and the address at which a record wraps round and to which. Under a base
        # of type 02 that is 64 KiB above it and the base itself, under one of type 04 4 GiB and 0.
        self._base, self._wraps_from, self._wraps_to = 0, MEMORY_SIZE, 0
        self._start_address: int | None = None
        self._has_other_types = False
        self._warnings: dict[str, str] = {}  # by kind where the first of a kind is enough

    def feed(self, block: bytes) -> bytes:
        """Take the next bytes of the file; return the data of the lines that end in them."""
        text = self._rest + block
        # A CR at the very end may be the first half of CR LF.
        end = max(text.rfind(b"\n"), text.rfind(b"\r", 0, len(text) - 1)) + 1
        # Of a line that is longer than any record it only matters whether it is blank, so that a
        # file without line ends takes no memory. A last CR stays, since it may be the line's end.
        begin, more = text[end : end + LONGEST_RECORD + 1], text[end + LONGEST_RECORD + 1 :]
        self._rest = begin + more[:-1].strip(BLANKS)[:1] + more[-1:]
        return self._take(text[:end].splitlines())

    def finish(self) -> bytes:
        """Take the end of the file; return the data of a last line that has no line end."""
        data = self._take(self._rest.splitlines())
        if not self._ended:
            raise self._fault("no end-of-file record")
        return data

    def report(self) -> dict[str, Any]:
        """Return the layout of the file as clients see it; to be called once, after finish()."""
        segments = Segments((address, size) for address, size, _ in self.pieces.by_address())
        if len(segments.ends) > MAX_SEGMENTS:
            raise HexFault(TOO_SCATTERED)
        for address, size, _ in Segments(self.pieces.overlaps()).between(0, MEMORY_SIZE):
            where = hex_address(address)
            self._warn(f"{size} bytes at {where} are written more than once: the last wins")
        start = self._start_address
        return {
            "records": self._records,
            "bytes": sum(self.pieces.sizes),  # what is written twice counts twice
            "start_address": None if start is None else hex_address(start),
            "segments": [
                {"address": hex_address(address), "size": size}
                for address, size, _ in segments.between(0, MEMORY_SIZE)
            ],
            "warnings": list(self._warnings.values()),
        }

    def has_raw_bytes(self) -> bool:
        """Tell whether the data are all that is to be flashed, and there are some."""
        return bool(self.pieces.sizes) and not self._has_other_types

    def _take(self, lines: list[bytes]) -> bytes:
        """Take whole lines, without their ends; return the data of their records."""
        data: list[bytes] = []
        for _, group in itertools.groupby(lines, len):
            run = list(group)
            taken = self._take_data_records(run) if len(run) >= MIN_RUN else None
            data += map(self._take_line, run) if taken is None else [taken]
        if len(self.pieces.sizes) > MAX_PIECES:
            raise HexFault(TOO_SCATTERED)
        return b"".join(data)

    def _take_data_records(self, lines: list[bytes]) -> bytes | None:
        """Take lines of one length and return their data, if all are sound data records.

        Otherwise return None, with nothing taken. Python is slow at single bytes and fast at long
        slices. So the lines are decoded in one go, and then looked at by columns: raw[0::width] is
        the first byte of every record, its count.
        """
        count, length = len(lines), len(lines[0])
        width = length // 2  # bytes of a record
        size = width - 5  # bytes of its data
        text = b"".join(lines)
        if self._ended or not 0 < size <= MAX_RUN_PAYLOAD or text[::length] != b":" * count:
            return None
        try:
            raw = binascii.unhexlify(text.replace(b":", b""))
        except ValueError:  # what is no hexadecimal digit
            return None
        if len(raw) != width * count or raw[::width] != bytes([size]) * count or any(raw[3::width]):
            return None
        # A column as one long number, 16 bits for each of its bytes: added up, the columns give the
        # sum of every record at once. By the checksum its low byte must be 0.
        data, lanes, sums = bytearray(size * count), bytearray(2 * count), 0
        for column in range(width):
            values = raw[column::width]
            lanes[::2] = values
            sums += int.from_bytes(lanes, "little")
            if 4 <= column < width - 1:
                data[column - 4 :: size] = values
        if any(sums.to_bytes(2 * count, "little")[::2]):
            return None
        lanes[::2], lanes[1::2] = raw[1::width], raw[2::width]
        addresses = struct.unpack(f">{count}H", lanes)
        first, total = addresses[0], size * count
        # Most files go on from record to record, so that all of these are one piece.
        fits = self._base + first + total <= self._wraps_from
        if fits and addresses == tuple(range(first, first + total, size)):
            self.pieces.add(self._base + first, total)
        else:
            for address in addresses:
                self._add_data(self._base + address, size)
        self._line += count
        self._records += count
        return bytes(data)

    def _take_line(self, line: bytes) -> bytes:
        """Take a line of any kind; return the data of its record."""
        self._line += 1
        if not self._records and UTF_16.search(line):
            raise self._fault("the file is UTF-16: save it as plain text, ASCII or UTF-8")
        match = None if self._ended else RECORD.match(line)
        if not match:
            self._take_text(line)
            return b""
        byte_order_mark, record = match.groups(b"")
        self._take_text(byte_order_mark)
        data = self._take_record(record)
        self._take_text(line[match.end() :])
        return data

    def _take_text(self, text: bytes) -> None:
        """Take text that is no record: blank, or else before the first or behind the last one."""
        if self._ended and text.startswith(b":"):
            raise self._fault("a second file begins here")
        if not text.strip(BLANKS):
            return
        if self._records and not self._ended:
            raise self._fault("does not begin with a colon")
        where = "behind the end-of-file" if self._ended else "before the first"
        self._warn(f"Line {self._line}: what stands {where} record is not flashed", where)

    def _take_record(self, line: bytes) -> bytes:
        """Take a line that begins with a colon; return its data."""
        strange = NO_DIGIT.search(line, 1)
        if strange:
            raise self._fault(f"character {strange.start() + 1} is no hexadecimal digit")
        count = int(line[1:3] or b"0", 16)
        excess = len(line) - 1 - 2 * (count + 5)
        if excess < 0:
            raise self._fault("record is cut off")
        if excess > 0:
            raise self._fault(f"record is longer than the {count} bytes that it announces")
        record = binascii.unhexlify(line[1:])
        if sum(record) & 0xFF:
            wanted = -sum(record[:-1]) & 0xFF
            raise self._fault(f"checksum is {record[-1]:02X}, should be {wanted:02X}")
        kind, payload = record[3], record[4:-1]
        if count != PAYLOAD_SIZE.get(kind, count):
            raise self._fault(f"type {kind:02X} has {count} bytes, not {PAYLOAD_SIZE[kind]}")
        self._records += 1
        if kind:
            self._apply_control_record(kind, int.from_bytes(payload, "big"))
            return b""
        self._add_data(self._base + int.from_bytes(record[1:3], "big"), count)
        return payload

    def _apply_control_record(self, kind: int, value: int) -> None:
        """Apply a record of another type than data."""
        if kind == 1:
            self._ended = True
        elif kind == 2:
            if self._base and self._wraps_from == MEMORY_SIZE:  # a base of type 04
                linear, segment = hex_address(self._base), hex_address(value << 4)
                reason = f"base {segment} of type 02 comes after {linear} of type 04"
                self._warn(f"Line {self._line}: {reason}; some programs add the two")
            self._base = self._wraps_to = value << 4
            self._wraps_from = self._base + 64 * KIB
        elif kind == 4:
            self._base, self._wraps_from, self._wraps_to = value << 16, MEMORY_SIZE, 0
        elif kind in (3, 5):
            # A record of type 03 gives the registers CS and IP of an 8086.
            start = value if kind == 5 else (value >> 16 << 4) + (value & 0xFFFF)
            last = self._start_address
            if last not in (None, start):
                reason = f"start address {hex_address(start)} comes after {hex_address(last)}"
                self._warn(f"Line {self._line}: {reason}; the last one counts")
            self._start_address = start
        else:
            self._has_other_types = True
            reason = f"what records of type {kind:02X} hold is unknown"
            self._warn(f"Line {self._line}: {reason}, so that there are no raw bytes", reason)

    def _add_data(self, address: int, size: int) -> None:
        """Add the data of a record, in two pieces where they wrap round."""
        room = self._wraps_from - address
        if size > room:
            begin, end = hex_address(address), hex_address(self._wraps_to)
            self._warn(f"The record at {begin} wraps round to {end}")
            self.pieces.add(address, room)
            address, size = self._wraps_to, size - room
        self.pieces.add(address, size)

    def _warn(self, sentence: str, kind: str = "") -> None:
        """Add a warning: of a kind that is named only the first, of others MAX_WARNINGS at most."""
        if kind or len(self._warnings) < MAX_WARNINGS:
            self._warnings.setdefault(kind or sentence, sentence)
        else:
            self._warnings["more"] = "There are more warnings like these"

    def _fault(self, reason: str) -> HexFault:
        return HexFault(f"Corrupt Intel HEX: line {self._line}: {reason}")


# ------------------------------------------------------------------------------------- catalogue

NUMBER = "(?:0|[1-9][0-9]*)"
PART = f"(?:{NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
SEMVER = re.compile(
    rf"v?({NUMBER})\.({NUMBER})\.({NUMBER})(?:-({PART}(?:\.{PART})*))?"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)


def semver_key(version: str) -> str:
    """Return a key that sorts versions by the precedence of SemVer 2.0.0, section 11.

    A leading v is ignored. A version that is no SemVer gives "", which sorts below all others.
    """
    match = SEMVER.fullmatch(version)
    if not match:
        return ""
    *core, prerelease = match.groups()
    key = "".join(f"{len(number):06}{number}" for number in core)
    if prerelease is None:
        return key + "~"  # a release is above all its pre-releases
    for part in prerelease.split("."):
        # Numbers sort by value, and below words. "!" sorts below any character of a word: so a word
        # sorts above its own beginning, and a longer list above a shorter one that it begins with.
        key += f"0{len(part):06}{part}!" if part.isdigit() else f"1{part}!"
    return key


# These parts of the scripts below have not changed since 1.0.0, and like the scripts they must not.
COLUMNS_OF_1_0_0 = """
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    label TEXT NOT NULL,
    fw_version TEXT NOT NULL,
    precedence TEXT NOT NULL,  -- semver_key(fw_version)
    created TEXT NOT NULL,
    updated TEXT,
    confirmed INTEGER NOT NULL DEFAULT 0,
    size INTEGER,
    sha256 TEXT,
    stored TEXT,  -- when the binary was stored, or else the one before it
    report TEXT,  -- of sound Intel HEX: the layout that clients see, as JSON
"""
INDEXES_OF_1_0_0 = """
    CREATE INDEX image_by_age ON image (tenant, created);
    CREATE INDEX image_by_label ON image (tenant, label, created);
    CREATE INDEX image_by_version ON image (tenant, fw_version, created);
    CREATE INDEX image_by_confirmed ON image (tenant, confirmed, created);
"""
# Script number N, counted from 1, makes version N of the schema from the one before. It is cut into
# statements at its semicolons, so there must be none in a comment.
MIGRATIONS = (
    # AUTOINCREMENT never reuses a number, so sqlite_sequence tells whether the store was ever used.
    f"""
    CREATE TABLE image ({COLUMNS_OF_1_0_0}
        segments TEXT  -- [[address, size], ...]
    );
    {INDEXES_OF_1_0_0}
    CREATE INDEX image_by_precedence ON image (tenant, label, precedence, created)
        WHERE confirmed = 1
    """,
    # The column segments goes, as the report has them too. SQLite drops columns only since 3.35,
    # so the table is made anew. Dropping the old one drops its indexes.
    f"""
    ALTER TABLE image RENAME TO image_1;
    CREATE TABLE image ({COLUMNS_OF_1_0_0}
        raw_size INTEGER  -- of the .bin, where there is one
    );
    INSERT INTO image SELECT seq, id, tenant, label, fw_version, precedence, created, updated,
        confirmed, size, sha256, coalesce(stored, updated), report,
        (SELECT nullif(sum(json_extract(value, '$[1]')), 0) FROM json_each(segments))
        FROM image_1;
    DELETE FROM sqlite_sequence WHERE name = 'image';
    UPDATE sqlite_sequence SET name = 'image' WHERE name = 'image_1';
    DROP TABLE image_1;
    {INDEXES_OF_1_0_0}
    CREATE INDEX image_by_precedence ON image (tenant, label, precedence) WHERE confirmed = 1;
    CREATE TABLE removed (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE)
    """,
)

# The image object as JSON, which SQLite writes three times as fast as json.dumps would. All answers
# with images have it from here; what an image has not is left out, never null. FIRST_MEMBERS ends
# with a name, whose value follows.
FIRST_MEMBERS = (
    "'id', id, 'label', label, 'fw_version', fw_version, 'created', created, 'confirmed', "
)
IMAGE_JSON = f"""CASE
    WHEN confirmed THEN json_object({FIRST_MEMBERS} json('true'), 'updated', updated,
        'size', size, 'sha256', sha256,
        'checked', json(CASE WHEN report IS NULL THEN 'false' ELSE 'true' END))
    WHEN updated IS NULL THEN json_object({FIRST_MEMBERS} json('false'))
    ELSE json_object({FIRST_MEMBERS} json('false'), 'updated', updated) END"""
# The same with the member hex; NULL where its report is longer than the parameter :longest.
WITH_REPORT = f"""CASE WHEN report IS NULL THEN {IMAGE_JSON}
    WHEN length(report) > :longest THEN NULL
    ELSE rtrim({IMAGE_JSON}, '}}') || ',"hex":' || report || '}}' END"""
FILE_NAME_JSON = "json_quote(id || '.hex')"

COLUMNS = "id, confirmed, size, sha256, stored, report IS NOT NULL, raw_size, label, fw_version"
ONE = "FROM image WHERE id = :id AND tenant = :tenant"
GET = f"SELECT {COLUMNS} {ONE}"
LATEST = f"""SELECT fw_version, precedence, {IMAGE_JSON} FROM image
    WHERE tenant = :tenant AND label = :label AND confirmed = 1
    ORDER BY precedence DESC, seq DESC LIMIT 1"""
FILTERS = {name: f" AND {name} = :{name}" for name in ("label", "fw_version", "confirmed")}
LIST = """SELECT '[' || coalesce(group_concat(item), '') || ']' FROM (
    SELECT {item} AS item FROM image WHERE tenant = :tenant{filters}
    ORDER BY created, seq LIMIT :limit OFFSET :offset)"""
COUNT = "SELECT count(*) FROM image WHERE tenant = :tenant{filters}"
ADD = """INSERT INTO image (id, tenant, label, fw_version, precedence, created)
    VALUES (:id, :tenant, :label, :fw_version, :precedence, :now)"""
# NULL leaves a column as it is.
CHANGE = """UPDATE image SET label = coalesce(:label, label), updated = :now,
    fw_version = coalesce(:fw_version, fw_version), precedence = coalesce(:precedence, precedence)
    WHERE id = :id AND tenant = :tenant"""
# An image's next binary is dated a second after its last at least, so that a date in If-Range
# cannot mean both. SQLite's dates have milliseconds, hence one of these more.
CONFIRM = """UPDATE image SET confirmed = 1, size = :size, sha256 = :sha256, report = :report,
    raw_size = :raw_size, updated = :now, stored = coalesce(
        max(:now, strftime('%Y-%m-%dT%H:%M:%f000+00:00', stored, '+1.001 seconds')), :now)
    WHERE id = :id AND tenant = :tenant"""
# The same bytes again. Its files are made anew, perhaps by a newer reader of Intel HEX.
CONFIRM_AGAIN = """UPDATE image SET report = :report, raw_size = :raw_size
    WHERE id = :id AND tenant = :tenant"""
# The date in stored stays, as the next binary's date depends on it.
CLEAR = """UPDATE image SET confirmed = 0, size = NULL, sha256 = NULL, report = NULL,
    raw_size = NULL, updated = :now WHERE id = :id AND tenant = :tenant AND confirmed = 1"""
# The table removed lists deleted images, as a crash may leave their files. The last 10,000 are
# enough: the files of an earlier one were gone long before the latest deletions were synced.
REMOVE = (
    f"DELETE {ONE}",
    "INSERT INTO removed (id) VALUES (:id)",
    "DELETE FROM removed WHERE seq <= last_insert_rowid() - 10000",
)
# All file names that the catalogue knows, and whether the file belongs to a binary (1) or may go.
FILES = """SELECT id || '.hex', 0 FROM removed UNION ALL SELECT id || '.bin', 0 FROM removed
    UNION ALL SELECT id || '.hex', confirmed FROM image
    UNION ALL SELECT id || '.bin', confirmed AND raw_size IS NOT NULL FROM image"""

# What a start-up error says where opening the catalogue has raised one of these.
CANNOT_USE: dict[type[Exception], str] = {
    CannotStart: "{error}",
    Damaged: "{cause}; name another folder with --data, or restore it from a backup, "
    "without the -wal and -shm files beside it",
    ReadOnly: "it is read-only; let this user write it, or name another folder with --data",
    StorageFull: "the disk is full; make room",
    Unavailable: "another program has locked it; end that, then try again",
}
PATIENCE = 10  # seconds that a thread waits for a lock that another process holds
QUICK_REPORT = 64 * KIB  # characters; a thread that never waits reads no longer report
PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    # Pages of 4 KiB. The write-ahead log must fit into RESERVE, or deleting would have no room.
    "wal_autocheckpoint = 200",
    # 700 KiB for each connection instead of 2,000: the operating system caches the file as well.
    "cache_size = -700",
    # While another program reads for long, the log grows; afterwards, give the disk space back.
    "journal_size_limit = 1048576",
    # As in sync(): macOS alone needs another call to write through to the disk.
    "fullfsync = 1",
)


class Image(NamedTuple):
    """A row as the service itself uses it, by COLUMNS; what clients see is IMAGE_JSON."""

    id: str
    confirmed: int
    size: int
    sha256: str
    stored: str
    is_hex: int  # 1 for sound Intel HEX
    raw_size: int | None  # bytes of the .bin, where there is one
    label: str
    fw_version: str


# Raises an error where an image, as it is under the write lock, must not be changed: If-Match.
Permit = Callable[[Image], None]
Values = Mapping[str, object]  # of the named parameters of an SQL statement


class Binary(NamedTuple):
    """What is recorded of a binary."""

    size: int
    sha256: str
    report: str | None  # of sound Intel HEX: its layout, as JSON
    raw_size: int | None  # bytes of the .bin, where there is one


class Catalogue:
    """The metadata of images, in SQLite; any thread may use it.

    Whatever touches an image takes its tenant, and raises NoSuchImage where that tenant has none
    with that id. Anything may raise Damaged, Unavailable or StorageFull.
    """

    def __init__(self, path: Path, make: bool = True) -> None:
        """Open the catalogue: made or migrated if `make`, else only read; raises CannotStart."""
        self._path, self._closed, self._make = path, False, make
        self._stat: os.stat_result | None = None  # tells the file from others, once it is there
        self._thread = threading.local()
        # Connections to lend to any thread: those that wait for a lock, and those that do not.
        self._idle: dict[bool, list[sqlite3.Connection]] = {True: [], False: []}
        # Threads that write queue here, as SQLite itself waits by sleeping, up to 100 ms at a time.
        self._writing = threading.RLock()
        self._additions: list[dict[str, Any]] = []  # images to add, which no thread records yet
        # A fleet downloads one binary again and again: the last few are kept, 6 MiB at most each.
        self.segments = functools.lru_cache(maxsize=4)(self._read_segments)
        CATALOGUES.add(self)
        try:
            with self._transaction() if make else self._connection() as connection:
                self._migrate(connection)
            # SQLite would not say so before the first change.
            if make and not os.access(path, os.W_OK):
                raise ReadOnly
            self._stat = os.stat(path)
        except (ServiceError, CannotStart) as error:
            self.close()
            reason = CANNOT_USE[type(error)].format(error=error, cause=error.__cause__)
            raise CannotStart(f"Cannot use {path} as the catalogue: {reason}") from error

    def require_in_place(self) -> None:
        """Raise Unavailable where changes would be lost: the file has been deleted or replaced."""
        with contextlib.suppress(OSError):
            if not self._stat or os.path.samestat(self._stat, os.stat(self._path)):
                return
        raise Unavailable("The catalogue was deleted or replaced: restart the service")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version > len(MIGRATIONS):
            raise CannotStart("a newer version of this program made it, which is needed to use it")
        if tables and not version:
            raise CannotStart("it is the database of another program")
        if version < len(MIGRATIONS) and not self._make:
            raise CannotStart("an older version of this program made it: start the service once")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            # Not by executescript(), which would commit the transaction first.
            for statement in script.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")

    def never_wait(self) -> None:
        """Have this thread, on which all connections depend, get MustWait instead of waiting."""
        self._thread.waits = False

    def _waits(self) -> bool:
        return getattr(self._thread, "waits", True)

    def _open(self, waits: bool) -> sqlite3.Connection:
        self.require_in_place()  # SQLite would make a new file in the place of a deleted one
        connection = sqlite3.connect(
            self._path.absolute().as_uri() + ("" if self._make else "?mode=ro"),
            uri=True,
            timeout=PATIENCE if waits else 0,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection; the one place where SQLite's errors become the service's own.

        Where the block raises an error the connection is closed, which rolls back a transaction.
        """
        waits, reusable = self._waits(), False
        try:
            try:
                connection = self._idle[waits].pop()
            except IndexError:
                connection = self._open(waits)
            try:
                yield connection
                reusable = not self._closed
            finally:
                if reusable:
                    self._idle[waits].append(connection)
                else:
                    connection.close()
        except sqlite3.Error as error:
            locked = Unavailable if waits else MustWait
            known = {"disk is full": StorageFull, "is locked": locked, "readonly": ReadOnly}
            if shutil.disk_usage(self._path.parent).free < MIB:
                known["disk I/O error"] = StorageFull  # no room for the -shm file
            kinds = [kind for words, kind in known.items() if words in str(error)]
            raise (kinds or [Damaged])[0] from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a write transaction; it is committed and synced when the block ends."""
        with self._writing:
            # Before a connection is lent, as an error would close it: one to a catalogue that was
            # deleted still reads, so that downloads go on.
            self.require_in_place()
            with self._connection() as connection:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")

    def _row(self, sql: str, **values: object) -> Any:
        with self._connection() as connection:
            return connection.execute(sql, values).fetchone()

    def _image_row(self, sql: str, **values: object) -> Any:
        row = self._row(sql, **values)
        if not row:
            raise NoSuchImage(str(values["id"]))
        return row

    def close(self) -> None:
        """Close all connections; those that are lent close when they come back."""
        self._closed = True
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connections that are not lent; who asks for one gets a new one."""
        for idle in self._idle.values():
            with contextlib.suppress(IndexError):  # another thread may take the last one
                while True:
                    idle.pop().close()

    def add(self, tenant: str, label: str, fw_version: str) -> tuple[str, str]:
        """Add an image; return its id and when it was created.

        A sync of the disk takes most of the time. So threads leave what they add in a list before
        they queue for the one that writes; the first to get there records what all have left, with
        one sync, and the others find their own done.
        """
        new: dict[str, Any] = {"id": str(uuid.uuid4()), "tenant": tenant, "label": label}
        new |= {"fw_version": fw_version, "precedence": semver_key(fw_version)}
        self._additions.append(new)
        with self._writing:
            if new in self._additions:
                # One by one, as other threads may add to the list meanwhile.
                together = [self._additions.pop(0) for _ in self._additions[:]]
                try:
                    with self._transaction() as connection:
                        for each in together:
                            each["now"] = now_text()  # under the lock: in the order of the rows
                            connection.execute(ADD, each)
                except BaseException as error:
                    for each in together:
                        each["error"] = error
        if "error" in new:
            raise new["error"]
        return new["id"], new["now"]

    def get(self, tenant: str, image_id: str) -> Image:
        return Image(*self._image_row(GET, id=image_id, tenant=tenant))

    def get_json(self, tenant: str, image_id: str, item: str = IMAGE_JSON) -> str:
        """Return the image object; WITH_REPORT adds the layout of its Intel HEX."""
        longest = math.inf if self._waits() else QUICK_REPORT
        sql = f"SELECT {item} {ONE}"
        (found,) = self._image_row(sql, id=image_id, tenant=tenant, longest=longest)
        if found is None:
            raise MustWait
        return str(found)

    def _read_segments(self, image: Image) -> Segments:
        """Return where the data of sound Intel HEX belong.

        Raises Damaged also where another binary has been recorded since the image was read.
        """
        sql = "SELECT report FROM image WHERE id = :id AND sha256 = :sha256"
        row = self._row(sql, id=image.id, sha256=image.sha256)
        if not row:
            raise Damaged
        segments = json.loads(row[0])["segments"]
        return Segments((int(segment["address"], 16), segment["size"]) for segment in segments)

    def tenant(self, image_id: str) -> str:
        """Return whose image it is; for signed links alone, which name no tenant."""
        return str(self._image_row("SELECT tenant FROM image WHERE id = :id", id=image_id)[0])

    def list_json(
        self, tenant: str, filters: Values, limit: int = -1, offset: int = 0, item: str = IMAGE_JSON
    ) -> str:
        """Return the tenant's images that pass all filters, oldest first; a limit of -1 is none."""
        sql = LIST.format(item=item, filters="".join(FILTERS[name] for name in filters))
        return str(self._row(sql, tenant=tenant, limit=limit, offset=offset, **filters)[0])

    def count(self, tenant: str, filters: Values) -> int:
        sql = COUNT.format(filters="".join(FILTERS[name] for name in filters))
        return int(self._row(sql, tenant=tenant, **filters)[0])

    def latest(self, tenant: str, label: str) -> tuple[str, str, str] | None:
        """Return version, semver_key and object of the newest image that has a binary."""
        return self._row(LATEST, tenant=tenant, label=label)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _changing(
        self, tenant: str, image_id: str
    ) -> Iterator[tuple[sqlite3.Connection, Image, dict[str, Any]]]:
        """Run a write transaction on an image; lend a connection, the image, and SQL parameters."""
        with self._transaction() as connection:
            values = {"id": image_id, "tenant": tenant, "now": now_text()}
            row = connection.execute(GET, values).fetchone()
            if not row:
                raise NoSuchImage(image_id)
            yield connection, Image(*row), values

    def change(self, tenant: str, image_id: str, changes: dict[str, str], permit: Permit) -> None:
        """Set the label, the version (fw_version) or both, whichever `changes` has."""
        new = dict.fromkeys(("label", "fw_version", "precedence")) | changes
        if "fw_version" in changes:
            new["precedence"] = semver_key(changes["fw_version"])
        with self._changing(tenant, image_id) as (connection, image, values):
            permit(image)
            connection.execute(CHANGE, values | new)

    @contextlib.contextmanager
    def confirm(self, tenant: str, image_id: str, binary: Binary, permit: Permit) -> Iterator[None]:
        """Record a binary once the block has published its files, with no upload in between.

        The same bytes may be published again, which mends damaged files. Raises ServiceError 409
        where others are recorded. Where the block or the recording fails, what was published is to
        be removed by unless_confirmed().
        """
        with self._changing(tenant, image_id) as (connection, image, values):
            if image.confirmed and image.sha256 != binary.sha256:
                raise ServiceError("Binary already exists", status=409)
            permit(image)
            yield
            sql = CONFIRM_AGAIN if image.confirmed else CONFIRM
            connection.execute(sql, values | binary._asdict())

    def clear(self, tenant: str, image_id: str, permit: Permit) -> None:
        """Record that an image has no binary any more, if it had one."""
        with self._changing(tenant, image_id) as (connection, image, values):
            permit(image)
            connection.execute(CLEAR, values)

    def remove(self, tenant: str, image_id: str, permit: Permit) -> str:
        """Remove an image; return the object that it was."""
        with self._changing(tenant, image_id) as (connection, image, values):
            permit(image)
            (removed,) = connection.execute(f"SELECT {IMAGE_JSON} {ONE}", values).fetchone()
            for statement in REMOVE:
                connection.execute(statement, values)
        return str(removed)

    def unless_confirmed(self, image_id: str, action: Callable[[str], None]) -> None:
        """Run an action on an image's id if it has no binary, while no upload can record one."""
        sql = "SELECT 1 FROM image WHERE id = ? AND confirmed = 1"
        with self._transaction() as connection:
            if not connection.execute(sql, (image_id,)).fetchone():
                action(image_id)

    def confirmed(self) -> list[Image]:
        """Return all tenants' images that have a binary."""
        with self._connection() as connection:
            rows = connection.execute(f"SELECT {COLUMNS} FROM image WHERE confirmed = 1")
            return [Image(*row) for row in rows]

    def strays(self, names: Iterable[str]) -> dict[str, bool]:
        """Return those of these files that belong to no binary.

        The value is True where the catalogue itself says that a file is left over, and False where
        it knows nothing of the file, as it may be older than that.
        """
        with self._connection() as connection:
            files = dict(connection.execute(FILES))
        return {name: name in files for name in names if not files.get(name)}

    def faults(self, check: str = "integrity_check") -> list[str]:
        """Return the faults that SQLite finds in the catalogue; quick_check skips the indexes."""
        try:
            with self._connection() as connection:
                rows = connection.execute(f"PRAGMA {check}(10)").fetchall()
        except Damaged as error:
            return [str(error.__cause__)]
        lines = [line for row in rows for line in str(row[0]).splitlines()]
        return [line for line in lines if line != "ok" and not line.startswith("***")]  # a heading

    def ever_used(self) -> bool:
        """Tell whether there ever was an image."""
        return self._row("SELECT 1 FROM sqlite_sequence WHERE seq > 0") is not None

    def check(self) -> None:
        """Raise ServiceError where images cannot be read or cannot be recorded for good."""
        self.require_in_place()
        self.total()
        if not os.access(self._path, os.W_OK):
            raise ReadOnly

    def total(self) -> int:
        """Return how many images all tenants have."""
        return int(self._row("SELECT count(*) FROM image")[0])

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy, while the catalogue is in use."""
        with self._connection() as connection, contextlib.closing(sqlite3.connect(path)) as copy:
            connection.backup(copy)


CATALOGUES: weakref.WeakSet[Catalogue] = weakref.WeakSet()


def disconnect_all() -> None:
    """Close all connections that are not lent, so that none crosses a fork.

    In the child SQLite would take the parent's locks for its own: "How To Corrupt An SQLite
    Database File", 2.6.
    """
    for catalogue in list(CATALOGUES):
        catalogue.disconnect()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=disconnect_all)


def now_text() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


# ------------------------------------------------------------------------------------- binaries


def require_space(folder: Path, size: int = 0) -> None:
    """Raise StorageFull unless that many bytes fit the disk with RESERVE to spare."""
    with full_disk_as_error():
        if shutil.disk_usage(folder).free - RESERVE < size:
            raise StorageFull


LARGEST_READ = MIB  # bytes; smaller reads would make downloads slower under other servers


class Excerpt:
    """A read-only file: the bytes between two addresses, with gaps filled, cut to a range.

    Made for a WSGI server's file wrapper: it ends where the range ends whatever the server does,
    and gives a block at a time, so that a window over a wide gap takes no memory. wsgiref needs
    read() alone; waitress finds the length by seek() and tell(). Our own server has the system
    send what in_one_piece() names.
    """

    def __init__(
        self, file: io.FileIO, segments: Segments, start: int, end: int, fill: bytes = b""
    ) -> None:
        """Take a file with the data of segments, two addresses, and the byte for gaps if any."""
        self._file, self._segments, self._start, self._fill = file, segments, start, fill
        self.narrow(0, end - start)

    def narrow(self, begin: int, end: int) -> None:
        """Cut to the bytes from `begin` to before `end`, counted from the start address."""
        self._begin = self._at = self._start + begin  # addresses, like all that follow
        self._end = self._start + end

    def tell(self) -> int:
        return self._at - self._begin

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (self._begin, self._at, self._end)[whence] + offset
        return self.tell()

    def in_one_piece(self) -> tuple[io.FileIO, int, int] | None:
        """Return file, offset and size of the rest; None if it has gaps, or there is none."""
        extent = next(self._segments.between(self._at, self._end), None)
        left = self._end - self._at
        return (self._file, extent.offset, left) if extent and extent.size == left else None

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, LARGEST_READ at most, and none only at the end."""
        left = max(self._end - self._at, 0)
        size = min(left, LARGEST_READ, LARGEST_READ if size < 0 else size)
        begin, self._at = self._at, self._at + size
        extents = list(self._segments.between(begin, self._at))
        if not extents:
            return self._fill * size
        # In the file the extents follow one another without gaps, so one read gets them all.
        first, last = extents[0].offset, extents[-1].offset + extents[-1].size
        self._file.seek(first)
        data = self._file.read(last - first)
        if len(data) < last - first:  # else the server would wait for the rest for ever
            raise OSError(errno.EIO, "A binary was cut off while it was read")
        if len(data) == size:
            return data
        block = bytearray(self._fill * size)
        for extent in extents:
            at, taken = extent.address - begin, extent.offset - first
            block[at : at + extent.size] = data[taken : taken + extent.size]
        return bytes(block)

    def close(self) -> None:
        self._file.close()


def read_extents(file: io.FileIO, extents: Iterable[Extent]) -> Iterator[bytes]:
    """Yield the bytes of extents of a file, one extent after the other, in blocks."""
    block = bytearray()
    for extent in extents:
        file.seek(extent.offset)
        for at in range(0, extent.size, BLOCK):
            block += file.read(min(BLOCK, extent.size - at))
            if len(block) >= BLOCK:
                yield bytes(block)
                block.clear()
    yield bytes(block)


class Upload:
    """A binary on its way in: its .hex file in tmp/, and a .bin file for the data of Intel HEX."""

    def __init__(self, folder: Path, limit: int, check: bool, require: bool) -> None:
        self._folder, self._limit, self._check, self._require = folder, limit, check, require
        self._hash, self._size = hashlib.sha256(), 0
        # The reader takes DETECTION_LIMIT or more at once, as the first so many bytes tell whether
        # the file is Intel HEX. It is taken for that until they, or a fault, show otherwise.
        self._unread, self._is_hex, self._reader = b"", True, HexReader()
        self._drafts: list[IO[bytes]] = []  # all files that were made in tmp/
        self.files: dict[str, IO[bytes]] = {}  # those to publish, by the suffix they will have
        self._store(".hex", b"")  # an empty file is a file

    def _store(self, suffix: str, block: bytes) -> None:
        """Append to one of the files, which begins to exist with its first block."""
        require_space(self._folder, len(block))
        if suffix not in self.files:
            self.files[suffix] = tempfile.NamedTemporaryFile(dir=self._folder, delete=False)
            self._drafts.append(self.files[suffix])
        self.files[suffix].write(block)

    def write(self, block: bytes) -> None:
        """Take the next bytes; raises TooLarge, StorageFull, or BadRequest for a faulty file."""
        self._size += len(block)
        if self._size > self._limit:
            raise TooLarge(self._limit)
        self._hash.update(block)
        self._store(".hex", block)
        self._unread += block
        if len(self._unread) >= DETECTION_LIMIT:
            self._read()

    def _read(self, at_end: bool = False) -> dict[str, Any] | None:
        """Read what is unread, if it is Intel HEX; return the report of a sound file at its end."""
        block, self._unread = self._unread, b""
        if len(block) == self._size:  # the beginning of the file, which tells its kind
            self._is_hex = looks_like_hex(block[:DETECTION_LIMIT])
            if self._require and not self._is_hex:
                raise BadRequest("Not an Intel HEX file")
        if not self._is_hex:
            return None
        try:
            self._store(".bin", self._reader.feed(block))
            if not at_end:
                return None
            self._store(".bin", self._reader.finish())
            return self._reader.report()
        except HexFault as fault:
            if self._check:
                raise BadRequest(f"{fault}; ?validate=false stores it unchecked") from fault
            self._is_hex = False
            return None

    def finish(self) -> Binary:
        """Bring all of it to the disk; return what it is. Raises what write() does."""
        layout, raw_size = self._read(at_end=True), None
        if layout and self._reader.has_raw_bytes():
            raw_size = sum(segment["size"] for segment in layout["segments"])
            if not self._reader.pieces.is_in_order():
                self._put_in_order()
        else:
            self.files.pop(".bin", None)
        for file in self.files.values():
            file.flush()
            sync(file.fileno())
            file.close()
        report = json.dumps(layout) if layout else None
        # The catalogue writes the report to its log, and later to its table.
        require_space(self._folder, 3 * len(report or ""))
        return Binary(self._size, self._hash.hexdigest(), report, raw_size)

    def _put_in_order(self) -> None:
        """Make the .bin anew, with its data in the order of addresses."""
        unordered = self.files.pop(".bin")
        unordered.flush()
        with open(unordered.name, "rb", buffering=0) as file:
            for block in read_extents(file, self._reader.pieces.extents()):
                self._store(".bin", block)

    def close(self) -> None:
        """Remove what was not published; what cannot be removed goes at the next start."""
        for draft in self._drafts:
            with contextlib.suppress(OSError):  # the disk has no room for what is still to write
                draft.close()
            with contextlib.suppress(OSError):  # it was published, and has another name now
                os.unlink(draft.name)


class BinaryStore:
    """The binaries: files that are whole or not there at all, named by the image's id."""

    def __init__(self, folder: Path, make: bool = True) -> None:
        """Make the folders unless they are there, if `make`; raises CannotStart."""
        self.folder, self.uploads = folder / "binaries", folder / "tmp"
        if make:
            make_folder(self.folder)
            make_folder(self.uploads)
            self._require_renaming()
            sync_folder(folder)

    def _require_renaming(self) -> None:
        """Raise CannotStart where a file cannot move from one folder to the other in one step.

        Only trying tells: between two bind mounts of one file system it fails as well.
        """
        # It tries with a folder: one that a crash leaves is not taken for a binary.
        probe = Path(tempfile.mkdtemp(dir=self.uploads))
        try:
            probe = probe.replace(self.folder / probe.name)
        except OSError as error:
            raise CannotStart(f"{self.folder} and tmp are on two mounts: use one") from error
        finally:
            probe.rmdir()

    @contextlib.contextmanager
    def receive(self, limit: int, check: bool = True, require: bool = False) -> Iterator[Upload]:
        """Lend an upload of at most `limit` bytes; what is not published is gone at the end.

        `check` refuses Intel HEX that is not sound, `require` all that is no Intel HEX.
        """
        with (
            full_disk_as_error(),
            contextlib.closing(Upload(self.uploads, limit, check, require)) as upload,
        ):
            yield upload

    def publish(self, upload: Upload, image_id: str) -> None:
        """Give the files of a finished upload their names, for good."""
        for suffix in sorted(upload.files):  # the .bin first: where the .hex is, the rest is too
            os.replace(upload.files[suffix].name, self.path(image_id, suffix))
        if ".bin" not in upload.files:  # an earlier binary, now being deleted, may have had one
            self.path(image_id, ".bin").unlink(missing_ok=True)
        sync_folder(self.folder)

    def remove(self, image_id: str) -> None:
        """Remove the files of an image, if there are any."""
        for suffix in (".hex", ".bin"):
            with contextlib.suppress(PermissionError):  # Windows: it is being read, and swept later
                self.path(image_id, suffix).unlink(missing_ok=True)

    def path(self, image_id: str, suffix: str) -> Path:
        return self.folder / (image_id + suffix)

    def open(self, image_id: str, suffix: str, size: int) -> io.FileIO:
        """Open a file for reading; raises Damaged where it is not there, readable and whole."""
        try:
            # Not by path(): putting a Path together takes as long as opening the file.
            file = open(f"{self.folder}{os.sep}{image_id}{suffix}", "rb", buffering=0)
            actual = os.fstat(file.fileno()).st_size
            if actual == size:
                return file
            file.close()
            found = f"is {actual} bytes long instead of {size}"
        except FileNotFoundError:
            found = "is missing"
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
        remedy = "upload the same file again to restore it"
        raise Damaged(f"The {suffix[1:]} file of image {image_id} {found}: {remedy}")

    def names(self) -> set[str]:
        """Return the names of all files that are there."""
        return {entry.name for entry in os.scandir(self.folder) if entry.is_file()}

    def check(self) -> None:
        """Write a file that vanishes at once; raises StorageFull or OSError."""
        require_space(self.uploads)
        os.scandir(self.folder).close()
        with full_disk_as_error(), tempfile.TemporaryFile(dir=self.uploads) as file:
            file.write(bytes(4 * KIB))
            file.flush()


# ------------------------------------------------------------------------------------- HTTP

ENTITY_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
# The three forms of RFC 9110, 5.6.7; email.utils takes others as well.
HTTP_DATE = re.compile(
    r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT|\w{6,9}, \d\d-\w{3}-\d\d \d\d:\d\d:\d\d GMT"
    r"|\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}",
    re.ASCII,
)
BYTE_RANGE = re.compile("bytes= *([0-9]*)-([0-9]*) *", re.IGNORECASE)
JSON_WANTED = "Payload must be valid JSON, and Content-Type set accordingly"
FORM_WANTED = "Payload must be valid multipart/form-data"
LARGEST_WINDOW = 256 * MIB
HEX_ADDRESS, HEX_BYTE = "0[xX](?:[0-9a-fA-F]{1,8}|100000000)", "0[xX][0-9a-fA-F]{1,2}"


# From the grammar of RFC 9112 (3, 5, 7.1) and RFC 9110 (5.6.2); linear in time on any input.
METHOD = rb"[!#$%&'*+.^_`|~0-9A-Z-]+"
REQUEST_LINE = re.compile(rb"(%b) (/[!-~]*|\*|(?i:https?)://[!-~]+) HTTP/([0-9])\.([0-9])" % METHOD)
HEADER_LINES = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*")
TRANSFER_CODING = re.compile(rb"\r\ntransfer-encoding:([^\r]*)", re.IGNORECASE)
AUTHORITY = re.compile(r"(?:[\w.~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?", re.ASCII)
CHUNK_SIZE = re.compile(rb"0*([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?")
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
REQUEST_START = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Z-]|\r?\Z")
STRAY_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
Environ = dict[str, Any]  # a request as WSGI (PEP 3333) has it
Headers = list[tuple[str, str]]
Body = bytes | Excerpt  # of an answer
HEADER_LIMIT, HEADER_LINES_LIMIT = 128 * KIB, 500
CHUNK_LINE_LIMIT = 8 * KIB  # bytes; the longest line before a chunk, or in the trailer


def parse_request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Return method, target and minor version of HTTP/1; raises BadRequest, or status 505."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadRequest("A request line is METHOD /path HTTP/1.1, in ASCII and percent-encoded")
    if match[3] != b"1":
        raise ServiceError("This service speaks HTTP/1.1", status=505)
    return match[1], match[2], match[4]


def header_size(received: bytearray, checked: int) -> int:
    """Return the size of the header that has been received, 0 where it is not yet whole.

    Raises BadRequest, or status 431 or 505, as soon as it cannot become one: the end of a TLS
    hello, or of a request with bare LF, would never come. Of what has been received, the first
    `checked` bytes were looked at by an earlier call.
    """
    end = received.find(b"\r\n\r\n", max(checked - 3, 0))
    if (len(received) if end < 0 else end) > HEADER_LIMIT:
        raise ServiceError(f"The header has more than {HEADER_LIMIT} bytes", status=431)
    if end >= 0:
        return end + 2
    if not REQUEST_START.match(received) or STRAY_LINE_END.search(received, checked - 1):
        raise BadRequest("A request is lines that end in CR LF, the first with a method")
    # A first line that is longer is only looked at when the header is whole.
    length = received.find(b"\r\n", 0, CHUNK_LINE_LIMIT)
    if length >= max(checked - 1, 0):  # its end has just come
        parse_request_line(bytes(received[:length]))
    return 0


class Request(HTTPRequestParser):
    """A request: its header, then its body as it arrives.

    waitress's parser takes lines and target apart, decodes them, joins a header that is given
    twice. All of its names in use: parse_header() and what that raises; headers, command, path,
    query, proxy_netloc, content_length, chunked, expect_continue. What comes before its call keeps
    its patterns from quadratic time, and its messages, which quote tokens, from the client. Bodies
    it does not read: it lets a bare LF end the line of a chunk, and copies the rest for each.
    """

    def __init__(self, header: bytes) -> None:
        """Read a header, without its empty line; raises BadRequest, or status 501 or 505."""
        super().__init__(Adjustments)  # the class itself, whose attributes are the defaults
        line, _, lines = header.partition(b"\r\n")
        method, target, minor = parse_request_line(line)
        self.target = target.decode()
        self.version = "1.0" if minor == b"0" else "1.1"
        if not HEADER_LINES.fullmatch(lines):
            raise BadRequest("A line of the header is not of the form Name: value")
        if lines.count(b"\n") > HEADER_LINES_LIMIT:
            raise ServiceError(f"The header has more than {HEADER_LINES_LIMIT} lines", status=431)
        if b"\t" in lines or b"   " in lines:  # blanks around a value mean nothing
            pairs = (line.partition(b":") for line in lines.splitlines())
            lines = b"".join(b"%b:%b\r\n" % (name, value.strip()) for name, _, value in pairs)
        header = b"%b %b HTTP/%b\r\n%b" % (method, target, self.version.encode(), lines)
        try:
            self.parse_header(header)
        except TransferEncodingNotImplemented:
            raise ServiceError("Transfer-Encoding takes chunked alone", status=501) from None
        except (ParsingError, ValueError):
            raise BadRequest("The request's host, or its Content-Length, is none") from None
        # A proxy in front might see another end of the request: RFC 9112, 6.1 and 6.3.
        codings = [coding.strip().lower() for coding in TRANSFER_CODING.findall(header)]
        self.has_length = "CONTENT_LENGTH" in self.headers
        if codings and (codings != [b"chunked"] or not self.chunked or self.has_length):
            wanted = "chunked alone, in HTTP/1.1, without Content-Length"
            raise BadRequest(f"Transfer-Encoding takes {wanted}")
        if self.version == "1.1":
            self.headers.setdefault("HOST", "")
        hosts = [self.headers[name] for name in self.headers if name == "HOST"]
        if not target.startswith((b"/", b"*")):  # its host counts: RFC 9112, 3.2.2
            self.headers["HOST"] = self.proxy_netloc
            hosts.append(self.proxy_netloc)
        if not all(map(AUTHORITY.fullmatch, hosts)):  # two headers have been joined by ", "
            raise BadRequest("A request names its host in one header Host: example.com:8000")
        self.environ = self._environ()

    def _environ(self) -> dict[str, Any]:
        """Return the request as WSGI has it: what the routes read of it."""
        environ = {
            "REQUEST_METHOD": self.command,
            "PATH_INFO": self.path,
            "QUERY_STRING": self.query,
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
        }
        for name, value in self.headers.items():
            known = name in ("CONTENT_TYPE", "CONTENT_LENGTH")
            environ[name if known else "HTTP_" + name] = value
        if self.chunked:  # waitress takes that header out
            environ |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
        return environ

    def receive(self, received: bytearray, limit: int, folder: Path) -> Iterator[bool]:
        """Move the body, of at most `limit` bytes, from what is received to a spool.

        The spool is in memory up to JSON_LIMIT, then a file. Yields True where more must come,
        False where others may have their turn; raises BadRequest, TooLarge, StorageFull.
        """
        self._limit, self._folder = limit, folder
        self._size = self._lines = self._overhead = 0
        with full_disk_as_error():
            self._body = tempfile.SpooledTemporaryFile(JSON_LIMIT, dir=str(folder))
            self.environ["wsgi.input"] = self._body
            if self.chunked:
                yield from self._chunks(received)
            else:
                yield from self._store(received, self.content_length)
            self._body.seek(0)
        self.environ["CONTENT_LENGTH"] = str(self._size)

    def _chunks(self, received: bytearray) -> Iterator[bool]:
        """Take a chunked body: RFC 9112, 7.1."""
        size = -1
        while size:
            match = CHUNK_SIZE.fullmatch((yield from self._line(received)))
            if not match:
                raise BadRequest("A chunk does not begin with its size in hexadecimal digits")
            size = int(match[1], 16)
            yield from self._store(received, size)
            if size and (yield from self._line(received)):
                raise BadRequest("A chunk is longer than it says")
        while (yield from self._line(received)):  # the trailer
            pass

    def _line(self, received: bytearray) -> Generator[bool, None, bytes]:
        """Return the next line of what frames the chunks, without its CR LF."""
        while (end := received.find(b"\n") + 1) == 0 and len(received) <= CHUNK_LINE_LIMIT:
            yield True
        line = bytes(received[:end])
        del received[:end]
        # A chunk of one byte has five bytes of framing. What goes far beyond that are extensions
        # and trailers: nobody reads them, and they count for no limit of the body's size.
        self._lines, self._overhead = self._lines + 1, self._overhead + end
        if self._overhead > 8 * self._size + MIB:
            raise TooLarge(self._limit)
        if self._lines % 500 == 0:
            yield False
        if not line.endswith(b"\r\n") or b"\r" in line[:-2] or end > CHUNK_LINE_LIMIT:
            raise BadRequest("A line between chunks is too long, or does not end in CR LF")
        return line[:-2]

    def _store(self, received: bytearray, size: int) -> Iterator[bool]:
        """Move `size` bytes to the spool."""
        while size:
            if not received:
                yield True
            count = min(size, len(received))
            size -= count
            self._size += count
            if self._size > self._limit:
                raise TooLarge(self._limit)
            # Bodies that fit one by one may fill the disk together: so look every 64 KiB.
            if self._size // JSON_LIMIT > (self._size - count) // JSON_LIMIT:
                require_space(self._folder, count)
            with memoryview(received)[:count] as block:
                self._body.write(block)
            del received[:count]

    def keeps_open(self, status: int) -> bool:
        """Tell whether the connection outlives an answer: RFC 9112, 9.3."""
        header = self.headers.get("CONNECTION", "").lower()
        options = {option.strip() for option in header.split(",")}
        # After a refused upload without a length, its body may follow, which is no request.
        unframed = not self.chunked and not self.has_length
        if unframed and status >= 400 and self.command in ("PUT", "POST", "PATCH"):
            return False
        persistent = self.version == "1.1" or "keep-alive" in options
        return persistent and "close" not in options

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the disk may have no room for what is still to write
            self.environ["wsgi.input"].close()


class Answer(NamedTuple):
    """An answer, ready to be sent."""

    status: int
    head: bytes
    body: Body
    keep: bool  # whether the connection stays open

    @classmethod
    def make(cls, status: str, headers: Headers, body: Body, version: str, keep: bool) -> Answer:
        """Make an answer from the status and headers that an application gives."""
        headers = [*headers, ("Date", format_http_date(int(time.time())))]
        if not keep or version == "1.0":
            headers.append(("Connection", "Keep-Alive" if keep else "close"))
        lines = [f"HTTP/{version} {status}", *map(": ".join, headers), "", ""]
        return cls(int(status[:3]), "\r\n".join(lines).encode("latin-1"), body, keep)


class Validators(NamedTuple):
    """What conditions compare with: an entity tag, and a time in seconds since the epoch."""

    etag: str
    modified: int


def http_date(environ: Environ, name: str) -> float | None:
    """Return the time in a header in seconds since the epoch, None where it holds no date."""
    if HTTP_DATE.fullmatch(environ.get(name, "").strip()):
        with contextlib.suppress(ValueError):  # there is no 41 December
            moment = email.utils.parsedate_to_datetime(environ[name])
            return moment.replace(tzinfo=timezone.utc).timestamp()
    return None


@functools.lru_cache(maxsize=4)
def format_http_date(seconds: int) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


@functools.lru_cache(maxsize=1024)
def last_modified(stored: str) -> tuple[int, str]:
    """Return when a binary was stored: in seconds since the epoch, and as an HTTP date."""
    seconds = int(datetime.fromisoformat(stored).timestamp())
    return seconds, format_http_date(seconds)


def entity_tags(header: str) -> list[str]:
    """Return the tags of a list, none for what is no list of tags (RFC 9110, 5.6.1 and 8.8.3)."""
    elements = ENTITY_TAG.sub("\0", header).split(",")  # a tag may have commas in it
    is_list = all(element.strip(" \t") in ("", "\0") for element in elements)
    return ENTITY_TAG.findall(header) if is_list else []


def require_conditions(environ: Environ, current: Validators | None) -> None:
    """Raise PreconditionFailed where If-Match or If-Unmodified-Since does not hold.

    `current` is None where there is no binary: then no tag matches, and there is no date.
    """
    if_match = environ.get("HTTP_IF_MATCH")
    unmodified = http_date(environ, "HTTP_IF_UNMODIFIED_SINCE")
    if if_match is not None:
        # The strong comparison (RFC 9110, 8.8.3.2): a weak tag never matches.
        tags = entity_tags(if_match)
        if not current or (if_match.strip() != "*" and current.etag not in tags):
            raise PreconditionFailed
    elif current and unmodified is not None and current.modified > unmodified:
        raise PreconditionFailed


def matches_none(environ: Environ, current: Validators) -> bool:
    """Tell whether If-None-Match holds, as it does where it is not given."""
    header = environ.get("HTTP_IF_NONE_MATCH", "")
    tags = [tag.removeprefix("W/") for tag in entity_tags(header)]
    return header.strip() != "*" and current.etag not in tags


def not_modified(environ: Environ, current: Validators) -> bool:
    """Tell whether a GET's answer is 304: RFC 9110, 13.2.2; raises PreconditionFailed."""
    require_conditions(environ, current)
    if "HTTP_IF_NONE_MATCH" in environ:
        return not matches_none(environ, current)
    modified = http_date(environ, "HTTP_IF_MODIFIED_SINCE")
    return modified is not None and current.modified <= modified


def requested_range(environ: Environ, current: Validators, size: int) -> range | None:
    """Return the bytes that a GET asks for, None for all of them: RFC 9110, 14.2.

    Anything but one sound range of bytes is ignored, as is one whose If-Range does not hold, and
    any of an empty file: nginx's slices ask for one of each. Raises ServiceError 416.
    """
    if_range = environ.get("HTTP_IF_RANGE", current.etag).strip()
    if if_range != current.etag and http_date(environ, "HTTP_IF_RANGE") != current.modified:
        return None
    match = BYTE_RANGE.fullmatch(environ.get("HTTP_RANGE", ""))
    if not match or match[1] == match[2] == "" or not size:
        return None
    # 19 digits are past the end of any file, and int() raises ValueError above 4,300.
    first, last = (int(digits.lstrip("0")[:19] or "0") for digits in match.groups())
    if not match[1]:  # "-500" asks for the last 500 bytes
        first, last = max(size - last, 0), size - 1
    elif not match[2]:
        last = size - 1
    elif last < first:
        return None
    if first >= size:
        where = {"Content-Range": f"bytes */{size}"}
        raise ServiceError(f"The range lies outside the {size} bytes", where, 416)
    return range(first, min(last + 1, size))


def parse_query(environ: Environ) -> dict[str, str]:
    """Return the parameters of a query; raises BadRequest for one given twice, or no UTF-8."""
    if not environ.get("QUERY_STRING"):
        return {}
    try:
        raw = environ["QUERY_STRING"].encode("latin-1").decode()
        pairs = urllib.parse.parse_qsl(raw, True, errors="strict", max_num_fields=20)
    except ValueError as error:
        raise BadRequest from error
    query = dict(pairs)
    if len(query) < len(pairs):
        raise BadRequest
    # Devices paste versions as they are; in a query, their plus sign would mean a blank.
    pasted = urllib.parse.parse_qsl(raw.replace("+", "%2B"))
    versions = {name: value for name, value in pasted if name in ("current", "fw_version")}
    return query | {name: value for name, value in versions.items() if SEMVER.fullmatch(value)}


def parse_number(text: str, low: int, high: int, hexadecimal: str = "") -> int:
    """Return the number in a query's value, from low to high; raises BadRequest for any other."""
    if re.fullmatch("[0-9]{1,18}", text) or (hexadecimal and re.fullmatch(hexadecimal, text)):
        value = int(text, 16 if "x" in text.lower() else 10)
        if low <= value <= high:
            return value
    raise BadRequest


def parse_window(query: Mapping[str, str]) -> tuple[int | None, int | None, int]:
    """Return start and end of a window, None where not given, and its fill; raises BadRequest."""
    start, end = (
        parse_number(query[name], 0, MEMORY_SIZE, HEX_ADDRESS) if name in query else None
        for name in ("start", "end")
    )
    empty = start is not None and end is not None and start >= end
    if empty or query.get("format") != "bin":
        raise BadRequest
    return start, end, parse_number(query.get("fill", "255"), 0, 0xFF, HEX_BYTE)


def place_window(segments: Segments, start: int | None, end: int | None) -> tuple[int, int]:
    """Return where a window begins and ends; raises Unprocessable if there is no data in it."""
    start = segments.begins[0] if start is None else start
    end = segments.ends[-1] if end is None else end
    if end - start <= LARGEST_WINDOW and any(segments.between(start, end)):
        return start, end
    pairs = zip(segments.begins[:10], segments.ends)
    where = [f"{hex_address(begin)} to {hex_address(end)}" for begin, end in pairs]
    if more := len(segments.ends) - len(where):
        where.append(f"{more} more places")
    raise Unprocessable(
        f"A window has at most {LARGEST_WINDOW} bytes, and some of the data in it. "
        f"Choose it with start and end; the data are at {', '.join(where)}"
    )


def body_blocks(environ: Environ) -> Iterator[bytes]:
    """Yield the body, which without a length is empty; raises BadRequest where it ends early."""
    length, stream = environ.get("CONTENT_LENGTH") or "", environ["wsgi.input"]
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if chunked and not environ.get("wsgi.input_terminated"):
        raise BadRequest("This server takes no chunked body: send it with Content-Length")
    if not re.fullmatch("[0-9]{0,18}", length):
        raise BadRequest("Content-Length takes a number")
    left = sys.maxsize if chunked else int(length or 0)
    while left and (block := stream.read(min(BLOCK, left))):
        left -= len(block)
        yield block
    if left and not chunked:
        raise BadRequest("The body ended before its Content-Length")


def parse_json(environ: Environ, required: bool = True) -> dict[str, Any]:
    """Return the JSON object in the body; {} for none, unless `required`. Raises ServiceError."""
    body = b""
    for block in body_blocks(environ):
        body += block
        if len(body) > JSON_LIMIT:
            raise TooLarge(JSON_LIMIT)
    if not body and not required:
        return {}
    try:
        # NaN and Infinity are Python's own, and int() raises ValueError for them.
        value = json.loads(body.decode(), parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise BadRequest(JSON_WANTED) from error
    kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if kind != "application/json" or not isinstance(value, dict):
        raise BadRequest(JSON_WANTED)
    return value


def file_in_form(environ: Environ) -> Iterator[bytes]:
    """Yield the content of the file `image` in a form as it is read; raises BadRequest.

    What is wrong after the file is raised after its content: store nothing before the end.
    """
    kind, options = multipart.parse_options_header(environ.get("CONTENT_TYPE", ""))
    if kind != "multipart/form-data":
        raise BadRequest(FORM_WANTED)
    fields: list[str] = []  # the fields that are files
    wanted = False  # whether the part that is being read is the file
    try:
        # In Latin-1 any byte is a character: a name in another encoding is no fault.
        parser = multipart.PushMultipartParser(
            options.get("boundary", ""), max_segment_count=1000, header_charset="latin-1"
        )
        for block in itertools.chain(body_blocks(environ), [b""]):  # b"" ends the form
            for event in parser.parse(block):
                if isinstance(event, multipart.MultipartSegment):
                    wanted = is_wanted_file(event, fields)
                elif event and wanted:
                    yield bytes(event)
    except multipart.MultipartError as error:
        raise BadRequest(FORM_WANTED) from error
    if not fields:
        raise BadRequest("Payload must contain a file")
    if "image" not in fields:
        raise BadRequest("File form does not have an image field")


def is_wanted_file(part: multipart.MultipartSegment, fields: list[str]) -> bool:
    """Tell if a part is the file `image`; add its field if it is any file. Raises BadRequest."""
    name = file_name(part.header("Content-Disposition", ""))
    if name is None:
        return False
    fields.append(part.name)
    if part.name != "image":
        return False
    if fields.count("image") > 1:
        raise BadRequest("Payload must contain one file named image, not two")
    if not name:
        raise BadRequest("Filename empty")
    if not name.lower().endswith(".hex"):
        raise BadRequest("Invalid File: its name must end in .hex")
    coding = part.header("Content-Transfer-Encoding", "binary").strip().lower()
    packed = part.header("Content-Encoding", "identity").strip().lower() != "identity"
    if coding not in ("7bit", "8bit", "binary") or packed:
        raise BadRequest("The form holds the file encoded: send its bytes as they are")
    return True


def file_name(disposition: str) -> str | None:
    """Return the file's name in a Content-Disposition, None where it has none.

    Only how the name ends matters, so the charset that filename* names is not looked at.
    """
    message = email.message.Message()
    message["Content-Disposition"] = disposition
    params = message.get_params([], "Content-Disposition")
    names = [value for name, value in params if name.lower() == "filename"]
    if not names:
        return None
    # filename*, here a tuple (charset, language, text), is preferred to filename: RFC 6266, 4.3.
    name = next((value[2] for value in names if isinstance(value, tuple)), names[0])
    with contextlib.suppress(ValueError, LookupError, email.errors.HeaderParseError):
        name = str(email.header.make_header(email.header.decode_header(name)))  # RFC 2047
    return str(name)


# ------------------------------------------------------------------------------------- API

PUBLIC = ""  # the right of a route that needs no token, and looks at none


class Route(NamedTuple):
    """A line of the API. The right it needs has no default, so that no route can forget it."""

    method: str  # GET stands for HEAD as well
    path: str  # as Bottle writes it: <image_id> matches all up to the next slash
    handler: str  # a method of Application: takes environ, the Caller, and what <...> matched
    right: str
    query: tuple[str, ...] = ()  # keys of PARAMETERS: all that the query may have
    takes: str = ""  # a key of BODIES
    gives: str = "Image"  # a key of SCHEMAS
    answers: tuple[int, ...] = (200,)  # the statuses that do not follow from other columns
    by_link: bool = False  # a signed link will do instead of a token
    quick: bool = False  # so fast that the event loop answers it, without another thread
    needs: tuple[str, ...] = ()  # those of query that must be there


REQUIRED = ("label", "fw_version")  # members of an image that are given, changed and filtered by
IMAGE, BINARY = "/image/<image_id>", "/image/<image_id>/binary"
WINDOW = ("format", "start", "end", "fill")
LATEST_QUERY, UPLOAD_QUERY = ("label", "current"), ("sha256", "validate")
ROUTES = (
    Route("GET", "/", "show_page", PUBLIC, gives="Page", answers=(200, 404), quick=True),
    Route("GET", "/health", "health", PUBLIC, gives="Health"),
    Route("GET", "/openapi.json", "describe", PUBLIC, gives="Description"),
    Route("GET", "/image", "list_images", READ, (*FILTERS, "limit", "offset"), gives="Images"),
    Route("POST", "/image", "create_image", WRITE, (), "image", "Created", (201,)),
    Route("GET", "/image/binary", "list_binaries", READ, gives="FileNames"),
    Route("GET", "/image/latest", "latest_image", READ, LATEST_QUERY,
          answers=(200, 204, 404), quick=True, needs=("label",)),
    Route("GET", "/image/latest/binary", "latest_binary", READ, (*LATEST_QUERY, *WINDOW),
          answers=(204, 307, 404), quick=True, needs=("label",)),
    Route("GET", IMAGE, "show_image", READ, quick=True),
    Route("PATCH", IMAGE, "change_image", WRITE, (), "change"),
    Route("DELETE", IMAGE, "delete_image", DELETE, gives="Removed"),
    Route("GET", BINARY, "download_binary", READ, WINDOW, gives="File",
          answers=(200, 206, 304, 412, 416, 422), by_link=True, quick=True),
    Route("POST", BINARY, "upload_form", WRITE, UPLOAD_QUERY, "form", "Uploaded", (200, 409)),
    Route("PUT", BINARY, "upload_file", WRITE, UPLOAD_QUERY, "file", "Uploaded", (200, 409, 411)),
    Route("DELETE", BINARY, "delete_binary", DELETE, gives="Result"),
    Route("POST", BINARY + "/link", "make_link", READ, (), "link", "Link"),
)  # fmt: skip


# The rest of this section describes the API as OpenAPI 3.1, whose schemas are JSON Schema.


def string(**limits: Any) -> dict[str, Any]:
    return {"type": "string", **limits}


def integer(minimum: int, maximum: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def json_object(required: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Return the schema of an object that has `required` members, and may have others."""
    return {"type": "object", "properties": required | others, "required": list(required)}


def reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


TEXT, WHOLE, FLAG = string(), {"type": "integer"}, {"type": "boolean"}
TIME, SWITCH = string(format="date-time"), string(enum=["true", "false"])
SHORT_TEXT = string(minLength=1, maxLength=128, pattern=r"^[^\u0000-\u001f\u007f-\u009f]*$")
REQUIRED_SCHEMAS = dict.fromkeys(REQUIRED, SHORT_TEXT)
DIGEST = string(pattern="^[0-9a-fA-F]{64}$")
ADDRESSES = {"anyOf": [integer(0, MEMORY_SIZE), string(pattern=f"^{HEX_ADDRESS}$")]}
BYTES = {"anyOf": [integer(0, 255), string(pattern=f"^{HEX_BYTE}$")]}
PARAMETERS: dict[str, dict[str, Any]] = {
    **REQUIRED_SCHEMAS, "confirmed": SWITCH, "current": string(minLength=1), "image_id": TEXT,
    "limit": integer(1, 1000), "offset": integer(0, 10**18),
    "format": string(enum=["bin"]), "start": ADDRESSES, "end": ADDRESSES, "fill": BYTES,
    "sha256": DIGEST, "validate": SWITCH,
}  # fmt: skip
SCHEMAS = {
    "Image": json_object(
        {"id": TEXT, **REQUIRED_SCHEMAS, "created": TIME, "confirmed": FLAG},
        updated=TIME, size=WHOLE, sha256=DIGEST, checked=FLAG, hex={"type": "object"},
    ),
    "Images": {"type": "array", "items": reference("Image")},
    "FileNames": {"type": "array", "items": TEXT},
    "Created": json_object({"id": TEXT, "label": SHORT_TEXT, "published_at": TIME, "url": TEXT}),
    "Removed": json_object({"result": TEXT, "removed_image": reference("Image")}),
    "Uploaded": json_object({"image": TEXT, "message": TEXT, "checked": FLAG}),
    "Result": json_object({"result": TEXT}),
    "Link": json_object({"url": TEXT, "expires": TIME}),
    "Health": json_object({"status": TEXT}),
    "Description": {"type": "object"},
    "Error": json_object({"message": TEXT}, status=WHOLE, errors={"type": "object"}),
}  # fmt: skip
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("application/json", json_object(REQUIRED_SCHEMAS)),
    "change": ("application/json", {**json_object({}, **REQUIRED_SCHEMAS), "minProperties": 1}),
    "link": ("application/json", json_object({}, expires_in=integer(1, LONGEST_LINK))),
    "form": ("multipart/form-data", json_object({"image": string(format="binary")})),
    "file": ("application/octet-stream", {}),
}
NOT_JSON = {"File": "application/octet-stream", "Page": "text/html"}


def describe_api(prefix: str, handlers: object) -> dict[str, Any]:
    """Return the API as OpenAPI 3.1, made from ROUTES and the handlers' docstrings."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        path = route.path.replace("<", "{").replace(">", "}")
        summary = getattr(handlers, route.handler).__doc__
        paths.setdefault(path, {})[route.method.lower()] = describe_route(route, summary)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Image Manager", "version": __version__},
        "servers": [{"url": prefix or "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def describe_route(route: Route, summary: str) -> dict[str, Any]:
    """Return a route as an operation of OpenAPI, with the statuses that follow from its columns."""
    changes, has_id = route.right in (WRITE, DELETE), "<image_id>" in route.path
    statuses = {500, 503, *route.answers}
    statuses |= {400} if route.query or route.takes else set()
    statuses |= {413, 415} if route.takes else set()
    statuses |= {401, 403} if route.right else set()
    statuses |= {507} if changes else set()
    statuses |= {404} if has_id else set()
    statuses |= {412} if has_id and changes else set()
    places = dict.fromkeys(route.query, "query") | ({"image_id": "path"} if has_id else {})
    needs = {*route.needs, "image_id"}
    operation = {
        "operationId": route.handler,
        "summary": summary,
        "parameters": [
            {"name": name, "in": place, "required": name in needs, "schema": PARAMETERS[name]}
            for name, place in places.items()
        ],
        "responses": {str(status): describe_response(route, status) for status in sorted(statuses)},
        "security": [{"token": []}] if route.right else [],
    }
    if route.takes:
        kind, schema = BODIES[route.takes]
        body = {"content": {kind: {"schema": schema}}, "required": route.takes != "link"}
        operation["requestBody"] = body
    return operation


def describe_response(route: Route, status: int) -> dict[str, Any]:
    """Return what a route answers with a status, as a response of OpenAPI."""
    described = {"description": http.HTTPStatus(status).phrase}
    if status in (204, 304):  # they have no body
        return described
    name = route.gives if status < 400 else "Error"
    kind = NOT_JSON.get(name, "application/json")
    content = {} if name in NOT_JSON else {"schema": reference(name)}
    return {**described, "content": {kind: content}}


# ------------------------------------------------------------------------------------- admission
# Our own server has a request with a body admitted before it takes that; all others, and those
# under another WSGI server, are admitted when they are answered.

# What admission notes in environ: the Route with what <...> in its path matched; the Caller; that
# a signed link was used, be it genuine or not; that the request has been admitted.
ROUTE, CALLER = "image_manager.route", "image_manager.caller"
BY_LINK, ADMITTED = "image_manager.by_link", "image_manager.admitted"

# The headers that a web page of another origin may send, and those that it may read: the CORS
# protocol of the Fetch standard.
ALLOWED_HEADERS = "Authorization, Content-Type, Range, If-Match, If-None-Match, If-Range"
EXPOSED_HEADERS = ("Access-Control-Expose-Headers",
                   "Accept-Ranges, Content-Length, Content-Range, Content-Disposition, ETag, "
                   "Repr-Digest, X-Load-Address")  # fmt: skip


def origin_headers(environ: Environ, allowed: str) -> Headers:
    """Return the headers that let a web page of another origin read an answer.

    `allowed` is an origin, * for any, "" for none. What a signed link gives, any page may read.
    """
    origin = "*" if BY_LINK in environ else allowed
    vary = [("Vary", "Origin")] if origin not in ("", "*") else []
    if origin and origin in ("*", environ.get("HTTP_ORIGIN")):
        return [("Access-Control-Allow-Origin", origin), EXPOSED_HEADERS, *vary]
    return vary


def require_parameters(route: Route, environ: Environ) -> None:
    """Raise BadRequest unless the query has all that the route needs, and nothing else it knows.

    Else the sender of a mistyped check of an upload would believe that it was made.
    """
    # A download's query may hold more, as a signed link has parameters of its own.
    if route.query and not route.by_link:
        query = parse_query(environ)
        if not {*route.needs} <= query.keys() <= {*route.query} or not all(query.values()):
            raise BadRequest


def require_body(route: Route, environ: Environ) -> None:
    """Raise ServiceError where the header says that the body is not what the route takes."""
    if environ.get("HTTP_CONTENT_ENCODING", "").strip().lower() not in ("", "identity"):
        accepted = {"Accept-Encoding": "identity"}
        raise ServiceError("The body is encoded: send it without Content-Encoding", accepted, 415)
    if route.takes in ("form", "file") and "HTTP_CONTENT_RANGE" in environ:  # RFC 9110, 14.5
        raise BadRequest("A part of a file cannot be stored: send all of it, without Content-Range")
    if route.takes != "file":
        return
    if environ.get("CONTENT_TYPE", "").strip().lower().startswith("multipart/"):
        raise ServiceError("PUT takes the file as the body: send a form with POST", status=415)
    if not environ.get("CONTENT_LENGTH") and "HTTP_TRANSFER_ENCODING" not in environ:
        raise ServiceError("Send the file as the body, with its Content-Length", status=411)


class Admission:
    """Tells from the header of a request alone which route it takes, who asks, and if they may."""

    def __init__(
        self, settings: Settings, tokens: Tokens, catalogue: Catalogue, binaries: BinaryStore
    ) -> None:
        self._settings, self._tokens = settings, tokens
        self._catalogue, self._binaries = catalogue, binaries
        self._limits = {"file": settings.max_upload, "form": settings.max_upload + JSON_LIMIT}
        # Bottle looks for the path alone, without the method: otherwise it would take PUT
        # /image/latest, which no route has, for a request to an image whose id is "latest".
        self._router = Router()
        for path in {route.path for route in ROUTES}:
            routes = {route.method: route for route in ROUTES if route.path == path}
            if "GET" in routes:
                routes["HEAD"] = routes["GET"]
            self._router.add(path, "ANY", routes)

    def route_path(self, path: str) -> str:
        """Return a request's PATH_INFO as ROUTES has it: decoded, without prefix and last slash."""
        path, prefix = "/" + path.lstrip("/"), self._settings.url_prefix
        if (path + "/").startswith(prefix + "/"):
            path = path[len(prefix) :]
        return path.encode("latin-1").decode(errors="replace").removesuffix("/") or "/"

    def _routes(self, environ: Environ) -> tuple[dict[str, Route], dict[str, str]]:
        """Return the routes of a path by method, and what <...> in it matched; raises NotFound."""
        path = self.route_path(environ.get("PATH_INFO", ""))
        try:
            routes, names = self._router.match({"REQUEST_METHOD": "ANY", "PATH_INFO": path})
        except HTTPError:
            raise NotFound from None
        return routes, names

    def preflight(self, environ: Environ) -> dict[str, str]:
        """Return the headers that grant a CORS preflight request, else {}; raises NotFound."""
        routes, _ = self._routes(environ)
        if not {"HTTP_ORIGIN", "HTTP_ACCESS_CONTROL_REQUEST_METHOD"} <= environ.keys():
            return {}
        allowed = self._settings.allow_origin
        if not allowed or allowed not in ("*", environ["HTTP_ORIGIN"]):
            routes = {method: route for method, route in routes.items() if route.by_link}
            if not routes:
                return {}
            environ[BY_LINK] = True
        return {
            "Access-Control-Allow-Methods": ", ".join(sorted(routes)),
            "Access-Control-Allow-Headers": ALLOWED_HEADERS,
        }

    def admit(self, environ: Environ) -> int:
        """Let a request in, or raise a ServiceError; return how many bytes its body may have."""
        routes, names = self._routes(environ)
        route = routes.get(environ["REQUEST_METHOD"])
        if not route:
            raise ServiceError("Method not allowed", {"Allow": ", ".join(sorted(routes))}, 405)
        environ[ROUTE] = route, names
        caller = environ[CALLER] = self._caller(route, environ, names)
        if route.right not in caller.rights:
            challenge = {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}
            raise ServiceError(f"This token does not give the right {route.right}", challenge, 403)
        require_parameters(route, environ)
        require_body(route, environ)
        limit = self._limits.get(route.takes, JSON_LIMIT)
        announced = environ.get("CONTENT_LENGTH") or "0"
        # int() raises ValueError above 4,300 digits, leading zeros included.
        size = int(announced.lstrip("0")[:18] or 0) if announced.isdecimal() else 0
        if size > limit:
            raise TooLarge(limit)
        if route.takes in self._limits:
            require_space(self._binaries.uploads, size)
        environ[ADMITTED] = True
        return limit

    def _caller(self, route: Route, environ: Environ, names: Mapping[str, str]) -> Caller:
        """Return who asks, by a signed link or a token; raises Unauthorised, NoSuchImage."""
        if route.right == PUBLIC:
            return Caller("", frozenset([PUBLIC]))
        if route.by_link and "signature" in (query := parse_query(environ)):
            environ[BY_LINK] = True
            sha256, expires = self._tokens.verify_link(names["image_id"], query)
            tenant = self._catalogue.tenant(names["image_id"])
            return Caller(tenant, frozenset([READ]), expires=expires, sha256=sha256)
        return self._tokens.verify(environ.get("HTTP_AUTHORIZATION"))


# ------------------------------------------------------------------------------------- application

SMALL_RANGE = 64 * KIB  # bytes; what is larger is sent from the open file instead of read first


def require_sound(catalogue: Catalogue, check: str = "quick_check") -> None:
    """Raise CannotStart where the catalogue is damaged."""
    faults = catalogue.faults(check)
    if faults:
        catalogue.close()
        remedy = "restore image_manager.db from a backup, without the -wal and -shm files beside it"
        raise CannotStart(f"The catalogue is damaged ({faults[0]}): {remedy}")


def require_catalogue(catalogue: Catalogue, binaries: BinaryStore) -> None:
    """Raise CannotStart where there are binaries, but there never was an image."""
    if not catalogue.ever_used() and binaries.names():
        catalogue.close()
        remedy = "restore image_manager.db from a backup, or move the binaries away"
        raise CannotStart(f"{binaries.folder} holds binaries no catalogue knows of: {remedy}")


def json_response(content: object, status: int = 200, **headers: str) -> HTTPResponse:
    """Return an answer in JSON; a string is JSON already."""
    text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
    # Without no-store a cache may keep a 404 as long as it likes: RFC 9111, 4.2.2.
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **headers}
    return HTTPResponse(text, status, headers)


def parse_members(environ: Environ, creating: bool) -> dict[str, str]:
    """Return label and version from a JSON body: both if `creating`, else at least one."""
    members = parse_json(environ)
    errors: dict[str, list[str]] = {}
    for name in REQUIRED:
        if name in members:
            errors[name] = text_faults(members[name])
        elif creating:
            errors[name] = ["Missing data for required field."]
    if not errors:
        errors["_schema"] = ["Nothing to change."]
    faulty = {name: reasons for name, reasons in errors.items() if reasons}
    if faulty:
        raise FaultyImage(faulty)
    return {name: members[name] for name in REQUIRED if name in members}


def parse_flag(value: str) -> bool:
    """Return what true or false in a query means; raises BadRequest for any other value."""
    if value not in ("true", "false"):
        raise BadRequest
    return value == "true"


def attachment(image: Image, suffix: str) -> str:
    """Return the Content-Disposition that calls a download by label and version."""
    name = re.sub("[^A-Za-z0-9._+-]+", "_", f"{image.label}-{image.fw_version}")[:100]
    return f'attachment; filename="{name}{suffix}"'


def permit_by(environ: Environ) -> Permit:
    """Return a Permit that checks an image by the conditions of a request, such as If-Match."""

    def permit(image: Image) -> None:
        current = None
        if image.confirmed:
            current = Validators(f'"{image.sha256}"', last_modified(image.stored)[0])
        require_conditions(environ, current)
        if current and not matches_none(environ, current):
            raise PreconditionFailed

    return permit


def download_response(
    environ: Environ, stored: str, excerpt: Excerpt, headers: dict[str, str]
) -> HTTPResponse:
    """Return an excerpt, or the range that is asked for; raises ServiceError 412 or 416."""
    modified, headers["Last-Modified"] = last_modified(stored)
    current = Validators(headers["ETag"], modified)
    if not_modified(environ, current):
        return HTTPResponse("", 304, headers)
    is_get, size = environ["REQUEST_METHOD"] == "GET", excerpt.seek(0, os.SEEK_END)
    part = requested_range(environ, current, size) if is_get else None
    begin, end = (part.start, part.stop) if part else (0, size)
    headers["Content-Type"] = "application/octet-stream"
    headers["Content-Length"] = str(end - begin)
    if part:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    excerpt.narrow(begin, end)
    content = excerpt if end - begin > SMALL_RANGE else excerpt.read()
    return HTTPResponse(content if is_get else b"", 206 if part else 200, headers)


class Application:
    """The service, as a WSGI application."""

    def __init__(self, settings: Settings) -> None:
        """Open the store in settings.data, making what is missing; raises CannotStart."""
        self.settings = settings
        make_folder(settings.data)
        self.tokens = Tokens(settings, settings.jwt_secret or load_secret(settings.data))
        self.binaries = BinaryStore(settings.data)
        self.catalogue = Catalogue(settings.data / "image_manager.db")
        self.admission = Admission(settings, self.tokens, self.catalogue, self.binaries)
        require_sound(self.catalogue)
        require_catalogue(self.catalogue, self.binaries)
        self.catalogue.disconnect()  # until the first request, no file is open
        self._slow = {route.path for route in ROUTES if not route.quick}

    def close(self) -> None:
        self.catalogue.close()

    # How a request becomes an answer: any WSGI server calls __call__, our own calls answer, or
    # refuse where there is no sound request. All three have _respond do the work.

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        """Answer a request as PEP 3333 has it."""
        status, headers, body = self._respond(environ)
        start_response(status, headers)
        if isinstance(body, bytes):
            return [body]
        file_wrapper = environ.get("wsgi.file_wrapper", WSGIFileWrapper)
        return file_wrapper(body)  # type: ignore[no-any-return]

    def answer(self, request: Request, last: bool) -> Answer:
        """Return the answer to a request; `last` where the connection is to be closed after it."""
        status, headers, body = self._respond(request.environ)
        keep = not last and request.keeps_open(int(status[:3]))
        return Answer.make(status, headers, body, request.version, keep)

    def refuse(self, error: Exception, is_head: bool, environ: Environ) -> Answer:
        """Return the answer to what is no request, or one whose body is not taken.

        It is the last on its connection, as nobody knows where the next request would begin.
        `environ` is empty where there is no request.
        """
        environ = {"REQUEST_METHOD": "HEAD" if is_head else "", **environ}
        return Answer.make(*self._respond(environ, error), "1.1", False)

    def is_quick(self, method: str, path: str, query: str) -> bool:
        """Tell whether a request is one to answer at once rather than in a thread."""
        # A window may have very many segments; a % may hide the word format.
        window = "format" in query or "%" in query
        path = self.admission.route_path(path)
        return method in ("GET", "HEAD") and path not in self._slow and not window

    def _respond(
        self, environ: Environ, error: Exception | None = None
    ) -> tuple[str, Headers, Body]:
        """Return status, headers and body of the answer to a request or an error, and log it."""
        try:
            response = self._error_response(error) if error else self._handle(environ)
        except Exception as caught:
            error, response = caught, self._error_response(caught)
        self._log(environ, response.status_code, error)
        body = response.body.encode() if isinstance(response.body, str) else response.body
        if "Content-Length" not in response:  # Bottle leaves it out of a 204 and a 304
            response["Content-Length"] = len(body)
        headers = response.headerlist + origin_headers(environ, self.settings.allow_origin)
        return response.status_line, headers, b"" if environ["REQUEST_METHOD"] == "HEAD" else body

    def _handle(self, environ: Environ) -> HTTPResponse:
        """Admit a request, unless the server has had that done, and let its handler respond."""
        if environ["REQUEST_METHOD"] == "OPTIONS":
            if granted := self.admission.preflight(environ):
                return HTTPResponse(status=204, headers=granted)
        if ADMITTED not in environ:
            self.admission.admit(environ)
        route, names = environ[ROUTE]
        return getattr(self, route.handler)(environ, environ[CALLER], **names)

    def _error_response(self, error: Exception) -> HTTPResponse:
        """Return the response for an error, in JSON; log those that an operator must see to."""
        if not isinstance(error, ServiceError):
            log.error("a request could not be answered", exc_info=error)
            error = ServiceError()
        elif error.status in (500, 503) and not isinstance(error, MustWait):
            log.error("%s%s", error, f" ({error.__cause__})" if error.__cause__ else "")
        return json_response(error.body(), error.status, **error.headers)

    def _log(self, environ: Environ, status: int, error: Exception | None) -> None:
        """Log a request that changes something, or would have, and one whose token is refused."""
        route, _ = environ.get(ROUTE, (None, {}))
        refused = status in (401, 403)
        if not route or (route.right not in (WRITE, DELETE) and not refused):
            return
        caller = environ.get(CALLER)
        names = (caller.tenant, caller.subject) if caller else (None, None)
        tenant, subject = (json.dumps(name)[:200] for name in names)
        path = urllib.parse.quote(self.admission.route_path(environ["PATH_INFO"]))[:200]
        # Quoted as JSON, because parts of the reason come from the token.
        why = f" {json.dumps(str(error))[:300]}" if refused else ""
        address, request = environ.get("REMOTE_ADDR", "-"), f"{route.method} {path} {status}{why}"
        log.info("%s tenant=%s sub=%s %s", address, tenant, subject, request)

    # Images. A handler's docstring is its description in /openapi.json.

    def health(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """Tell whether the service can read its catalogue and write in its folder."""
        try:
            self.catalogue.check()
            self.binaries.check()
        except ServiceError as error:
            raise Unavailable(f"Not healthy: {error}") from error.__cause__
        except OSError as error:  # not with its path, as this is for all to read
            reason = f"{os.path.basename(error.filename or 'data')}/: {error.strerror}"
            raise Unavailable(f"Not healthy: {reason}") from error
        return json_response({"status": "ok"})

    def show_page(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """Show the page for people at the bench, where Accept names text/html."""
        accepted = environ.get("HTTP_ACCEPT", "").lower().split(",")
        if "text/html" not in [kind.partition(";")[0].strip() for kind in accepted]:
            raise NotFound(headers={"Vary": "Accept"})
        return HTTPResponse(PAGE_HTML, 200, PAGE_HEADERS)

    def describe(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """Describe this API, as OpenAPI 3.1."""
        return json_response(describe_api(self.settings.url_prefix, self))

    def list_images(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """List the images, oldest first; with limit in pages."""
        query = parse_query(environ)
        filters: dict[str, object] = {name: query[name] for name in REQUIRED if name in query}
        if any(map(text_faults, filters.values())) or ("offset" in query and "limit" not in query):
            raise BadRequest
        if "confirmed" in query:
            filters["confirmed"] = parse_flag(query["confirmed"])
        if "limit" not in query:
            return json_response(self.catalogue.list_json(caller.tenant, filters))
        limit = parse_number(query["limit"], 1, 1000)
        offset = parse_number(query.get("offset", "0"), 0, 10**18)
        total = self.catalogue.count(caller.tenant, filters)
        pages = {"next": offset + limit} if offset + limit < total else {}
        pages |= {"prev": max(min(offset, total) - limit, 0)} if offset else {}
        path = f"{self.settings.url_prefix}/image"
        links = [
            f'<{path}?{urllib.parse.urlencode({**query, "offset": begin})}>; rel="{relation}"'
            for relation, begin in pages.items()
        ]
        headers = {"X-Total-Count": str(total)} | ({"Link": ", ".join(links)} if links else {})
        listed = self.catalogue.list_json(caller.tenant, filters, limit, offset)
        return json_response(listed, 200, **headers)

    def create_image(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """Create an image, to which a binary can then be uploaded."""
        members = parse_members(environ, creating=True)
        require_space(self.binaries.uploads)
        image_id, created = self.catalogue.add(caller.tenant, **members)
        url = f"{self.settings.url_prefix}/image/{image_id}"
        image = {"id": image_id, "label": members["label"], "published_at": created, "url": url}
        return json_response(image, 201, Location=url)

    def list_binaries(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """List the file names of the binaries, oldest image first."""
        listed = self.catalogue.list_json(caller.tenant, {"confirmed": 1}, item=FILE_NAME_JSON)
        return json_response(listed)

    def latest_image(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """Show a label's image with the highest version that has a binary; 204: current has it."""
        query = parse_query(environ)
        found = self.catalogue.latest(caller.tenant, query["label"])
        if not found:
            raise NotFound("No image with this label has a binary")
        version, key, image = found
        current = query.get("current", "")
        has_it = semver_key(current) >= key if semver_key(current) else current == version
        return HTTPResponse(status=204) if has_it else json_response(image)

    def latest_binary(self, environ: Environ, caller: Caller) -> HTTPResponse:
        """Redirect to the binary of the image that /image/latest shows, by a link for an hour."""
        response = self.latest_image(environ, caller)
        if response.status_code == 200:
            image, query = json.loads(response.body), parse_query(environ)
            url, _ = self._link(environ, image["id"], image["sha256"], 3600)
            window = {name: query[name] for name in WINDOW if name in query}
            url += "&" + urllib.parse.urlencode(window) if window else ""
            response.status, response["Location"] = 307, url
        return response

    def show_image(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Show an image."""
        return json_response(self.catalogue.get_json(caller.tenant, image_id, WITH_REPORT))

    def change_image(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Change the label, the version or both."""
        changes = parse_members(environ, creating=False)
        self.catalogue.change(caller.tenant, image_id, changes, permit_by(environ))
        return json_response(self.catalogue.get_json(caller.tenant, image_id))

    # Binaries. Here the two stores meet, in an order that survives a power cut, each step synced.
    # The files of an upload come first, then, under the catalogue's write lock, their names, then
    # the row. A deletion removes the row first, then the files, under the write lock, unless a new
    # upload was faster. The answer always comes last.

    def delete_image(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Delete an image and its binary."""
        removed = self.catalogue.remove(caller.tenant, image_id, permit_by(environ))
        self.catalogue.unless_confirmed(image_id, self.binaries.remove)
        return json_response(f'{{"removed_image":{removed},"result":"ok"}}')

    def delete_binary(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Delete the binary; that there is none is no error, so that a retry succeeds."""
        self.catalogue.clear(caller.tenant, image_id, permit_by(environ))
        self.catalogue.unless_confirmed(image_id, self.binaries.remove)
        return json_response({"result": "ok"})

    def upload_form(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Upload the binary as the file `image` of a form."""
        return self._upload(environ, caller, image_id, file_in_form(environ))

    def upload_file(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Upload the binary as the body."""
        return self._upload(environ, caller, image_id, body_blocks(environ))

    def _upload(
        self, environ: Environ, caller: Caller, image_id: str, blocks: Iterable[bytes]
    ) -> HTTPResponse:
        query = parse_query(environ)
        wanted, check = query.get("sha256", "").lower(), parse_flag(query.get("validate", "true"))
        if not re.fullmatch("([0-9a-f]{64})?", wanted):
            raise BadRequest
        self.catalogue.get(caller.tenant, image_id)
        limit, require = self.settings.max_upload, self.settings.require_intel_hex
        with self.binaries.receive(limit, check, require) as upload:
            for block in blocks:
                upload.write(block)
            binary = upload.finish()
            if wanted not in ("", binary.sha256):
                raise BadRequest(f"The SHA-256 of what was received is {binary.sha256}")
            with contextlib.ExitStack() as failing:
                with self.catalogue.confirm(caller.tenant, image_id, binary, permit_by(environ)):
                    # From here on there may be files without a record, which must go.
                    withdraw = self.catalogue.unless_confirmed
                    failing.callback(withdraw, image_id, self.binaries.remove)
                    self.binaries.publish(upload, image_id)
                failing.pop_all()
        checked = binary.report is not None
        return json_response({"image": image_id, "message": "image uploaded", "checked": checked})

    def download_binary(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Download the binary or a range of it; format=bin gives the raw bytes of Intel HEX."""
        image = self.catalogue.get(caller.tenant, image_id)
        if not image.confirmed or caller.sha256 not in ("", image.sha256):
            raise NoBinary
        query = parse_query(environ)
        # Between the row and the file, the binary may have been deleted or replaced. So the row is
        # read again when the file is open, and if it has changed, all begins anew.
        try:
            excerpt, headers = self._open(image, query)
        except Damaged:
            if self.catalogue.get(caller.tenant, image_id) == image:
                raise
            return self.download_binary(environ, caller, image_id)
        with contextlib.ExitStack() as closing:
            closing.callback(excerpt.close)
            if self.catalogue.get(caller.tenant, image_id) != image:
                return self.download_binary(environ, caller, image_id)
            headers |= {"Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
            if caller.sha256:  # what a signed link gives never changes, and caches may share it
                left = max(int(caller.expires - time.time()), 0)
                headers["Cache-Control"] = f"public, max-age={left}, immutable"
            response = download_response(environ, image.stored, excerpt, headers)
            if response.body is excerpt:
                closing.pop_all()  # the server closes it
            return response

    def _open(self, image: Image, query: dict[str, str]) -> tuple[Excerpt, dict[str, str]]:
        """Open what a query asks for of a binary; return it with its headers."""
        if query.keys() & {*WINDOW}:
            return self._open_window(image, query)
        digest = base64.b64encode(bytes.fromhex(image.sha256)).decode()
        headers = {
            "Content-Disposition": attachment(image, ".hex"),
            "ETag": f'"{image.sha256}"',
            "Repr-Digest": f"sha-256=:{digest}:",
        }
        file = self.binaries.open(image.id, ".hex", image.size)
        return Excerpt(file, Segments([(0, image.size)]), 0, image.size), headers

    def _open_window(self, image: Image, query: dict[str, str]) -> tuple[Excerpt, dict[str, str]]:
        """Open the raw bytes between two addresses; return them with their headers."""
        start, end, fill = parse_window(query)
        if not image.is_hex:
            raise Unprocessable
        segments = self.catalogue.segments(image)
        if image.raw_size is None:
            unknown = "It has records of other types than 00 to 05, whose meaning is unknown"
            raise Unprocessable(unknown if segments.ends else "The Intel HEX file has no data")
        start, end = place_window(segments, start, end)
        headers = {
            "Content-Disposition": attachment(image, ".bin"),
            "ETag": f'"{image.sha256}-{start:x}-{end:x}-{fill:02x}"',
            "X-Load-Address": hex_address(start),
        }
        file = self.binaries.open(image.id, ".bin", image.raw_size)
        return Excerpt(file, segments, start, end, bytes([fill])), headers

    def make_link(self, environ: Environ, caller: Caller, image_id: str) -> HTTPResponse:
        """Make a link that downloads the binary without a token until it expires."""
        seconds = parse_json(environ, required=False).get("expires_in", 3600)
        whole = type(seconds) in (int, float) and seconds == seconds // 1  # JSON has 60.0 for 60
        if not whole or not 1 <= seconds <= LONGEST_LINK:
            raise BadRequest(f"expires_in takes a whole number of seconds from 1 to {LONGEST_LINK}")
        image = self.catalogue.get(caller.tenant, image_id)
        if not image.confirmed:
            raise NoBinary
        url, expires = self._link(environ, image_id, image.sha256, int(seconds))
        moment = datetime.fromtimestamp(expires, timezone.utc)
        return json_response({"url": url, "expires": moment.isoformat(timespec="microseconds")})

    def _link(self, environ: Environ, image_id: str, sha256: str, seconds: int) -> tuple[str, int]:
        """Return a link to a binary, and when it expires: no later than the token of who asks.

        Raises BadRequest where the Host header, which the link repeats, is none.
        """
        expires = int(min(time.time() + seconds, environ[CALLER].expires))
        name, port = environ["SERVER_NAME"], environ["SERVER_PORT"]
        host = environ.get("HTTP_HOST") or (f"[{name}]:{port}" if ":" in name else f"{name}:{port}")
        if not re.fullmatch(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", host, re.ASCII):
            raise BadRequest("The Host header names no host")
        base = self.settings.public_url or f"{environ['wsgi.url_scheme']}://{host}"
        path = f"{self.settings.url_prefix}/image/{image_id}/binary"
        return f"{base}{path}?{self.tokens.sign(image_id, sha256, expires)}", expires


def create_app(settings: Settings) -> Application:
    """Return the service as a WSGI application, for WebTest or any WSGI server.

    Makes what the data folder misses, but takes no lock and sweeps nothing: a server may run
    several processes on it. Call close() in the end. Raises CannotStart.
    """
    return Application(settings)


# ------------------------------------------------------------------------------------- logs
# What an operator reads: the access log, and the service's own log on standard error. No request
# waits for either: a line that cannot be written at once is lost.


class AccessLog:
    """A line for each answer in the Combined Log Format, in a file that processes may share."""

    def __init__(self, path: str) -> None:
        """Open a file, standard output for "-"; raises CannotStart."""
        self._path: str | int = 1 if path == "-" else path
        try:
            self._file = self._open()
        except OSError as error:
            raise CannotStart(f"Cannot write {path} ({error.strerror}): name another") from error

    def _open(self) -> io.FileIO:
        # Without a buffer a line is one write, so that those of several processes do not mix.
        private = functools.partial(os.open, mode=0o640)
        return open(self._path, "ab", buffering=0, closefd=self._path != 1, opener=private)

    def reopen(self) -> None:
        """Open the file anew, as when logrotate has moved it away; raises OSError."""
        previous, self._file = self._file, self._open()
        previous.close()

    def close(self) -> None:
        self._file.close()

    def write(self, environ: Environ, target: str, status: int, size: int) -> None:
        """Write the line of an answer; `target` is "" for no request, `size` what was sent."""
        request, referrer = target, environ.get("HTTP_REFERER", "-")
        if target:
            request = f"{environ['REQUEST_METHOD']} {target} {environ['SERVER_PROTOCOL']}"
        when = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        line = (
            f"{environ['REMOTE_ADDR'] or '-'} - {user_name(environ.get(CALLER))} [{when}] "
            f"{quoted(request or '-')} {status} {size or '-'} {quoted(referrer)} "
            f"{quoted(environ.get('HTTP_USER_AGENT', '-'))}\n"
        )
        # A full disk must not stop the answers, nor a signal that has just had the file reopened.
        with contextlib.suppress(OSError, ValueError):
            if has_room(self._file.fileno()):
                self._file.write(line.encode())


def has_room(file: int) -> bool:
    """Tell whether a line can be written at once; a pipe that nobody reads fills up."""
    try:
        return bool(select.select([], [file], [], 0)[1])
    except (OSError, ValueError):  # Windows asks this of sockets alone
        return True


def say(text: str) -> None:
    """Print to standard error, unless that is closed, full or a pipe that nobody reads."""
    with contextlib.suppress(OSError):
        if sys.stderr and has_room(2):
            # With its end in one write, so that lines of several processes do not mix.
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class StandardError(logging.Handler):
    """Gives the service's log to say(), for which logging's own handler would wait or fail."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


# What lets in whoever reads it: the parameter of a link, any letter of whose name may come
# percent-encoded, also where a client has mangled what stands around it, and a token.
SIGNATURE = "".join(f"(?:{letter}|%{ord(letter):x})" for letter in "signature") + "(?:=|%3d)[^&# ]*"
SECRET = re.compile(
    rf"(?<=\?){SIGNATURE}&?|(?:&|&amp;|;|%26)?{SIGNATURE}|(?<![\w-])eyJ[\w-]*\.[\w-]+\.[\w-]*",
    re.IGNORECASE,
)
PORT = re.compile(r"\A([0-9.]+):[0-9]+\Z|\A\[(.*)\](?::[0-9]+)?\Z")  # which some proxies add


def quoted(text: str) -> str:
    """Return a text in quotes, escaped and cut, and without what lets in whoever reads it."""
    text = SECRET.sub("", text)[:2000].replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub("[^ -~]", lambda match: f"\\x{ord(match[0]):02x}", text) + '"'


def user_name(caller: Caller | None) -> str:
    """Return tenant or tenant/subject, percent-encoded; link; or - for nobody."""
    if not caller or not caller.tenant:
        return "-"
    if caller.sha256:
        return "link"
    names = [caller.tenant, str(caller.subject)] if caller.subject else [caller.tenant]
    return "/".join(urllib.parse.quote(name, safe="", errors="replace") for name in names)


def client_address(peer: str, forwarded: str, trusted: tuple[Network, ...]) -> str:
    """Return the last address on the way here that is not one of the trusted proxies.

    Each proxy adds to X-Forwarded-For, at its end, who called it: `forwarded` is true back to the
    first that is not trusted, and whatever stands before that may be forged.
    """
    client = peer
    for hop in [peer, *filter(str.strip, reversed(forwarded.split(",")))]:
        try:
            # Behind a % there may be any text.
            text = PORT.sub(r"\1\2", hop.strip().removeprefix("::ffff:")).partition("%")[0]
            address = ipaddress.ip_address(text)
        except ValueError:  # a proxy may write "unknown"
            break
        client = str(address)
        if not any(address in network for network in trusted):
            break
    return client


# ------------------------------------------------------------------------------------- threads

Job = Callable[[], None] | None  # None ends the thread that takes it


class Threads:
    """A few threads that run jobs.

    The one that was last at work is the first to work again, as what it needs is still in the
    processor's caches; the standard library's executor lets them take turns.
    """

    def __init__(self, count: int) -> None:
        self._lock, self._idle = threading.Lock(), list[queue.SimpleQueue[Job]]()
        self._waiting = collections.deque[Job]()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def run(self, job: Job) -> None:
        """Have a thread run a job, now or when one is idle; returns at once."""
        with self._lock:
            if self._idle:
                self._idle.pop().put(job)
            else:
                self._waiting.append(job)

    def _work(self) -> None:
        jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()  # for this thread alone
        while True:
            with self._lock:
                if self._waiting:
                    jobs.put(self._waiting.popleft())
                else:
                    self._idle.append(jobs)
            if not (job := jobs.get()):
                return
            job()

    def end(self) -> None:
        """End the threads when they have run all jobs."""
        for _ in self._threads:
            self.run(None)
        for thread in self._threads:
            thread.join()


# ------------------------------------------------------------------------------------- server
# One thread, that of the loop, has all sockets and answers what is quick; the rest is answered in
# other threads (_run_in_thread). Connection._live shows a connection's life in order: what it waits
# for, it yields, and _step takes it on when that has come.

IDLE = 120  # seconds in which a client must send or take something
LOOK = 1  # seconds from one look at whose time is over to the next
LINGER, LINGER_BYTES = 10, 64 * MIB  # seconds and bytes that are read after the last answer
SEND_BLOCK = 64 * KIB  # bytes of an answer that are read ahead of the client
SENDFILE_BLOCK = MIB  # bytes of a file that the system sends in one call
SLOWEST = 2 * KIB  # bytes of such a block that a client must take in a second
# What a connection can wait for. For the first three it reads.
READING = HEADER, BODY, END = ("the next header", "the rest of a body", "the client's end")
ROOM, THREAD, FILE, TURN = ("room to send", "a thread", "a file to be sent", "the others' turn")
Life = Generator[str, Any, None]


class Connection(asyncio.Protocol):
    """A client's connection: its life is a generator that yields what it waits for."""

    def __init__(self, server: Server) -> None:
        self._server, self._loop = server, asyncio.get_running_loop()
        self._application, self._trusted = server.application, server.settings.trusted_proxy
        self._received = bytearray()
        self._half_closed = self._lost = False
        self._sending: asyncio.Task[None] | None = None
        self._life, self.waits_for = self._live(), ""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        # peername is None where the client has reset the connection already.
        host, port = (transport.get_extra_info("sockname") or ("", 0))[:2]
        client = (transport.get_extra_info("peername") or ("",))[0].removeprefix("::ffff:")
        self._addresses = {"SERVER_NAME": host, "SERVER_PORT": str(port), "REMOTE_ADDR": client}
        transport.set_write_buffer_limits(0)  # so resume_writing() comes when all is sent
        self._server.connections.add(self)
        self._step()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self.waits_for in READING:
            self._step()
        else:  # one request at a time: the next ones stay in the socket
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._half_closed = True
        if self.waits_for in READING:
            self._step()
        return True  # the client may still read

    def resume_writing(self) -> None:
        self._loop.call_soon(self._go_on, ROOM)  # not now: asyncio has not finished its own step

    def connection_lost(self, _: Exception | None) -> None:
        self._lost = True
        self._server.connections.discard(self)
        self._server.places.release()
        if self.waits_for != THREAD:  # else _live() closes the answer when the thread has made it
            self.waits_for = ""
            self._life.close()

    def _step(self, value: object = None) -> None:
        """Let the connection's life go on until it waits for something again."""
        self.waits_for = ""
        try:
            self.waits_for = self._life.send(value)
            if self.waits_for in READING and not self._half_closed:
                self.transport.resume_reading()
        except StopIteration:
            self.transport.close()
        except Exception:
            log.exception("a connection failed")
            self.transport.abort()

    def _go_on(self, event: str, value: object = None) -> None:
        if self.waits_for == event:
            self._step(value)

    def _touch(self, size: int = 0) -> None:
        """Start the time anew in which the client must do something, or take `size` bytes."""
        self.deadline = self._loop.time() + max(IDLE, size / SLOWEST)

    def _live(self) -> Life:
        """Answer one request after the other, then close."""
        keep = True
        while keep:
            header, request, answer = b"", None, None
            try:
                if header := (yield from self._header()):
                    request = Request(header)
                    answer = yield from self._answer(request)
            except Exception as error:
                is_head = (header or self._received).startswith(b"HEAD ")
                environ = request.environ if request else {}
                answer = self._application.refuse(error, is_head, environ)
            if not answer or self._lost:
                if answer and isinstance(answer.body, Excerpt):
                    answer.body.close()
                return
            self._sent, keep = 0, answer.keep
            try:
                yield from self._send(answer)
            finally:
                if log_file := self._server.access_log:
                    environ = request.environ if request else self._addresses
                    target = request.target if request else ""
                    log_file.write(environ, target, answer.status, self._sent)
            if keep and self._received:  # a client that pipelines lets the others in between
                yield from self._turn()
        yield from self._linger()

    def _header(self) -> Generator[str, Any, bytes]:
        """Return the next header; nothing where the client sends no more."""
        received, checked = self._received, 0
        self._touch()
        while True:
            if match := EMPTY_LINES.match(received):  # RFC 9112, 2.2
                del received[: match.end()]
                checked = 0
            if received and not checked:  # the time for a header begins with its first byte
                self._touch()
            if size := header_size(received, checked):
                header = bytes(received[:size])
                del received[: size + 2]
                return header
            if self._half_closed:
                return b""
            checked = len(received)
            yield HEADER

    def _answer(self, request: Request) -> Generator[str, Any, Answer | None]:
        """Return the answer to a request, None where the client has gone."""
        forwarded = request.environ.get("HTTP_X_FORWARDED_FOR", "")
        client = client_address(self._addresses["REMOTE_ADDR"], forwarded, self._trusted)
        request.environ |= {**self._addresses, "REMOTE_ADDR": client}
        with contextlib.closing(request):
            if request.chunked or request.content_length:
                limit = self._application.admission.admit(request.environ)
                if request.expect_continue and not self._received:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                folder = self._application.binaries.uploads
                # A body of the largest size may take IDLE seconds for each 64 KiB, but no longer.
                latest = self._loop.time() + IDLE * max(1, limit / SEND_BLOCK)
                for starved in request.receive(self._received, limit, folder):
                    if not starved:
                        yield from self._turn()
                        continue
                    if self._half_closed:
                        return None
                    self.deadline = min(self._loop.time() + IDLE, latest)
                    yield BODY
            last = self._server.stopping and not self._received
            quick = self._application.is_quick(request.command, request.path, request.query)
            answer = self._application.answer(request, last) if quick else None
            # 503: the catalogue is locked. The loop must not wait for it, but a thread may.
            if not answer or answer.status == 503:
                self.deadline = math.inf
                self._server.threads.run(functools.partial(self._run_in_thread, request, last))
                answer = yield THREAD
            return answer

    def _run_in_thread(self, request: Request, last: bool) -> None:
        answer = None if self._lost else self._application.answer(request, last)
        self._loop.call_soon_threadsafe(self._go_on, THREAD, answer)

    def _send(self, answer: Answer) -> Life:
        """Send an answer as the client takes it."""
        self._touch()
        if isinstance(answer.body, bytes) and len(answer.body) <= SEND_BLOCK:
            self.transport.write(answer.head + answer.body)
            self._sent = len(answer.body)
        else:
            self.transport.write(answer.head)
            yield from self._send_body(answer.body)
        if self.transport.get_write_buffer_size():
            yield ROOM

    def _send_body(self, body: Body) -> Life:
        content = io.BytesIO(body) if isinstance(body, bytes) else body
        try:
            if self.transport.get_write_buffer_size():
                yield ROOM
            if isinstance(content, Excerpt) and content.in_one_piece():
                self._sending = self._loop.create_task(self._sendfile(content))
                self._sending.add_done_callback(lambda _: self._go_on(FILE))
                yield FILE
            while block := content.read(SEND_BLOCK):
                self.transport.write(block)
                if self.transport.get_write_buffer_size():
                    yield ROOM
                else:
                    yield from self._turn()
                self._touch()
        finally:
            self._sent = content.tell()
            if self._sending and self._sending.cancel():  # the system may still read the file
                self._sending.add_done_callback(lambda _: content.close())
            else:
                content.close()

    async def _sendfile(self, content: Excerpt) -> None:
        """Have the system send a file, as far as it is in one piece and the system can."""
        try:
            sent = 1
            while sent and (place := content.in_one_piece()):
                file, offset, left = place
                size = min(left, SENDFILE_BLOCK)
                self._touch(size)
                sent = await self._loop.sendfile(self.transport, file, offset, size, fallback=False)
                content.seek(sent, os.SEEK_CUR)
        except asyncio.SendfileNotAvailableError:
            pass
        except (OSError, RuntimeError, asyncio.CancelledError) as error:
            if getattr(error, "errno", None) == errno.EIO:  # any other: the client has gone
                log.error("a binary cannot be read (%s)", error)
            self.transport.abort()

    def abort(self) -> None:
        """End the connection at once; if the system is sending a file, stop that first."""
        if not (self._sending and self._sending.cancel()):
            self.transport.abort()

    def _turn(self) -> Life:
        self._loop.call_soon(self._go_on, TURN)
        yield TURN

    def _linger(self) -> Life:
        """Send no more, and read until the client sends no more either: RFC 9112, 9.6.

        Closing with bytes unread would destroy the answer on its way.
        """
        with contextlib.suppress(OSError):
            self.transport.write_eof()
        self.deadline, heard = self._loop.time() + LINGER, 0
        while not self._half_closed and heard <= LINGER_BYTES:
            heard += len(self._received)
            self._received.clear()
            yield END


class Server:
    """Serves an application on a listening socket, in the thread that calls run()."""

    def __init__(self, application: Application, listener: socket.socket, shared: bool) -> None:
        """Take a listening socket, `shared` with other processes or not; raises CannotStart."""
        self.application, self.settings = application, application.settings
        self._listener, self._shared = listener, shared
        log_file = self.settings.access_log
        self.access_log = AccessLog(log_file) if log_file else None
        self.connections: set[Connection] = set()
        self.stopping, self._grace, self._next_complaint = False, 0.0, 0.0
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self.places = asyncio.Semaphore(connection_limit())

    def run(self) -> None:
        """Serve until stop() is called, then let the requests in flight finish."""
        self.threads = Threads(self.settings.threads)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self.threads.end()
            self._loop.run_until_complete(asyncio.sleep(0.001))  # lets asyncio close the last ones
            self._loop.close()
            if self.access_log:
                self.access_log.close()

    def stop(self, grace: float) -> None:
        """Have run() return, after `grace` seconds at most; for other threads and for signals."""
        self._grace, self.stopping = grace, True
        with contextlib.suppress(RuntimeError):  # run() has returned, and its loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        self.application.catalogue.never_wait()
        self._listener.setblocking(False)
        accepting = self._loop.create_task(self._accept())
        while not self.stopping:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK)
            self._close(lambda connection: self._loop.time() > connection.deadline)
        for _ in range(10):  # turns for clients in the backlog, and for what they have sent
            await asyncio.sleep(0)
        with contextlib.suppress(NotImplementedError):  # so that no more clients come in
            self._loop.remove_reader(self._listener.fileno())
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        if not self._shared:
            with contextlib.suppress(OSError):  # a forked child may hold the socket open
                self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = self._loop.time() + self._grace
        while self.connections and self._loop.time() < deadline:
            self._close(lambda connection: connection.waits_for in (HEADER, END))
            await asyncio.sleep(0.005)
        self._close(lambda _: True)

    def _close(self, which: Callable[[Connection], bool]) -> None:
        for connection in list(self.connections):
            if which(connection):
                connection.abort()

    async def _accept(self) -> None:
        """Take clients while there is a place for them; the others wait in the backlog."""
        opening = set()  # the loop itself would not keep these tasks alive
        while True:
            await self.places.acquire()
            try:
                client, _ = await self._loop.sock_accept(self._listener)
                task = self._loop.create_task(self._open(client))
                opening.add(task)
                task.add_done_callback(opening.discard)
                if self._shared:
                    await asyncio.sleep(0)  # leave some clients to the other processes
            except OSError as error:
                self.places.release()
                if not isinstance(error, ConnectionError):  # a client that has left already
                    self.complain(error)
                    await asyncio.sleep(1)  # meanwhile files or memory may become free

    async def _open(self, client: socket.socket) -> None:
        try:
            # A socket that cannot be watched raises here, while asyncio would only log it and let
            # the client hang. Windows's own loop watches none.
            with contextlib.suppress(NotImplementedError):
                self._loop.add_reader(client.fileno(), bool)
                self._loop.remove_reader(client.fileno())
            await self._loop.connect_accepted_socket(lambda: Connection(self), client)
        except OSError as error:
            self.complain(error)
            client.close()
            self.places.release()

    def complain(self, error: OSError) -> None:
        """Log that a connection cannot be taken, once a minute."""
        if self._loop.time() >= self._next_complaint:
            self._next_complaint = self._loop.time() + 60
            log.error("a connection cannot be taken (%s): trying again every second", error)


# ------------------------------------------------------------------------------------- processes
# One process serves by itself (serve_here). With --workers N the first process only starts others
# around one listening socket, replaces those that die, and passes signals on (supervise).

GRACE = 30  # seconds that requests in flight may take to end
Signals = dict[int, bool]  # those that a service heeds, and whether each only reopens its log


def connection_limit() -> int:
    """Return how many connections there may be: each may need a file besides its socket."""
    try:
        import resource
    except ImportError:  # Windows, whose select() takes 512
        return 400
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:  # which is -1
        return 10_000
    return max(4, min(10_000, (files - 40) // 2))


def raise_file_limit() -> None:
    """Allow this process as many open files as 10,000 connections need, or as the system does."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 20_200 if most == resource.RLIM_INFINITY else min(most, 20_200)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens where the settings say; raises CannotStart."""
    host, port = settings.host, settings.port
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dual = host == "::" and socket.has_dualstack_ipv6()
        # The place goes on whole: of fe80::1%eth0 its last part is the network interface.
        return socket.create_server(place, family=family, backlog=1024, dualstack_ipv6=dual)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # negative where a name cannot be resolved
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        remedy = "choose others with --host and --port"
        raise CannotStart(f"Cannot listen on {host} port {port} ({reason}): {remedy}") from error


def base_url(listener: socket.socket, settings: Settings) -> str:
    """Return the address of the API, with the prefix but no slash at the end."""
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    host, port = socket.getnameinfo(listener.getsockname(), numeric)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.url_prefix}"


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep a data folder for one service; raises CannotStart where another has it.

    The lock is SQLite's because that works on every platform and ends with the process, however
    that ends: no file is left that says a dead service still runs.
    """
    make_folder(folder)
    path = folder / "service.lock"
    with contextlib.ExitStack() as closing:
        try:
            lock = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            closing.callback(lock.close)
            lock.execute("PRAGMA journal_mode = MEMORY")  # no file beside it
            lock.execute("BEGIN EXCLUSIVE")
            # Of a file that can only be read SQLite says so at the first change, and until then
            # has locked nothing. This change is never committed.
            lock.execute("PRAGMA user_version = 1")
        except sqlite3.Error as error:
            reason = f"Cannot lock {path} ({error}): let this user write it, or remove it"
            if "locked" in str(error):
                reason = f"Another service uses {folder}: stop that, or choose another with --data"
            raise CannotStart(reason) from error
        yield


def clean_up(application: Application) -> None:
    """Remove what a crash left over, but no file that the catalogue knows nothing of.

    That may be an upload younger than the catalogue, where this was restored from a backup.
    """
    catalogue, binaries = application.catalogue, application.binaries
    strays = catalogue.strays(binaries.names())
    left_over = [binaries.folder / name for name, is_left_over in strays.items() if is_left_over]
    unknown = len(strays) - len(left_over)
    if left_over:  # a damaged index may hide the images that need them
        require_sound(catalogue, "integrity_check")
    left_over += binaries.uploads.iterdir()
    left_over += application.settings.data.glob("secret.key*.draft")
    for path in filter(Path.is_file, left_over):
        log.info("removing %s, which was left over", path)
        path.unlink()
    if unknown:
        log.warning("%s files in %s belong to no image: see verify", unknown, binaries.folder)


@contextlib.contextmanager
def ready_to_serve(settings: Settings) -> Iterator[tuple[Application, socket.socket]]:
    """Lend an application that has its folder to itself, and a socket that listens for it."""
    with (
        sole_use(settings.data),
        listen(settings) as listener,
        contextlib.closing(create_app(settings)) as application,
    ):
        clean_up(application)
        yield application, listener


class Running(NamedTuple):
    """A server that runs in this process."""

    url: str
    application: Application

    def token(
        self, service: str = "admin", scope: Iterable[str] = (), expires: int | None = None
    ) -> str:
        """Return a token with `scope` (read, write, delete; all if empty).

        It lives for `expires` seconds, or else as long as the secret in the data folder.
        """
        rights = [f"image:{word}" for word in scope]
        return self.application.tokens.issue(service, rights, expires)


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Running]:
    """Run a real server in a thread, on a free port unless the settings name one.

    No thread, open file or lock is left when the block ends. Raises CannotStart.
    """
    with ready_to_serve(settings) as (application, listener):
        url = base_url(listener, settings)
        server = Server(application, listener, shared=False)
        thread = threading.Thread(target=server.run, name="image-manager", daemon=True)
        thread.start()
        try:
            yield Running(url, application)
        finally:
            server.stop(grace=2)
            thread.join()


def block_signals(settings: Settings) -> Signals:
    """Hold back the signals that a service heeds, until it is ready for them; return which."""
    signals: Signals = {signal.SIGTERM: False, signal.SIGINT: False}
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    reopens = settings.access_log not in ("", "-")
    if hangup and (reopens or signal.getsignal(hangup) != signal.SIG_IGN):  # as nohup has it
        signals[hangup] = reopens
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals


def serve_here(application: Application, listener: socket.socket, signals: Signals) -> None:
    """Serve in this process until a signal ends it."""
    server = Server(application, listener, shared=application.settings.workers > 1)

    def handle(number: int, _: object) -> None:
        if server.access_log and signals[number]:
            try:
                server.access_log.reopen()
            except OSError as error:
                log.error("the access log goes on in its old file: %s", error)
        elif number == signal.SIGINT and server.stopping:
            os._exit(130)
        elif not server.stopping:
            server.stop(GRACE)
            end = threading.Timer(GRACE + 1, os._exit, (0,))  # whatever a thread is still at
            end.daemon = True
            end.start()

    for number in signals:
        signal.signal(number, handle)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    server.run()
    for number in signals:
        signal.signal(number, signal.SIG_IGN)  # it is ending already


def supervise(application: Application, listener: socket.socket, signals: Signals) -> None:
    """Keep as many processes serving as are wanted, until a signal ends them.

    Signals stay blocked here and are taken one by one: a handler could run amid a fork, before the
    worker is known, which would miss the signal, or in the worker, which would pass it on.
    """
    workers: dict[int, float] = {}  # when each began
    stopping = False
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler some systems drop it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    list(ended_children())  # those that ended before the signal was blocked
    reader, writer = os.pipe()
    while workers or not stopping:
        while len(workers) < application.settings.workers and not stopping:
            pid = os.fork()
            if not pid:
                os.close(writer)
                work(application, listener, signals, reader)
            workers[pid] = time.monotonic()
        number = signal.sigwait([*signals, signal.SIGCHLD])
        if number == signal.SIGCHLD:
            for pid, status in ended_children():
                began = workers.pop(pid, None)
                if began and not stopping:
                    log.error("worker %s ended with status %s: another follows", pid, status)
                    # Those that fail at once must not keep the machine busy.
                    time.sleep(max(0, began + 1 - time.monotonic()))
            continue
        if number == signal.SIGINT and stopping:
            number = signal.SIGKILL
        elif not signals[number]:
            number, stopping = signal.SIGTERM, True
            listener.close()  # else connections would be taken that nobody serves
        for pid in workers:
            os.kill(pid, number)
        if number == signal.SIGKILL:
            os._exit(130)


def ended_children() -> Iterator[tuple[int, int]]:
    """Yield process and status of each child that has ended.

    Some may be no workers: those of a script that has become this program, or of a container.
    """
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            yield child


def work(application: Application, listener: socket.socket, signals: Signals, reader: int) -> None:
    """Serve in a process that has been forked, then end it."""

    def end_with_parent() -> None:
        os.read(reader, 1)  # returns when the first process, which never writes, is gone
        os._exit(1)

    try:
        threading.Thread(target=end_with_parent, daemon=True).start()
        serve_here(application, listener, signals)
        os._exit(0)
    except BaseException:
        log.exception("a worker failed")
    finally:
        os._exit(1)


# ------------------------------------------------------------------------------------- maintenance
# Checking and copying a store that may be in use. Both return how many binaries there are, and
# what is wrong: a sentence for each fault that says what to do.


@contextlib.contextmanager
def open_store(folder: Path) -> Iterator[tuple[Catalogue, BinaryStore, list[str]]]:
    """Lend a store and the list of its faults, which begins with those of the catalogue.

    It may be in use, or on a read-only file system. The block ends early where the catalogue is so
    damaged that it cannot be read. Raises CannotStart.
    """
    path = folder / "image_manager.db"
    if not path.is_file():
        raise CannotStart(f"There is no store in {folder}: name its folder with --data")
    with contextlib.ExitStack() as closing:
        try:
            catalogue = Catalogue(path, make=False)
        except CannotStart as error:
            if not re.search("unable to open|read-only", str(error)):
                raise
            # Even to read, SQLite needs files beside the catalogue that it can write. Where it
            # cannot, nobody changes the catalogue, so that it may be copied file by file.
            scratch = closing.enter_context(tempfile.TemporaryDirectory())
            for part in folder.glob(path.name + "*"):
                shutil.copyfile(part, Path(scratch, part.name))
            catalogue = Catalogue(Path(scratch, path.name), make=False)
        closing.callback(catalogue.close)
        binaries = BinaryStore(folder, make=False)
        faults = [f"damaged: the catalogue ({fault})" for fault in catalogue.faults()]
        if not faults:
            require_catalogue(catalogue, binaries)
        try:
            yield catalogue, binaries, faults
        except Damaged as error:
            if not faults:
                faults.append(f"damaged: the catalogue ({error.__cause__})")


def fault_of(image: Image, binaries: BinaryStore, copies: BinaryStore | None = None) -> str | None:
    """Return what is wrong with an image's files, None if nothing is.

    For a backup they are copied first, and it is the copies that are checked.
    """
    remedy = "upload the same file again, or restore it from a backup"
    other_bytes = f"damaged: the {{}} file of image {image.id} has other bytes: {remedy}"
    checked, has_raw = copies or binaries, image.raw_size is not None
    try:
        for suffix in (".hex", ".bin") if has_raw else (".hex",):
            path = binaries.path(image.id, suffix)
            with contextlib.suppress(FileNotFoundError):  # it is missed below
                if copies:
                    copy_file(path, copies.path(image.id, suffix))
                else:
                    path.open("rb").close()  # which tells whether this user may read it
        scratch = checked.uploads if os.access(checked.uploads, os.W_OK) else None
        with (
            checked.open(image.id, ".hex", image.size) as file,
            tempfile.TemporaryFile(buffering=0, dir=scratch) as data,
        ):
            digest, reader = hashlib.sha256(), HexReader()
            for block in iter(functools.partial(file.read, BLOCK), b""):
                digest.update(block)
                if has_raw:
                    data.write(reader.feed(block))
            if digest.hexdigest() != image.sha256:
                return other_bytes.format("hex")
            if image.raw_size is None:
                return None
            # Of the .bin no digest is recorded, but what is in it follows from the .hex.
            data.write(reader.finish())
            wanted = read_extents(data, reader.pieces.extents())
            with checked.open(image.id, ".bin", image.raw_size) as raw:
                if not all(raw.read(len(block)) == block for block in wanted):
                    return other_bytes.format("bin")
    except HexFault:
        return other_bytes.format("hex")
    except Damaged as error:
        return f"damaged or missing: {error}"
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        remedy = "let this user read them"
        return f"unreadable: the files of image {image.id} ({error.strerror}): {remedy}"
    return None


def verify_store(folder: Path, progress: Callable[[int, int], object]) -> tuple[int, list[str]]:
    """Return how many binaries a store has, and all that is wrong with it; changes nothing.

    progress(number, total) is called before each binary. Raises CannotStart.
    """
    images, found = [], []
    with open_store(folder) as (catalogue, binaries, faults):
        strays = catalogue.strays(binaries.names())
        if strays:
            time.sleep(1)  # a deletion under way removes the row, then the files
            strays = catalogue.strays(strays.keys() & binaries.names())
        images = catalogue.confirmed()
        for number, image in enumerate(images, 1):
            progress(number, len(images))
            if fault := fault_of(image, binaries):
                found.append((image.id, image.stored, fault))
        # What was deleted, or uploaded anew, while it was checked is no fault.
        still = {(image.id, image.stored) for image in catalogue.confirmed()}
        faults += [fault for *binary, fault in found if tuple(binary) in still]
        for name, is_left_over in sorted(strays.items()):
            path = binaries.folder / name
            left_over = f"left over: {path}: the next start of the service removes it"
            unknown = f"unknown: {path}: no image has it: upload it again, or move it away"
            faults.append(left_over if is_left_over else unknown)
    return len(images), faults


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, synced; nobody else can read it before it has the source's mode."""
    target.unlink(missing_ok=True)
    private = functools.partial(os.open, mode=0o600)
    with open(source, "rb") as file, open(target, "xb", opener=private) as copy:
        shutil.copyfileobj(file, copy, BLOCK)
        copy.flush()
        sync(copy.fileno())
    shutil.copymode(source, target)


def copy_images(
    catalogue: Catalogue, draft: Path, binaries: BinaryStore, copies: BinaryStore
) -> tuple[int, list[str]]:
    """Copy the catalogue, then the binaries that are in the copy; return how many, and faults.

    In this order no image of the copy lacks its binary, unless it was deleted before its turn
    came: then the catalogue is copied once more, and what that has besides.
    """
    found: dict[Image, str | None] = {}
    while True:
        catalogue.copy_to(draft)
        with contextlib.closing(Catalogue(draft)) as snapshot:
            images = snapshot.confirmed()
            for image in images:
                if found.get(image, "to be copied"):
                    found[image] = fault_of(image, binaries, copies)
            strays = snapshot.strays(copies.names())
        wrong = {image: fault for image in images if (fault := found[image])}
        if wrong.keys() <= set(catalogue.confirmed()):
            break
    for name in strays:
        (copies.folder / name).unlink()
    return len(images), list(wrong.values())


def back_up_store(folder: Path, destination: Path) -> tuple[int, list[str]]:
    """Copy a store that may be in use; return what verify_store() does; raises CannotStart."""
    count = 0
    with open_store(folder) as (catalogue, binaries, faults):
        if destination.resolve().is_relative_to(folder.resolve()):
            raise CannotStart(f"{destination} lies in the store itself: name another folder")
        make_folder(destination)
        if any(destination.iterdir()):
            raise CannotStart(f"{destination} has something in it: name a new or empty folder")
        copies = BinaryStore(destination)
        # The catalogue gets its name at the very end: without one, nobody takes a backup that was
        # broken off for a store.
        draft = copies.uploads / "image_manager.db"
        draft.touch(0o600)
        count, found = copy_images(catalogue, draft, binaries, copies)
        faults += found
        secret = folder / "secret.key"
        if secret.exists():
            copy_file(secret, destination / "secret.key")
        shutil.copymode(folder / "image_manager.db", draft)
        sync_folder(copies.folder)
        os.replace(draft, destination / "image_manager.db")
        sync_folder(destination)
    return count, faults


# ------------------------------------------------------------------------------------- page
# One document for people at the bench, which uses the API as any client does. The script keeps what
# it knows in `state`; render() shows it, and is called after each change. All text gets into the
# page as text: labels hold any character.

PAGE_STYLE = r"""
:root {
  color-scheme: light dark;
  --back: light-dark(#fff, #14191d); --panel: light-dark(#f4f6f8, #1d2429);
  --text: light-dark(#1b2329, #e4e9ed); --quiet: light-dark(#59656f, #a2aeb8);
  --accent: light-dark(#0b6e75, #5cc8cf); --bad: light-dark(#b3261e, #ff8a80);
  --line: light-dark(#d3dae0, #364149);
}
html { scrollbar-gutter: stable; }
* { box-sizing: border-box; margin: 0; accent-color: var(--accent); }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 68rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header { padding: 1rem 0; border-bottom: 1px solid var(--line); }
h1, .panel h2 { font-size: 1.1rem; }
main > *, .stack > * + * { margin-top: 1rem; }
.panel { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  background: var(--panel); color: var(--text); }
[role=alert] pre { white-space: pre-wrap; }
[role=alert] { position: sticky; top: .5rem; border-left: 4px solid var(--bad); }
.row { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: end; }
.middle { align-items: center; }
#who { margin-left: auto; }
.grow { flex: 1 1 9rem; min-width: 0; }
a, strong { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
h2:focus-visible { outline: none; }  /* where the reading begins, and nothing to press */
label, th { font-size: .875rem; color: var(--quiet); }
input, select, button { font: inherit; color: var(--text); background: var(--back);
  border: 1px solid var(--quiet); border-radius: .35rem; padding: .4rem .7rem; min-height: 2.6rem; }
label :is(input, select) { display: block; width: 100%; margin-top: .15rem; }
input[type=file] { color: transparent; }  /* the name is shown below, that of a dropped file too */
::file-selector-button { font: inherit; border: 1px solid var(--line); border-radius: .25rem; }
button, #list tbody tr { cursor: pointer; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--back); }
button:disabled { opacity: .55; cursor: default; }
.bad { color: var(--bad); border-color: var(--bad); }
.quiet, dt { color: var(--quiet); }
code, pre, .mono, svg text { font: .875rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { font-size: min(.875rem, 2.8vw); overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.25rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem min(1rem, 2vw) .4rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
:is(th, td):nth-child(3) { text-align: right; padding-right: min(2rem, 4vw); }  /* sizes */
#list th { width: 15%; }  /* or columns would move while one filters */
#list th:first-child { width: 40%; }
th, td code, #list td:nth-child(n + 3) { white-space: nowrap; }
#list tbody tr:hover { background: var(--panel); }
#links button { min-width: 6rem; }  /* as wide for "Copied" as for "Copy" */
#map { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
svg text { font-size: 12px; }
svg { max-width: 100%; fill: var(--text); }
svg .gap { fill: var(--quiet); }
svg .data { fill: var(--accent); }
svg .cut { fill: none; stroke: var(--quiet); stroke-dasharray: 3 3; }
dialog { margin: auto; max-width: min(30rem, 92vw); }
dialog::backdrop { background: rgb(0 0 0 / 55%); }
@media (max-width: 48rem) { #list :is(th, td):nth-child(5) { display: none; } }
"""

PAGE_SCRIPT = r"""
"use strict";
const BASE = location.pathname.replace(/\/+$/, "");  // with the prefix, if there is one
const RIGHTS = ["read", "write", "delete"];
const LIST_ROWS = 200, TABLE_ROWS = 1000, DUMP_ROWS = 32, LONGEST_LINE = 500;
const HOUR = 3600;
const LASTING = {[HOUR]: "1 hour", 86400: "1 day", 604800: "7 days", 2592000: "30 days"};
const state = {
  token: sessionStorage.getItem("token") || "", images: null, filter: "", shown: LIST_ROWS,
  image: null, link: null, lasting: HOUR, dump: null, goTo: "",
  file: null, typed: {}, upload: null, news: "",
  alert: null, failed: null,  // errors: of what was asked for last, and of the last upload
};

function update(changes) {
  Object.assign(state, changes);
  render();
}

// Elements and text.

function element(tag, ...children) {  // the first of them may be its attributes
  const attributes = children[0]?.constructor === Object ? children.shift() : {};
  const made = ["svg", "rect", "text", "path"].includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value);
  }
  return fill(made, children);
}

function fill(parent, ...children) {  // what is null, false or "" is left out
  parent.replaceChildren(...children.flat(Infinity).filter(Boolean));
  return parent;
}

const {a, bdi, code, dd, dialog, div, dl, dt, form, h2, input, label, li, option, p, pre, section,
  select, span, strong, table, tbody, td, th, thead, tr, ul} =
  new Proxy({}, {get: (_, tag) => element.bind(null, tag)});
const byId = id => document.getElementById(id);
const button = (text, onclick, attributes = {}) =>
  element("button", {type: "button", onclick, ...attributes}, text);
const submit = (text, disabled = false) => element("button", {class: "main", disabled}, text);
const idOf = name => name.toLowerCase().replace(" ", "");
const field = (name, attributes) => label({class: "grow"}, name,
  input({id: idOf(name), autocomplete: "off", spellcheck: "false", ...attributes}));
const panel = (title, ...children) =>
  section({class: "panel stack"}, title && h2(title), children);
const row = (...cells) => tr(cells.map(cell => td(cell)));
const heads = (...names) => thead(tr(names.map(name => th({scope: "col"}, name))));

// What would turn round the text beside it is named.
const plain = text => text.replace(/[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
  character => `[U+${hex(character.codePointAt(0), 4)}]`);
const hex = (number, digits) => number.toString(16).toUpperCase().padStart(digits, "0");
const address = number => "0x" + hex(number, 8);
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const TIME = new Intl.DateTimeFormat(undefined, {dateStyle: "medium", timeStyle: "medium"});
const time = text => TIME.format(new Date(text));
const title = image => plain(`${image.label} ${image.fw_version}`);

function size(bytes) {
  const power = Math.min(Math.floor(Math.log2(bytes) / 10), 3);
  return bytes < 1024 ? counted(bytes, "byte")
    : `${(bytes / 1024 ** power).toFixed(1)} ${" KMG"[power]}iB`;
}

const exactSize = bytes => bytes < 1024 ? size(bytes) : `${size(bytes)} (${bytes} bytes)`;

// The API.

// Returns what the server answers: an object for JSON, or else the bytes. By XMLHttpRequest, as
// fetch() does not tell how much of a file is sent.
function ask(method, path, {token = state.token, json, file, range, signal, onprogress} = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    signal?.throwIfAborted();
    signal?.addEventListener("abort", () => { request.abort(); reject(signal.reason); });
    request.open(method, BASE + path);
    request.responseType = "arraybuffer";
    request.setRequestHeader("Authorization", "Bearer " + token);
    if (json) request.setRequestHeader("Content-Type", "application/json");
    if (range) request.setRequestHeader("Range", range);
    request.upload.onprogress = request.upload.onload = onprogress;
    request.onerror = () => reject(new Error("The connection is broken: is the service running?"));
    request.onload = () => {
      const {status, response} = request;
      const isJson = request.getResponseHeader("Content-Type") === "application/json";
      const answer = isJson ? JSON.parse(new TextDecoder().decode(response)) : response;
      if (status < 300) return resolve(answer);
      if (status === 401 && token === state.token) state.token = "";
      const {message = `The server answered ${status}`, errors = {}} = answer;
      reject(new Error([message, ...Object.entries(errors).flat(2)].join(": ")));
    };
    request.send(json ? JSON.stringify(json) : file);
  });
}

let wanted = {};  // of each kind of answer, the one asked for last

// Does what its answer changes in the state, or shows what went wrong. An answer is late, and not
// shown, once another of its kind was asked for, or one has gone on to another place.
async function attempt(kind, action, reset = {}) {
  const mine = wanted[kind] = {};
  state.alert = null;
  const changes = await action().catch(error => ({alert: error}));
  if (wanted[kind] !== mine) return false;
  update({...reset, ...changes});
  return !state.alert;
}

// The token, and going from one place to another.

function claims() {  // what the token says; the server alone checks it
  try {
    const part = atob(state.token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/"));
    const bytes = Uint8Array.from(part, character => character.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes)) ?? {};
  } catch {
    return {};  // the server will say what is wrong with it
  }
}

function may(right) {
  const words = [claims().scope].flat().join(" ").split(/\s/);
  const named = RIGHTS.filter(one => words.includes("image:" + one));
  return state.token !== "" && (!named.length || named.includes(right));
}

function useToken(event) {  // without what cannot be seen, pasted with it
  const token = event.target.elements.token.value.replace(/^.*Bearer\s|[^!-~]/gi, "");
  sessionStorage.setItem("token", token);
  Object.assign(state, {token, images: null});
  go();
}

function forgetToken() {
  cancel();
  sessionStorage.removeItem("token");
  Object.assign(state,
    {token: "", images: null, image: null, filter: "", file: null, typed: {}, alert: null});
  go();
}

// The id of the image that the address names.
const place = () => location.hash.slice(1).replace(/[^\w-]/g, "");

const readImages = async () => may("read") ? (await ask("GET", "/image")).reverse() : null;

async function go(news = "") {  // until the answer comes, what is shown stays
  const id = place(), left = state.image?.id;
  wanted = {};
  Object.assign(state, {news, failed: null});
  document.querySelector("dialog")?.close();
  if (!state.token) return render();
  const arrived = await attempt("place", async () => {
    if (!id) return {images: await readImages()};
    return {image: may("read") && await ask("GET", `/image/${id}`)};
  }, {image: null, link: null, dump: null, goTo: ""});
  if (!arrived) return;
  if (!state.image) return document.querySelector(`[href="#${left}"]`)?.focus();
  scrollTo(0, 0);
  byId("title").focus();
  if (hasBytes(state.image)) await attempt("dump", () => readDump(state.image, 0));
}

// Uploading.

const choose = file => update({file, failed: null, news: ""});

function names() {  // as the file's name suggests, where a person has typed nothing else
  const stem = (state.file?.name || "").replace(/\.[A-Za-z]\w{0,4}$/, "");
  const [, label, version] =
    /^(.+?)[-_ ]v?(\d+(?:\.\d+)+(?:[-+][\w.+-]*)?)$/i.exec(stem) || [null, stem, ""];
  const cut = text => [...text].slice(0, 128).join("");  // as the server counts
  const {typed} = state;
  return {label: typed.label || cut(label), fw_version: typed.fw_version || cut(version)};
}

// It keeps what it began with: meanwhile one may go on, or forget the token.
async function upload(query = "") {
  if (!state.file || state.upload) return;
  const {file, image, token} = state, json = names(), stopper = new AbortController();
  let id = image?.id, checked;
  update({upload: {file, sent: 0, stopper}, alert: null, failed: null, news: ""});
  try {
    await file.slice(0, 1).arrayBuffer().catch(() => {
      throw new Error("The file cannot be read, or has changed: choose it again");
    });
    id ??= (await ask("POST", "/image", {token, json})).id;
    ({checked} = await ask("PUT", `/image/${id}/binary${query}`,
      {token, file, signal: stopper.signal, onprogress: event => showProgress(event.loaded)}));
  } catch (error) {
    const line = await lineOf(file, error.message).catch(() => "");
    if (id && !image) await ask("DELETE", `/image/${id}`, {token}).catch(() => {
      error.message += `. Image ${id} was left without a binary`;
    });
    const images = await readImages().catch(() => state.images);  // it may have been among them
    return update({upload: null, images, failed: Object.assign(error, {image, line})});
  }
  const verdict = checked ? "It is sound Intel HEX." : "It was not checked.";
  const news = `${title(image || json)} is stored. ${verdict}`;
  Object.assign(state, {upload: null, file: null, typed: {}, news});
  if (!place()) history.pushState(null, "", "#" + id);
  if (place() === id) go(news);
  else render();  // one looks at another image by now
}

const cancel = () => state.upload?.stopper.abort(new Error("The upload was cancelled"));

async function lineOf(file, message) {  // the line that the server's sentence names
  const [, number] = /\bline (\d+)/.exec(message) || [];
  if (!number) return "";
  const text = await file.text(), lineEnd = /\r\n?|\n/g;
  for (let line = 1; line < number; line++) lineEnd.test(text);  // goes on behind the last one
  const [line] = text.slice(lineEnd.lastIndex).split(/[\r\n]/, 1);
  return line.length > LONGEST_LINE ? line.slice(0, LONGEST_LINE) + " … (cut off here)" : line;
}

// What lies where.

function segments(image) {  // of what is no Intel HEX, the whole file
  if (!image.hex) return image.size ? [{at: 0, end: image.size}] : [];
  return image.hex.segments.map(({address, size}) =>
    ({at: Number(address), end: Number(address) + size}));
}

// Of records of other types nobody knows what they put where.
const hasBytes = image => segments(image).length > 0
  && !image.hex?.warnings.some(text => text.includes("no raw bytes"));

function groups(items, belongs) {  // what follows one another and belongs together
  const found = [];
  for (const item of items) {
    if (found.length && belongs(found.at(-1), item)) found.at(-1).push(item);
    else found.push([item]);
  }
  return found;
}

function isOutside(image) {  // the entry point, of all that the file has
  const at = Number(image.hex.start_address), parts = segments(image);
  return !parts.length || at < parts[0].at || at >= parts.at(-1).end;
}

const total = pieces => pieces.reduce((sum, {at, end}) => sum + end - at, 0);

function drawMap(image) {
  const parts = segments(image), entry = image.hex.start_address, mark = Number(entry);
  const begin = parts[0].at, {end} = parts.at(-1), data = total(parts), shapes = [];
  const pieces = parts.flatMap((part, number) => {
    const before = number ? parts[number - 1].end : begin;
    const kind = part.at - before > data / 4 ? "cut" : "gap";  // a long one is cut short
    return [{kind, at: before, end: part.at}, {kind: "data", ...part}];
  });
  const cuts = pieces.filter(({kind}) => kind === "cut");
  const scale = 240 / (end - begin - total(cuts));
  let y = 14, drawn = 0, labelled = -20, marked = y;
  const draw = (tag, attributes, text) => shapes.push(element(tag, attributes, text));
  const write = (text, at, kind = "") => {
    if (at < labelled + 16) return;  // it would lie on the one above
    draw("text", {class: kind, x: 104, y: at + 4}, text);
    labelled = at;
  };
  for (const {kind, at, end} of pieces) {
    const height = kind === "cut" ? Math.min(40, 480 / cuts.length) : (end - at) * scale;
    const seen = Math.max(height, 2);
    if (kind !== "gap" && y + height - drawn > 0.5) {  // of thousands, one shape to a pixel
      draw("rect", {class: kind, x: 12, y, width: 76, height: seen});
      if (kind === "data") drawn = y + seen;
    }
    if (kind === "data") write(address(at), y);
    if (kind === "cut") write(`gap of ${size(end - at)}`, y + height / 2, "gap");
    if (mark > at && mark <= end) marked = y + height * (mark - at) / (end - at);
    y += height;
  }
  write(`${address(end)} end`, Math.max(y, labelled + 16), "gap");
  if (entry && !isOutside(image)) {
    draw("text", {x: 232, y: marked + 4}, "entry point");
    draw("path", {class: "entry", d: `M0 ${marked - 6}l12 6l-12 6z`});
  }
  const said = `Memory map: ${counted(parts.length, "segment")} with ${exactSize(data)} `
    + `from ${address(begin)} to ${address(end)}` + (entry ? `, entry point ${entry}` : "");
  const box = `0 0 320 ${labelled + 14}`;
  return element("svg", {role: "img", "aria-label": said, width: 320, viewBox: box}, shapes);
}

async function readDump(image, from) {
  if (Number.isNaN(from))
    throw new Error("Go to takes an address: 0x08000000, or a decimal number");
  const parts = segments(image), bytes = new Map(), lines = new Set();  // all by address
  for (const part of parts.filter(part => part.end > from)) {
    const at = Math.max(part.at, from);
    for (let line = at - at % 16; line < part.end && lines.size < DUMP_ROWS; line += 16)
      lines.add(line);
  }
  if (!lines.size) throw new Error(`The data end at ${address(parts.at(-1).end)}`);
  await Promise.all(groups(lines, (run, line) => line === run.at(-1) + 16).map(async run => {
    const [begin] = run, end = run.at(-1) + 16;
    const answer = new Uint8Array(await (image.hex
      ? ask("GET", `/image/${image.id}/binary?format=bin&start=${begin}&end=${end}`)
      : ask("GET", `/image/${image.id}/binary`, {range: `bytes=${begin}-${end - 1}`})));
    for (const part of parts)  // what is of none of them, the server has filled in
      for (let at = Math.max(part.at, begin); at < Math.min(part.end, end); at++)
        bytes.set(at, answer[at - begin]);
  }));
  const text = [...lines].map((line, number, all) => {
    const gap = number && line - all[number - 1] - 16;
    return (gap ? `          .. gap of ${size(gap)}\n` : "") + dumpLine(line, bytes);
  }).join("\n");
  return {dump: {text, next: [...lines].at(-1) + 16}};
}

function dumpLine(line, bytes) {
  const columns = Array.from({length: 16}, (_, column) => bytes.get(line + column));
  const digits = columns.map(byte => byte === undefined ? ".." : hex(byte, 2)).join(" ");
  const text = columns.map(byte => byte === undefined ? " "
    : byte > 31 && byte < 127 ? String.fromCharCode(byte) : "·").join("");
  return `${hex(line, 8)}  ${digits}  ${text}`;
}

// Showing the state.

function render() {
  const key = one => one.id || one.textContent;
  const {activeElement: before} = document, caret = before.selectionStart;
  const focused = key(before), {top} = before.getBoundingClientRect();
  fill(byId("who"), state.token && whoView());
  fill(byId("content"), alertView(state.alert), alertView(state.failed),
    sendingView(state.upload), state.token ? placeView() : tokenView());
  byId("news").textContent = state.news;
  document.title = (state.image ? title(state.image) + " - " : "") + "Image Manager";
  if (state.upload) showProgress(state.upload.sent);
  // What had the focus has it again, as another element, and stays where it is on the screen.
  const again = [...document.querySelectorAll("a, button, input, select, pre, h2")]
    .find(one => key(one) === focused);
  if (!again) return byId("token")?.focus();
  again.focus({preventScroll: true});
  if (caret != null) again.setSelectionRange(caret, caret);
  scrollBy(0, again.getBoundingClientRect().top - top);
}

function whoView() {
  const said = RIGHTS.filter(right => !may(right)).map(right => `This token may not ${right}`);
  const {service} = claims();
  if (service) said.unshift(`Tenant ${plain(String(service))}`);
  return [a({href: "#", onclick: () => place() || go()}, "All images"),
    span({class: "quiet"}, said.join(". ")), button("Forget token", forgetToken)];
}

function alertView(error) {
  const unchecked = may("write") && error?.image?.id === state.image?.id
    && error?.message.includes("?validate=false");
  return error && div({role: "alert", class: "panel stack"}, p(plain(error.message)),
    error.line && pre(plain(error.line)),
    unchecked && button("Store it unchecked", () => upload("?validate=false")));
}

function tokenView() {
  return form({class: "panel stack", onsubmit: useToken},
    p("A token lets you in. When the service starts, it prints the command that makes one: ",
      code("image_manager.py token"), "."),
    div({class: "row"}, field("Token", {required: true, class: "mono",
      value: sessionStorage.getItem("token") || ""}), submit("Use token")));
}

function placeView() {
  const {image, images} = state;
  if (image) return imageView(image);
  if (place() && may("read")) return null;  // there is no such image
  return [may("write") && uploadView(), images && listView(images)];
}

function uploadView() {
  const {file, image} = state, suggested = names();
  if (state.upload) return null;  // one at a time
  const text = (name, key) => field(name, {required: true, maxlength: 128, value: suggested[key],
    oninput: event => { state.typed[key] = event.target.value; }});
  return panel(image ? "Upload the binary" : "Upload an image",
    form({class: "row", onsubmit: () => upload()},
      // render() makes this anew: so the same file, mended, can be chosen again.
      field("File", {type: "file", onchange: event => choose(event.target.files[0])}),
      !image && [text("Label", "label"), text("Version", "fw_version")],
      submit("Upload", !file)),
    p({class: "quiet"}, file ? `${plain(file.name)}, ${exactSize(file.size)}`
      : "Choose a file, or drop one anywhere on this page."));
}

function sendingView(upload) {
  return upload && panel(`Uploading ${plain(upload.file.name)}`, div({class: "row middle"},
    // At the left end, where no second click on Upload hits it.
    button("Cancel", cancel, {id: "cancel"}),
    element("progress", {id: "progress", class: "grow", "aria-label": "Upload"}),
    span({id: "sent", role: "status"})));
}

function showProgress(sent) {
  const {file} = state.upload, all = sent >= file.size;
  state.upload.sent = sent;
  byId("progress").value = all ? 1 : sent / file.size;
  byId("sent").textContent =
    all ? "All is sent: the server checks it" : `${Math.floor(100 * sent / file.size)} %`;
  byId("cancel").hidden = all;  // it would come too late
}

function listView(images) {
  const count = p({class: "quiet", role: "status"}), rows = tbody({onclick: ({target}) =>
    target.tagName !== "A" && target.closest("tr").querySelector("a").click()});
  const filter = field("Filter",
    {type: "search", value: state.filter, oninput: () => show(LIST_ROWS)});
  const more = button("Show more", () => {
    const before = state.shown;
    show(before + LIST_ROWS);
    if (more.hidden) rows.rows[before].querySelector("a").focus();
  });
  const show = shown => {  // this alone changes while one types
    Object.assign(state, {filter: filter.lastChild.value, shown});
    const sought = state.filter.trim().toLowerCase();
    const found = images.filter(({label, fw_version, id}) =>
      `${label} ${fw_version} ${id}`.toLowerCase().includes(sought));
    fill(rows, found.slice(0, shown).map(listRow));
    fill(count, images.length ? `${found.length} of ${images.length} images`
      : "No image is stored yet.");
    more.hidden = found.length <= shown;
  };
  show(state.shown);
  return section({id: "list", class: "stack"}, filter, count, images.length > 0
    && table(heads("Label", "Version", "Size", "Checked", "Created"), rows), more);
}

const listRow = ({id, label, fw_version, confirmed, checked, size: bytes, created}) => row(
  a({href: "#" + id}, plain(label).trim() || id), plain(fw_version), confirmed && size(bytes),
  checked ? "sound" : confirmed ? span({class: "bad"}, "unchecked") : "no binary", time(created));

function imageView(image) {
  const {confirmed, checked, hex: layout} = image, warnings = layout?.warnings || [];
  const warned = warnings.length ? `, with ${counted(warnings.length, "warning")}` : "";
  const verdict = !confirmed ? "Not confirmed: there is no binary yet"
    : checked ? `The binary is confirmed. Checked: sound Intel HEX${warned}`
    : "The binary is confirmed. Not checked: stored as it is, as this is no sound Intel HEX";
  const members = {
    "Id": code(image.id),
    "Created": time(image.created),
    "Updated": image.updated && time(image.updated),
    "Size": confirmed && exactSize(image.size),
    "SHA-256": confirmed && code(image.sha256),
    "Records": layout && `${layout.records}, with ${exactSize(layout.bytes)} of data`,
    "Entry point": layout?.start_address
      && layout.start_address + (isOutside(image) ? ", where there are no data" : ""),
  };
  return [
    h2({id: "title", tabindex: -1}, bdi(plain(image.label)), " ", bdi(plain(image.fw_version))),
    p(strong({class: checked ? "" : confirmed ? "bad" : "quiet"}, verdict)),
    panel("", dl(Object.entries(members).map(([name, value]) => value && [dt(name), dd(value)]))),
    confirmed ? downloadView(image) : may("write") && uploadView(),
    warned && panel("Warnings", ul(warnings.map(text => li(text)))),
    layout?.segments.length > 0
      && panel("Memory map", div({id: "map"}, drawMap(image), segmentTable(segments(image)))),
    state.dump && dumpView(image, state.dump),
    may("delete") && deletionView(image),
  ];
}

const makeLink = (image, expires_in) =>
  ask("POST", `/image/${image.id}/binary/link`, {json: {expires_in}});

function downloadLink(text, image, query) {  // by a signed link, as a browser sends no token
  const download = async () => {
    const {search} = new URL((await makeLink(image, HOUR)).url);
    a({href: BASE + `/image/${image.id}/binary` + search + query, download: ""}).click();
  };
  return a({href: "#" + image.id, onclick: event => {
    event.preventDefault();
    attempt("download", download);
  }}, text);
}

function downloadView(image) {
  // What is further apart than the 256 MiB that the server gives at once makes several files.
  const parts = image.hex && hasBytes(image) ? segments(image) : [];
  const bins = groups(parts, (group, part) => part.end - group[0].at <= 256 << 20).map(group => {
    const begin = group[0].at, {end} = group.at(-1);
    return span(downloadLink("bin", image, `&format=bin&start=${begin}&end=${end}`),
      ` from ${address(begin)} to ${address(end - 1)}, ${size(end - begin)}`,
      group.length > 1 && ", gaps filled with FF");
  });
  const choice = event => update({lasting: Number(event.target.value), link: null});
  const make = async () => {
    if (await attempt("link", async () => ({link: await makeLink(image, state.lasting)})))
      document.querySelector("#links button").focus();
  };
  return panel("Download",
    div({class: "row"}, downloadLink("hex", image, ""), bins),
    div({class: "row"}, label("Valid for", select({id: "lasting", onchange: choice},
      Object.entries(LASTING).map(([value, name]) =>
        option({value, selected: Number(value) === state.lasting}, name)))),
    button("Make a link", make)),
    state.link && linkView(image, state.link));
}

function linkView({label, fw_version}, {url, expires}) {
  const file = `${label}-${fw_version}`.replace(/[^A-Za-z0-9._+-]+/g, "_").slice(0, 100);
  const quoted = "'" + url.replace(/'/g, "'\\''") + "'";  // for a shell
  const isLocal = /^https?:..(127\.|localhost|\[::1])/.test(url);
  const shown = (name, value) => div({class: "row"},
    field(name, {value, readonly: true, class: "mono"}), button("Copy", copy));
  return div({id: "links", class: "stack"},
    p({class: "quiet"}, `Whoever has this link can download until ${time(expires)}.`, isLocal
      && " It works on this machine alone: for a board, serve with --host 0.0.0.0 (or ::) and open"
        + " this page at the machine's address."),
    shown("Link", url),
    shown("With curl", `curl -f --retry 5 -o '${file}.hex' ${quoted}`),
    shown("With wget", `wget -O '${file}.hex' ${quoted}`));
}

function copy({target: pressed}) {  // over plain http there is no navigator.clipboard
  const shown = pressed.parentElement.querySelector("input");
  shown.focus();
  shown.select();
  if (document.execCommand("copy")) pressed.textContent = "Copied";
  setTimeout(() => { pressed.textContent = "Copy"; }, 2000);
}

function segmentTable(parts) {
  const rows = parts.slice(0, TABLE_ROWS).map(({at, end}) =>
    row(code(address(at)), code(address(end - 1)), exactSize(end - at)));
  const more = parts.length - rows.length;
  return div(table(heads("From", "To", "Size"), tbody(rows)),
    more > 0 && p({class: "quiet"}, `and ${counted(more, "more segment")}`));
}

function dumpView(image, {text, next}) {
  const show = from => attempt("dump", () => readDump(image, from));
  const jump = () => {
    const sought = state.goTo.trim();
    // As the dump writes an address, and as people write one with letters: hexadecimal.
    const isBare = /^(0[0-9a-f]{7}|(?=.*[a-f])[0-9a-f]{1,8})$/i.test(sought);
    const isAddress = /^(0x[0-9a-f]{1,8}|[0-9]{1,10})$/i.test(sought);
    show(isBare ? parseInt(sought, 16) : isAddress ? Number(sought) : NaN);
  };
  return panel("Contents",
    form({class: "row", onsubmit: jump},
      field("Go to", {required: true, placeholder: address(segments(image)[0].at),
        value: state.goTo, oninput: event => { state.goTo = event.target.value; }}),
      button("First", () => show(0)), button("Next", () => show(next))),
    pre({id: "dump", tabindex: 0, "aria-label": "Hex dump"}, text));
}

function deletionView(image) {
  const {id, confirmed} = image, name = title(image);
  return div({class: "row"},
    confirmed && deletion("Delete binary", `the binary of ${name}`, `/image/${id}/binary`, id),
    deletion("Delete image", confirmed ? `${name} and its binary` : name, `/image/${id}`, ""));
}

function deletion(text, what, path, next) {
  const remove = async () => {
    shown.close();
    if (!await attempt("deletion", async () => { await ask("DELETE", path); })) return;
    history.replaceState(null, "", "#" + next);  // Back must not lead to what is gone
    go(`Deleted: ${what}.`);
  };
  const question = `Delete ${what}?`;
  const shown = dialog(
    {"aria-label": question, class: "panel stack", onclose: () => shown.remove()},
    p(question), div({class: "row"}, button("Delete", remove, {class: "bad"}),
      button("Cancel", () => shown.close(), {autofocus: true})));
  return button(text, () => {
    document.body.append(shown);
    shown.showModal();
  }, {class: "bad"});
}

addEventListener("hashchange", () => go());
addEventListener("submit", event => event.preventDefault());  // each form has its function
addEventListener("beforeunload", event => state.upload && event.preventDefault());
addEventListener("dragover", event => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();  // or none is dropped
});
addEventListener("drop", event => {
  const [file] = event.dataTransfer.files;
  if (!file) return;  // text, for a field
  event.preventDefault();  // or the browser would show it
  if (!may("write") || state.upload) return;
  if (place() && state.image?.confirmed !== false) location.hash = "";
  choose(file);
});
go();
"""

PAGE_HTML = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Image Manager</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 8 8'><path fill='teal' d='M1 1h6v6H1z'/></svg>">
<style>{PAGE_STYLE}</style>
</head>
<body>
<header class="row middle"><h1>Image Manager</h1><span id="who" class="row middle"></span></header>
<main>
<p id="news" role="status"></p>
<div id="content" class="stack"><noscript>This page needs JavaScript.</noscript></div>
</main>
<script>{PAGE_SCRIPT}</script>
</body>
</html>
"""


def page_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:;"
    f" script-src {page_hash(PAGE_SCRIPT)}; style-src {page_hash(PAGE_STYLE)};"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none';"
    " require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}


# ------------------------------------------------------------------------------------- command line
# Each command is a function, and its docstring its page of help.

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# What the command line has where Settings has something else, or nothing.
DEFAULTS = {"data": Path(__file__).resolve().parent / "data", "port": 8000}


def serve(settings: Settings, arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Each option can be set in the environment too, as IMAGE_MANAGER_PORT for --port.
    IMAGE_MANAGER_JWT_SECRET takes the place of the secret in the folder.
    """
    if settings.workers > 1 and not hasattr(os, "fork"):
        raise CannotStart("This platform cannot fork: serve with --workers 1")
    raise_file_limit()
    with ready_to_serve(settings) as (application, listener):
        if settings.access_log:  # before workers fail at it one after the other
            AccessLog(settings.access_log).close()
        signals = block_signals(settings)
        say(f"listening on {base_url(listener, settings)}")
        say("the address opens in a browser, too")
        say(f"storing {application.catalogue.total()} images in {settings.data}")
        say_how_to_get_a_token(settings)
        if settings.jwt_secret and len(settings.jwt_secret) < 32:
            say("IMAGE_MANAGER_JWT_SECRET has less than the 32 characters that HS256 asks for")
        application.catalogue.disconnect()  # an idle service keeps no file of it open
        run = supervise if settings.workers > 1 else serve_here
        run(application, listener, signals)
    return 0


def say_how_to_get_a_token(settings: Settings) -> None:
    """Name the command that makes a token which the service takes, from whatever folder."""
    if settings.jwt_public_key:
        return
    command = [sys.executable or "python", os.path.abspath(__file__), "token"]
    command += ["--data", str(settings.data.absolute())]
    command += ["--audience", settings.jwt_audience] if settings.jwt_audience else []
    command += ["--issuer", settings.jwt_issuer] if settings.jwt_issuer else []
    say(f"get a token with: {shlex.join(command)}")
    if settings.jwt_secret:
        say("  (which needs IMAGE_MANAGER_JWT_SECRET in its environment, as it is here)")


def token(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print a token."""
    if faults := text_faults(arguments.service):  # before a secret is made for nothing
        raise CannotStart(f"--service takes a name of 1 to 128 characters: {faults[0]}")
    secret, path = settings.jwt_secret, settings.data / "secret.key"
    if not secret and not settings.jwt_public_key:
        is_new = not path.exists()
        secret = load_secret(settings.data)
        if is_new:
            say(f"made {path}, as there was none: this token is for a service that uses it")
    tokens = Tokens(settings, secret)
    print(tokens.issue(arguments.service, arguments.scope, arguments.expires))
    return 0


def verify(settings: Settings, arguments: argparse.Namespace) -> int:
    """Check every file against the catalogue, and the catalogue itself.

    Exit status: 0 all sound, 1 something is not, 2 it could not look.
    """
    return print_findings("checked", *verify_store(settings.data, show_progress))


def backup(settings: Settings, arguments: argparse.Namespace) -> int:
    """Copy a store, which may be in use, to a folder that has nothing in it.

    To go on with the copy: serve --data DESTINATION.
    Exit status: 0 all sound, 1 something is not, 2 no copy could be made.
    """
    return print_findings("copied", *back_up_store(settings.data, arguments.destination))


def show_progress(number: int, total: int) -> None:
    if sys.stderr and sys.stderr.isatty():
        end = "\n" if number == total else ""
        print(f"\r{number} of {total}", end=end, file=sys.stderr, flush=True)


def print_findings(done: str, count: int, faults: list[str]) -> int:
    print(*faults, f"{count} binaries {done}, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


def parse_scope(text: str) -> list[str]:
    rights = [f"image:{word.strip()}" for word in text.split(",")]
    if not set(rights) <= set(RIGHTS):
        raise argparse.ArgumentTypeError("takes read, write and delete, with commas between")
    return rights


def parse_time(text: str) -> int | None:
    """Return the seconds of 90s, 15m, 12h or 30d, None for never."""
    match = re.fullmatch("([1-9][0-9]{0,8})([smhd])", text)
    if not match and text != "never":
        raise argparse.ArgumentTypeError("takes a time such as 12h or 30d (s, m, h, d), or never")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else None


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, and whose options may be fields of Settings."""

    def error(self, message: str) -> NoReturn:
        raise CannotStart(f"{message}: see {self.prog} --help")

    def add_setting(self, name: str, flag: str = "") -> None:
        """Add an option for a field of Settings, which reads its text."""
        flag = flag or "--" + name.replace("_", "-")
        parse, meaning = FIELDS[name].metadata["parse"], FIELDS[name].metadata["meaning"]
        default = DEFAULTS.get(name, FIELDS[name].default)
        meaning += f" (default: {default})" if default else ""
        kind: dict[str, Any] = {"metavar": flag.rpartition("-")[2].upper()}
        if parse is parse_switch:
            kind = {"action": "store_true"}
        elif parse is parse_networks:
            kind["action"] = "append"
        # SUPPRESS: not given, it leaves alone what the environment says.
        self.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=meaning, **kind)


def command_line() -> CommandLine:
    about = "A firmware image store: SQLite, files and curl. Without a command it serves."
    more = "Each command has a page of its own: image_manager.py serve --help"
    parser = CommandLine(prog="image_manager.py", description=about, epilog=more)
    parser.add_argument("--version", action="version", version=f"image manager {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    options = {}
    for handler in (serve, token, verify, backup):
        name, page = handler.__name__, handler.__doc__ or ""
        options[name] = commands.add_parser(name, help=page.partition("\n")[0], description=page)
        options[name].set_defaults(handler=handler)
        options[name].add_setting("data")
    for name, field in FIELDS.items():
        if "meaning" in field.metadata and name != "data":
            options["serve"].add_setting(name)
    add = options["token"].add_argument
    add("--service", default="admin", help="tenant that it is for (default: admin)")
    add("--scope", type=parse_scope, default=[], help="such as read,write (default: all)")
    add("--expires", type=parse_time, default="30d", help="90s, 15m, 12h, 7d, never (default: 30d)")
    options["token"].add_setting("jwt_audience", "--audience")
    options["token"].add_setting("jwt_issuer", "--issuer")
    options["backup"].add_argument("destination", type=Path, help="folder, new or empty")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["serve", *words]
    warnings.filterwarnings("ignore", "The HMAC key")  # serve() says it in its own words
    form, stamp = "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S%z"
    logging.basicConfig(level="INFO", format=form, datefmt=stamp, handlers=[StandardError()])
    environment = {name: os.environ.get(f"IMAGE_MANAGER_{name.upper()}") for name in FIELDS}
    defaults = DEFAULTS | {name: text for name, text in environment.items() if text}
    try:
        given = command_line().parse_args(words, argparse.Namespace(**defaults))
        values = {name: value for name, value in vars(given).items() if name in FIELDS}
        return int(given.handler(Settings(**values), given))
    except (CannotStart, ServiceError) as error:
        cause = f" ({error.__cause__})" if isinstance(error, ServiceError) else ""
        say(f"image manager: {error}{cause}")
        return 2
    except OSError as error:
        say(f"image manager: {error.filename or 'the system'}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        return 130  # as shells have it for what was interrupted


if __name__ == "__main__":
    status = main()
    try:
        if sys.stderr:
            sys.stderr.flush()
    except OSError:  # Python would try again, and end with status 120
        sys.stderr = None
    sys.exit(status)
