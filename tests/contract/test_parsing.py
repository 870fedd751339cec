"""The parameter parser: every spelling that clients use, and no text at all that makes it fail otherwise than by BadRequest."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server import contract as wire
from server.errors import BadRequest, NotAcceptable, ServerError
from server.families import FAMILIES
from server.model_info import Limits, ModelInfo
from server.values import Job, Layout, Scaling

KL = ModelInfo(
    name="kl", limits=Limits(), class_name="AutoencoderKL",
    latents=FAMILIES["kl"].describe({"latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}),
)  # fmt: skip
VIDEO = ModelInfo(
    name="video", limits=Limits(),
    class_name="AutoencoderKLHunyuanVideo", latents=FAMILIES["hunyuan_video"].describe(
        {"latent_channels": 16, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
    ),
)  # fmt: skip
CLIP = [("shape", "1,16,2,8,8")]
SHAPE = [("shape", "1"), ("shape", "4"), ("shape", "8"), ("shape", "8"), ("dtype", "float16")]


def prepare(*pairs: tuple[str, str], accept: str = "*/*", info: ModelInfo = KL) -> Job:
    sent = [pair for pair in SHAPE if pair[0] not in dict(pairs)]
    return wire.decode_job(wire.Parameters([*sent, *pairs]), accept, info, wire.RenderDefaults())


@pytest.mark.parametrize("spelling", ["[1, 4, 8, 8]", "1,4,8,8", "[1,4,8,8]", " 1 , 4,8,8 "])
def test_a_shape_may_be_one_text(spelling: str) -> None:
    assert prepare(("shape", spelling)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    "pairs",
    [
        [("shape[]", "1"), ("shape[]", "4"), ("shape[]", "8"), ("shape[]", "8")],
        [("shape[0]", "1"), ("shape[1]", "4"), ("shape[2]", "8"), ("shape[3]", "8")],
        [("shape[3]", "8"), ("shape[1]", "4"), ("shape[2]", "8"), ("shape[0]", "1")],
        [("shape[]", "1,4,8,8")],
    ],
)
def test_a_shape_may_have_the_brackets_of_javascript_libraries(pairs: list[tuple[str, str]]) -> None:
    assert wire.Parameters(pairs).shape() == (1, 4, 8, 8)
    assert wire.Parameters(pairs).has("shape")


@pytest.mark.parametrize(
    "keys", [["shape[0]", "shape[2]"], ["shape[0]", "shape[0]"], ["shape[]", "shape[0]"], ["shape[1]"]]
)
def test_brackets_with_gaps_are_refused(keys: list[str]) -> None:
    with pytest.raises(BadRequest, match=r"shape\[0\], shape\[1\], … must each be sent once, without gaps"):
        wire.Parameters([(key, "1") for key in keys])


@pytest.mark.parametrize("word", ["True", "true", "TRUE", "1"])
def test_a_flag_is_true_in_any_case(word: str) -> None:
    assert prepare(("do_scaling", word)).scaling == Scaling(from_model=True)


@pytest.mark.parametrize("word", ["False", "false", "0", "None", ""])
def test_a_flag_is_false_in_any_case(word: str) -> None:
    assert prepare(("do_scaling", word)).scaling == Scaling()


def test_a_scalar_may_be_repeated_with_the_same_value() -> None:
    assert prepare(("shift_factor", "0.5"), ("shift_factor", "0.5")).scaling.shift == 0.5


def test_unknown_parameters_are_ignored() -> None:
    assert prepare(("input_tensor_type", "binary"), ("output_tensor_type", "binary"), ("x", "1"), ("x", "2"))


def test_the_query_wins_over_the_body() -> None:
    parameters = wire.Parameters(
        [("scaling_factor", "2")], {"scaling_factor": 3, "shift_factor": 4, "do_scaling": True}
    )
    assert parameters.scaling() == Scaling(2, 4, True)


def test_a_bodys_parameters_are_numbers_texts_booleans_and_lists() -> None:
    parameters = wire.Parameters(
        [], {"shape": [1.0, 4, 8, "8"], "dtype": "torch.float16", "height": None, "do_scaling": False, "x": {"a": 1}}
    )
    assert (parameters.shape(), parameters.dtype(), parameters.scaling()) == ((1, 4, 8, 8), "float16", Scaling())


# The rows of the contract's response table.
ACCEPTED = [
    (KL, "pil", "image/jpeg", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "image/png", "png", "image/png", Layout.PIXELS),
    (KL, "pil", "*/*", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "image/*", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "image/avif,image/webp,*/*;q=0.8", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "image/jpeg;q=0.5, image/png", "png", "image/png", Layout.PIXELS),
    (KL, "pil", "image/jpeg;q=0, image/png;q=0.1", "png", "image/png", Layout.PIXELS),
    (KL, "pil", "image/jpeg;q=0, */*", "png", "image/png", Layout.PIXELS),
    (KL, "pil", "application/json, text/plain, */*", "jpg", "image/jpeg", Layout.PIXELS),  # axios
    (KL, "pil", "application/json, */*", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "*/*, application/json", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "application/json, image/png", "png", "image/png", Layout.PIXELS),
    (KL, "pil", "application/json, */*;q=0.5", "base64", "application/json", Layout.UNIT),  # HTTPie with --json
    (KL, "pil", "application/json, text/html", "base64", "application/json", Layout.UNIT),
    (KL, "pil", "*/*, image/png", "jpg", "image/jpeg", Layout.PIXELS),
    (KL, "pil", "image/png, */*", "png", "image/png", Layout.PIXELS),
    (KL, "pil", "tensor/binary, image/jpeg", "binary", "tensor/binary", Layout.UNIT),
    (KL, "pt", "application/json, text/plain, */*", "binary", "tensor/binary", Layout.SAMPLE),
    (VIDEO, "mp4", "application/json, text/plain, */*", "mp4", "video/mp4", Layout.PIXELS),
    (VIDEO, "mp4", "text/plain, */*", "mp4", "text/plain", Layout.PIXELS),
    (KL, "pil", "tensor/binary", "binary", "tensor/binary", Layout.UNIT),
    (KL, "pil", "tensor/base64", "base64", "tensor/base64", Layout.UNIT),
    (KL, "pt", "tensor/binary", "binary", "tensor/binary", Layout.SAMPLE),
    (KL, "pt", "*/*", "binary", "tensor/binary", Layout.SAMPLE),
    (KL, "pt", "tensor/*", "binary", "tensor/binary", Layout.SAMPLE),
    (KL, "pt", "application/json", "base64", "application/json", Layout.SAMPLE),
    (VIDEO, "pil", "tensor/binary", "binary", "tensor/binary", Layout.UNIT),
    (VIDEO, "pt", "tensor/base64", "base64", "tensor/base64", Layout.SAMPLE),
    (VIDEO, "mp4", "text/plain", "mp4", "text/plain", Layout.PIXELS),
    (VIDEO, "mp4", "video/mp4", "mp4", "video/mp4", Layout.PIXELS),
    (VIDEO, "mp4", "*/*", "mp4", "video/mp4", Layout.PIXELS),
]


@pytest.mark.parametrize(("info", "output_type", "accept", "name", "media_type", "layout"), ACCEPTED)
def test_accept_and_output_type_choose_the_representation(
    info: ModelInfo, output_type: str, accept: str, name: str, media_type: str, layout: Layout
) -> None:
    shape = ("shape", "1,4,8,8" if info is KL else "1,16,2,8,8")
    prepared = prepare(shape, ("output_type", output_type), accept=accept, info=info)
    assert (prepared.format, prepared.render.media_type, prepared.layout) == (name, media_type, layout)


REFUSED = [
    (KL, "pil", "text/plain"),
    (KL, "pt", "image/png"),
    (KL, "mp4", "*/*"),
    (KL, "mp4", "video/mp4"),
    (VIDEO, "pil", "image/jpeg"),
    (VIDEO, "pil", "*/*"),
    (VIDEO, "mp4", "tensor/binary"),
]


@pytest.mark.parametrize(("info", "output_type", "accept"), REFUSED)
def test_what_no_cell_holds_is_not_acceptable(info: ModelInfo, output_type: str, accept: str) -> None:
    with pytest.raises(NotAcceptable):
        prepare(*CLIP * (info is VIDEO), ("output_type", output_type), accept=accept, info=info)


def test_a_clip_of_one_frame_may_be_a_picture() -> None:
    for accept, chosen in [("*/*", "jpg"), ("image/png", "png")]:
        assert prepare(("shape", "1,16,1,8,8"), accept=accept, info=VIDEO).format == chosen
    with pytest.raises(NotAcceptable):
        prepare(*CLIP, accept="image/png", info=VIDEO)


def test_partial_postprocess_is_pixels_for_pt_alone() -> None:
    partial = ("partial_postprocess", "True")
    assert prepare(partial, ("output_type", "pt")).layout is Layout.PIXELS
    assert prepare(partial, accept="tensor/binary").layout is Layout.UNIT


WORDS = st.one_of(
    st.text(max_size=40),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["True", "None", "1e5", "-0", "1_0", "٣", "[1,4,8,8]", "[[1]]", "9" * 5000, "\x00", "\ud800", "pil"]
    ),
)
KEYS = st.sampled_from(
    [
        "shape",
        "shape[]",
        "shape[0]",
        "shape[1]",
        "output_dtype",
        "dtype",
        "scaling_factor",
        "shift_factor",
        "do_scaling",
        "output_type",
        "image_format",
        "partial_postprocess",
        "height",
        "width",
        "model",
        "fps",
        "quality",
        "input_tensor_type",
    ]
)


@given(st.lists(st.tuples(KEYS, WORDS), max_size=12), st.text(max_size=60), st.sampled_from([KL, VIDEO]))
@example([("shape", "1,16,16"), ("height", "9" * 6), ("width", "9" * 6)], "*/*", KL)
def test_any_texts_are_prepared_or_refused_with_a_short_printable_sentence(
    pairs: list[tuple[str, str]], accept: str, info: ModelInfo
) -> None:
    try:
        prepared = prepare(*pairs, accept=accept, info=info)
    except ServerError as error:
        assert 400 <= error.status < 500
        assert len(str(error)) < 400
        assert str(error).isprintable()
    else:
        assert prepared.bytes_needed > 0
        assert prepared.geometry.height > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda j: st.lists(j) | st.dictionaries(st.text(), j),
)


@given(st.dictionaries(KEYS, JSON) | JSON, st.booleans())
@example({"shape": [True, 4, 8, 8], "dtype": "float16"}, False)
@example({"shape": [1, 4, 8, 8], "dtype": {"float16": 1}}, False)
def test_any_json_body_is_read_or_refused(parameters: object, has_query: bool) -> None:
    body = json.dumps({"inputs": "AAAA", "parameters": parameters}).encode()
    try:
        _, sent = wire.read_json(body)
        wire.decode_job(wire.Parameters(SHAPE if has_query else [], sent), "*/*", KL, wire.RenderDefaults())
    except ServerError as error:
        assert 400 <= error.status < 500


@given(st.binary(max_size=200))
def test_any_bytes_for_a_json_body_are_read_or_refused(body: bytes) -> None:
    with suppress(BadRequest):
        wire.read_json(body)
