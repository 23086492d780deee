"""Reading text that a user wrote, by lines as JSON and other tools count them."""

from __future__ import annotations

from pathlib import Path

from scalefold.compiler.errors import CalibrationError


def read_text(path: Path, remedy: str = "give UTF-8 text") -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put in front.

    Raises:
        CalibrationError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"it cannot be read ({error})", where=str(path), remedy=remedy) from error


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1.

    Only line feeds end a line: `str.splitlines` would also cut at U+2028 and the like, which a JSON string may hold.
    """
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
