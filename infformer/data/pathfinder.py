"""Pathfinder: is there a dashed path between the two discs of an image? The images are drawn here.

Two long dashed paths, the *snakes*, wind among short ones; one end of a snake has a disc, and so has the other end of
the same snake (label 1) or of the other one (label 0). The law is that of the images of Long-Range Arena, those with
the longest paths (Linsley et al. 2018, https://github.com/drewlinsley/pathfinder). Coordinates are (row, column).

An image is made of segments that were drawn before: a snake turns by one of a few dozen angles, and begins at one of
360. What else takes time there, the widening of all that is occupied, is done here only where a segment may end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Place = tuple[int, int]

_FINER = 2  # segments are drawn on a canvas so many times finer
_OCCUPIED = 0.3  # of what is drawn, from which on nothing else may begin there
_CROSSING = 1.8  # of two that lie over each other, from which on they cross
_SEGMENT_TRIALS = 3  # draws of a segment before its snake is given up
_SNAKE_TRIALS = 5  # short snakes begun before one is left out
_FREE = 0.01  # of the pixels: where fewer are free, no short snake begins


@dataclass(frozen=True)
class Drawing:
    """What images of one size look like."""

    size: int
    """Pixels of a side."""
    seed_distance: int
    """Between the beginnings of the two long snakes."""
    marker_radius: float
    segment_length: int
    thickness: float
    continuity: float
    """How straight a snake goes on; less is straighter."""
    margins: tuple[int, ...]
    """Room around a segment; each image has one of these."""
    short_snakes: int
    contrast: float
    """Of the long snakes."""
    short_contrast: float
    segments: int = 14
    """Of a long snake."""
    short_segments: int = 4
    padding: int = 1


DRAWINGS = {
    32: Drawing(32, 7, 1.5, 2, 0.5, 1.0, (1,), 5, 1.5, 2.0),
    128: Drawing(128, 20, 3, 5, 1.5, 1.8, (2, 3), 8, 0.9, 0.9),
}
"""By the pixels of a side: those of Pathfinder and of Path-X."""


class Drawn(NamedTuple):
    """An image, and whether one path connects its discs."""

    pixels: Pixels
    """[size, size]"""
    label: int


def draw_image(drawing: Drawing, random: np.random.Generator) -> Drawn:
    """Draw one image, all by these random numbers."""
    label = int(random.integers(2))
    margin = drawing.margins[int(random.integers(len(drawing.margins)))]
    pen = _pen(drawing, margin)
    while (two := _two_snakes(pen, random)) is None:
        pass
    image, mask, begins, ends = two
    for _ in range(drawing.short_snakes):
        for _ in range(_SNAKE_TRIALS):
            if _short_snake(pen, image, mask, random):
                break
    marked = int(random.integers(2))
    for place in (begins[marked], ends[marked if label else 1 - marked]):
        np.maximum(image, pen.disc(place), out=image)
    low, high = image.min(), image.max()
    return Drawn(((image - low) * (255 / (high - low)) + 0.5).astype(np.uint8), label)


def draw_images(size: int, numbers: Iterator[int] | range, seed: int, split: int) -> tuple[Pixels, NDArray[np.uint8]]:
    """Images by their numbers, each from random numbers of its own, [images, size · size], and their labels.

    Args:
        size: pixels of a side, one of `DRAWINGS`.
        split: the number of the split that they are for; other splits have other images.
    """
    drawn = [
        draw_image(DRAWINGS[size], np.random.Generator(np.random.Philox(key=[seed, split], counter=[0, 0, size, own])))
        for own in numbers
    ]
    pixels = np.stack([one.pixels for one in drawn]).reshape(len(drawn), size * size)
    return pixels, np.array([one.label for one in drawn], dtype=np.uint8)


class _Segment(NamedTuple):
    """A segment in one direction, around its beginning."""

    line: Floats
    """[2 reach + 1, 2 reach + 1]"""
    mask: Floats
    """The same, wider by the margin."""


class _Snake(NamedTuple):
    """Where a snake has got to."""

    pivot: Place
    """From which the next segment is aimed."""
    angle: float
    last: Place
    """Where the last segment begins,"""
    segment: _Segment
    """which is not yet among what is occupied."""
    tip: Place


@dataclass(frozen=True)
class _Pen:
    """Draws segments of one drawing with one margin."""

    drawing: Drawing
    margin: int

    @cached_property
    def reach(self) -> int:
        return self.drawing.segment_length + math.ceil(self.drawing.thickness) + self.margin

    @cached_property
    def step(self) -> int:
        """From a pivot to where a segment that is aimed from it may end."""
        return self.drawing.segment_length + self.margin

    @cached_property
    def disc_offsets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        y, x = np.nonzero(_round(self.margin))
        return y - self.margin, x - self.margin

    @cached_property
    def candidates(self) -> tuple[NDArray[np.int64], Floats]:
        """Where a segment may end around its pivot, one for each pixel of the arc, [ends, 2], and the directions."""
        angles = np.arange(0, 360, 360 / (2 * self.step * math.pi)) * math.pi / 180
        around = np.floor(self.step * np.stack([np.sin(angles), np.cos(angles)], axis=1)).astype(np.int64)
        ends = np.unique(around, axis=0)
        return ends, np.arctan2(ends[:, 0], ends[:, 1])

    def disc(self, place: Place) -> Floats:
        """A marker on an otherwise empty image."""
        size, radius = self.drawing.size, self.drawing.marker_radius * _FINER
        rows, columns = (np.arange(size * _FINER) - coordinate * _FINER for coordinate in place)
        fine = rows[:, np.newaxis] ** 2 + columns**2 <= radius**2
        coarse = Image.fromarray(fine.astype(np.uint8) * 255).resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(coarse) / 255.0

    def windows(self, place: Place) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Which part of an image a segment at a place covers, and which part of the segment that is."""
        on_image, on_canvas = [], []
        for coordinate in place:
            low, high = coordinate - self.reach, coordinate + self.reach + 1
            first, last = max(low, 0), max(min(high, self.drawing.size), 0)
            on_image.append(slice(first, last))
            on_canvas.append(slice(first - low, last - low))
        return (on_image[0], on_image[1]), (on_canvas[0], on_canvas[1])

    def put(self, image: Floats, place: Place, canvas: Floats) -> None:
        """Lay a canvas over an image, in place: the brighter of the two is seen."""
        there, own = self.windows(place)
        np.maximum(image[there], canvas[own], out=image[there])

    def occupied_at(self, mask: Floats, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
        """How much is occupied within the margin around some pixels."""
        dy, dx = self.disc_offsets
        y, x = rows[:, np.newaxis] + dy, columns[:, np.newaxis] + dx
        size = self.drawing.size
        inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
        found: Floats = np.where(inside, mask[y.clip(0, size - 1), x.clip(0, size - 1)], 0).max(axis=1)
        return found


@lru_cache
def _pen(drawing: Drawing, margin: int) -> _Pen:
    return _Pen(drawing, margin)


@lru_cache(maxsize=4096)
def _draw_segment(pen: _Pen, angle: float) -> _Segment:
    """A segment from the middle of a small canvas, in a direction."""
    drawing, reach = pen.drawing, pen.reach
    fine = Image.new("L", (2 * reach * _FINER + 1,) * 2)
    middle = reach * _FINER
    y, x = _moved((middle, middle), angle, drawing.segment_length * _FINER)
    ImageDraw.Draw(fine).line([(middle, middle), (x, y)], fill=255, width=round(drawing.thickness * _FINER))
    wider = _dilated(np.asarray(fine), _round(pen.margin * _FINER))
    line, mask = (
        np.asarray(own.resize((2 * reach + 1,) * 2, Image.Resampling.LANCZOS)) / 255.0
        for own in (fine, Image.fromarray(wider))
    )
    return _Segment(line, mask)


@lru_cache(maxsize=1024)
def _footprint(pen: _Pen, angle: float) -> list[Place]:
    """What must be free for a snake to begin in a direction, around its beginning; empty: none begins so.

    With the published images none does where this, laid at some edge, lies wholly outside of the image: what is there
    was not zero but the least of all numbers for the library that widened the images, and all was given up.
    """
    # Laid around the head of the segment, which is one pixel beside the middle, and cut to what a step reaches.
    around = _draw_segment(pen, angle).mask >= 1
    places = [(int(row) - pen.reach + 1, int(column) - pen.reach + 1) for row, column in np.argwhere(around)]
    places = [place for place in places if max(map(abs, place)) <= pen.step]
    rows, columns = zip(*places, strict=True) if places else ((1,), (1,))
    leaves = min(rows) > 0 or max(rows) < 0 or min(columns) > 0 or max(columns) < 0
    corners = [
        any(sign_y * row >= 0 and sign_x * column >= 0 for row, column in places)
        for sign_y in (-1, 1)
        for sign_x in (-1, 1)
    ]
    return [] if leaves or not all(corners) else places


def _round(radius: int) -> NDArray[np.bool_]:
    """A disc of pixels."""
    squares = np.arange(-radius, radius + 1) ** 2
    return squares[:, np.newaxis] + squares <= radius**2


def _dilated(image: Pixels, struct: NDArray[np.bool_]) -> Pixels:
    """The brightest pixel among those around each one that a symmetric structure names."""
    radius = len(struct) // 2
    padded = np.pad(image, radius)
    wider = np.zeros_like(image)
    height, width = image.shape
    for y, x in zip(*np.nonzero(struct), strict=True):
        np.maximum(wider, padded[y : y + height, x : x + width], out=wider)
    return wider


def _moved(place: Place, angle: float, distance: float) -> Place:
    return math.ceil(place[0] + distance * math.sin(angle)), math.ceil(place[1] + distance * math.cos(angle))


def _opposite(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


def _two_snakes(pen: _Pen, random: np.random.Generator) -> tuple[Floats, Floats, list[Place], list[Place]] | None:
    """Two long snakes on an empty image, what they occupy, and where they begin and end; None: they did not fit."""
    drawing = pen.drawing
    size, padding = drawing.size, drawing.padding
    image, mask = np.zeros((size, size)), np.ones((size, size))
    mask[padding:-padding, padding:-padding] = 0
    first = _seed(pen, mask, 2 * drawing.seed_distance, random)
    second = None if first is None else _seed_beside(pen, first.tip, random)
    if first is None or second is None:
        return None
    snakes = [first, second]
    for snake in snakes:
        pen.put(image, snake.last, drawing.contrast * snake.segment.line)
    begins = [snake.tip for snake in snakes]
    for _ in range(drawing.segments - 1):
        for number, snake in enumerate(snakes):
            longer = _extend(pen, snake, mask, random)
            if longer is None:
                return None
            pen.put(mask, snake.last, snake.segment.mask)
            pen.put(image, longer.last, drawing.contrast * longer.segment.line)
            snakes[number] = longer
    pen.put(mask, snakes[-1].last, snakes[-1].segment.mask)
    return image, mask, begins, [snake.tip for snake in snakes]


def _short_snake(pen: _Pen, image: Floats, mask: Floats, random: np.random.Generator) -> bool:
    """Add a short snake to an image and to what is occupied, in place; whether it found room."""
    drawing = pen.drawing
    if (mask <= _OCCUPIED).mean() < _FREE:
        return False
    snake = _seed(pen, mask, 1, random)
    if snake is None:
        return False
    occupied, made = mask.copy(), [snake]
    for _ in range(drawing.short_segments - 1):
        longer = _extend(pen, snake, occupied, random)
        if longer is None:
            return False
        pen.put(occupied, snake.last, snake.segment.mask)
        snake = longer
        made.append(snake)
    pen.put(occupied, snake.last, snake.segment.mask)
    mask[:] = occupied
    for own in made:
        pen.put(image, own.last, drawing.short_contrast * own.segment.line)
    return True


def _seed(pen: _Pen, mask: Floats, border: int, random: np.random.Generator) -> _Snake | None:
    """The first segment of a snake, drawn uniformly from the places where it fits; None: it fits nowhere."""
    for _ in range(_SEGMENT_TRIALS):
        angle = _any_angle(random)
        footprint = _footprint(pen, angle)
        if not footprint:
            return None
        size = len(mask)
        taken = mask > _OCCUPIED
        taken[:border] = taken[-border:] = True
        taken[:, :border] = taken[:, -border:] = True
        blocked = np.zeros_like(taken)  # where the segment would meet something
        for dy, dx in footprint:
            here = (slice(max(0, -dy), size - max(0, dy)), slice(max(0, -dx), size - max(0, dx)))
            there = (slice(max(0, dy), size - max(0, -dy)), slice(max(0, dx), size - max(0, -dx)))
            blocked[here] |= taken[there]
        free = np.flatnonzero(~blocked)
        if not len(free):
            return None
        row, column = divmod(int(free[random.integers(len(free))]), size)
        snake = _begin(pen, (row, column), angle)
        if snake is not None:
            return snake
    return None


def _seed_beside(pen: _Pen, tip: Place, random: np.random.Generator) -> _Snake | None:
    """The first segment of the second snake, at a distance from where the first one begins."""
    for _ in range(_SEGMENT_TRIALS):
        angle = _any_angle(random)
        direction = int(random.integers(360)) * math.pi / 180
        row = round(tip[0] + pen.drawing.seed_distance * math.sin(direction))
        column = round(tip[1] + pen.drawing.seed_distance * math.cos(direction))
        snake = _begin(pen, (row, column), angle)
        if snake is not None:
            return snake
    return None


def _any_angle(random: np.random.Generator) -> float:
    return int(random.integers(-180, 180)) * math.pi / 180


def _begin(pen: _Pen, tail: Place, angle: float) -> _Snake | None:
    """A snake of one segment; None: it would leave the image."""
    head = _moved(tail, angle, pen.drawing.segment_length)
    pivot = _moved(head, _opposite(angle), pen.step)
    if not all(0 <= coordinate < pen.drawing.size for coordinate in (*head, *pivot)):
        return None
    return _Snake(pivot, angle, tail, _draw_segment(pen, angle), tail)


def _extend(pen: _Pen, snake: _Snake, mask: Floats, random: np.random.Generator) -> _Snake | None:
    """The snake with one more segment; None: there is no room for it."""
    pivot = _moved(snake.pivot, snake.angle, pen.drawing.segment_length + 2 * pen.margin)
    ends, angles = pen.candidates
    rows, columns = ends[:, 0] + pivot[0], ends[:, 1] + pivot[1]
    turn = np.abs(angles - snake.angle)
    turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * pen.drawing.continuity, math.pi / 2)
    size = pen.drawing.size
    chosen = np.flatnonzero((rows >= 0) & (rows < size) & (columns >= 0) & (columns < size) & (turn < math.pi / 2))
    weights = np.cos(turn[chosen]) ** 2 * (1 - pen.occupied_at(mask, rows[chosen], columns[chosen]))
    total = weights.sum()
    if total < 1e-4:
        return None
    cumulative = np.cumsum(weights)
    for _ in range(_SEGMENT_TRIALS):
        index = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        number = chosen[min(index, len(chosen) - 1)]
        angle, head = float(angles[number]), (int(rows[number]), int(columns[number]))
        segment = _draw_segment(pen, _opposite(angle))  # drawn from its end backwards
        there, own = pen.windows(head)
        if (mask[there] + segment.mask[own]).max() < _CROSSING:
            return _Snake(pivot, angle, head, segment, head)
    return None
