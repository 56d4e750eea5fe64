"""The largest numbers that a recipe may hold. Beyond them a value is a slip of the keyboard.

They are wide: what is merely unwise is allowed. What is not would overflow in a library, fill the memory, or never end.
"""

from __future__ import annotations

MOST_STEPS = 1_000_000_000  # optimizer steps, and rows
MOST_EPOCHS = 100_000
MOST_ROWS = 1_000_000  # in one forward pass, or accumulated
MOST_TOKENS = 100_000_000  # in a row, a context or an answer
MOST_ENTRIES = 100_000_000  # in a vocabulary
MOST_WIDTH = 1_000_000  # of a layer or a part of one
MOST_INNER = 16_000_000  # of a feed-forward layer, which is some times as wide
MOST_LAYERS = 10_000  # a config with more is damaged, and lists a layer would fill the memory
MOST_PARTS = 100_000  # heads, experts, groups, buckets, ranks
MOST_SEED = 2**32 - 1  # what NumPy's generator takes
MOST_RATE = 10.0  # learning rate, weight decay
MOST_FACTOR = 1e6  # multipliers, scales, penalties, caps
MOST_THETA = 1e15  # base of a rotation
MOST_NORM = 1e12  # a gradient norm that clips nothing
MOST_MEGABYTES = 1_000_000
MOST_NATS = 1e6
MOST_TEMPERATURE = 1e3

MAX_DOCUMENT_MB = 64.0  # of data, unless a recipe says another
