"""What came of a fine-tune, on a terminal: losses, overfitting, files, predicted against measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.train_result import TrainResult
from reports.comparison import Comparison
from reports.scale import count_text, memory_text, seconds_text
from reports.terminal import print_comparison

if TYPE_CHECKING:
    from rich.console import Console


def print_trained(console: Console, result: TrainResult, out: Path) -> None:
    """The summary of a finished training whose files are in ``out``."""
    from rich.text import Text

    for line in summary_lines(result, out):
        console.print(Text(line), soft_wrap=True)
    console.print()
    print_comparison(console, comparisons(result))


def comparisons(result: TrainResult) -> list[Comparison]:
    """Predicted against measured, as the other reports show it. A prediction without a width has no interval to hit."""
    rows = []
    for row in result.comparisons:
        predicted = row.predicted
        wide = predicted is not None and predicted.low < predicted.high
        rows.append(
            Comparison(
                quantity=row.quantity,
                unit=row.unit,
                predicted=predicted.value if predicted else None,
                low=predicted.low if predicted and wide else None,
                high=predicted.high if predicted and wide else None,
                measured=row.measured,
            )
        )
    return rows


def summary_lines(result: TrainResult, out: Path) -> list[str]:
    epochs = "1 epoch" if result.epochs == 1 else f"{_plain(result.epochs)} epochs"
    lines = [
        f"Trained {result.setup['model']} for {result.steps:,} steps ({epochs} of {result.samples:,} sequences, "
        f"{count_text(result.tokens)} tokens) of {result.data} in {seconds_text(result.training_seconds)}.",
        f"Training loss {result.first_loss:.4f} -> {result.final_loss:.4f}; held-out loss "
        f"{result.final_evaluation_loss:.4f}, best {result.best_evaluation_loss:.4f} after epoch "
        f"{_plain(result.best_epoch)}.",
    ]
    if len(result.allocated_by_rank) > 1:
        most = max(result.allocated_by_rank)
        lines.append(
            f"{len(result.allocated_by_rank)} devices: peak allocated {memory_text(result.allocated_by_rank[0])} on the first, "
            f"{memory_text(most)} on the fullest (number {result.allocated_by_rank.index(most)})."
        )
    if result.overfit_epoch is not None:
        lines.append(
            f"OVERFITTING after epoch {_plain(result.overfit_epoch)}: the held-out loss rises from there while the training "
            f"loss falls. Use {out / result.best_checkpoint}."
        )
    lines.append(f"Best checkpoint: {out / result.best_checkpoint}; final model: {out / result.model}")
    return lines


def _plain(epochs: float) -> str:
    return f"{round(epochs, 2):g}"
