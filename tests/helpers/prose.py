"""How a Markdown text reads, in figures: python tests/helpers/prose.py README.md docs/*.md

Prose is what is left without code blocks, tables, headings and comments. A sentence ends with a full stop, a question
mark, an exclamation mark, or its paragraph. Inline code counts as one word and as no number.
"""

import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

# words of a dialect that this project had once, and what the field says instead
BANNED = {
    r"mend(s|ed|ing)?": "fix",
    r"can not": "cannot",
    r"pictures?": "image or frame",
    r"go(es)? on with|went on": "resume or continue",
    r"dealt|dealing": "shuffle, assign",
    r"told": "the instruction says, the flag sets",
    r"film(s|ed|ing)?": "record",
    r"without a word": "silently",
    r"learnt by heart": "memorised",
    r"makes? anew": "make again",
    r"looked at by": "checked by",
    r"besides": "also",
}
IMAGE, LINK = re.compile(r"!\[[^\]]*\]\([^)]*\)"), re.compile(r"\[([^\]]*)\]\([^)]*\)")
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d,.:]*")


class Prose(NamedTuple):
    """Figures of one text."""

    sentences: list[str]
    median_words: float  # per sentence
    semicolons: float  # per 100 words
    most_numbers: int  # in one sentence
    banned: list[str]  # each with what to write instead


def paragraphs(markdown: str) -> list[str]:
    """The paragraphs and list items of a text, each on one line, without what is no prose."""
    text = re.sub(r"^```.*?^```", "\n", markdown, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^(#|\|).*$", "\n", text, flags=re.M)  # headings and tables
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n", text, flags=re.M)  # a list item is a paragraph
    text = LINK.sub(r"\1", IMAGE.sub("", text))
    text = re.sub(r"`[^`]+`", "code", text)
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part.replace("*", "") for part in joined if part]


def sentences_of(markdown: str) -> list[str]:
    """The sentences of a text, in order."""
    return [
        sentence for part in paragraphs(markdown) for sentence in re.split(r"(?<=[.!?])\s+", part) if sentence.strip()
    ]


def measure(markdown: str) -> Prose:
    """The figures of a text. Banned words are looked for in tables too, but not in code."""
    sentences = sentences_of(markdown)
    lengths = [len(sentence.split()) for sentence in sentences]
    words = max(1, sum(lengths))
    text = re.sub(r"`[^`]+`", "", re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M))
    banned = [
        f"{found[0]!r} (write: {instead})"
        for word, instead in BANNED.items()
        for found in re.finditer(rf"\b({word})\b", text, flags=re.I)
    ]
    return Prose(
        sentences,
        statistics.median(lengths) if lengths else 0.0,
        100 * sum(sentence.count(";") for sentence in sentences) / words,
        max((len(NUMBER.findall(sentence)) for sentence in sentences), default=0),
        banned,
    )


def main(paths: list[str]) -> None:
    print(f"{'file':32} {'words':>6} {'median':>6} {'longest':>7} {'; /100':>6} {'numbers':>7}")
    for path in paths:
        prose = measure(Path(path).read_text())
        lengths = [len(sentence.split()) for sentence in prose.sentences]
        figures = f"{sum(lengths):6} {prose.median_words:6.1f} {max(lengths, default=0):7}"
        print(f"{path:32} {figures} {prose.semicolons:6.2f} {prose.most_numbers:7}")
        for sentence in prose.sentences:
            if len(sentence.split()) > 25 or len(NUMBER.findall(sentence)) > 3:
                print(f"    {sentence}")
        for word in prose.banned:
            print(f"    {word}")


if __name__ == "__main__":
    main(sys.argv[1:])
