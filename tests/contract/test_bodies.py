"""JSON bodies: every spelling of base64 is read, and no body holds the interpreter or takes much more than its own size."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.contract import Parameters, read_base64, read_json
from server.contract.bodies import AROUND_BYTES, PIECE_BYTES
from server.errors import BadRequest

SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "standard": base64.b64encode,
    "URL-safe": base64.urlsafe_b64encode,
    "unpadded": lambda data: base64.b64encode(data).rstrip(b"="),
    "wrapped": base64.encodebytes,
    "a data URL": lambda data: b"data:application/octet-stream;base64," + base64.b64encode(data),
    "a data URL with a charset": lambda data: b"DATA:image/png;charset=utf-8;base64," + base64.urlsafe_b64encode(data),
}
DUMPS: dict[str, Callable[[object], str]] = {
    "plain": json.dumps,
    "PHP, which escapes slashes": lambda content: json.dumps(content).replace("/", "\\/"),
    ".NET, which escapes + and =": lambda content: json.dumps(content).replace("+", "\\u002B").replace("=", "\\u003d"),
}
SIZES = (0, 1, 2, 3, 1000, 3 * AROUND_BYTES, 4 * PIECE_BYTES + 1)


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_base64_is_read(spelling: str, dump: str) -> None:
    for size in SIZES:
        data = os.urandom(size)
        text = SPELLINGS[spelling](data).decode()
        parameters = {"shape": [1, 4], "note": 'a "quoted" \\ word'}
        for content in ({"inputs": text, "parameters": parameters}, {"parameters": parameters, "inputs": text}):
            assert read_json(DUMPS[dump](content).encode()) == (data, parameters)
        assert read_base64(text) == data


@given(st.binary(max_size=50), st.integers(0, 6), st.sampled_from(["\\n", " ", "\\/", "\\u002f"]))
def test_an_escape_may_lie_across_two_pieces(data: bytes, before: int, escape: str) -> None:
    start = base64.b64encode(bytes(range(3)) * (PIECE_BYTES // 4)).decode()[: -before or None]
    text = start + "A" * (-len(start.strip()) % 4) + escape
    text += "A" * (3 if escape not in ("\\n", " ") else 0) + base64.b64encode(data).decode()
    found, _ = read_json(f'{{"inputs": "{text}"}}'.encode())
    assert found == base64.b64decode(json.loads(f'"{text}"').replace("\n", "").replace(" ", ""))


NOT_BASE64 = [
    "a*b",
    "A",
    "AAAAA",
    "AA=",
    "AAAA=",
    "A===",
    "AA==AA==",
    "AA==A",
    "data:,AA",
    "data:x;base64AAAA",
    "é",
    "\ud800",
]


@pytest.mark.parametrize("size", [0, 3 * AROUND_BYTES, 4 * PIECE_BYTES])
@pytest.mark.parametrize("text", NOT_BASE64, ids=ascii)
def test_what_is_no_base64_is_refused(text: str, size: int) -> None:
    before = base64.b64encode(bytes(size // 4 * 3)).decode()
    whole = text if text.startswith("data:") else before + text
    with pytest.raises(BadRequest, match="'inputs' is not base64"):
        read_json(json.dumps({"inputs": whole}).encode())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"inputs": "' + b"A" * 400_000, "is not JSON"),
        (b'{"inputs": "' + b"A" * 400_000 + b'"', "is not JSON"),
        (b'{"inputs": 1, "x": "' + b"A" * 400_000 + b'"}', "no string 'inputs'"),
        (
            b'{"inputs": "AAAA", "x": "' + b"A" * 400_000 + b'"}',
            "a string of more than 65536 bytes that is not 'inputs'",
        ),
        (b'{"parameters": {"inputs": "' + b"A" * 400_000 + b'"}}', "no string 'inputs'"),
        (b'{"inputs": "AAAA", "x": [' + b"1," * 100_000 + b"1]}", "more than 65536 bytes outside"),
        (b'["' + b"A" * 400_000 + b'"]', "no string 'inputs'"),
        (b'{"inputs": "' + b"A" * 400_000 + b'", "x": ' + b"[" * 9 + b"]" * 9 + b"}", "nested more than 8 levels"),
        (b'{"inputs": "' + b"A" * 400_000 + b'", "x": ' + b"[" * 9999 + b"]" * 9999 + b"}", "nested more|is not JSON"),
        (b'{"inputs": "' + b"A" * 400_000 + b'", "parameters": [1]}', "'parameters' is not an object"),
        (b'{"inputs": "' + b'\\"' * 200_000 + b'"}', "not base64|is not JSON|outside"),
        (b'{"x": "' + b'\\"' * 200_000 + b'", "inputs": "AAAA"}', "outside the string 'inputs'"),
        (b"\\" * 400_000, "more than 65536 bytes"),
    ],
)
def test_what_is_around_inputs_is_bounded(body: bytes, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        read_json(body)


def test_a_list_of_parameters_has_at_most_five_values() -> None:
    assert Parameters([], {"shape": [1, 2, 3, 4, 5]}).shape() == (1, 2, 3, 4, 5)
    for key in ("shape", "dtype"):
        with pytest.raises(BadRequest, match=f"parameters.{key} is a list of 6; lists have at most 5 values"):
            Parameters([], {key: [1] * 6})


# Reads one body in a process of its own, while a thread ticks. Says: the longest time between two ticks, in ms, and the
# most memory beside the body, in MiB.
MEASURE = """
import sys, threading, time, tracemalloc
from server.errors import BadRequest
from server.contract import Parameters, read_json

MIB = 1 << 20
size = int(sys.argv[2]) * MIB
def fill(begin, piece, end): return bytearray(begin + piece * ((size - len(begin) - len(end)) // len(piece)) + end)
body = {
    "a list of ones": lambda: fill(b'{"inputs":"AAAA","parameters":{"shape":[1', b",1", b"]}}"),
    "a dtype of numbers": lambda: fill(b'{"inputs":"AAAA","parameters":{"dtype":[1', b",1234567", b"]}}"),
    "small objects": lambda: fill(b'{"inputs":"AAAA","x":[0', b',{"":0}', b"]}"),
    "empty objects": lambda: fill(b'{"inputs":"AAAA","x":[0', b",{}", b"]}"),
    "words of two letters": lambda: fill(b'{"inputs":"', b"AA ", b'"}'),
    "escapes": lambda: fill(b'{"inputs":"', b"\\\\u0041", b'"}'),
    "escaped quotes": lambda: fill(b'{"inputs":"', b'\\\\"', b'"}'),
    "brackets": lambda: fill(b"", b"[", b""),
    "honest base64": lambda: fill(b'{"inputs":"', b"AbCd", b'"}'),
}[sys.argv[1]]()
longest, is_over = 0.0, False
def tick():
    global longest
    last = time.perf_counter()
    while not is_over:
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
ticking = threading.Thread(target=tick)
ticking.start()
tracemalloc.start()
try:
    data, parameters = read_json(body)
    Parameters([], parameters)
except BadRequest as error:
    pass
is_over = True
ticking.join()
print(longest * 1e3, tracemalloc.get_traced_memory()[1] / MIB)
"""
BODIES = [
    *("a list of ones", "a dtype of numbers", "small objects", "empty objects", "words of two letters", "escapes"),
    *("escaped quotes", "brackets", "honest base64"),
]


@pytest.mark.parametrize("kind", BODIES)
def test_no_body_holds_the_interpreter_or_takes_much_more_than_its_size(kind: str) -> None:
    """Before they were bounded, these took up to 20 s and 3.4 GB. The bounds are generous: the machine may be busy."""
    size = 64
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, str(size)], capture_output=True, text=True, check=True, timeout=100
    )
    longest_ms, memory_mb = map(float, told.stdout.split())
    assert longest_ms < 500
    assert memory_mb < 1.25 * size
