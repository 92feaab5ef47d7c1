"""Tables in the documentation, between two marks of a Markdown page."""

from collections.abc import Iterable, Sequence
from pathlib import Path

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def put_tables(page: Path, tables: str) -> None:
    """Put tables into a page, in the place of those that it has."""
    before, rest = page.read_text().split(f"{BEGIN}\n")
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


def table_lines(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown, line by line."""
    lines = [titles, *rows]
    text = [f"| {' | '.join(map(str, cells))} |" for cells in lines]
    return [text[0], "|---" * len(titles) + "|", *text[1:]]
