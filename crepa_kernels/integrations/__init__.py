"""Other trainers, with this package's loss in theirs."""
