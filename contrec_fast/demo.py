"""What `contrec demo` prints: a few users, what they chose, and what is recommended to them."""

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contrec_fast.engine import Recommender

SHOWN_HISTORY = 5


def show_users(recommender: Recommender, users: int, k: int, console: Console) -> None:
    """Print histories, generated texts and lists of some users spread over the dataset."""
    dataset = recommender.dataset
    rows = np.linspace(0, len(dataset.user_ids) - 1, users).astype(int)
    lists = recommender.recommend(rows, k)
    titles, bonus = dataset.items.titles, recommender.model.config.retrieval.bonus
    for i, row in enumerate(rows):
        history = [titles[item] for item in dataset.histories[row][-SHOWN_HISTORY:]]
        console.print(f"\n[bold]User {escape(dataset.user_ids[row])}[/] chose, latest last:")
        console.print("  " + escape(" | ".join(history)))
        console.print(f'The model writes: [italic]"{escape(lists.texts[i])}"[/]')
        table = Table(box=None, pad_edge=False)
        for name, justify in (("rank", "right"), ("recommended", "left"), ("category", "left"),
                              ("score", "right"), ("bonus", "right"), ("", "left")):  # fmt: skip
            table.add_column(name, justify=justify)
        for rank, item in enumerate(lists.ids[i][lists.ids[i] >= 0]):
            held_out = "chosen next" if item == dataset.targets[row] else ""
            table.add_row(
                str(rank + 1),
                escape(titles[item]),
                escape(dataset.items.categories[item]),
                f"{lists.scores[i, rank]:.3f}",
                f"x {1 + bonus:.2f}" if lists.matched[i, rank] else "",
                held_out,
            )
        console.print(table)
