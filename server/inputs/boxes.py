"""Read the index of an MP4 before ffmpeg does: how many frames a player shows, and which boxes ffmpeg does not need.

ffmpeg builds its index from counts in the file before it applies any limit: a file of 2 KB that claims to have 85
million samples makes it take 3 GB. This module therefore checks the counts first. It also lists every box that is not
needed to decode the first video, so that the caller can rename it to a kind that ffmpeg skips: other tracks, metadata,
and boxes in a place where they do not belong.

The format is ISO/IEC 14496-12, with parts of the older QuickTime File Format of Apple.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from math import atan2, degrees, hypot
from typing import Any

from ..errors import BadRequest, TooLarge

SKIPPED = b"skip"  # the kind of a box that ffmpeg skips
# How many frames may be in the file that no player shows. Cutting a video without encoding it again leaves such frames:
# those from the key frame before the cut.
MOST_HIDDEN = 600
MOST_BOXES = 1 << 16
MOST_EDITS = 100

# The kinds of boxes that each kind may contain. Boxes of other kinds in it are skipped.
CODEC_SETTINGS = frozenset({b"avcC", b"hvcC", b"av1C", b"vpcC", b"esds", b"colr", b"pasp"})
CHILDREN: dict[bytes, frozenset[bytes]] = {
    b"": frozenset({b"ftyp", b"moov", b"mdat", b"moof"}),
    b"moov": frozenset({b"mvhd", b"trak", b"mvex"}),
    b"mvex": frozenset({b"trex"}),
    b"trak": frozenset({b"tkhd", b"edts", b"mdia"}),
    b"edts": frozenset({b"elst"}),
    b"mdia": frozenset({b"mdhd", b"hdlr", b"minf"}),
    b"minf": frozenset({b"vmhd", b"stbl"}),
    b"stbl": frozenset({b"stsd", b"stts", b"ctts", b"stss", b"stsz", b"stz2", b"stsc", b"stco", b"co64"}),
    b"moof": frozenset({b"mfhd", b"traf"}),
    b"traf": frozenset({b"tfhd", b"tfdt", b"trun"}),
}
REPEATED = frozenset({b"mdat", b"moof", b"trak", b"trex", b"traf", b"trun"})
# For each table: the bytes of one entry, and the offset of the number of entries.
TABLES = {b"stts": (8, 4), b"ctts": (8, 4), b"stss": (4, 4), b"stsc": (12, 4), b"stco": (4, 4), b"co64": (8, 4)}
SAMPLE_ENTRY_BYTES = 86  # the fixed part of a video's sample entry; the boxes with the settings of the codec follow it


class _Damaged(Exception):
    """The index is cut short or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Movie:
    """The first video of an MP4.

    frames: how many frames a player shows.
    samples: an upper bound of the frames that must be decoded to show them.
    is_turned: whether the display matrix swaps width and height.
    skipped: the places in the file where the caller must write `SKIPPED`, each to hide one box from ffmpeg.
    """

    frames: int
    samples: int
    is_turned: bool
    skipped: tuple[int, ...]


@dataclass(slots=True)
class _Box:
    """A box of the file.

    type_at: the place of its kind. start, end: the places of its content.
    """

    kind: bytes
    type_at: int
    start: int
    end: int
    children: list[_Box]

    def all(self, kind: bytes) -> list[_Box]:
        """Return all children of this kind."""
        return [child for child in self.children if child.kind == kind]

    def find(self, *path: bytes) -> _Box | None:
        """Return the first box at this path of kinds below this box, or None."""
        found: _Box | None = self
        for kind in path:
            found = next(iter(found.all(kind)), None) if found else None
        return found

    def get(self, *path: bytes) -> _Box:
        """Return the first box at this path of kinds. Raises _Damaged if there is none."""
        found = self.find(*path)
        if found is None:
            raise _Damaged
        return found


def read_movie(data: bytes | bytearray, max_frames: int) -> Movie:
    """Read the index of an MP4 in time and memory bounded by `max_frames`.

    max_frames: how many frames the model takes. Raises TooLarge if the file has more than MOST_HIDDEN frames beyond
    that, BadRequest if it has no video, its index is damaged, or it has too many boxes or edits.
    """
    try:
        return _Reader(memoryview(data), max_frames).movie()
    except (_Damaged, struct.error, OverflowError):
        raise BadRequest(
            "the MP4's index is damaged or cut short; send a whole MP4, or write it again with ffmpeg"
        ) from None


class _Reader:
    """Reads the index of one file. It counts the boxes that it reads and notes those to skip."""

    def __init__(self, data: memoryview, max_frames: int) -> None:
        self._data = data
        self._max_frames = max_frames
        self._most_samples = max_frames + MOST_HIDDEN
        self._boxes_left = MOST_BOXES
        self._skipped: list[int] = []

    def movie(self) -> Movie:
        """Read the index of the file."""
        root = _Box(b"", 0, 0, len(self._data), [])
        self._descend(root)
        moov = root.get(b"moov")
        trak = self._first_video(moov)
        if trak is None:
            raise BadRequest("the MP4 has no video in it; send one with a video track")
        self._read_codec_settings(trak.get(b"mdia", b"minf", b"stbl", b"stsd"))
        edits = self._edits(trak, moov)
        shown, samples = self._shown(trak.get(b"mdia", b"minf", b"stbl"), edits)
        fragments = self._fragments(root, moov, self._track_id(trak), samples)
        # Each edit may show frames again, or need all frames before its own.
        decoded = samples * max(1, len(edits)) + fragments
        return Movie(shown + fragments, decoded, self._is_turned(trak, moov), tuple(self._skipped))

    # Boxes

    def _boxes(self, start: int, end: int) -> Iterator[_Box]:
        """Yield the boxes between two places.

        Up to 7 bytes may follow the last one: QuickTime ends a list with zeros.
        """
        while end - start >= 8:
            if not self._boxes_left:
                raise BadRequest(f"the MP4 has more than {MOST_BOXES} boxes; write it again with ffmpeg")
            self._boxes_left -= 1
            size, kind = self._unpack(">I4s", start, end)
            head = 8
            if size == 1:
                (size,), head = self._unpack(">Q", start + 8, end), 16
            elif size == 0:  # the box extends to the end of its parent
                size = end - start
            if size < head or size > end - start:
                raise _Damaged
            yield _Box(kind, start + 4, start + head, start + size, [])
            start += size

    def _descend(self, parent: _Box) -> None:
        """Read the children that a box may contain, and skip all others."""
        seen = set()
        for box in self._boxes(parent.start, parent.end):
            if box.kind not in CHILDREN[parent.kind]:
                self._skip(box)
                continue
            if box.kind in seen and box.kind not in REPEATED:
                raise _Damaged
            seen.add(box.kind)
            parent.children.append(box)
            if box.kind in CHILDREN:
                self._descend(box)

    def _skip(self, box: _Box) -> None:
        self._skipped.append(box.type_at)

    def _unpack(self, layout: str, at: int, end: int) -> tuple[Any, ...]:
        """Unpack the bytes at a place. Raises _Damaged if they do not end before `end`."""
        if at + struct.calcsize(layout) > end:
            raise _Damaged
        return struct.unpack_from(layout, self._data, at)

    def _field(self, box: _Box, layout: str, at: int, at_in_version_1: int | None = None) -> int:
        """Return a field of a box. at_in_version_1: its place in a box of version 1, whose times have 64 bits."""
        (version,) = self._unpack(">B", box.start, box.end)
        place = at_in_version_1 if version and at_in_version_1 is not None else at
        return int(self._unpack(layout, box.start + place, box.end)[0])

    # The track

    def _first_video(self, moov: _Box) -> _Box | None:
        """Return the first video track, which is the one to decode. All other tracks are skipped."""
        videos = [trak for trak in moov.all(b"trak") if self._is_video(trak)]
        for trak in moov.all(b"trak"):
            if trak not in videos[:1]:
                self._skip(trak)
        return videos[0] if videos else None

    def _is_video(self, trak: _Box) -> bool:
        handler = trak.find(b"mdia", b"hdlr")
        return handler is not None and bytes(self._data[handler.start + 8 : handler.start + 12]) == b"vide"

    def _track_id(self, trak: _Box) -> int:
        return self._field(trak.get(b"tkhd"), ">I", 12, 20)

    def _is_turned(self, trak: _Box, moov: _Box) -> bool:
        """Return whether ffmpeg turns the video by 90 or 270 degrees, by the matrices of the track and the movie."""
        track, movie = self._matrix(trak.get(b"tkhd"), 40, 52), self._matrix(moov.get(b"mvhd"), 36, 48)
        a, b, c, d = (
            track[row] * movie[column] + track[row + 1] * movie[column + 2] for row in (0, 2) for column in (0, 1)
        )
        if not (hypot(a, c) and hypot(b, d)):
            return False
        angle = degrees(atan2(b / hypot(b, d), a / hypot(a, c))) % 360
        return any(abs(angle - turn) < 1 for turn in (90, 270))

    def _matrix(self, box: _Box, at: int, at_in_version_1: int) -> tuple[int, int, int, int]:
        """Return the part of a display matrix that turns and mirrors: a, b, c, d of [a b u; c d v; x y w]."""
        places = ((at + 4 * n, at_in_version_1 + 4 * n) for n in (0, 1, 3, 4))
        a, b, c, d = (self._field(box, ">i", *place) for place in places)
        return a, b, c, d

    def _read_codec_settings(self, stsd: _Box) -> None:
        """Skip the boxes in the sample descriptions that are not settings of the codec."""
        for entry in self._boxes(stsd.start + 8, stsd.end):
            if entry.end - entry.type_at + 4 < SAMPLE_ENTRY_BYTES:
                raise _Damaged
            for box in self._boxes(entry.type_at - 4 + SAMPLE_ENTRY_BYTES, entry.end):
                if box.kind not in CODEC_SETTINGS:
                    self._skip(box)

    # Frames

    def _shown(self, stbl: _Box, edits: list[range]) -> tuple[int, int]:
        """Return how many of the frames outside fragments the edits show, and how many such frames there are."""
        samples = self._check_tables(stbl)
        starts = accumulate(self._runs(stbl, b"stts", ">II"), initial=0)
        offsets = chain(self._runs(stbl, b"ctts", ">Ii"), repeat(0))
        if not edits:
            return samples, samples
        times = [start + offset for _, start, offset in zip(range(samples), starts, offsets, strict=False)]
        return sum(time in edit for edit in edits for time in times), samples

    def _check_tables(self, stbl: _Box) -> int:
        """Check that no table has more entries than a file may have samples. Return the number of samples."""
        samples = 0
        for kind, layout in ((b"stsz", ">II"), (b"stz2", ">4xI")):
            for box in stbl.all(kind):
                *size, count = self._unpack(layout, box.start + 4, box.end)
                samples += self._counted(count)
                if any(size) and size[0] * count > len(self._data):
                    raise _Damaged
        for kind, (entry_bytes, at) in TABLES.items():
            for box in stbl.all(kind):
                (count,) = self._unpack(">I", box.start + at, box.end)
                if self._counted(count) * entry_bytes > box.end - box.start - at - 4:
                    raise _Damaged
        return samples

    def _counted(self, samples: int) -> int:
        """Return the number of samples. Raises TooLarge if there are more than the file may have."""
        if samples > self._most_samples:
            raise TooLarge(
                f"the MP4 lists {samples} frames, and this model takes at most {self._max_frames}; send a shorter video"
            )
        return samples

    def _runs(self, stbl: _Box, kind: bytes, layout: str) -> Iterator[int]:
        """Return one value for each sample, from a table of pairs of a count and a value.

        Raises TooLarge if the counts add up to too many samples, even if the values are not used, because ffmpeg would
        expand the table.
        """
        table = stbl.find(kind)
        if table is None:
            return iter(())
        (entries,) = self._unpack(">I", table.start + 4, table.end)
        runs = [self._unpack(layout, table.start + 8 + 8 * n, table.end) for n in range(entries)]
        self._counted(sum(count for count, _ in runs))
        return chain.from_iterable(repeat(value, count) for count, value in runs)

    def _edits(self, trak: _Box, moov: _Box) -> list[range]:
        """Return the times of the track, in its own unit, that a player shows one after the other.

        An empty list means all of them.
        """
        elst = trak.find(b"edts", b"elst")
        if elst is None:
            return []
        clock = self._field(trak.get(b"mdia", b"mdhd"), ">I", 12, 20)
        movie_clock = self._field(moov.get(b"mvhd"), ">I", 12, 20)
        entries = self._field(elst, ">I", 4)
        layout, entry_bytes = (">Qq", 20) if self._field(elst, ">B", 0) else (">Ii", 12)
        if entries > MOST_EDITS:
            raise BadRequest(f"the MP4 has more than {MOST_EDITS} edits; write it again with ffmpeg")
        if not (clock and movie_clock):
            raise _Damaged
        edits = []
        for n in range(entries):
            duration, start = self._unpack(layout, elst.start + 8 + entry_bytes * n, elst.end)
            if start >= 0:  # a negative start marks a pause
                edits.append(range(start, start + (2 * duration * clock + movie_clock) // (2 * movie_clock)))
        return edits

    def _fragments(self, root: _Box, moov: _Box, track: int, samples: int) -> int:
        """Return how many frames of the track are in fragments. Edits do not apply to them."""
        trex = moov.get(b"mvex").all(b"trex") if moov.find(b"mvex") else []
        for box in trex:
            if self._field(box, ">I", 4) != track:
                self._skip(box)
        found = 0
        for traf in chain.from_iterable(moof.all(b"traf") for moof in root.all(b"moof")):
            if self._field(traf.get(b"tfhd"), ">I", 4) != track:
                self._skip(traf)
                continue
            found += sum(self._field(trun, ">I", 4) for trun in traf.all(b"trun"))
            self._counted(samples + found)
        return found
