"""The miniature's world: captioned 64-pixel scenes of one to three coloured shapes.

    python scenes.py --captions 20000 --seed 1 --out captions.txt      # captions, one a line
    python scenes.py --pictures 2048 --seed 2 --out scenes             # pictures, a file each
    python scenes.py --grid scenes.png                                 # a labelled grid of pictures

Scene (seed, index, split) is the same on every machine, and there is no last one.
Split "train" never holds the eight (colour, shape) pairs of HELD_OUT; every scene of
split "held-out" holds at least one, so it asks for combinations nobody was trained on.

The grammar, which `scene` writes and `parse` reads:
    caption     objects ["on" | "against" "a" [tone] [texture] "background"]
    objects     object | object relation object | object relation object "and" object relation "the" ...
                | object "and" object | object "," object "and" object      ("with" stands for "and")
    object      "a" [size] colour shape
"""
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import cli

SIZE = 64                                               # pixels; every length below is in these
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLOURS = {"red": (222, 38, 44), "green": (36, 160, 66), "blue": (44, 84, 228), "yellow": (252, 220, 40),
           "orange": (250, 132, 20), "purple": (140, 52, 178), "pink": (252, 140, 196), "cyan": (48, 208, 228)}
RADIUS = {"small": 7.0, "large": 11.5}                  # half the side of the box a shape fits in
SIZES = tuple(RADIUS)
RELATIONS = ("left of", "right of", "above", "below")
TONES = ("dark", "light")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SPLITS = ("train", "held-out")

# A Latin diagonal: each shape and each colour is held out once, so all sixteen words are still learnt.
HELD_OUT = frozenset((colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS))

COUNTS = (0.35, 0.40, 0.25)                             # of scenes with 1, 2 and 3 objects
TEXTURED = (0.40, 0.20, 0.20, 0.20)                     # of TEXTURES
MARGIN, GAP, CLEAR = 1.5, 2.0, 4.0                      # to the border; between boxes; of one axis over the other
SAY_SIZE, SAY_RELATION, SAY_BACKGROUND = 0.5, 0.8, 0.4

SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
RELATION_WORDS = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
                  "above": ("above", "over"), "below": ("below", "under")}
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
SEEN, UNSEEN = [pair for pair in PAIRS if pair not in HELD_OUT], [pair for pair in PAIRS if pair in HELD_OUT]


@dataclass(frozen=True)
class Object:
    """One shape. x, y: its centre in pixels from the top left corner; radius: half its box's side;
    rgb: near COLOURS[colour]."""
    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple


@dataclass(frozen=True)
class Scene:
    """A whole picture. objects: in the caption's order; ground: the background's two RGB colours; period (pixels),
    angle (radians), phase (two fractions of the period): its texture's geometry."""
    objects: tuple
    tone: str
    texture: str
    caption: str
    ground: tuple
    period: float
    angle: float
    phase: tuple


@dataclass(frozen=True)
class Claim:
    """What a caption says, None where unsaid. objects: (shape, colour, size) each;
    relations: (i, relation, j), indices into objects."""
    objects: tuple
    relations: tuple
    tone: str | None
    texture: str | None


def relation(a, b):
    """The word of RELATIONS that holds of a against b (anything with x and y): the larger axis decides."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def scene(seed, index, split="train"):
    """Scene number `index` (0, 1, ... without end) of a seed's split. ValueError if the split is not one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f'split "{split}" is unknown: use "train" or "held-out"')
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])
    count = 1 + int(rng.choice(3, p=COUNTS))
    if split == "train":
        pairs = [SEEN[i] for i in rng.choice(len(SEEN), count, replace=False)]
    else:
        first = UNSEEN[rng.integers(len(UNSEEN))]
        rest = [pair for pair in PAIRS if pair != first]
        pairs = [first] + [rest[i] for i in rng.choice(len(rest), count - 1, replace=False)]
        pairs = [pairs[i] for i in rng.permutation(count)]
    sizes = [SIZES[i] for i in rng.integers(2, size=count)]
    while (places := _place(rng, sizes)) is None:       # three large ones seldom fit
        sizes[sizes.index("large")] = "small"
    objects = []
    for (colour, shape), size, (x, y, radius) in zip(pairs, sizes, places):
        rgb = np.clip(np.array(COLOURS[colour]) + rng.integers(-10, 11, size=3), 0, 255)
        objects.append(Object(shape, colour, size, x, y, radius, tuple(rgb.tolist())))
    tone, texture = TONES[rng.integers(2)], str(rng.choice(TEXTURES, p=TEXTURED))
    base, contrast = ((rng.uniform(22, 58), rng.uniform(18, 38)) if tone == "dark"
                      else (rng.uniform(208, 242), -rng.uniform(18, 38)))
    tint = rng.uniform(-8, 8, size=3)
    ground = tuple(tuple(np.clip(level + tint, 0, 255).tolist()) for level in (base, base + contrast))
    return Scene(tuple(objects), tone, texture, _caption(rng, objects, tone, texture), ground,
                 float(rng.uniform(8, 13)), float(rng.uniform(0, np.pi)), tuple(rng.random(2).tolist()))


def _place(rng, sizes, tries=256):
    """[(x, y, radius)], the first of random layouts where no two boxes meet and every relation is clear, or None."""
    n = len(sizes)
    radius = np.array([RADIUS[size] for size in sizes]) * rng.uniform(0.92, 1.08, size=n)
    low = radius[:, None] + MARGIN
    xy = low + rng.random((tries, n, 2)) * (SIZE - 2 * low)                     # [tries, n, 2]
    good = np.ones(tries, bool)
    for i in range(n):
        for j in range(i):
            apart = np.sort(np.abs(xy[:, i] - xy[:, j]), axis=1)                # smaller axis, larger axis
            good &= (apart[:, 1] >= radius[i] + radius[j] + GAP) & (apart[:, 1] >= apart[:, 0] + CLEAR)
    return [(*point, r) for point, r in zip(xy[good.argmax()].tolist(), radius.tolist())] if good.any() else None


def _caption(rng, objects, tone, texture):
    def one_of(words):
        return words[rng.integers(len(words))]

    def name(thing):
        size = one_of(SIZE_WORDS[thing.size]) + " " if rng.random() < SAY_SIZE else ""
        words = f"{size}{thing.colour} {thing.shape}"
        return ("an " if words[0] == "o" else "a ") + words

    names = [name(thing) for thing in objects]
    join = one_of((" and ", " with "))
    if len(names) == 1:
        text = names[0]
    elif rng.random() < SAY_RELATION:
        text = f"{names[0]} {one_of(RELATION_WORDS[relation(objects[0], objects[1])])} {names[1]}"
        if len(names) == 3:                             # "the" says which of the two is meant
            known = objects[rng.integers(2)]
            text += (f"{join}{names[2]} {one_of(RELATION_WORDS[relation(objects[2], known)])} "
                     f"the {known.colour} {known.shape}")
    else:
        text = ", ".join(names[:-1]) + join + names[-1]
    if rng.random() < SAY_BACKGROUND:
        words = one_of((tone, texture, f"{tone} {texture}"))
        text += one_of((" on a ", ", on a ", " against a ")) + words + " background"
    return text


_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_RELATIONS = {word: rel for rel, words in RELATION_WORDS.items() for word in words}
_BACKGROUND = re.compile(rf"^(.*?),? (?:on|over|against) (?:an? |the )?(?:({'|'.join(TONES)}),? )?"
                         rf"(?:({'|'.join(TEXTURES)}) )?background$")
_OBJECT = re.compile(rf"\b(?:(an?|the|one) )?(?:({'|'.join(_SIZES)}),? )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_JOIN = re.compile(r"(?:,|and|with|, and|, with)$")


def parse(caption):
    """The Claim of a caption. Case, spaces, "a" or "an" and a full stop don't matter. ValueError, one line, if it
    names no object or holds words that the grammar lacks."""
    text = re.sub(r"\s+", " ", caption.lower().replace(",", " , ")).replace(" ,", ",").strip(" .,")
    tone = texture = None
    if match := _BACKGROUND.match(text):
        text, tone, texture = match.groups()
    objects, relations, previous, end = [], [], None, 0
    for match in _OBJECT.finditer(text):
        article, size, colour, shape = match.groups()
        between, end = text[end:match.start()].strip(), match.end()
        known = [i for i, (s, c, _) in enumerate(objects) if (s, c) == (shape, colour)]
        if article == "the" and known:
            this = known[-1]
        else:
            objects.append((shape, colour, _SIZES.get(size)))
            this = len(objects) - 1
        word = _RELATIONS.get(re.sub(r"^is ", "", between).replace("on the ", "to the "))
        if previous is not None and word and previous != this:
            relations.append((previous, word, this))
        elif between != "" if previous is None else not _JOIN.match(between):
            raise ValueError(f'caption "{caption}": cannot read "{between or match[0]}"')
        previous = this
    if not objects:
        raise ValueError(f'caption "{caption}" names no object: say a colour ({", ".join(COLOURS)}) '
                         f'and a shape ({", ".join(SHAPES)})')
    if rest := text[end:].strip(" ,"):
        raise ValueError(f'caption "{caption}": cannot read "{rest}"')
    return Claim(tuple(objects), tuple(relations), tone, texture)


def _star(points, inner):
    turn = np.arange(2 * points) * np.pi / points
    reach = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([reach * np.sin(turn), -reach * np.cos(turn)], axis=1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - (y.max() + y.min()) / 2], axis=1) / 16


_ROUND, _ARM = _star(24, 1.0), 0.34                     # a circle of 48 corners; half a cross's bar
OUTLINE = {                                             # polygons inside the box [-1, 1] x [-1, 1], y down
    "circle": _ROUND, "ring": _ROUND, "heart": _heart(), "star": _star(5, 0.44) * 1.05 + (0, 0.08),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86,
    "triangle": np.array([(0, -0.95), (1, 0.85), (-1, 0.85)]),
    "diamond": np.array([(0, -1), (0.78, 0), (0, 1), (-0.78, 0)]),
    "cross": np.array([(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM), (_ARM, 1),
                       (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]),
}
HOLE = 0.56                                             # a ring's inner radius
FINE = 4                                                # samples a pixel's side, averaged


def _background(scene, size):
    first, second = (np.array(colour, np.float32) for colour in scene.ground)
    if scene.texture == "plain":
        return np.broadcast_to(first, (size, size, 3))
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (SIZE / size)
    cos, sin, p = np.cos(scene.angle), np.sin(scene.angle), scene.period
    u = (cos * grid)[None, :] + (sin * grid)[:, None] + scene.phase[0] * p      # [size, size] pixels
    v = (cos * grid)[:, None] - (sin * grid)[None, :] + scene.phase[1] * p
    # Edges one pixel wide: a picture without aliasing needs no supersampling here.
    sharp = size / SIZE
    if scene.texture == "striped":
        mix = np.sin(u * (2 * np.pi / p)) * (p / (2 * np.pi)) * sharp
    elif scene.texture == "dotted":
        mix = (0.28 * p - np.hypot(u % p - p / 2, v % p - p / 2)) * sharp
    else:
        mix = np.sin(u * (np.pi / p)) * np.sin(v * (np.pi / p)) * (p / np.pi) * sharp
    return first + np.clip(mix + 0.5, 0, 1)[:, :, None] * (second - first)


def draw(scene, size=SIZE):
    """The scene as a PIL RGB image of size x size pixels, antialiased."""
    picture = Image.fromarray((_background(scene, size) + 0.5).astype(np.uint8))
    scale = size / SIZE
    for thing in scene.objects:
        x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
        left, top, side = int(x - r), int(y - r), int(2 * r) + 3
        centre = np.array([x - left, y - top]) * FINE
        mask = Image.new("L", (side * FINE, side * FINE))
        pen = ImageDraw.Draw(mask)
        pen.polygon((OUTLINE[thing.shape] * (r * FINE) + centre).ravel().tolist(), fill=255)
        if thing.shape == "ring":
            pen.polygon((OUTLINE["circle"] * (HOLE * r * FINE) + centre).ravel().tolist(), fill=0)
        picture.paste(thing.rgb, (left, top), mask.reduce(FINE))
    return picture


def batch(seed, start, n, split="train"):
    """Scenes start ... start + n - 1: (uint8 array [n, 64, 64, 3], n captions, n Scenes)."""
    scenes = [scene(seed, start + i, split) for i in range(n)]
    pictures = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i, one in enumerate(scenes):
        pictures[i] = draw(one)
    return pictures, [one.caption for one in scenes], scenes


def captions(seed, start, n, split="train"):
    """The captions of scenes start ... start + n - 1, one by one, without drawing."""
    return (scene(seed, start + i, split).caption for i in range(n))


def grid(seed=0, columns=6, rows=5, split="train", side=160):
    """A labelled contact sheet: a PIL image of columns x rows scenes, each drawn `side` pixels wide."""
    sheet = Image.new("RGB", (columns * (side + 10) + 10, rows * (side + 66) + 10), "white")
    for i in range(columns * rows):
        one, x, y = scene(seed, i, split), 10 + i % columns * (side + 10), 10 + i // columns * (side + 66)
        sheet.paste(draw(one).resize((side, side), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + side + 2), textwrap.fill(one.caption, side // 5 - 2), fill="black",
                                   spacing=1)
    return sheet


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--captions", type=cli.positive, metavar="N", help="write N captions, one a line, to --out")
    parser.add_argument("--pictures", type=cli.positive, metavar="N",
                        help="draw N scenes into the folder --out, as 000000.png and so on")
    parser.add_argument("--out", type=Path, help="default: captions.txt, or the folder scenes")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="draw a labelled grid of scenes")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--start", type=cli.seed, default=0, help="index of the first caption or scene")
    parser.add_argument("--split", choices=SPLITS, default="train")
    args = parser.parse_args()
    if not args.captions and not args.grid and not args.pictures:
        parser.error("nothing to do: give --captions N, --pictures N or --grid PNG")
    if args.captions and args.pictures:
        parser.error("--captions and --pictures write to one --out; ask for them one after the other")
    if args.grid and args.grid.suffix.lower() != ".png":
        parser.error(f"--grid {args.grid} is no .png file; give it that ending")
    args.out = args.out or Path("scenes" if args.pictures else "captions.txt")
    for path in filter(None, (args.captions and args.out, args.grid)):
        path.parent.mkdir(parents=True, exist_ok=True)
    from checkpoint import write, write_by                 # here: it imports torch
    if args.captions:
        write(args.out, "".join(
            f"{line}\n" for line in captions(args.seed, args.start, args.captions, args.split)).encode())
    if args.pictures:
        args.out.mkdir(parents=True, exist_ok=True)
        for i in range(args.pictures):
            write_by(draw(scene(args.seed, args.start + i, args.split)).save, args.out / f"{i:06d}.png")
    if args.grid:
        write_by(grid(args.seed, split=args.split).save, args.grid)


if __name__ == "__main__":
    cli.run(main)
