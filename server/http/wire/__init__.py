"""The client's words: query parameters, bodies and `Accept`, to one VAERequest. Nobody else knows them."""

from server.http.wire.bodies import is_json_body, read_base64, read_json
from server.http.wire.decode import Prepared, RenderDefaults, prepare
from server.http.wire.encode import (
    PreparedPixels,
    check_encode,
    file_bytes_held,
    header_of,
    prepare_pixels,
    read_pixels,
)
from server.http.wire.files import Bytes, is_for_encoding, opened
from server.http.wire.formats import choose_format
from server.http.wire.parameters import Parameters, patience_s

__all__ = [
    "Bytes",
    "Parameters",
    "Prepared",
    "PreparedPixels",
    "RenderDefaults",
    "check_encode",
    "choose_format",
    "file_bytes_held",
    "header_of",
    "is_for_encoding",
    "is_json_body",
    "opened",
    "patience_s",
    "prepare",
    "prepare_pixels",
    "read_base64",
    "read_json",
    "read_pixels",
]
