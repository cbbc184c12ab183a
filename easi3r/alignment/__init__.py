"""Global alignment: one world for all pair predictions (DUSt3R 3.4, MonST3R 3.3, Easi3R 3.3)."""

from easi3r.alignment.join import join_piece, later_half
from easi3r.alignment.optimise import align

__all__ = ["align", "join_piece", "later_half"]
