"""One tree of errors, each a single sentence that says what is wrong, where, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ScalefoldError(Exception):
    """A fault the user can act on; printed as one sentence, without a traceback.

    Args:
        what: what is wrong, starting in lower case and without a full stop.
        where: the file, layer, key or pattern it was found in.
        remedy: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str, remedy: str) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(f"{where}: {what}; {remedy}.")


class SourceError(ScalefoldError):
    """The model to compile cannot be found, read or exported."""


class GraphError(ScalefoldError):
    """The graph was read but is not one that can be compiled."""


class RecipeError(ScalefoldError):
    """The recipe has faults; all of them are reported at once.

    Args:
        faults: one `key: what is wrong` each.
        where: the recipe's file or name.
    """

    def __init__(self, faults: Sequence[str], *, where: str) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(
            f"{count} in the recipe: {' | '.join(self.faults)}",
            where=where,
            remedy="mend them; `scalefold recipes` lists the named recipes and their keys",
        )


class PatternError(ScalefoldError):
    """A pattern that selects layers matches none of them."""


class CalibrationError(ScalefoldError):
    """The calibration data is missing, empty, or does not fit the model."""


class KernelError(ScalefoldError):
    """A layer that was planned as an integer kernel did not become one."""

    exit_code = 3


class OutputError(ScalefoldError):
    """The output folder cannot be written."""


class InterruptError(BaseException):
    """The user stopped the run. As KeyboardInterrupt it is no `Exception`: libraries take those for faults of their own."""

    exit_code = 130

    def __init__(self, what: str, *, where: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}; {remedy}.")


@contextmanager
def needing_packages(purpose: str, remedy: str) -> Iterator[None]:
    """Import what only some uses need, and say so where it is not installed.

    Args:
        purpose: what needs it, as the subject of a sentence.
        remedy: what the user can do about it.

    Raises:
        SourceError: a package that is imported inside is missing.
    """
    try:
        yield
    except ImportError as error:
        what = f"{purpose} needs the package {error.name or error}"
        raise SourceError(what, where="the Python installation", remedy=remedy) from error
