"""What the peers of several ops share."""

import torch

# When a peer is worth its time: always, if it is quick to make or often the best; where it is known to be the best but
# takes a compiler tens of seconds; in a full run.
ALWAYS, BEST, FULL = range(3)
# Modes of torch.compile, names of the peers, and when they are worth it: of the two the thorough one is the likelier best.
COMPILERS = [("default", "compile", FULL), ("max-autotune-no-cudagraphs", "compile max-autotune", BEST)]
# Where there is nothing to find by trying.
PLAIN_COMPILERS = [("default", "compile", BEST), ("max-autotune-no-cudagraphs", "compile max-autotune", FULL)]


def compiled(expression, mode=None):
    """The expression as torch.compile makes it."""
    # Else the compiler would give up after a few shapes and run the expression as it is.
    torch._dynamo.reset()
    return torch.compile(expression, mode=mode, dynamic=False)


class Case:
    """A shape of shapes.json is a case, and timed in all modes."""

    MODES = ["graph", "eager", "cold"]

    @staticmethod
    def cases(shape):
        return [(shape["name"], shape)]

    def result(self, out):
        """What a call returned, like the reference."""
        return out
