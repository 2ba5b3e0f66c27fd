"""dev/LOG.md is a notebook: newest first, every entry with its four parts, an index that leads somewhere."""

import re

from conftest import ROOT

LOG = (ROOT / "dev" / "LOG.md").read_text()
HEADING = re.compile(r"^## (\d{4}-\d\d-\d\d): (.+) \((positive|negative|mixed|open)\)$", re.M)
PARTS = ("Question", "Tried", "Result", "Decision")


def anchor(heading: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_entries_are_dated_and_the_newest_comes_first():
    headings = re.findall(r"^## (.+)$", LOG, re.M)
    assert headings[:2] == ["What we believe now", "How to read an entry"]
    entries = HEADING.findall(LOG)
    assert len(entries) == len(headings) - 2 > 100
    dates = [date for date, _, _ in entries]
    assert dates == sorted(dates, reverse=True)


def test_every_entry_has_its_four_parts_in_order():
    pieces = HEADING.split(LOG)[1:]
    for title, text in zip(pieces[1::4], pieces[3::4]):
        assert tuple(re.findall(r"^\*\*(\w+)\.\*\*", text, re.M)) == PARTS, title


def test_every_link_within_the_log_leads_to_one_entry():
    anchors = [anchor(heading) for heading in re.findall(r"^## (.+)$", LOG, re.M)]
    assert len(set(anchors)) == len(anchors)
    links = re.findall(r"\]\(#([^)]+)\)", LOG)
    assert len(links) > 40 and set(links) <= set(anchors), sorted(set(links) - set(anchors))


def test_what_we_believe_is_short_and_every_line_has_its_evidence():
    index = LOG.partition("## What we believe now\n")[2].partition("\n## ")[0]
    lines = re.split(r"^\d+\. ", index, flags=re.M)[1:]
    assert 10 <= len(lines) <= 15
    assert all("](#" in line for line in lines)
