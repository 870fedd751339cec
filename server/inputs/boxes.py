"""The index of an MP4, read before ffmpeg is: how many frames a player shows, and what ffmpeg need not see.

ffmpeg builds its index from counts in the file before it applies any limit: 2 KB that claim 85 million samples take
3 GB. So the counts are checked here, and every box that is not needed to decode the first video is renamed to one that
ffmpeg skips: other tracks, metadata, and whatever is in a box where it does not belong.

The format is ISO/IEC 14496-12, and Apple's QuickTime File Format, which it grew out of.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from math import atan2, degrees, hypot
from typing import Any

from ..errors import BadRequest, TooLarge

SKIPPED = b"skip"
# Frames of the file that no player shows: a cut without encoding again keeps those from the key frame before it.
MOST_HIDDEN = 600
MOST_BOXES = 1 << 16
MOST_EDITS = 100

# What a box may hold; anything else in it is skipped.
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
# Bytes of an entry, and of what stands before the number of entries.
TABLES = {b"stts": (8, 4), b"ctts": (8, 4), b"stss": (4, 4), b"stsc": (12, 4), b"stco": (4, 4), b"co64": (8, 4)}
SAMPLE_ENTRY_BYTES = 86  # of a video: what stands before the boxes with the codec's settings


class _Damaged(Exception):
    """The file contradicts itself."""


@dataclass(frozen=True, slots=True)
class Movie:
    """The first video of an MP4.

    frames: those that a player shows. samples: those that must be decoded for them, at most. is_turned: whether its
    display matrix swaps width and height. skipped: where in the file to write `SKIPPED`, to hide a box from ffmpeg.
    """

    frames: int
    samples: int
    is_turned: bool
    skipped: tuple[int, ...]


@dataclass(slots=True)
class _Box:
    kind: bytes
    type_at: int
    start: int  # of its content
    end: int
    children: list[_Box]

    def all(self, kind: bytes) -> list[_Box]:
        return [child for child in self.children if child.kind == kind]

    def find(self, *path: bytes) -> _Box | None:
        found: _Box | None = self
        for kind in path:
            found = next(iter(found.all(kind)), None) if found else None
        return found

    def get(self, *path: bytes) -> _Box:
        """Raises _Damaged where there is none."""
        found = self.find(*path)
        if found is None:
            raise _Damaged
        return found


def read_movie(data: bytes | bytearray, max_frames: int) -> Movie:
    """Read the index of an MP4 in time and memory bounded by `max_frames`.

    Raises TooLarge where it has more frames than a file of so many can need, and BadRequest.
    """
    try:
        return _Reader(memoryview(data), max_frames).movie()
    except (_Damaged, struct.error, OverflowError):
        raise BadRequest(
            "the MP4's index is damaged or cut short; send a whole MP4, or write it again with ffmpeg"
        ) from None


class _Reader:
    def __init__(self, data: memoryview, max_frames: int) -> None:
        self._data = data
        self._max_frames = max_frames
        self._most_samples = max_frames + MOST_HIDDEN
        self._boxes_left = MOST_BOXES
        self._skipped: list[int] = []

    def movie(self) -> Movie:
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
        # An edit may show a frame again, or need all those before it.
        decoded = samples * max(1, len(edits)) + fragments
        return Movie(shown + fragments, decoded, self._is_turned(trak, moov), tuple(self._skipped))

    # Boxes

    def _boxes(self, start: int, end: int) -> Iterator[_Box]:
        """Those between two places. Fewer bytes than a box's head may follow the last one, as QuickTime's zeros do."""
        while end - start >= 8:
            if not self._boxes_left:
                raise BadRequest(f"the MP4 has more than {MOST_BOXES} boxes; write it again with ffmpeg")
            self._boxes_left -= 1
            size, kind = self._unpack(">I4s", start, end)
            head = 8
            if size == 1:
                (size,), head = self._unpack(">Q", start + 8, end), 16
            elif size == 0:  # to the end of what it is in
                size = end - start
            if size < head or size > end - start:
                raise _Damaged
            yield _Box(kind, start + 4, start + head, start + size, [])
            start += size

    def _descend(self, parent: _Box) -> None:
        """Read what a box may hold, and skip the rest."""
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
        """Raises _Damaged where it does not lie before `end`."""
        if at + struct.calcsize(layout) > end:
            raise _Damaged
        return struct.unpack_from(layout, self._data, at)

    def _field(self, box: _Box, layout: str, at: int, at_in_version_1: int | None = None) -> int:
        """One field, which stands elsewhere where times have 64 bits."""
        (version,) = self._unpack(">B", box.start, box.end)
        place = at_in_version_1 if version and at_in_version_1 is not None else at
        return int(self._unpack(layout, box.start + place, box.end)[0])

    # The track

    def _first_video(self, moov: _Box) -> _Box | None:
        """The track that ffmpeg decodes; the others are skipped."""
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
        """Whether ffmpeg turns it by 90 or 270 degrees, by the track's matrix and then the movie's."""
        track, movie = self._matrix(trak.get(b"tkhd"), 40, 52), self._matrix(moov.get(b"mvhd"), 36, 48)
        a, b, c, d = (
            track[row] * movie[column] + track[row + 1] * movie[column + 2] for row in (0, 2) for column in (0, 1)
        )
        if not (hypot(a, c) and hypot(b, d)):
            return False
        angle = degrees(atan2(b / hypot(b, d), a / hypot(a, c))) % 360
        return any(abs(angle - turn) < 1 for turn in (90, 270))

    def _matrix(self, box: _Box, at: int, at_in_version_1: int) -> tuple[int, int, int, int]:
        """What turns and mirrors: a, b, c, d of [a b u; c d v; x y w]."""
        places = ((at + 4 * n, at_in_version_1 + 4 * n) for n in (0, 1, 3, 4))
        a, b, c, d = (self._field(box, ">i", *place) for place in places)
        return a, b, c, d

    def _read_codec_settings(self, stsd: _Box) -> None:
        """Skip what ffmpeg would read in the descriptions of the frames beside the codec's settings."""
        for entry in self._boxes(stsd.start + 8, stsd.end):
            if entry.end - entry.type_at + 4 < SAMPLE_ENTRY_BYTES:
                raise _Damaged
            for box in self._boxes(entry.type_at - 4 + SAMPLE_ENTRY_BYTES, entry.end):
                if box.kind not in CODEC_SETTINGS:
                    self._skip(box)

    # Frames

    def _shown(self, stbl: _Box, edits: list[range]) -> tuple[int, int]:
        """How many frames of the movie itself the edits show, and how many it has."""
        samples = self._check_tables(stbl)
        starts = accumulate(self._runs(stbl, b"stts", ">II"), initial=0)
        offsets = chain(self._runs(stbl, b"ctts", ">Ii"), repeat(0))
        if not edits:
            return samples, samples
        times = [start + offset for _, start, offset in zip(range(samples), starts, offsets, strict=False)]
        return sum(time in edit for edit in edits for time in times), samples

    def _check_tables(self, stbl: _Box) -> int:
        """The number of samples, once no table has more entries than there may be samples."""
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
        """Raises TooLarge."""
        if samples > self._most_samples:
            raise TooLarge(
                f"the MP4 lists {samples} frames, and this model takes at most {self._max_frames}; send a shorter video"
            )
        return samples

    def _runs(self, stbl: _Box, kind: bytes, layout: str) -> Iterator[int]:
        """A value for each sample, from a table of how often each value comes.

        Raises TooLarge, whether the values are used or not: ffmpeg expands the table.
        """
        table = stbl.find(kind)
        if table is None:
            return iter(())
        (entries,) = self._unpack(">I", table.start + 4, table.end)
        runs = [self._unpack(layout, table.start + 8 + 8 * n, table.end) for n in range(entries)]
        self._counted(sum(count for count, _ in runs))
        return chain.from_iterable(repeat(value, count) for count, value in runs)

    def _edits(self, trak: _Box, moov: _Box) -> list[range]:
        """The times of the track, in its own unit, that a player shows one after the other; none: all."""
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
            if start >= 0:  # else a pause
                edits.append(range(start, start + (2 * duration * clock + movie_clock) // (2 * movie_clock)))
        return edits

    def _fragments(self, root: _Box, moov: _Box, track: int, samples: int) -> int:
        """How many frames of the track come in fragments, which edits do not cut."""
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
