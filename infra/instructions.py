"""Instructions: text cleaned and compared, the leak rule, and writing one from two captions."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

Silence = Literal["no difference", "no word in common", "no new word", "too different"]

_CAPTION_LIMIT = 1_000  # characters: comparing words is quadratic
_SHARED_LIMIT = 10  # words
_CHANGE_LIMIT = 6  # words
_REGION_LIMIT = 2

_SPELLING = "\u200c\u200d"  # format characters that several scripts need
_APOSTROPHES = "'\u2019"
_LIKE = str.maketrans({**dict.fromkeys(_SPELLING, ""), "\u2019": "'"})
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn"}  # Unicode categories
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3040-\u30ff"

# What names an author, a container or a date instead of anything to be seen.
_BOILERPLATE = [
    re.compile(
        r"^(?i:clip ?art|image|picture|photo|photograph|drawing|illustration|icon)s?"
        r" (?i:by) .{1,60}? [-\u2013\u2014:] "
    ),
    re.compile(r",? by (?:[A-Z]\S* ){1,3}[A-Z]\S*(?: \d{4})?\.?$"),
    re.compile(r"^part of (?:the|a) .*\b(?:collection|set|series|pack|library)\b.*$", re.I),
    re.compile(r"\([^()]*\d{4}[^()]*\)"),
    re.compile(
        r"^[\W_]*(?:[^\W_]+[\W_]+){0,3}(?:iconset|icons|signs|symbols|clip ?arts?|collections?"
        r"|themes?|gallery|album|samples|templates|maps)[\W_]*$",
        re.I,
    ),
]

# Words whose presence in one caption only says nothing about a picture. English, and the
# articles and prepositions of its neighbours, because captions mix them.
_SILENT_WORDS = """
    a an and are as at be by for from has have in into is it its of on or that the their this to
    was were with without der die das ein eine und von mit de la le les el los las un une des du et
    y il lo gli di e o da
    bw clip clipart collection color colour copy design draft drawing file final gif icon iconset
    icons illustration image img jpeg jpg logo new ori original part photo pic picture png remix
    sample series set simple style stylised stylized svg symbol theme untitled updated
    various vector version
"""
_SILENT = frozenset(_SILENT_WORDS.split())


class Word(NamedTuple):
    """A word as written, as compared, and whether it says anything about a picture."""

    text: str
    key: str
    speaks: bool


class Difference(NamedTuple):
    """What two captions share, and the (new, gone) phrases in which the target differs.

    `gone` is empty where the target adds a word and replaces none. `names_the_thing` says that
    the shared words end a caption of bare words, where English puts the noun.
    """

    shared: str
    names_the_thing: bool
    changes: list[tuple[str, str]]


def clean(text: str) -> str:
    """NFC, one line, without control, direction and other invisible format characters."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    kept = (
        " " if char.isspace() else char
        for char in unicodedata.normalize("NFC", text)
        if char.isspace() or char in _SPELLING or unicodedata.category(char) not in _INVISIBLE
    )
    return " ".join("".join(kept).split())


def words(text: str) -> list[Word]:
    """The words of a text in any script; each Han character counts as one."""
    runs = ("".join(run) for kind, run in groupby(text, _kind) if kind == "word")
    pieces = (piece for run in runs for piece in re.split(f"([{_HAN}])", run))
    return [_word(piece) for raw in pieces if (piece := raw.strip(_APOSTROPHES + _SPELLING))]


@lru_cache(4096)
def _kind(char: str) -> str:
    in_word = unicodedata.category(char)[0] in "LMN" or char in _APOSTROPHES + _SPELLING
    return "word" if in_word else "between"


def _word(text: str) -> Word:
    key = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    key = key.removesuffix("'s")
    single_letter = len(key) == 1 and not re.match(f"[{_HAN}]", key)
    speaks = not (single_letter or key in _SILENT or any(map(str.isnumeric, key)))
    if len(key) > 3 and key.endswith("s") and not key.endswith(("ss", "us", "is")):
        key = key[:-1]
    return Word(text, key, speaks)


def distinct(instructions: Iterable[str]) -> list[str]:
    """The instructions that differ in more than case, punctuation and spacing, first ones first."""
    first: dict[tuple[str, ...], str] = {}
    for instruction in instructions:
        first.setdefault(_spoken(instruction), instruction)
    first.pop((), None)
    return list(first.values())


def gives_away(instruction: str, target_caption: str | None) -> bool:
    """Whether an instruction holds the target's caption, of two words or more, word for word."""
    if not target_caption:
        return False
    told, target_caption = _spoken(instruction), target_caption[:_CAPTION_LIMIT]
    return any(
        len(phrase) > 1 and _contains(told, phrase)
        for phrase in (_spoken(target_caption), _spoken(_without_boilerplate(target_caption)))
    )


# Names of picture files, whole or as cameras and programs count them.
_FILE_NAMES = re.compile(
    r"[\w)-]\.(?:jpe?g|png|gif|webp|svgz?|tiff?|bmp|avif|heic|psd|eps|ico)\b"
    r"|\b(?:img|dsc[fn]?|dscn|p?mvi|pict?|image|photo|screen ?shot|untitled|scan)[-_]?\d{2,}",
    re.IGNORECASE,
)
_PARTS_OF_THE_SETUP = re.compile(r"\b(?:source|target|query|second) (?:image|picture)s?\b", re.I)
_LONG_CAPTION = 5  # words that speak: a sentence about a picture needs those of a shorter one
_CHANGED_WORDS = 6  # one in so many may differ

Leak = Literal["quotes_caption", "rewords_caption", "names_file", "names_pictures"]


def leak(instruction: str, target_caption: str | None) -> Leak | None:
    """By what an instruction tells of the target as nobody would who looks for it, or None.

    `quotes_caption`: it holds the target's caption, of two words or more, word for word.
    `rewords_caption`: it holds nearly all words of a longer one, in whatever order; small words,
    case and plurals don't count. `names_file`: it names a file. `names_pictures`: it speaks of a
    source or target image, which the person who searches does not know of.
    """
    if gives_away(instruction, target_caption):
        return "quotes_caption"
    if target_caption and _rewords(instruction, target_caption):
        return "rewords_caption"
    if _FILE_NAMES.search(unicodedata.normalize("NFKC", instruction)):
        return "names_file"
    if _PARTS_OF_THE_SETUP.search(instruction):
        return "names_pictures"
    return None


def _rewords(instruction: str, caption: str) -> bool:
    """Whether at most one in six of the words of a longer caption is not in an instruction."""
    caption = caption[:_CAPTION_LIMIT]
    for text in {caption, _without_boilerplate(caption)}:
        told = Counter(word.key for word in words(clean(instruction)) if word.speaks)
        wanted = Counter(word.key for word in words(clean(text)) if word.speaks)
        missing = (wanted - told).total()
        if wanted.total() >= _LONG_CAPTION and missing * _CHANGED_WORDS <= wanted.total():
            return True
    return False


def _spoken(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared: what looks the same is the same."""
    return tuple(
        unicodedata.normalize("NFKC", word.text).translate(_LIKE).casefold()
        for word in words(clean(text))
    )


def _contains(told: tuple[str, ...], phrase: tuple[str, ...]) -> bool:
    starts = range(len(told) - len(phrase) + 1)
    return any(told[start : start + len(phrase)] == phrase for start in starts)


def _without_boilerplate(caption: str) -> str:
    for pattern in _BOILERPLATE:
        caption = pattern.sub(" ", caption)
    return caption.strip()


def difference(query_caption: str, target_caption: str) -> Difference | Silence:
    """What the target's caption says that the query's does not, or why nothing can be said.

    A word that is only missing from the target is no difference: captions name what is there.
    Numbers, single letters, articles and names of files, authors and collections say nothing.
    """
    query_core, target_core = (
        _without_boilerplate(clean(caption[:_CAPTION_LIMIT]))
        for caption in (query_caption, target_caption)
    )
    query, target = words(query_core), words(target_core)
    said, told = ([w for w in caption if w.speaks] for caption in (query, target))
    known, wanted = {word.key for word in said}, {word.key for word in told}
    if known == wanted:
        return "no difference"
    shared: list[Word] = []
    changes: list[tuple[list[Word], list[Word]]] = []
    matcher = SequenceMatcher(None, [w.key for w in said], [w.key for w in told], autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            shared += _between(target, told[j:j_end])
        elif any(word.key not in known for word in told[j:j_end]):
            gone = [word for word in said[i:i_end] if word.key not in wanted]
            changes.append((_between(target, told[j:j_end]), _between(query, gone)))
    bare = len(told) == len(target) and not re.search(r"[-_(/,:;]", target_core)
    return _judged(shared, changes, bare and shared[-1:] == target[-1:])


def _between(caption: list[Word], chosen: list[Word]) -> list[Word]:
    """The chosen words of a caption with the small words among them."""
    if not chosen:
        return []
    first, last = (
        next(place for place, word in enumerate(caption) if word is end)
        for end in (chosen[0], chosen[-1])
    )
    kept = {id(word) for word in chosen}
    return [w for w in caption[first : last + 1] if id(w) in kept or w.key in _SILENT]


def _judged(
    shared: list[Word], changes: list[tuple[list[Word], list[Word]]], thing: bool
) -> Difference | Silence:
    held = sum(word.speaks for word in shared)
    told = sum(word.speaks for new, _ in changes for word in new)
    if not held:
        return "no word in common"
    if not changes:
        return "no new word"
    longest = max(max(len(new), len(gone)) for new, gone in changes)
    if longest > _CHANGE_LIMIT or len(changes) > _REGION_LIMIT or told > 2 * held:
        return "too different"
    phrases = [(_phrase(new), _phrase(gone)) for new, gone in changes]
    return Difference(_phrase(shared[:_SHARED_LIMIT]), thing, phrases)


def _phrase(phrase: list[Word]) -> str:
    spaced = "".join(f" {word.text}" for word in phrase).strip()
    return re.sub(f"(?<=[{_HAN}{_KANA}]) (?=[{_HAN}{_KANA}])", "", spaced)


# Three kinds, so that the instructions of a pair differ in what they tell as well as in words:
# shared part and contrast, contrast alone, shared part and news. Shared words that
# end a bare English noun phrase name the thing ("maple leaf"); others may be anything ("electric").
_CONTRAST_ALONE = [
    "Like this one, but {contrast}",
    "Make it {contrast}",
    "The same kind of thing, only {contrast}",
    "Similar to this, though {contrast}",
]
_TEMPLATES = {
    "thing": [
        [
            "{shared}, but {contrast}",
            "The same kind of picture ({shared}), only {contrast}",
            "Also {shared}, but make it {contrast}",
            "Something like this {shared}: {contrast}",
        ],
        _CONTRAST_ALONE,
        [
            "Another {shared}, this time {new}",
            "{shared} again, now {new}",
            "One more {shared}, this one {new}",
            "A different {shared}: {new}",
        ],
    ],
    "anything": [
        [
            "Still {shared}, but {contrast}",
            "{shared} as well, but {contrast}",
            "{shared} like here, but {contrast}",
            "In common: {shared}. Different: {contrast}",
        ],
        _CONTRAST_ALONE,
        [
            "{shared} again, now {new}",
            "Once more {shared}, this time {new}",
            "Also {shared}: {new}",
            "{shared} too, this time {new}",
        ],
    ],
}
_CONTRASTS = ["{new} instead of {gone}", "{new} rather than {gone}", "{new} in place of {gone}"]


def from_captions(pair_id: str, query_caption: str, target_caption: str) -> list[str] | Silence:
    """One to three English instructions from the difference of two captions, or why there is none.

    The wording is picked by a hash of `pair_id`. The words of the captions stay in their language.
    """
    found = difference(query_caption, target_caption)
    if not isinstance(found, Difference):
        return found
    picks = hashlib.sha256(pair_id.encode()).digest()
    contrast = _CONTRASTS[picks[3] % len(_CONTRASTS)]
    told = {
        "shared": found.shared,
        "new": ", and ".join(new for new, _ in found.changes),
        "contrast": ", and ".join(
            contrast.format(new=new, gone=gone) if gone else new for new, gone in found.changes
        ),
    }
    kinds = _TEMPLATES["thing" if found.names_the_thing else "anything"]
    written = [
        kind[pick % len(kind)].format(**told) for kind, pick in zip(kinds, picks, strict=False)
    ]
    kept = [text for text in distinct(written) if not gives_away(text, target_caption)]
    return kept or "no new word"
