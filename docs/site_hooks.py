"""What mkdocs calls while it builds the website: pages outside docs/, and links to code, work there too.

README.md becomes the first page. A linked text of the repository (RESULTS.md, dev/LOG.md) becomes a page, and so does
a linked file of code. On GitHub the same links lead to the files themselves.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)((?:#[^)]*)?\))")
SEARCH = {"glossary.md": {"boost": 4}, "dev/LOG.md": {"exclude": True}}  # its many headings would come first
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}


def place_of(path: Path) -> str:
    """A file of the repository -> where it is in the website."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return name if path.suffix == ".md" else f"source/{name}.md"


def file_at(place: str) -> Path:
    """The other way round."""
    if place == "index.md":
        return ROOT / "README.md"
    if place.startswith("source/"):
        return ROOT / place.removeprefix("source/").removesuffix(".md")
    inside = ROOT / "docs" / place
    return inside if inside.exists() else ROOT / place


def linked_files(page: Path) -> set[Path]:
    """Files of the repository that a text links."""
    targets = {(page.parent / target).resolve() for _, target, _ in LINK.findall(page.read_text(encoding="utf-8"))}
    return {target for target in targets if target.is_file()}


def on_files(files, config):
    """Add the first page, and every file outside docs/ that a page links."""
    from mkdocs.structure.files import File  # the tests import this module without mkdocs

    found, queue = set(), [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    while queue:
        page = queue.pop()
        if page in found:
            continue
        found.add(page)
        if page.suffix == ".md":
            queue += linked_files(page)
    for path in sorted(found):
        place, text = place_of(path), None
        if (ROOT / "docs") in path.parents:
            continue
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
        else:
            code = path.read_text(encoding="utf-8")
            head = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---\n\n"
            text = f"{head}# {path.relative_to(ROOT)}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{code}\n````\n"
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links of the repository -> links of the website."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    if here in SEARCH:
        page.meta["search"] = SEARCH[here]

    def moved(link: re.Match) -> str:
        target = (file_at(here).parent / link[2]).resolve()
        return link[1] + os.path.relpath(place_of(target), os.path.dirname(here) or ".") + link[3]

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page, config, files) -> str:
    """No line ends inside a flag: browsers break after hyphens."""

    def whole(code: re.Match) -> str:
        return "<code>" + re.sub(r"(--[\w-]+)", r'<span class="flag">\1</span>', code[1]) + "</code>"

    return re.sub(r"<code>([^<]*)</code>", whole, html)
