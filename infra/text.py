"""Untrusted text made harmless to show: one line, nothing hidden, a bounded length."""

import re
import unicodedata

# CSI and OSC sequences with their parameters, then any other escape and the character after it.
# C1 controls start sequences too, but in captions they are bytes of a wrongly decoded text.
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.")
# Joiners are format characters too, but Persian, Indic scripts and emoji are not readable without.
JOINERS = "\u200c\u200d"
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#!&~$:@^=])|(?<=www)(\.)|^(?=[-+])|^(\d+)(?=[.)](?: |$))")
# What chat templates and trainers of vision-language models take for something else than text:
# places of pictures and regions, LLaVA's marks around them, and control tokens of the ChatML,
# Llama, Mistral, Gemma and DeepSeek families.
MARKS = re.compile(
    r"<(?=/?(?:image|video|audio|region)[\w:-]*>|/?img>|IMG_CONTEXT>|ImageHere>|im_(?:start|end|patch)>"
    r"|/?s>|(?:unk|pad|bos|eos|mask)>|(?:start|end)_of_\w+>|</?SYS>>"
    r"|[|\uff5c][^<>\s]{1,64}[|\uff5c]>)"
    r"|\[(?=/?(?:INST|IMG(?:_BREAK|_END)?|TOOL_\w+|AVAILABLE_TOOLS)\])"
)
ELLIPSIS = "\u2026"


def plain(text: str, limit: int = 500) -> str:
    """One line of `limit` characters at most, as a reader sees it and a terminal cannot obey it.

    Drops ANSI sequences, control characters and those that turn the direction of text; breaks of
    lines become blanks, lone surrogates U+FFFD.
    """
    # Four times the limit: what is dropped may not cost time without bound either.
    cut = text[: 4 * limit]
    shown = "".join(map(_character, ANSI.sub("", cut))).strip()
    if len(shown) > limit or len(cut) < len(text):
        return shown[: limit - 1].rstrip() + ELLIPSIS
    return shown


def inert(text: str) -> str:
    """A text in which no trainer finds a place for a picture, or a control token: each mark gets a
    blank after its bracket. Inserting, unlike taking away, makes no new mark of what is around it.
    """
    return MARKS.sub(lambda found: f"{found[0]} ", text)


def markdown(text: str, limit: int = 500) -> str:
    """Plain text as Markdown that means just this text, in a paragraph or a cell of a table."""
    return MARKDOWN.sub(_escape, plain(text, limit))


def _character(character: str) -> str:
    category = unicodedata.category(character)
    if character in "\t\n\v\f\r\x85" or category in ("Zl", "Zp"):
        return " "
    if category == "Cs":
        return "\ufffd"
    return "" if category in ("Cc", "Cf") and character not in JOINERS else character


def _escape(found: re.Match[str]) -> str:
    number = found[3]
    return f"{number}\\" if number else f"\\{found[0]}"
