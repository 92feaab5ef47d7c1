"""Tables in the documentation, between two marks of a Markdown page."""

from pathlib import Path

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def put_tables(page: Path, tables: str) -> None:
    """Put tables into a page, in the place of those that it has."""
    before, rest = page.read_text().split(f"{BEGIN}\n")
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")
