"""The judge: what a function becomes when it is compiled for a card that need not be here."""

from optax_lowmem._plan.cards import CARDS, Card

from .program import Compiled, compile_for, mesh_of, missing
from .traffic import Traffic, traffic

__all__ = ["CARDS", "Card", "Compiled", "Traffic", "compile_for", "mesh_of", "missing", "traffic"]
