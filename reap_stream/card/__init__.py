"""README.md of a pruned checkpoint, made of facts alone: what was cut from what, how, and how well.

    facts        what only the job knows, kept as `reap/card.json`
    base         which model was cut, where that can be told, and what the result may be called
    source       the source's own card: what is inherited, and its text
    inputs       everything the card is made of, read back from a directory
    metadata     the front matter
    sections     the text, with `method`, `results` and `usage`
    reproduce    the command that gives the same bytes
    privacy      names in the place of paths
    records      the records of a checkpoint without paths of the machine
    writing      README.md of a finished directory, rendered anew

The card follows from files of the directory, so it can be rendered again at any time: when an
evaluation is there, or when the model that was cut has got a name on the Hub.
"""
