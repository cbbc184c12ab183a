"""What the demo is made of: procedurally rendered worlds with exact truth."""
