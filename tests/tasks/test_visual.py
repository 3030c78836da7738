"""Answers read again from the pixels, and again from the content in the id; and how much guessing would earn."""

import re
from collections import Counter

import numpy as np
import pytest

from kimi_jax.tasks import TASKS, visual
from kimi_jax.tasks.base import make_problems
from kimi_jax.tasks.math import parse_expression
from kimi_jax.types import Problem

# Widths of the rows of the plain shapes: drawn here by hand, not taken from the code.
ROWS = {(6, 6, 6, 6, 6, 6): "square", (2, 4, 6, 6, 4, 2): "circle", (2, 2, 4, 4, 6, 6): "triangle", (2,) * 6: "cross"}
NAMES = {"r": "red", "g": "green", "b": "blue", "y": "yellow"}
KINDS = {"s": "square", "c": "circle", "t": "triangle", "x": "cross"}
WHITE = (255, 255, 255)
WORD = re.compile(r"\b(red|green|blue|yellow|black|squares?|circles?|triangles?|cross(es)?)\b")


CELLS = {"": 8, "_rich": 16, "_large": 56}  # pixels


def drawn(name: str, count: int) -> list[Problem]:
    return make_problems(TASKS[name], split="train", count=count, seed=11)


def things_in_pixels(image: np.ndarray) -> dict[tuple[int, int], tuple[str, str]]:
    colours = {rgb: name for name, rgb in visual.COLOURS.items()}
    things = {}
    for row in range(4):
        for column in range(4):
            cell = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            inked = (cell != WHITE).any(-1)
            if inked.any():
                (rgb,) = {tuple(pixel) for pixel in cell[inked].tolist()}
                widths = tuple(w for w in inked.sum(1).tolist() if w)
                things[row + 1, column + 1] = colours[rgb], ROWS[widths]
    return things


def things_in_id(problem: Problem) -> dict[tuple[int, int], tuple[str, str]]:
    rows = problem.id.split(":")[1].split(";")
    return {
        (r, c // 2 + 1): (NAMES[row[c]], KINDS[row[c + 1]])
        for r, row in enumerate(rows, start=1)
        for c in range(0, 8, 2)
        if row[c : c + 2] != ".."
    }


def answer_scene(things: dict, prompt: str) -> str:
    """Answers the question in English about the things."""

    def count(phrase: str) -> int:
        words = [w.removesuffix("es") if w.startswith("crosses") else w.removesuffix("s") for w in phrase.split()]
        wanted = set(words) - {"shape"}
        return sum(wanted <= set(thing) for thing in things.values())

    if match := re.fullmatch(r"How many more (\w+) than (\w+)(?: shapes)?\? <image>", prompt):
        return str(count(match[1]) - count(match[2]))
    if match := re.fullmatch(r"How many (\w+ shapes|\w+)\? <image>", prompt):
        return str(count(match[1]))
    colour, shape = re.fullmatch(r"Where is the (\w+) (\w+)\? <image>", prompt).groups()
    ((row, column),) = [place for place, thing in things.items() if thing == (colour, shape)]
    return f"row {row} column {column}"


def steps_of_scene(name: str, things: dict, prompt: str) -> str:
    """The worked solution up to the answer, from the things."""
    if name == "scene_locate":
        return prompt.removeprefix("Where is the ").removesuffix("? <image>")
    if name == "scene_count":  # a running total: what the first row has, the first two, ...
        above = [{place: thing for place, thing in things.items() if place[0] <= row} for row in (1, 2, 3, 4)]
        return ",".join(answer_scene(part, prompt) for part in above)
    words = re.findall(r"more (\w+) than (\w+)", prompt)[0]
    a, b = (answer_scene(things, f"How many {word}? <image>") for word in words)
    return f"{words[0]} {a},{words[1]} {b};{a}-{b}={int(a) - int(b)}"


@pytest.mark.parametrize("name", ["scene_count", "scene_compare", "scene_locate"])
def test_scenes_are_answered_by_their_pixels(name):
    for problem in drawn(name, 211):
        things = things_in_pixels(problem.images[0])
        assert problem.images[0].shape == (32, 32, 3)
        assert things == things_in_id(problem)
        assert answer_scene(things, problem.prompt) == problem.answer
        assert problem.solution == f"{steps_of_scene(name, things, problem.prompt)};Answer:{problem.answer}"


@pytest.mark.parametrize("suffix", ["_rich", "_large"])
@pytest.mark.parametrize("name", ["scene_count", "scene_compare", "scene_locate"])
def test_rich_scenes_show_their_content(name, suffix):
    """Colours per cell from the pixels; the answer from the content."""
    side = CELLS[suffix]
    for problem in drawn(name + suffix, 61):
        things = things_in_id(problem)
        image = problem.images[0].astype(int)
        assert image.shape == (4 * side, 4 * side, 3)
        for row in range(4):
            for column in range(4):
                cell = image[side * row :, side * column :][:side, :side].reshape(-1, 1, 3)
                near = (np.abs(cell - np.array([visual.COLOURS[c] for c in visual.SCENE_COLOURS])) < 35).all(-1).sum(0)
                colour = visual.SCENE_COLOURS[int(near.argmax())] if near.max() > 5 else None
                assert colour == things.get((row + 1, column + 1), (None,))[0]
        assert answer_scene(things, problem.prompt) == problem.answer


@pytest.mark.parametrize("style", [visual.PLAIN, visual.RICH, visual.LARGE])
def test_shapes_differ_at_every_size(style):
    for size in style.sizes:
        masks = [visual.shape_mask(shape, size) for shape in visual.SHAPES]
        for i, a in enumerate(masks):
            assert all((a != b).mean() > 0.15 for b in masks[:i]), size


@pytest.mark.parametrize("suffix", CELLS)
def test_bars_have_the_heights_that_are_asked_for(suffix):
    for problem in drawn("bar_chart" + suffix, 151):
        image = problem.images[0].astype(int)
        cell = CELLS[suffix]
        assert image.shape == (5 * cell, problem.difficulty * cell, 3)
        heights = {}
        for column in range(problem.difficulty):
            strip = image[:, column * cell + cell // 2]
            bottom = strip[-3:].mean(0)
            colour = min(visual.COLOURS, key=lambda name: np.abs(bottom - visual.COLOURS[name]).sum())
            inked = np.abs(strip - visual.COLOURS[colour]).max(-1) < 40
            heights[colour] = inked.sum() / (cell // 2)
        asked = re.findall("|".join(visual.COLOURS), problem.prompt)
        assert sum(heights[colour] for colour in asked) == int(problem.answer)
        steps = ",".join(f"{colour} {heights[colour]:.0f}" for colour in asked) + ";"
        if len(asked) == 2:
            steps += "+".join(f"{heights[colour]:.0f}" for colour in asked) + f"={problem.answer};"
        assert problem.solution == f"{steps}Answer:{problem.answer}"
        assert problem.id == f"bar_chart:{' '.join(f'{c} {int(h)}' for c, h in heights.items())}"


@pytest.mark.parametrize("name", ["scene_count", "scene_compare", "scene_locate", "bar_chart"])
def test_a_picture_is_held_out_whatever_is_asked_about_it(name):
    """ "What is red plus blue?" is in one split with "What is blue plus red?" and "How high is the red bar?"."""
    train, heldout = (
        make_problems(TASKS[name], split=s, count=n, seed=0) for s, n in (("train", 1999), ("heldout", 499))
    )
    pictures = {problem.images[0].tobytes() for problem in train}
    assert len(pictures) == len(train) and not any(problem.images[0].tobytes() in pictures for problem in heldout)


def blots(inked: np.ndarray) -> int:
    """How many connected pieces the ink of a bool [height, width] has; sides connect, corners do not."""
    left = set(zip(*np.nonzero(inked), strict=True))
    count = 0
    while left:
        count += 1
        border = [left.pop()]
        while border:
            row, column = border.pop()
            near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= near
            border += near
    return count


@pytest.mark.parametrize("suffix", CELLS)
def test_pips_are_counted_from_the_pixels(suffix):
    places = Counter()
    for problem in drawn("pips" + suffix, 151):
        cell = CELLS[suffix]
        tiles = problem.difficulty + 1
        assert problem.images[0].shape == (cell, tiles * cell, 3) and problem.difficulty in (1, 2, 3)
        inked = (problem.images[0] < 128).all(-1).reshape(cell, tiles, cell).swapaxes(0, 1)
        image = problem.images[0].reshape(cell, tiles, cell, 3).swapaxes(0, 1).astype(float)
        papers = np.array([tile[~ink].mean(0) for tile, ink in zip(image, inked, strict=True)])
        darker = papers[:-1] - papers[1:]  # than the tile to the left
        assert (darker[::2] > 20).all() and (darker[1::2] < -20).all()  # where a tile ends is seen
        counts = [blots(tile) for tile in inked]
        assert all(1 <= count <= 9 for count in counts)
        assert problem.prompt == "How many pips? <image>" and problem.answer == str(sum(counts))
        total, steps = counts[0], ""
        for count in counts[1:]:
            steps += f"{total}+{count}={total + count};"
            total += count
        assert problem.solution == f"{steps}Answer:{total}"
        assert problem.id == f"pips:{','.join(map(str, counts))}"
        places.update(tile.tobytes() for tile in inked)
    assert len(places) > 200  # the number is not told by one picture of it


def test_text_images_read_like_the_chain_problem():
    """Reads the plain picture cell by cell and computes what it says."""
    glyphs = {visual.glyph_mask(c, "regular", 1).tobytes(): c for c in "0123456789+-*"}
    assert len(glyphs) == 13
    for problem in drawn("text_image", 151):
        height, width, _ = problem.images[0].shape
        assert width <= 64 and (width == 64 or height == 8)
        cells = problem.images[0].reshape(height // 8, 8, width // 8, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
        inked = [(cell == 0).all(-1) for cell in cells]
        expression = "".join(glyphs[cell[:7, 1:6].tobytes()] for cell in inked if cell.any())
        assert problem.prompt == "Compute <image>"
        value, *rest = re.findall(r"^\d+|[-+*]\d+", expression)
        value = int(value)
        for step in rest:
            value = {"+": value + int(step[1:]), "-": value - int(step[1:]), "*": value * int(step[1:])}[step[0]]
        assert str(value) == problem.answer and len(rest) == problem.difficulty
        assert not any(cell.any() for cell in inked[len(expression) :])


def test_a_question_as_text_and_as_an_image_has_one_id_answer_and_solution():
    for seed in range(17):
        text = TASKS["chain"].draw(np.random.default_rng(seed), 3)
        for name in ("text_image", "text_image_rich", "text_image_large"):
            image = TASKS[name].draw(np.random.default_rng(seed), 3)
            assert (image.id, image.answer, image.solution) == (text.id, text.answer, text.solution)


def test_countdown_images_show_the_target_and_the_numbers():
    glyphs = {visual.glyph_mask(c, "regular", 1).tobytes(): c for c in "0123456789"}
    for problem in drawn("countdown_image", 53):
        lines = []
        for line in np.split(problem.images[0], 4):
            inked = [(cell == 0).all(-1) for cell in np.split(line, 2, axis=1)]
            lines.append(int("".join(glyphs[cell[:7, 1:6].tobytes()] for cell in inked if cell.any())))
        target, *numbers = lines
        assert parse_expression(problem.answer) == (sorted(numbers), target)
        assert problem.solution.startswith(f"{target} from {', '.join(map(str, numbers))}. ")
        assert TASKS["countdown_image"].verify(problem, problem.solution).outcome == "correct"
        assert problem.id == f"countdown:{','.join(map(str, sorted(numbers)))}>{target}"  # that of the same in text


def test_only_rich_pictures_of_one_content_differ():
    content = visual.draw_scene_count(np.random.default_rng(0), 4)
    for style, differ in ((visual.RICH, True), (visual.LARGE, True), (visual.PLAIN, False)):
        first, second = (content.render(style, np.random.default_rng(seed)) for seed in (0, 1))
        assert (first != second).any() == differ


@pytest.mark.parametrize("name", ["scene_count", "scene_compare", "scene_locate", "bar_chart", "pips", "text_image"])
def test_no_answer_is_common(name):
    """The best constant guess, for the task and for each form of its questions, earns at most 15%."""
    draw, difficulties = getattr(visual, f"draw_{name}"), TASKS[name].difficulties
    rng = np.random.default_rng(0)
    answers: dict[str, Counter] = {}
    for n in range(6007):
        content = draw(rng, difficulties[n % len(difficulties)])
        form = WORD.sub("_", content.question)
        if name == "pips":  # how many tiles there are shows in the width
            form += f" of {content.difficulty + 1} tiles"
        answers.setdefault(form, Counter())[content.answer] += 1
    forms = {"scene_count": 2, "scene_compare": 2, "scene_locate": 1, "bar_chart": 2, "pips": 3, "text_image": 1}
    assert len(answers) == forms[name]
    for form, counter in [*answers.items(), ("all", sum(answers.values(), Counter()))]:
        assert max(counter.values()) / counter.total() <= 0.15, (form, counter)
