"""Global alignment: one world for all pair predictions (DUSt3R section 3.4, MonST3R section 3.3, Easi3R section 3.3)."""

from easi3r.alignment.optimise import align

__all__ = ["align"]
