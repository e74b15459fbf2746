"""What `contrec demo` prints: a few users, what they chose, and what is recommended to them."""

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contrec_fast.models.contrec import ContRec

SHOWN_HISTORY = 5


def show_users(model: ContRec, users: int, k: int, console: Console) -> None:
    """Print histories, generated texts and lists of some users spread over the dataset.

    As in evaluation, the held-out item is neither read nor left out, so that lists may have it.
    """
    dataset, bonus = model.dataset, model.config.retrieval.bonus
    titles, categories = dataset.items.titles, dataset.items.categories
    rows = np.linspace(0, len(dataset.user_ids) - 1, users).astype(int)
    ids, known = dataset.items.ids, dataset.histories
    index = {item: number for number, item in enumerate(ids)}
    histories = {dataset.user_ids[row]: [ids[item] for item in known[row]] for row in rows}
    lists = model.recommend(histories=histories, k=k)
    for row in rows:
        user, target = dataset.user_ids[row], dataset.targets[row]
        chosen = lists[lists.user_id == user]
        history = [titles[item] for item in dataset.histories[row][-SHOWN_HISTORY:]]
        console.print(f"\n[bold]User {escape(user)}[/] chose, latest last:")
        console.print("  " + escape(" | ".join(history)))
        console.print(f'The model writes: [italic]"{escape(chosen.text.iloc[0])}"[/]')
        table = Table(box=None, pad_edge=False)
        for name, justify in (("rank", "right"), ("recommended", "left"), ("category", "left"),
                              ("score", "right"), ("bonus", "right"), ("", "left")):  # fmt: skip
            table.add_column(name, justify=justify)
        for line in chosen.itertuples():
            item = index[line.item_id]
            table.add_row(
                str(line.rank),
                escape(titles[item]),
                escape(categories[item]),
                f"{line.score:.3f}",
                f"x {1 + bonus:.2f}" if line.matched else "",
                "chosen next" if item == target else "",
            )
        console.print(table)
