"""Pictures with exact answers: counting, comparing and locating shapes, reading bars, and arithmetic as pixels.

The answer is drawn first, uniformly, and a picture is made to have it, so that guessing without looking earns little.
(The exceptions are `text_image` and `countdown_image`, whose answers spread by themselves.)

Each task exists in a plain style of 8-pixel cells for small models, with the suffix "_rich" in a style with larger
cells, several sizes and fonts, jitter, noise and tinted backgrounds, and with "_large" in such a style for published
models, which see 28 or 32 pixels as one token. All ask the same under the same problem id, so what is held out in one
is held out in the others. `text_image` shares the ids of `chain`, and `countdown_image` those of `countdown`, for the
same reason: a question drawn as an image should be answered like the same question written as text (k1.5 §2.3.5).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from kimi_jax.tasks.base import ANSWER_MARKER, Task, verify_exact
from kimi_jax.tasks.math import CHAIN, abridge_countdown, draw_chain, draw_countdown, verify_countdown
from kimi_jax.types import IMAGE_MARKER, Problem, Verdict

T = TypeVar("T")

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 190, 0),
    "black": (0, 0, 0),
}


@dataclasses.dataclass(frozen=True)
class Style:
    """How contents become pixels. Every side of an image is a multiple of `cell`, which is a multiple of 8."""

    cell: int  # pixels; the side of a scene's cell and of a character, the width of a bar's column
    sizes: tuple[int, ...]  # pixels; the sides that a shape may have, less than `cell`
    scales: tuple[int, ...]  # pixels; the sides that a dot of a character may have, at most cell / 8
    fonts: tuple[str, ...]  # names in FONTS
    jitter: bool  # shapes lie anywhere in their cells, instead of in the middle; texts are shifted; bars vary in width
    noise: float  # standard deviation of a pixel's noise, where white is 255
    tint: int  # the background may be this much darker than white, in each channel


PLAIN = Style(cell=8, sizes=(6,), scales=(1,), fonts=("regular",), jitter=False, noise=0.0, tint=0)
RICH = Style(
    cell=16, sizes=(8, 10, 12, 14), scales=(1, 2), fonts=("regular", "bold", "slanted"), jitter=True, noise=6.0, tint=40
)
LARGE = dataclasses.replace(RICH, cell=56, sizes=(28, 34, 40, 46), scales=(4, 5, 6, 7))


@dataclasses.dataclass(frozen=True)
class Content:
    """What is asked, and of what; the style is yet to come."""

    id: str
    question: str
    solution: str  # worked, with the answer at its end
    answer: str
    difficulty: int
    render: Callable[[Style, np.random.Generator], np.ndarray]  # draws it: uint8 [height, width, 3]


def _visual_task(
    name: str,
    style: Style,
    difficulties: tuple[int, ...],
    draw_content: Callable[[np.random.Generator, int], Content],
    verify: Callable[[Problem, str], Verdict],
    abridge: Callable[[str], str | None] | None,
) -> Task:
    def draw(rng: np.random.Generator, difficulty: int) -> Problem:
        content = draw_content(rng, difficulty)
        image = content.render(style, rng)
        if style.noise:
            image = np.clip(np.rint(image + style.noise * rng.standard_normal(image.shape)), 0, 255).astype(np.uint8)
        return Problem(
            id=content.id,
            task=name,
            prompt=f"{content.question} {IMAGE_MARKER}",
            answer=content.answer,
            difficulty=content.difficulty,
            images=(image,),
            solution=content.solution,
        )

    return Task(name=name, kind="image", difficulties=difficulties, draw=draw, verify=verify, abridge=abridge)


def _canvas(rows: int, columns: int, style: Style, rng: np.random.Generator) -> np.ndarray:
    """An empty picture, uint8 [rows · cell, columns · cell, 3]."""
    background = 255 - rng.integers(0, style.tint + 1, 3)
    return np.broadcast_to(background, (rows * style.cell, columns * style.cell, 3)).astype(np.uint8)


def _offset(mask: np.ndarray, style: Style, rng: np.random.Generator) -> tuple[int, int]:
    """Where the top left corner of the mask lies in its cell: (down, right)."""
    free = style.cell - np.array(mask.shape)
    down, right = rng.integers(0, free + 1) if style.jitter else free // 2
    return int(down), int(right)


def _paint(image: np.ndarray, mask: np.ndarray, top: int, left: int, colour: str) -> None:
    image[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = COLOURS[colour]


def _choice(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


# --- scenes: shapes in the cells of a grid --------------------------------------------------------------------------

GRID = 4  # rows and columns
SHAPES = ("square", "circle", "triangle", "cross")
SCENE_COLOURS = ("red", "green", "blue", "yellow")
THINGS = [(colour, shape) for colour in SCENE_COLOURS for shape in SHAPES]

Thing = tuple[str, str]  # (colour, shape)
Scene = dict[tuple[int, int], Thing]  # by (row, column), from 0; empty cells are absent


@functools.cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """The pixels that a shape covers: bool [size, size]."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    if shape == "square":
        return np.ones((size, size), bool)
    if shape == "circle":
        return x**2 + y**2 < (size / 2) ** 2 - size / 10
    if shape == "triangle":
        return np.abs(x) <= (y + size / 2 + 0.5) / 2
    return np.abs(np.abs(x) - np.abs(y)) < max(1, size / 8)  # cross


def render_scene(scene: Scene, style: Style, rng: np.random.Generator) -> np.ndarray:
    """A scene as uint8 [4 · cell, 4 · cell, 3]; `rng` decides what the style leaves open."""
    image = _canvas(GRID, GRID, style, rng)
    for (row, column), (colour, shape) in scene.items():
        mask = shape_mask(shape, _choice(rng, style.sizes))
        down, right = _offset(mask, style, rng)
        _paint(image, mask, row * style.cell + down, column * style.cell + right, colour)
    return image


def scene_code(scene: Scene) -> str:
    """Two letters a cell, row by row: "rc" is a red circle, "rx" a red cross, ".." an empty cell."""
    letters = {"square": "s", "circle": "c", "triangle": "t", "cross": "x"}
    cells = {cell: colour[0] + letters[shape] for cell, (colour, shape) in scene.items()}
    return ";".join("".join(cells.get((row, column), "..") for column in range(GRID)) for row in range(GRID))


def _scatter(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    """Puts the things into different cells."""
    cells = rng.permutation(GRID * GRID)[: len(things)].tolist()
    return {divmod(cell, GRID): thing for cell, thing in zip(cells, things, strict=True)}


def _some(rng: np.random.Generator, options: Sequence[Thing], count: int) -> list[Thing]:
    return [options[i] for i in rng.integers(0, len(options), count)]


def _scene_content(task: str, scene: Scene, question: str, steps: str, answer: object, difficulty: int) -> Content:
    return Content(
        id=f"{task}:{scene_code(scene)}",  # whatever is asked: a picture is held out as a whole
        question=question,
        solution=f"{steps}{ANSWER_MARKER}{answer}",
        answer=str(answer),
        difficulty=difficulty,
        render=functools.partial(render_scene, scene),
    )


def draw_scene_count(rng: np.random.Generator, difficulty: int) -> Content:
    """How many things of a colour or of a shape; 0 to 9, among `difficulty` others."""
    colour, shape = _choice(rng, SCENE_COLOURS), _choice(rng, SHAPES)
    asked, matching = (
        (f"{colour} shapes", [thing for thing in THINGS if thing[0] == colour]),
        (_plural(shape), [thing for thing in THINGS if thing[1] == shape]),
    )[rng.integers(2)]
    answer = int(rng.integers(10))
    others = [thing for thing in THINGS if thing not in matching]
    scene = _scatter(rng, _some(rng, matching, answer) + _some(rng, others, difficulty))
    rows = [sum(scene.get((row, column)) in matching for column in range(GRID)) for row in range(GRID)]
    steps = f"{','.join(map(str, np.cumsum(rows)))};"  # a running total, so that every step adds one row
    return _scene_content("scene_count", scene, f"How many {asked}?", steps, answer, difficulty)


def draw_scene_compare(rng: np.random.Generator, difficulty: int) -> Content:
    """How many more of one shape or colour than of another; 0 to 8, among `difficulty` things that are neither."""
    axis = int(rng.integers(2))  # of a Thing
    more, fewer = rng.permutation((SCENE_COLOURS, SHAPES)[axis])[:2].tolist()
    answer = int(rng.integers(9))
    subtrahend = int(rng.integers(min(3, (GRID * GRID - difficulty - answer) // 2) + 1))
    scene = _scatter(
        rng,
        _some(rng, [thing for thing in THINGS if thing[axis] == more], subtrahend + answer)
        + _some(rng, [thing for thing in THINGS if thing[axis] == fewer], subtrahend)
        + _some(rng, [thing for thing in THINGS if thing[axis] not in (more, fewer)], difficulty),
    )
    if axis == 0:
        question = f"How many more {more} than {fewer} shapes?"
    else:
        more, fewer = _plural(more), _plural(fewer)
        question = f"How many more {more} than {fewer}?"
    minuend = subtrahend + answer
    steps = f"{more} {minuend},{fewer} {subtrahend};{minuend}-{subtrahend}={answer};"
    return _scene_content("scene_compare", scene, question, steps, answer, difficulty)


def draw_scene_locate(rng: np.random.Generator, difficulty: int) -> Content:
    """Where the only thing of its kind is, among `difficulty` others."""
    target = _choice(rng, THINGS)
    scene = _scatter(rng, [target, *_some(rng, [thing for thing in THINGS if thing != target], difficulty)])
    (row, column), (colour, shape) = next(iter(scene.items()))  # the target was placed first
    steps = f"{colour} {shape};"
    answer = f"row {row + 1} column {column + 1}"
    return _scene_content("scene_locate", scene, f"Where is the {colour} {shape}?", steps, answer, difficulty)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


# --- bar charts -----------------------------------------------------------------------------------------------------

MAX_HEIGHT = 9  # of a bar, in units of half a cell


def render_bars(heights: dict[str, int], style: Style, rng: np.random.Generator) -> np.ndarray:
    """Bars from left to right, {colour: height in units}, as uint8 [5 · cell, bars · cell, 3]."""
    image = _canvas((MAX_HEIGHT + 1) // 2, len(heights), style, rng)
    for column, (colour, height) in enumerate(heights.items()):
        margin = int(rng.integers(1, style.cell // 4 + 1)) if style.jitter else style.cell // 8
        left, right = column * style.cell + margin, (column + 1) * style.cell - margin
        image[image.shape[0] - height * style.cell // 2 :, left:right] = COLOURS[colour]
    return image


def draw_bar_chart(rng: np.random.Generator, difficulty: int) -> Content:
    """The height of one bar, or the sum of two, among `difficulty` bars of different colours."""
    colours = rng.permutation(list(COLOURS))[:difficulty].tolist()
    heights = {colour: int(rng.integers(1, MAX_HEIGHT + 1)) for colour in colours}
    first, second = rng.permutation(colours)[:2].tolist()
    if rng.random() < 0.5:
        answer = heights[first]
        question, steps = f"How high is the {first} bar?", f"{first} {answer};"
    else:
        answer = int(rng.integers(2, 2 * MAX_HEIGHT + 1))
        a = int(rng.integers(max(1, answer - MAX_HEIGHT), min(MAX_HEIGHT, answer - 1) + 1))
        b = answer - a
        heights[first], heights[second] = a, b
        question, steps = f"What is {first} plus {second}?", f"{first} {a},{second} {b};{a}+{b}={answer};"
    return Content(
        id=f"bar_chart:{' '.join(f'{colour} {height}' for colour, height in heights.items())}",
        question=question,
        solution=f"{steps}{ANSWER_MARKER}{answer}",
        answer=str(answer),
        difficulty=difficulty,
        render=functools.partial(render_bars, heights),
    )


# --- pips: tiles like those of dominoes, to be counted and added up ---------------------------------------------------

MAX_PIPS = 9  # of a tile: 3 × 3 places
SHADE = 32  # how much darker every second tile is, for its border to be seen: pips lie close to it


def render_pips(tiles: tuple[int, ...], style: Style, rng: np.random.Generator) -> np.ndarray:
    """Tiles from left to right, each with its number of pips at random places, as uint8 [cell, tiles · cell, 3]."""
    image = _canvas(1, len(tiles), style, rng)
    unit = style.cell // 8
    for column, pips in enumerate(tiles):
        tile = image[:, column * style.cell : (column + 1) * style.cell]
        tile -= np.uint8(SHADE * (column % 2))
        for place in rng.permutation(MAX_PIPS)[:pips]:
            shift = rng.integers(0, unit, 2) if style.jitter else np.zeros(2, int)
            side = 2 * unit - int(shift.max())
            top, left = np.array(divmod(int(place), 3)) * 3 * unit + shift
            _paint(tile, np.ones((side, side), bool), top, left, "black")
    return image


def draw_pips(rng: np.random.Generator, difficulty: int) -> Content:
    """The sum of the pips of `difficulty` + 1 tiles, added up from left to right.

    The id keeps the order of the tiles, so "3,5" may be held out while "5,3" is learned from: what is held out is what
    there is to be seen, an arrangement as in the scenes, and the running sums of the worked solution follow its order.
    """
    tiles = tuple(int(n) for n in rng.integers(1, MAX_PIPS + 1, difficulty + 1))
    sums = np.cumsum(tiles)
    steps = "".join(f"{a}+{n}={b};" for a, n, b in zip(sums[:-1], tiles[1:], sums[1:], strict=True))
    return Content(
        id=f"pips:{','.join(map(str, tiles))}",
        question="How many pips?",
        solution=f"{steps}{ANSWER_MARKER}{sums[-1]}",
        answer=str(sums[-1]),
        difficulty=difficulty,
        render=functools.partial(render_pips, tiles),
    )


# --- text as an image -----------------------------------------------------------------------------------------------

LINE = 8  # characters, then the text wraps

# Seven rows of five dots each, as the bits of a two-digit hexadecimal number.
_GLYPHS = {
    "0": "0e 11 13 15 19 11 0e",
    "1": "04 0c 04 04 04 04 0e",
    "2": "0e 11 01 02 04 08 1f",
    "3": "1f 02 04 02 01 11 0e",
    "4": "02 06 0a 12 1f 02 02",
    "5": "1f 10 1e 01 01 11 0e",
    "6": "06 08 10 1e 11 11 0e",
    "7": "1f 01 02 04 08 08 08",
    "8": "0e 11 11 0e 11 11 0e",
    "9": "0e 11 11 0f 01 02 0c",
    "+": "00 04 04 1f 04 04 00",
    "-": "00 00 00 1f 00 00 00",
    "*": "00 04 15 0e 15 04 00",
}

# A font moves each dot (row, column) of the regular one to one or more columns.
FONTS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "regular": lambda row, column: (column,),
    "bold": lambda row, column: (column, column + 1),
    "slanted": lambda row, column: (column + (6 - row) // 3,),
}


@functools.cache
def glyph_mask(character: str, font: str, scale: int) -> np.ndarray:
    """The dots of a character, scale × scale pixels each: bool [7 · scale, 5..7 · scale]."""
    rows = [int(bits, 16) for bits in _GLYPHS[character].split()]
    dots = [(r, c) for r, bits in enumerate(rows) for c in range(5) if bits >> (4 - c) & 1]
    width = 1 + max(moved for row in range(7) for moved in FONTS[font](row, 4))
    mask = np.zeros((7, width), bool)
    for row, column in dots:
        mask[row, list(FONTS[font](row, column))] = True
    return mask.repeat(scale, axis=0).repeat(scale, axis=1)


def render_text(lines: Sequence[str], style: Style, rng: np.random.Generator) -> np.ndarray:
    """Lines of text, one cell for each character, as uint8 [lines · cell, characters of the longest · cell, 3]."""
    image = _canvas(len(lines), max(map(len, lines)), style, rng)
    font, scale = _choice(rng, style.fonts), _choice(rng, style.scales)
    down, right = _offset(glyph_mask(lines[0][0], font, scale), style, rng)  # of the whole text
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            mask = glyph_mask(character, font, scale)
            _paint(image, mask, row * style.cell + down, column * style.cell + right, "black")
    return image


def draw_text_image(rng: np.random.Generator, difficulty: int) -> Content:
    """A `chain` problem whose expression is drawn."""
    expression, problem = draw_chain(rng, difficulty)
    return Content(
        id=problem.id,
        question="Compute",
        solution=problem.solution,
        answer=problem.answer,
        difficulty=difficulty,
        render=functools.partial(render_text, [expression[i : i + LINE] for i in range(0, len(expression), LINE)]),
    )


def draw_countdown_image(rng: np.random.Generator, difficulty: int) -> Content:
    """A `countdown` problem whose target and numbers are drawn, line by line; its solution begins by reading them."""
    target, numbers, problem = draw_countdown(rng, difficulty)
    return Content(
        id=problem.id,
        question="Make the first number from the others.",
        solution=f"{target} from {', '.join(map(str, numbers))}. {problem.solution}",
        answer=problem.answer,
        difficulty=difficulty,
        render=functools.partial(render_text, [str(target), *map(str, numbers)]),
    )


VISUAL_TASKS = tuple(
    _visual_task(name + suffix, style, difficulties, draw_content, verify, abridge)
    for suffix, style in (("", PLAIN), ("_rich", RICH), ("_large", LARGE))
    for name, difficulties, draw_content, verify, abridge in (
        ("scene_count", (2, 4, 6), draw_scene_count, verify_exact, None),
        ("scene_compare", (1, 2, 4), draw_scene_compare, verify_exact, None),
        ("scene_locate", (3, 6, 9), draw_scene_locate, verify_exact, None),
        ("bar_chart", (3, 4, 5), draw_bar_chart, verify_exact, None),
        ("pips", (1, 2, 3), draw_pips, verify_exact, None),
        ("text_image", CHAIN.difficulties, draw_text_image, verify_exact, None),
        ("countdown_image", (3,), draw_countdown_image, verify_countdown, abridge_countdown),
    )
)
