"""A small made-up shop: believable titles and purchases with an order worth learning."""

from bisect import bisect
from itertools import accumulate

import numpy as np

from contrec_fast.data.interactions import Dataset, Items

# What one buys in each category, in the order in which one tends to buy it. Neighbours in this
# list (and its two ends) share customers.
# fmt: off
PRODUCTS = {
    "Coffee": (
        "Pour-Over Dripper", "Paper Filters", "House Blend Beans",
        "Gooseneck Kettle", "Burr Grinder", "Single-Origin Beans",
    ),
    "Baking": (
        "Stand Mixer", "Bread Flour", "Proofing Basket",
        "Loaf Tin", "Dough Scraper", "Sourdough Starter",
    ),
    "Gardening": (
        "Raised Bed Kit", "Potting Soil", "Tomato Seeds",
        "Hand Trowel", "Drip Irrigation Set", "Liquid Fertiliser",
    ),
    "Camping": (
        "Two-Person Tent", "Ground Sheet", "Sleeping Mat",
        "Down Sleeping Bag", "Gas Stove", "Fuel Canister",
    ),
    "Running": (
        "Trail Shoes", "Cushioned Socks", "Handheld Bottle",
        "Reflective Vest", "Hydration Pack", "Race Belt",
    ),
    "Cycling": (
        "Commuter Helmet", "Front Light", "Floor Pump",
        "Puncture Repair Kit", "Chain Lubricant", "Replacement Inner Tube",
    ),
    "Photography": (
        "Mirrorless Camera", "Memory Card", "Spare Battery",
        "Prime Lens", "Lens Filter Set", "Carbon Tripod",
    ),
    "Painting": (
        "Watercolour Set", "Cold-Press Paper Pad", "Round Brush Set",
        "Masking Tape", "Table Easel", "Varnish Spray",
    ),
    "Fantasy Books": (
        "Saga, Volume 1", "Saga, Volume 2", "Saga, Volume 3",
        "Saga, Volume 4", "Saga, Volume 5", "Saga, Volume 6",
    ),
    "Board Games": (
        "Base Game", "Card Sleeves", "First Expansion",
        "Second Expansion", "Storage Insert", "Collector Edition",
    ),
}
BRANDS = (
    "Alderway", "Brackenfold", "Corvane", "Duskmere", "Elmbrook", "Farrowlight", "Greyhollow",
    "Hartwell", "Isleworn", "Juniper & Pine", "Kestrel Row", "Larkspur", "Millstone", "Northmoor",
    "Oakhaven", "Pennywhistle", "Quillon", "Rowanlea", "Saltmarsh", "Thornbury",
)
# fmt: on
CATEGORIES = tuple(PRODUCTS)
STEPS = 6  # products in a line: one brand's way through a category
LONGEST = 20  # items of a user, the held-out one included; the shortest is 6


def synthetic_shop(users: int = 400, items: int = 240, seed: int = 0) -> Dataset:
    """A shop of ten categories in which what somebody buys next follows from earlier purchases.

    A *line* is one brand's way through a category: the product, then its accessory, refill or
    next volume. Each user follows two lines in related categories and mostly goes back and forth
    between them, so that the next item more often continues the second-last purchase than the
    last one. Now and then a product is skipped, or a taste drifts: a line is given up for one in
    the same or a neighbouring category. Some categories and brands are much more popular than
    others. Nobody buys anything twice; the last purchase (of 6 to 20) is the target.

    The same arguments give the same shop on every platform (PCG64 and correctly rounded
    arithmetic), and more users leave the earlier ones as they are. Raises ValueError for
    users < 1, items < 60 (one line in each category) or seed < 0.
    """
    smallest = STEPS * len(CATEGORIES)
    for name, value, least in (("users", users, 1), ("items", items, smallest), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    catalog, lines = _build_catalog(items)
    # One row of uniform draws per purchase, so that no draw depends on what was bought before.
    draws = np.random.Generator(np.random.PCG64(seed)).random((users, LONGEST + 1, 6)).tolist()
    purchases = [np.array(_shop(lines, user_draws), dtype=np.int64) for user_draws in draws]
    return Dataset(
        items=catalog,
        user_ids=[f"user-{user + 1:04d}" for user in range(users)],
        histories=[bought[:-1] for bought in purchases],
        targets=np.array([bought[-1] for bought in purchases], dtype=np.int64),
    )


def _build_catalog(items: int) -> tuple[Items, list[list[list[int]]]]:
    """The catalog and, per category, its lines as lists of item indices in buying order."""
    titles, categories = [], []
    lines: list[list[list[int]]] = [[] for _ in CATEGORIES]
    for item in range(items):
        slot, category = divmod(item, len(CATEGORIES))
        line, step = divmod(slot, STEPS)
        if step == 0:
            lines[category].append([])
        lines[category][line].append(item)
        # Categories start at different brands, as few brands make everything.
        edition, brand = divmod(line, len(BRANDS))
        name = BRANDS[(brand + 7 * category) % len(BRANDS)]
        suffix = f" (Series {edition + 1})" if edition else ""
        titles.append(f"{name} {PRODUCTS[CATEGORIES[category]][step]}{suffix}")
        categories.append(CATEGORIES[category])
    return Items([f"SKU-{item + 1:04d}" for item in range(items)], titles, categories), lines


def _shop(lines: list[list[list[int]]], draws: list[list[float]]) -> list[int]:
    """One user's purchases: item indices, oldest first, none twice."""
    bought: list[int] = []

    def start(category: int, draw: float) -> tuple[int, list[int]]:
        """A line of the category (or of the next with one to offer), popular ones first."""
        for offset in range(len(CATEGORIES)):
            nearby = (category + offset) % len(CATEGORIES)
            fresh = [line for line in lines[nearby] if not set(line) & set(bought)]
            if fresh:
                return nearby, list(fresh[_skewed(len(fresh), draw)])
        # Every line has been begun: what is left of all of them.
        rest = [item for line in sum(lines, []) for item in line if item not in bought]
        return category, rest

    first_draws, *steps = draws
    length = 6 + int(first_draws[0] * (LONGEST - 5))
    home = _skewed(len(CATEGORIES), first_draws[1])
    second = (home + 1 + int(first_draws[2] * 3)) % len(CATEGORIES)
    threads = [start(home, first_draws[3]), start(second, first_draws[4])]
    current = int(first_draws[5] * 2)
    for switch, drift, where, which, skip, other in steps[:length]:
        if switch < 0.65:
            current = 1 - current
        category, left = threads[current]
        left = [item for item in left if item not in bought]
        if not left or drift < 0.08:
            moved = 0 if where < 0.5 else 1 if other < 0.5 else len(CATEGORIES) - 1
            category, left = start((category + moved) % len(CATEGORIES), which)
        item = left[1 if skip < 0.12 and len(left) > 1 else 0]
        bought.append(item)
        threads[current] = category, left[left.index(item) + 1 :]
    return bought


def _skewed(count: int, draw: float) -> int:
    """An index below count, index i with weight 1 / (i + 2), from a draw uniform in [0, 1)."""
    weights = list(accumulate(1 / (index + 2) for index in range(count)))
    return min(bisect(weights, draw * weights[-1]), count - 1)
