"""The HTTP contract, without HTTP: parameters, `Accept` and a body become a Request.

The other packages get a Job or a Request, except for a few parameters that only one family has.
"""

from .bodies import Bytes, check_length, is_json_body, read_base64, read_json, with_data
from .decode import RenderDefaults, decode_job
from .encode import check_encode, encode_job, file_bytes_held, header_of, read_pixels
from .files import direction_of, opened, sound_in, sound_job
from .formats import choose_format
from .parameters import Parameters, patience_s

__all__ = [
    "Bytes",
    "Parameters",
    "RenderDefaults",
    "check_encode",
    "check_length",
    "choose_format",
    "decode_job",
    "direction_of",
    "encode_job",
    "file_bytes_held",
    "header_of",
    "is_json_body",
    "opened",
    "patience_s",
    "read_base64",
    "read_json",
    "read_pixels",
    "sound_in",
    "sound_job",
    "with_data",
]
