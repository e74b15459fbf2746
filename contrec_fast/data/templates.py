"""Ten wordings of the prompt around a history, and the sentence that answers them.

Training varies over them so that the model reads the history rather than one phrase; inference
always uses the first, whose fixed words one shared cache can then hold.
"""

# (role with one example, question)
TEMPLATES = (
    (
        "You advise the customers of a shop. Example: after a tent and a sleeping bag, "
        "the user might lean towards (Camping) products, such as a camping stove. "
        "This user chose, oldest first:",
        " What comes next?",
    ),
    (
        "A customer's choices follow, the latest at the end. Whoever buys flour and a loaf tin, "
        "for instance, might lean towards (Baking) products, such as a dough scraper. The choices:",
        " Which product suits this customer now?",
    ),
    (
        "Read what somebody picked over time and say what they want. Someone with running shoes "
        "and socks might lean towards (Running) products, such as a bottle. Picked so far:",
        " What do they want?",
    ),
    (
        "You know a catalog and the people who use it. A reader of two volumes of a saga might "
        "lean towards (Fantasy) products, such as volume three. Here is what one person took:",
        " What should be shown to them?",
    ),
    (
        "Guess the next choice from the earlier ones. For example, a kettle and filters point to "
        "(Coffee) products, such as fresh beans. Earlier choices in order:",
        " The next choice?",
    ),
    (
        "Recommend something to a visitor of our shop. A visitor who took a camera might lean "
        "towards (Photography) products, such as a tripod. This visitor took:",
        " What would you recommend?",
    ),
    (
        "These items were chosen one after another by the same person. After a helmet and a lamp, "
        "say, one might lean towards (Cycling) products, such as a pump. The items:",
        " How does it go on?",
    ),
    (
        "State a person's taste from what they selected. Someone with seeds and soil might lean "
        "towards (Gardening) products, such as a trowel. Selected, from first to last:",
        " What is this person's taste?",
    ),
    (
        "Below is a shopping history. Just as a base game may be followed by (Board Games) "
        "products, such as an expansion, something follows it. The history:",
        " What follows?",
    ),
    (
        "Help a returning customer to find the right thing. Brushes and paper, as an example, "
        "suggest (Painting) products, such as an easel. Found before:",
        " What is the right thing now?",
    ),
)


def response_text(title: str, category: str) -> str:
    """The sentence that states what a user wants."""
    if category:
        return f" The user might lean towards ({category}) products, such as {title}."
    return f" The user might like {title}."
