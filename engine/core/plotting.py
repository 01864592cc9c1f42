"""matplotlib as everything here uses it: text is text. A class may be named "$x^2$", which is no formula, or one that fails."""

import matplotlib
from matplotlib.figure import Figure

__all__ = ["Figure"]

matplotlib.rcParams["text.parse_math"] = False
