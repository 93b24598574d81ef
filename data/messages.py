"""Text that the messages of this package share."""

from collections.abc import Sequence

SHOWN = 20  # lines


def one_or_list(problems: Sequence[str], summary: str) -> str:
    """Returns the only problem, or a summary and the first problems, one per line; `{n}` is their number."""
    if len(problems) == 1:
        return problems[0]
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([summary.format(n=len(problems)), *problems[:SHOWN], *more])


def counted(number: int, noun: str) -> str:
    """`1 block`, `12 blocks`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
