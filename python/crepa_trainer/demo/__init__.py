"""`crepa-train demo`: a run like any other on small models of its own, and what came of it."""
