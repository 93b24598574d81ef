"""Goals for the GPU table, and whether they were met."""

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_session import Session

# Images/s of the fast variant over MAE's, both in column "now", with or without CUDA graphs.
FAST_OVER_MAE = {
    ("vit_base", 224): 1.8, ("vit_base", 384): 2.6, ("vit_base", 448): 3.3,
    ("vit_large", 224): 1.1, ("vit_large", 384): 1.6, ("vit_large", 448): 2.0,
}  # fmt: skip
LOMAR_OVER_AUTHORS = 2.0
MFU = {"vit_large": 0.45, "vit_huge": 0.50}  # of plain LoMaR at 224


@dataclass(frozen=True)
class Goal:
    """A value that should be at least `least`, or None if it was not measured."""

    name: str
    least: float
    value: float | None

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured (goal: {self.least:g})"
        verdict = "met" if self.value >= self.least else "NOT met"
        return f"{self.name}: {self.value:.2f} (goal: {self.least:g}, {verdict})"


def goals(cells: dict[str, dict[str, Any]]) -> list[Goal]:
    """All goals, from the cells that were measured."""

    def ratio(numerator: str, denominator: str) -> float | None:
        speeds = [best(name, "images_per_s") for name in (numerator, denominator)]
        return speeds[0] / speeds[1] if all(speeds) else None

    def best(name: str, key: str) -> float | None:
        """The better value of those with and without CUDA graphs."""
        return max(
            (cells[found][key] for found in (name, f"{name}, without CUDA graphs") if found in cells), default=None
        )

    return [
        *(
            Goal(f"fast_over_mae {arch} {size}", least, ratio(f"{arch} {size} fast, now", f"{arch} {size} mae, now"))
            for (arch, size), least in FAST_OVER_MAE.items()
        ),
        *(Goal(f"mfu lomar {arch} 224", least, best(f"{arch} 224 lomar, now", "mfu")) for arch, least in MFU.items()),
        Goal(
            "lomar_over_authors vit_base 224",
            LOMAR_OVER_AUTHORS,
            ratio("vit_base 224 lomar, now", "vit_base 224 lomar, authors"),
        ),
    ]


def print_goals(session: Session) -> dict[str, float | None]:
    """Prints each goal, and returns the values reached, by name."""
    found = goals(session.results.get("cells", {}))
    for goal in found:
        session.say(str(goal))
    return {goal.name: goal.value for goal in found}
