"""How drafts are sampled and verified."""
