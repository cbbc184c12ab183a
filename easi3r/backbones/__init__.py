"""Networks: DUSt3R's architecture, its checkpoints, and objects that somebody else built."""
