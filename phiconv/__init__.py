"""phiconv: a declarative recipe in, a verified Phi artifact out."""

__version__ = "0.1.0"
