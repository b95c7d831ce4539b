"""What a run says of itself: its plan before, its values while, its table and pictures after."""
