"""The index of an MP4: as many frames as ffmpeg shows of real files, and little time and memory for hostile ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import BadRequest, TooLarge
from server.inputs.boxes import MOST_BOXES, MOST_EDITS, MOST_HIDDEN, SKIPPED, read_movie
from server.inputs.video import read_video, read_video_header
from tests.inputs.mp4 import (
    FTYP,
    H264,
    MDHD,
    MVEX,
    SOUND_HDLR,
    box,
    edited,
    few,
    frames_of,
    full,
    moof,
    movie,
    numbers,
    source,
    stsd,
    table,
    trak,
    write,
)

SOUND = ("-f", "lavfi", "-i", "sine=duration=4", "-c:a", "aac")
CUTS = [("0.5", "1"), ("1.3", "2"), ("0.04", "0.5"), ("2.72", "9"), ("1", "1")]
WRITTEN: dict[str, tuple[str, ...]] = {
    "H.264": (*source(), *H264),
    "with sound": (*source(), *SOUND, *H264),
    "without B-frames": (*source(), *H264, "-bf", "0"),
    "open GOPs": (*source(), *H264, "-x264-params", "open-gop=1"),
    "HEVC": (
        *source(),
        "-c:v",
        "libx265",
        "-x265-params",
        "log-level=error:keyint=25:open-gop=0:frame-threads=1:pools=none",
        "-tag:v",
        "hvc1",
    ),
    "MPEG-4": (*source(), "-c:v", "mpeg4", "-bf", "2"),
    "NTSC": (*source(rate="30000/1001"), *H264),
    "a fine clock": (*source(), *H264, "-video_track_timescale", "90000"),
    "negative offsets": (*source(), *H264, "-movflags", "negative_cts_offsets"),
    "no edits": (*source(), *H264, "-use_editlist", "0"),
    "uneven times": (*source(), "-vf", "select='not(mod(n,3))+not(mod(n,7))'", "-fps_mode", "vfr", *H264),
}
FRAGMENTED: dict[str, tuple[str, ...]] = {
    "fragments": (*source(), *H264, "-movflags", "frag_keyframe+empty_moov"),
    "fragments and sound": (*source(), *SOUND, *H264, "-movflags", "frag_keyframe"),
    "a fragment each": (*source(1), *H264, "-movflags", "frag_every_frame+empty_moov+default_base_moof"),
}


def assert_counts(path: Path) -> None:
    data = path.read_bytes()
    found = read_movie(data, 257)
    expected = frames_of(path)
    assert found.frames == len(expected) > 0
    hidden = bytearray(data)
    for place in found.skipped:
        hidden[place : place + 4] = SKIPPED
    path.write_bytes(hidden)
    assert frames_of(path) == expected, "what is hidden from ffmpeg is not needed"


@pytest.mark.parametrize("name", [*WRITTEN, *FRAGMENTED])
def test_a_file_has_the_frames_that_ffmpeg_shows(name: str, tmp_path: Path) -> None:
    assert_counts(write(tmp_path / "whole.mp4", *(WRITTEN | FRAGMENTED)[name]))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_cut_file_has_the_frames_that_ffmpeg_shows(name: str, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", *WRITTEN[name])
    for at, length in CUTS:
        assert_counts(write(tmp_path / "cut.mp4", "-ss", at, "-t", length, "-i", whole, "-c", "copy"))


def test_a_cut_hevc_file_with_open_gops_shows_no_more_frames_than_its_index_says(tmp_path: Path) -> None:
    """Its first frames may need some that were cut off. ffmpeg leaves those out, which the index does not tell.

    x265 does not choose the same frames each time, so how many are left out is not known here.
    """
    options = (*source(), "-c:v", "libx265", "-x265-params", "log-level=error:keyint=25:open-gop=1", "-tag:v", "hvc1")
    whole = write(tmp_path / "whole.mp4", *options)
    for at, length in CUTS:
        cut = write(tmp_path / "cut.mp4", "-ss", at, "-t", length, "-i", whole, "-c", "copy")
        shown = len(frames_of(cut))
        assert read_movie(cut.read_bytes(), 257).frames >= shown > 0
        header = read_video_header(cut.read_bytes(), 257)
        assert read_video(cut.read_bytes(), header, rotate=True).shape[0] == shown


def test_a_cut_file_lists_frames_that_no_player_shows(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", *WRITTEN["without B-frames"])
    cut = write(tmp_path / "cut.mp4", "-ss", "0.8", "-t", "0.2", "-i", whole, "-c", "copy").read_bytes()
    found = read_movie(cut, 5)
    assert (found.frames, found.samples) == (5, 25)


def test_joined_and_late_videos(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", *WRITTEN["H.264"])
    for number, (at, length) in enumerate(CUTS[:2]):
        write(tmp_path / f"{number}.mp4", "-ss", at, "-t", length, "-i", whole, "-c", "copy")
    (tmp_path / "list").write_text("file 0.mp4\nfile 1.mp4\n")
    assert_counts(write(tmp_path / "joined.mp4", "-f", "concat", "-i", tmp_path / "list", "-c", "copy"))
    assert_counts(write(tmp_path / "late.mp4", "-itsoffset", "0.5", "-i", whole, *SOUND, "-c:v", "copy"))


@pytest.mark.parametrize(
    ("options", "is_turned"),
    [
        ((), False),
        (("-display_rotation", "90"), True),
        (("-display_rotation", "180"), False),
        (("-display_rotation", "270"), True),
        (("-display_hflip", "-display_rotation", "90"), True),
        (("-display_rotation", "30"), False),
    ],
    ids=str,
)
def test_a_display_matrix_may_swap_width_and_height(options: tuple[str, ...], is_turned: bool, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", *source(0.2), *H264)
    turned = write(tmp_path / "turned.mp4", *options, "-i", whole, "-c", "copy")
    assert read_movie(turned.read_bytes(), 9).is_turned == is_turned


def test_a_movie_made_by_hand() -> None:
    found = read_movie(movie(trak(few())), 3)
    assert (found.frames, found.samples, found.is_turned, found.skipped) == (3, 3, False, ())


MILLIONS = 85_000_000
TOO_MANY: dict[str, bytes] = {
    "samples of one size": movie(trak(few(stsz=full(b"stsz", numbers(1, MILLIONS))))),
    "samples of no size": movie(trak(few(stsz=full(b"stsz", numbers(0, MILLIONS))))),
    "compact sizes": movie(trak(few(stsz=b"", stz2=full(b"stz2", numbers(8, MILLIONS))))),
    "durations": movie(trak(few(stts=table(b"stts", numbers(MILLIONS, 1))))),
    "offsets": movie(trak(few(ctts=table(b"ctts", numbers(MILLIONS, 1))))),
    "entries of durations": movie(trak(few(stts=full(b"stts", numbers(MILLIONS))))),
    "entries of offsets": movie(trak(few(ctts=full(b"ctts", numbers(MILLIONS))))),
    "runs of chunks": movie(trak(few(stsc=full(b"stsc", numbers(MILLIONS))))),
    "chunks": movie(trak(few(stco=full(b"stco", numbers(MILLIONS))))),
    "chunks far away": movie(trak(few(stco=b"", co64=full(b"co64", numbers(MILLIONS))))),
    "key frames": movie(trak(few(stss=full(b"stss", numbers(MILLIONS))))),
    "a fragment": movie(trak(few()), MVEX) + moof(full(b"trun", numbers(MILLIONS))),
    "many fragments": movie(trak(few()), MVEX) + moof(full(b"trun", numbers(100))) * 9,
    "many runs of a fragment": movie(trak(few()), MVEX) + moof(*[full(b"trun", numbers(100))] * 9),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_too_many_frames_are_refused_by_their_number(case: str) -> None:
    assert len(TOO_MANY[case]) < 3000
    with pytest.raises(TooLarge, match=r"lists \d+ frames, and this model takes at most 17"):
        read_movie(TOO_MANY[case], 17)


@pytest.mark.parametrize(("samples", "is_refused"), [(17 + MOST_HIDDEN, False), (18 + MOST_HIDDEN, True)])
def test_a_cut_file_may_list_some_more_frames_than_it_shows(samples: int, is_refused: bool) -> None:
    tables = few(stsz=full(b"stsz", numbers(0, samples)), stts=table(b"stts", numbers(samples, 1)))
    data = movie(trak(tables, edited((17 * 40, samples - 17))))
    if is_refused:
        with pytest.raises(TooLarge):
            read_movie(data, 17)
    else:
        assert read_movie(data, 17).frames == 17


@pytest.mark.parametrize("version", [0, 1])
def test_edits_show_what_they_say(version: int) -> None:
    for edits, shown in (
        ([(120, 0)], 3),
        ([(80, 0)], 2),
        ([(120, 1)], 2),
        ([(500, -1), (120, 0)], 3),
        ([(40, 0), (40, 2)], 2),
        ([(40, 1), (120, 0)], 4),
        ([(40, 9)], 0),
    ):
        assert read_movie(movie(trak(few(), edited(*edits, version=version))), 9).frames == shown, edits


def test_frames_of_fragments_are_those_of_the_video() -> None:
    sound = moof(full(b"trun", numbers(MILLIONS)), track=2)
    data = movie(trak(few()), MVEX) + moof(full(b"trun", numbers(4))) + sound + moof(full(b"trun", numbers(5)))
    found = read_movie(data, 17)
    assert (found.frames, found.samples) == (12, 12)
    (hidden,) = found.skipped
    assert data[hidden : hidden + 4] == b"traf"


def hidden_kinds(data: bytes) -> list[bytes]:
    return [data[place : place + 4] for place in read_movie(data, 17).skipped]


def test_what_ffmpeg_need_not_see_is_hidden_from_it() -> None:
    bomb = full(b"stsz", numbers(1, MILLIONS))
    large = trak(few(stsz=bomb), hdlr=SOUND_HDLR)
    assert hidden_kinds(movie(large, trak(few()))) == [b"trak"], "another track's table is not even counted"
    assert hidden_kinds(movie(trak(few()), trak(few(stsz=bomb)))) == [b"trak"], "nor a second video's"
    assert hidden_kinds(movie(trak(few(stsd=stsd(box(b"stbl", bomb), box(b"avcC")))))) == [b"stbl"]
    assert hidden_kinds(movie(trak(few(), box(b"udta", box(b"stbl", bomb))))) == [b"udta"]
    assert hidden_kinds(movie(trak(few(), bomb))) == [b"stsz"], "a box where it does not belong"
    assert hidden_kinds(movie(trak([*few(), box(b"sbgp", numbers(MILLIONS))]))) == [b"sbgp"]
    compressed = box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", bytes(40)))
    assert hidden_kinds(movie(trak(few()), compressed) + box(b"meta", large)) == [b"cmov", b"meta"]


STARVED = movie(trak(few()))
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no movie": FTYP,
    "no video": movie(trak(few(), hdlr=SOUND_HDLR)),
    "no track": movie(),
    "no tables": movie(trak([])),
    "two movies": movie(trak(few())) + movie(trak(few())),
    "two tables of sizes": movie(trak([*few(), full(b"stsz", numbers(1, 3))])),
    "a box beyond its parent": STARVED.replace(b"\0\0\0\x14stco", b"\0\0\xff\x14stco"),
    "a box smaller than its head": STARVED.replace(b"\0\0\0\x14stco", b"\0\0\0\x07stco"),
    "a large size that is small": STARVED.replace(b"\0\0\0\x14stco\0\0\0\0", b"\0\0\0\x01stco\0\0\0\0"),
    "a table cut short": movie(trak(few(stts=full(b"stts", numbers(3, 1, 1))))),
    "samples beyond the file": movie(trak(few(stsz=full(b"stsz", numbers(1 << 30, 3))))),
    "a short header": movie(trak(few()).replace(MDHD, full(b"mdhd", bytes(4)))),
    "no clock": movie(trak(few(), edited((40, 0))).replace(MDHD, full(b"mdhd", numbers(0, 0, 0, 0, 0)))),
    "edits cut short": movie(trak(few(), box(b"edts", full(b"elst", numbers(2), bytes(12))))),
    "many edits": movie(trak(few(), edited(*[(40, 0)] * (MOST_EDITS + 1)))),
    "many boxes": movie(trak(few())) + box(b"free") * MOST_BOXES,
    "many boxes in a description": movie(trak(few(stsd=stsd(box(b"free") * MOST_BOXES)))),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_index_is_one_sentence(case: str) -> None:
    with pytest.raises(BadRequest, match=r"^the MP4[^.]*; (send|write) [^.]*ffmpeg$|^the MP4 has no video in it; send"):
        read_movie(DAMAGED[case], 17)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Files of every kind whose index is in front, where the test below damages them."""
    folder = tmp_path_factory.mktemp("seeds")
    whole = write(folder / "whole.mp4", *source(0.4), *H264, "-movflags", "+faststart")
    cut = write(folder / "cut.mp4", "-ss", "0.1", "-i", whole, "-c", "copy", "-movflags", "+faststart")
    fragments = write(folder / "fragments.mp4", "-i", whole, "-c", "copy", "-movflags", "frag_keyframe+empty_moov")
    by_hand = movie(trak(few(ctts=table(b"ctts", numbers(3, 1))), edited((80, 1))), MVEX) + moof(
        full(b"trun", numbers(2))
    )
    return [*(path.read_bytes() for path in (whole, cut, fragments)), by_hand]


damage = st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=4)


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 3), damage=damage, cut=st.none() | st.integers(0, 3000))
def test_any_damage_is_a_refusal_or_an_index_within_bounds(
    seeds: list[bytes], seed: int, damage: list[tuple[int, bytes]], cut: int | None
) -> None:
    data = bytearray(seeds[seed][:cut])
    for place, value in damage:
        start = place % max(1, len(data))
        data[start : start + len(value)] = value
    try:
        found = read_movie(data, 17)
    except (BadRequest, TooLarge):
        return
    most = 17 + MOST_HIDDEN
    assert 0 <= found.frames <= most * MOST_EDITS
    assert 0 <= found.samples <= most * MOST_EDITS
    assert all(0 < place <= len(data) - 4 for place in found.skipped)
