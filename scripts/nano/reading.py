"""One word in a picture, in fonts of Debian packages; those of the test are other families.

The table `FONTS` says which: relatives by design (Carlito was made from Lato) are in the same split. Words are the same
in both splits. Pictures are 128 to 192 pixels wide and 32 to 64 high.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from omni_jax.errors import InputError
from scripts.nano.pictures import paper, picture_part, png, shown
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.text import wording
from scripts.nano.words import IT_SAYS, NOUNS, NUMBERS

ROOT = Path("/usr/share/fonts")
# The Debian package of each family, the pattern of its files, and its split.
FONTS: dict[str, tuple[str, str, Split]] = {
    "Liberation Sans": ("fonts-liberation", "truetype/liberation/LiberationSans-*.ttf", "train"),
    "Liberation Sans Narrow": ("fonts-liberation", "truetype/liberation/LiberationSansNarrow-*.ttf", "train"),
    "Liberation Serif": ("fonts-liberation", "truetype/liberation/LiberationSerif-*.ttf", "train"),
    "Liberation Mono": ("fonts-liberation", "truetype/liberation/LiberationMono-*.ttf", "train"),
    "DejaVu Sans": ("fonts-dejavu-core", "truetype/dejavu/DejaVuSans*.ttf", "train"),
    "DejaVu Serif": ("fonts-dejavu-core", "truetype/dejavu/DejaVuSerif*.ttf", "train"),
    "FreeSans": ("fonts-freefont-ttf", "truetype/freefont/FreeSans*.ttf", "train"),
    "FreeSerif": ("fonts-freefont-ttf", "truetype/freefont/FreeSerif*.ttf", "train"),
    "FreeMono": ("fonts-freefont-ttf", "truetype/freefont/FreeMono*.ttf", "train"),
    "Roboto": ("fonts-roboto-unhinted", "truetype/roboto/unhinted/RobotoTTF/*.ttf", "train"),
    "Open Sans": ("fonts-open-sans", "truetype/open-sans/OpenSans-*.ttf", "train"),
    "Cantarell": ("fonts-cantarell", "opentype/cantarell/*.otf", "train"),
    "Quicksand": ("fonts-quicksand", "truetype/quicksand/*.ttf", "train"),
    "Inconsolata": ("fonts-inconsolata", "truetype/inconsolata/*.*tf", "train"),
    "Libertine, Biolinum": ("fonts-linuxlibertine", "opentype/linux-libertine/*_R*.otf", "train"),
    "Caladea": ("fonts-crosextra-caladea", "truetype/crosextra/Caladea-*.ttf", "train"),
    "Hack": ("fonts-hack", "truetype/hack/*.ttf", "train"),
    "Fira Code": ("fonts-firacode", "truetype/firacode/*.ttf", "train"),
    "Dosis": ("fonts-dosis", "opentype/dosis/*.otf", "train"),
    "Vollkorn": ("fonts-vollkorn", "truetype/vollkorn/*.ttf", "train"),
    "Junicode": ("fonts-junicode", "opentype/junicode/*.otf", "train"),
    "Didot": ("fonts-gfs-didot", "opentype/didot/*.otf", "train"),
    "Play": ("fonts-play", "truetype/play/*.ttf", "train"),
    "Jura": ("fonts-jura", "opentype/jura/*.otf", "train"),
    "Courier Prime": ("fonts-courier-prime", "opentype/courier-prime/*.otf", "train"),
    "Comfortaa": ("fonts-comfortaa", "truetype/comfortaa/*.ttf", "train"),
    "C059": ("fonts-urw-base35", "opentype/urw-base35/C059-*.otf", "train"),
    "P052": ("fonts-urw-base35", "opentype/urw-base35/P052-*.otf", "train"),
    "Bookman": ("fonts-urw-base35", "opentype/urw-base35/URWBookman-*.otf", "train"),
    "Gothic": ("fonts-urw-base35", "opentype/urw-base35/URWGothic-*.otf", "train"),
    "Charis": ("fonts-sil-charis", "truetype/charis/*.ttf", "train"),
    "JetBrains Mono": ("fonts-jetbrains-mono", "truetype/jetbrains-mono/*.ttf", "train"),
    "Averia Sans": ("fonts-averia-sans-gwf", "truetype/averia-gwf/AveriaSans*.ttf", "train"),
    "Averia Serif": ("fonts-averia-serif-gwf", "truetype/averia-gwf/AveriaSerif*.ttf", "train"),
    "Universalis": ("fonts-adf-universalis", "truetype/adf/Universalis*.otf", "train"),
    "Libris": ("fonts-adf-libris", "truetype/adf/Libris*.otf", "train"),
    "Berenis": ("fonts-adf-berenis", "truetype/adf/BerenisADFPro-*.otf", "train"),
    "Baskervald": ("fonts-adf-baskervald", "truetype/adf/Baskervald*.otf", "train"),
    "Tribun": ("fonts-adf-tribun", "truetype/adf/Tribun*.otf", "train"),
    "Verana": ("fonts-adf-verana", "truetype/adf/Verana*.otf", "train"),
    "Irianis": ("fonts-adf-irianis", "truetype/adf/IrianisADFStd*.otf", "train"),
    "Switzera": ("fonts-adf-switzera", "truetype/adf/Switzera*.otf", "train"),
    "Solothurn": ("fonts-adf-solothurn", "truetype/adf/Solothurn*.otf", "train"),
    "Old Standard": ("fonts-oldstandard", "truetype/fonts-oldstandard/*.ttf", "train"),
    "Quattrocento": ("fonts-quattrocento", "opentype/quattrocento/*.otf", "train"),
    "Mononoki": ("fonts-mononoki", "truetype/mononoki/*.ttf", "train"),
    "Kaffeesatz": ("fonts-yanone-kaffeesatz", "opentype/yanone-kaffeesatz/*.otf", "train"),
    "League Spartan": ("fonts-league-spartan", "opentype/league-spartan/*.otf", "train"),
    "Prociono": ("fonts-prociono", "opentype/fonts-prociono/*.otf", "train"),
    "Loma": ("fonts-tlwg-loma-ttf", "truetype/tlwg/Loma*.ttf", "train"),
    "Kinnari": ("fonts-tlwg-kinnari-ttf", "truetype/tlwg/Kinnari*.ttf", "train"),
    "Anonymous Pro": ("fonts-anonymous-pro", "truetype/anonymous-pro/*.ttf", "train"),
    "Oxygen": ("fonts-oxygen", "truetype/oxygen/*.ttf", "train"),
    "M+ 1": ("fonts-mplus", "opentype/mplus/Mplus1-*.otf", "train"),
    "Karla": ("fonts-karla", "truetype/karla/*.otf", "train"),
    "Inter": ("fonts-inter", "opentype/inter/Inter-*.otf", "train"),
    "Monoid": ("fonts-monoid", "truetype/monoid/Monoid-*.ttf", "train"),
    "National Park": ("fonts-national-park", "opentype/national-park/NationalPark-*.otf", "train"),
    "Manrope": ("fonts-manrope", "truetype/manrope/*.ttf", "train"),
    "Agave": ("fonts-agave", "truetype/agave/*.ttf", "train"),
    "Neohellenic": ("fonts-gfs-neohellenic", "opentype/neohellenic/*.otf", "train"),
    "Artemisia": ("fonts-gfs-artemisia", "opentype/artemisia/*.otf", "train"),
    "Humor Sans": ("fonts-humor-sans", "truetype/humor-sans/*.ttf", "train"),
    "OpenDyslexic": ("fonts-opendyslexic", "opentype/opendyslexic/OpenDyslexic-*.otf", "train"),
    "Century Catalogue": ("fonts-century-catalogue", "truetype/fonts-century-catalogue/*.ttf", "train"),
    "Goudy Bookletter": ("fonts-goudybookletter", "opentype/sortsmill/GoudyBookletter1911.otf", "train"),
    "Lato": ("fonts-lato", "truetype/lato/*.ttf", "test"),
    "Carlito": ("fonts-crosextra-carlito", "truetype/crosextra/Carlito-*.ttf", "test"),
    "EB Garamond": ("fonts-ebgaramond", "opentype/ebgaramond/EBGaramond12*.otf", "test"),
    "Comic Neue": ("fonts-comic-neue", "opentype/comic-neue/*.otf", "test"),
    "Cabin": ("fonts-cabin", "opentype/cabin/*.otf", "test"),
    "Gentium": ("fonts-sil-gentium", "truetype/gentium/*.ttf", "test"),
    "B612": ("fonts-b612", "opentype/b612/*.otf", "test"),
}
# Of files that are too thin to be read small, or hold no plain letters.
UNREADABLE = ("Thin", "Hairline", "Light", "SC", "AllSC", "Initials", "MathTeX", "Outline")
READ = (
    "What does it say?", "Read the word.", "Which word is written here?", "What is written in the picture?",
    "Read the text in the picture.", "What does the picture say?", "Which word do you see?", "Please read this.",
    "Can you read the word?", "Tell me what is written here.", "What word is this?", "Read what is written.",
    "Which word does the picture show?", "Read this word to me.", "Tell me which word you see.",
)  # fmt: skip


class Lettering(NamedTuple):
    """The letters of a word in small, their edges in shares of the width, and the height of their middle in shares."""

    text: str
    edges: list[float]
    middle: float


class Look(NamedTuple):
    """How the letters of a word differ from their font's.

    finer: they are drawn so many times larger. stretch: of the width. spacing: more between letters, in sizes of the
    font. weight: pixels of the larger drawing that each stroke gains on each side, -1 to 2. slant: to the right.
    """

    finer: int
    stretch: float
    spacing: float
    weight: int
    slant: float


PLAIN = Look(1, 1.0, 0.0, 0, 0.0)


def reading_sense(scale: float = 1.0) -> Sense:
    """The sense of words that are read."""
    return Sense("read", read, counts(scale, 60_000, 600))


def read(draw: np.random.Generator, split: Split) -> Sample:
    """A word, read from a picture."""
    word = pick(draw, (*NOUNS, *NUMBERS))
    family = pick(draw, sorted(fonts(split)))
    picture = word_picture(draw, word, pick(draw, fonts(split)[family]), split == "train")
    asked = shown(draw, wording(draw, READ, split), picture_part("word.png"))
    return Sample([user(*asked), assistant(IT_SAYS.format(word))], word, {"word.png": picture})


@lru_cache(2)
def fonts(split: Split) -> dict[str, tuple[Path, ...]]:
    """The files of a split's families; InputError that names the packages of those that are missing."""
    found = {family: _files(pattern) for family, (_, pattern, _) in FONTS.items()}
    missing = sorted({FONTS[family][0] for family, files in found.items() if not files})
    if missing:
        raise InputError(f"fonts are missing; install them with: apt-get install {' '.join(missing)}")
    return {family: found[family] for family, (_, _, of) in FONTS.items() if of == split}


def _files(pattern: str) -> tuple[Path, ...]:
    return tuple(sorted(path for path in ROOT.glob(pattern) if not any(part in path.stem for part in UNREADABLE)))


def word_picture(draw: np.random.Generator, word: str, font: Path, varied: bool) -> bytes:
    """A picture of a word, PNG; varied: in letters that differ from the font's."""
    return png(lettered(draw, word, font, varied)[0])


def lettered(draw: np.random.Generator, word: str, font: Path, varied: bool) -> tuple[Image.Image, Lettering]:
    """A picture of a word, and where its letters are."""
    width, height = int(pick(draw, (128, 160, 192))), int(pick(draw, (32, 64)))
    text = pick(draw, (word,) * 7 + (word.capitalize(),) * 2 + (word.upper(),))
    mask, lettering = _set(draw, text, font, width, height, _look(draw) if varied else PLAIN)
    ink = np.asarray(_turned(draw, mask), np.float32)[..., None] / 255
    light, dark = draw.uniform(165, 255) + draw.uniform(-25, 25, 3), draw.uniform(0, 70) + draw.uniform(-10, 70, 3)
    if draw.random() < 0.25:
        light, dark = dark, light
    surface = paper(draw, height, width, light, draw.uniform(0, 12))
    mixed = Image.fromarray(np.clip(surface + ink * (dark - surface), 0, 255).astype(np.uint8))
    soft = draw.random() < 0.25
    return mixed.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 0.8))) if soft else mixed, lettering


def _look(draw: np.random.Generator) -> Look:
    """A look that makes one font many."""
    weight = int(pick(draw, (-1, 0, 0, 1, 2)))
    return Look(3, draw.uniform(0.8, 1.25), draw.uniform(-0.02, 0.12), weight, draw.uniform(-0.15, 0.25))


def _set(
    draw: np.random.Generator, text: str, font: Path, width: int, height: int, look: Look
) -> tuple[Image.Image, Lettering]:
    """A word in a mask, as large as its place allows or somewhat smaller, somewhere; and where its letters are."""
    spaces, narrow = look.spacing * (len(text) - 1), width / look.stretch
    left, top, right, bottom = ImageFont.truetype(font, 100).getbbox(text)
    most = min(
        0.92 * narrow / (right - left + 100 * spaces), 0.86 * height / (bottom - top), 0.42 * max(48, height) / 75
    )
    size = max(100 * most * draw.uniform(0.72, 1), min(100 * most, 15))
    shown = ImageFont.truetype(font, round(look.finer * size))
    left, top, right, bottom = shown.getbbox(text)
    space = look.spacing * shown.size
    room = np.array([round(look.finer * narrow), look.finer * height])
    free = room - (right - left + space * (len(text) - 1), bottom - top)
    x, y = free / 2 + draw.uniform(-0.4, 0.4, 2) * free
    mask = Image.new("L", tuple(room.tolist()))
    pen, starts = ImageDraw.Draw(mask), [shown.getlength(text[:i]) + space * i for i in range(len(text) + 1)]
    for begin, letters in zip(starts, text, strict=False) if look.spacing else ((0.0, text),):
        pen.text((round(x - left + begin), round(y - top)), letters, 255, shown)
    edges = [(round(x - left) + start) / room[0] for start in starts]
    lettering = Lettering(text.lower(), edges, (y + (bottom - top) / 2) / room[1])
    return _changed(mask, look, lettering.middle).resize((width, height), Image.Resampling.BOX), lettering


def _changed(mask: Image.Image, look: Look, middle: float) -> Image.Image:
    """A mask with thicker or thinner and slanted letters, as far as nothing leaves it."""
    if look.weight:
        mask = mask.filter(ImageFilter.MaxFilter(2 * look.weight + 1) if look.weight > 0 else ImageFilter.MinFilter(3))
    slant = (1.0, look.slant, -look.slant * middle * mask.height, 0.0, 1.0, 0.0)
    slanted = mask.transform(mask.size, Image.Transform.AFFINE, slant, Image.Resampling.BILINEAR)
    return mask if not look.slant or _is_cut(slanted) else slanted


def _turned(draw: np.random.Generator, mask: Image.Image) -> Image.Image:
    """A mask turned by at most four degrees, as far as nothing leaves it."""
    angle = draw.uniform(-4, 4)
    turned = mask.rotate(angle, Image.Resampling.BICUBIC)
    return mask if _is_cut(turned) else turned


def _is_cut(mask: Image.Image) -> bool:
    """Whether letters reach the edge of a mask."""
    values = np.asarray(mask)
    return max(values[0].max(), values[-1].max(), values[:, 0].max(), values[:, -1].max()) > 40
