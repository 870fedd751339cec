"""Requests that are wrong, by kind: each entry makes another one from a seeded generator.

What a kind makes may now and then be right, as when a flipped bit lands in the latents: then its answer is a picture.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import string
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from tests.web.raw import QUERY, good, head

BODY = np.zeros(256, "float32").tobytes()
GOOD = good(BODY)
WORDS = (
    "",
    " ",
    "None",
    "null",
    "-1",
    "0",
    "1e3",
    "1_0",
    "٣",
    "NaN",
    "inf",
    "1" * 5000,
    "a" * 300,
    "[",
    "{}",
    "[1,4",
    "'",
    '"',
)
PATHS = (
    "../../etc/passwd",
    "%2e%2e/x",
    "a//b",
    "%00",
    "%ff",
    "sd/encode/x",
    "sd%2fencode",
    ";",
    "~",
    "health/..",
    ".env",
)

Rng = random.Random
Kind = Callable[[Rng], bytes]


def text(rng: Rng, alphabet: str = string.printable, most: int = 40) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(1, most)))


def ask(query: str = QUERY, *lines: str, body: bytes = BODY, path: str = "/", method: str = "POST") -> bytes:
    return head(method, f"{path}?{query}", f"Content-Length: {len(body)}", *lines) + body


def changed(key: str, *values: str) -> Kind:
    """The good query with one parameter set to one of these, or to anything."""

    def make(rng: Rng) -> bytes:
        value = rng.choice([*values, *WORDS, text(rng)])
        rest = {"shape": "1,4,8,8", "dtype": "float32"}
        query = "&".join(f"{name}={quote(given)}" for name, given in {**rest, key: value}.items())
        return ask(query)

    return make


def as_json(make: Callable[[Rng], Any]) -> Kind:
    def made(rng: Rng) -> bytes:
        return ask(QUERY, "Content-Type: application/json", body=json.dumps(make(rng)).encode())

    return made


def with_line(*lines: str) -> Kind:
    return lambda rng: ask(QUERY, rng.choice(lines))


def chunked(*bodies: bytes) -> Kind:
    return lambda rng: head("POST", f"/?{QUERY}", "Transfer-Encoding: chunked") + rng.choice(bodies)


def flipped(rng: Rng) -> bytes:
    data = bytearray(GOOD)
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(140)] ^= 1 << rng.randrange(8)  # in the head, mostly
    return bytes(data)


def cut(rng: Rng) -> bytes:
    start = rng.randrange(140)
    return GOOD[:start] + GOOD[start + rng.randint(1, 30) :]


def inserted(rng: Rng) -> bytes:
    at = rng.randrange(140)
    return GOOD[:at] + rng.randbytes(rng.randint(1, 8)) + GOOD[at:]


PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


def damaged(rng: Rng) -> bytes:
    """A PNG, JPEG or WebP with bytes changed, or cut short, for encoding."""
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, rng.choice(["PNG", "JPEG", "WEBP"]))
    body = bytearray(file.getvalue())
    for _ in range(rng.randint(1, 9)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return ask("", path="/encode", body=bytes(body[: rng.randint(0, len(body))] if rng.random() < 0.3 else body))


def anything(rng: Rng) -> Any:
    return rng.choice([None, True, 1, -1, 1e308, "", "x", [], [1], {}, {"a": []}, [[[]]], "=" * 9, "AAAA", text(rng)])


RANDOM_LATENTS = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf}


def not_finite(rng: Rng) -> bytes:
    latents = np.zeros(256, "float32")
    latents[rng.randrange(256)] = rng.choice(list(RANDOM_LATENTS.values()))
    return ask(body=latents.tobytes())


FRAMED: dict[str, Kind] = {
    # parameters
    "shape": changed("shape", "1,4,8", "1,4,8,8,8,8", "1,4,9,9", "99999,99999,9,9", "1,4,8,-8", "1.5,4,8,8", "0,4,8,8"),
    "dtype": changed("dtype", "float8", "uint8", "int64", "float64", "torch.", "object"),
    "scaling_factor": changed("scaling_factor", "0", "-0", "1e-40", "1e999", "nan", "0x10"),
    "shift_factor": changed("shift_factor", "1e9", "--1", "1,5"),
    "do_scaling": changed("do_scaling", "2", "yes", "on"),
    "output_type": changed("output_type", "gif", "mp4", "latent", "np"),
    "image_format": changed("image_format", "bmp", "gif", "../png"),
    "partial_postprocess": changed("partial_postprocess", "maybe"),
    "quality": changed("quality", "0", "101", "-1"),
    "fps": changed("fps", "0", "1e9"),
    "height": lambda rng: ask(f"shape=1,16,16&dtype=float32&width=64&height={quote(rng.choice(WORDS))}", body=BODY * 4),
    "model": changed("model", "../../x", "http://x/y", "sd\0", "hf/model", "%00", "file:///x"),
    "no parameters": lambda rng: ask(""),
    "no dtype": lambda rng: ask("shape=1,4,8,8"),
    "no shape": lambda rng: ask("dtype=float32"),
    "a scalar twice": lambda rng: ask(f"{QUERY}&scaling_factor=1&scaling_factor={rng.randint(2, 99)}"),
    "a thousand parameters": lambda rng: ask("&".join(f"p{n}={rng.random()}" for n in range(1000))),
    "a query that is none": lambda rng: ask(quote(text(rng), safe="&=%;+[]")),
    "percent signs": lambda rng: ask(QUERY + rng.choice(["%", "%%", "%zz=1", "&%00=%ff", "&shape=%c3%28", "&model=%f0%9f"])),
    "many shapes": lambda rng: ask("&".join(["shape=1"] * rng.randint(6, 900)) + "&dtype=float32"),
    # bodies
    "too short": lambda rng: ask(body=BODY[: rng.randint(0, 1023)]),
    "too long": lambda rng: ask(body=BODY + bytes(rng.randint(1, 5000))),
    "not finite": not_finite,
    "no length": lambda rng: head("POST", f"/?{QUERY}"),
    "JSON of anything": as_json(anything),
    "JSON inputs of anything": as_json(lambda rng: {"inputs": anything(rng)}),
    "JSON parameters of anything": as_json(lambda rng: {"inputs": "AAAA", "parameters": {"shape": anything(rng)}}),
    "JSON that is cut": lambda rng: ask("", "Content-Type: application/json", body=b'{"inputs": "AAAA'[: rng.randint(0, 16)]),
    "JSON too deep": lambda rng: ask("", "Content-Type: application/json", body=b"[" * rng.randint(2000, 20000)),
    "JSON in a wrong encoding": lambda rng: ask("", "Content-Type: application/json", body=rng.randbytes(50)),
    "JSON numbers without end": lambda rng: ask("", "Content-Type: application/json", body=b'{"inputs": ' + b"9" * 9000 + b"}"),
    "base64 of too little": as_json(lambda rng: {"inputs": base64.b64encode(BODY[: rng.randint(0, 1023)]).decode()}),
    "a compressed body": lambda rng: ask(QUERY, "Content-Encoding: gzip", body=gzip.compress(BODY)),
    "an unknown type": with_line("Content-Type: text/csv", "Content-Type: ;;;", "Content-Type: multipart/form-data; boundary=x"),
    "chunks of too little": chunked(b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n"),
    # routes and methods
    "paths": lambda rng: ask(path=f"/{rng.choice(PATHS)}"),
    "methods": lambda rng: head(rng.choice(["PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "MKCOL", "LOCK"]), f"/{rng.choice(['', 'sd', 'health'])}"),
    "damaged pictures": damaged,
    "pixels of anything": lambda rng: ask(
        f"shape={quote(rng.choice([*WORDS, '1,3,8,8', '3,8,8', '1,8,8,3']))}&dtype={rng.choice(['uint8', 'float16', 'int8'])}",
        path="/encode",
        body=rng.randbytes(rng.randint(0, 600)),
    ),
    "encode": lambda rng: ask(path=rng.choice(["/encode", "/sd/encode", "/nobody/encode"])),
    "a wrong method": lambda rng: head("GET", rng.choice(["/predict", "/sd", "/encode"])),
    # headers
    "Accept": with_line("Accept: image/gif", "Accept: ;;;q=x", "Accept: */*;q=0", "Accept: " + "a/b," * 500, "Accept: ,,,"),
    "ids": with_line("X-Request-Id: a b", "X-Request-Id: " + "x" * 99, "X-Request-Id: \x1b[31m", "X-Request-Id: é"),
    "keys": with_line("Authorization: Basic ====", "Authorization: Bearer", "X-API-Key: é", "Authorization: " + "x" * 999),
    "expectations": with_line("Expect: 100-continue", "Expect: miracles", "Expect: "),
    "ranges": with_line("Range: bytes=0-0,0-0,0-0", "Range: bytes=" + "0-," * 999, "If-Range: x"),
    "foreign hosts": lambda rng: head("GET", "/models", host=rng.choice(["evil.example", "10.0.0.1", "x@localhost", "a b", ""])),
    "two hosts": with_line("Host: localhost", "Host: evil.example"),
    "no host": lambda rng: b"GET /models HTTP/1.1\r\n\r\n",
}  # fmt: skip

# Where the request ends is itself in doubt.
UNFRAMED: dict[str, Kind] = {
    "chunks that lie": chunked(b"5\r\nhello!!\r\n", b"-5\r\nhello\r\n", b"zz\r\n", b"5 \r\nhello\r\n", b"\r\n\r\n", b"0x5\r\nhello\r\n"),
    "chunks too large": chunked(b"f" * 17 + b"\r\n", b"ffffffffffffffff\r\nhello\r\n" + b"x" * 5000),
    "too many chunks": chunked(b"1\r\nx\r\n" * 2000 + b"0\r\n\r\n"),
    "trailers": chunked(b"0\r\nX: y\r\n" + b"X: y\r\n" * 30 + b"\r\n", b"0\r\nX y\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\n"),
    "any path": lambda rng: ask(path="/" + quote(text(rng), safe="/%;:@&=+$,")),
    "no such method": lambda rng: head(text(rng, string.ascii_uppercase, 12), "/"),
    "a target that is no path": lambda rng: head("GET", rng.choice(["*", "http://", "x", "//", "localhost:80", "?", "#", "/#x"])),
    "lengths that are none": lambda rng: head("POST", "/", f"Content-Length: {rng.choice(['-1', '1e3', '²', '', '0x10', '9' * 40, '5, 5'])}"),
    "two lengths": with_line("Content-Length: 3", "Content-Length: 1025"),
    "length and chunks": with_line("Transfer-Encoding: chunked", "Transfer-Encoding : chunked", "transfer-encoding: CHUNKED"),
    "unknown encodings": with_line("Transfer-Encoding: gzip", "Transfer-Encoding: chunked, gzip", "Transfer-Encoding: xchunked"),
    "header lines that are none": with_line("no colon", ": no name", "X Y: z", "X : y", " folded", "X: a\rb", "X: a\0b", "X\xff: y"),
    "header noise": lambda rng: ask(QUERY, f"{text(rng)}: {text(rng)}"),
    "a large header": lambda rng: head("GET", "/health", f"X: {'y' * rng.randint(66_000, 200_000)}"),
    "a long path": lambda rng: head("GET", "/" + "x" * rng.randint(66_000, 200_000)),
    "many headers": lambda rng: head("GET", "/models", *(["X: y"] * rng.randint(2000, 20_000))),
    "upgrades": with_line("Connection: Upgrade\r\nUpgrade: websocket", "Connection: Upgrade\r\nUpgrade: h2c"),
    "CONNECT": lambda rng: head("CONNECT", rng.choice(["localhost:80", "/", "*"])),
    "versions": lambda rng: f"GET / {rng.choice(['HTTP/9.9', 'HTTP/1', 'HTP/1.1', 'HTTP/1.1 x', 'ICY', 'HTTP/2.0'])}\r\nHost: localhost\r\n\r\n".encode(),
    "line ends": lambda rng: GOOD.replace(b"\r\n", rng.choice([b"\n", b"\r", b"\r\r\n", b"\n\r"])),
    "noise": lambda rng: b"\xff" + rng.randbytes(rng.randint(10, 2000)),
    "TLS": lambda rng: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
    "HTTP/2": lambda rng: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(27),
    "spaces": lambda rng: GOOD.replace(b" ", rng.choice([b"  ", b"\t", b"\x0b", b""]), rng.randint(1, 3)),
    "flipped bits": flipped,
    "cut out": cut,
    "put in": inserted,
}  # fmt: skip

KINDS = {**FRAMED, **UNFRAMED}
