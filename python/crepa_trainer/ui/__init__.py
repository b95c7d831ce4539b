"""The web page, `crepa-train ui`: it sets up, starts, watches and compares runs, and training needs none of it."""
