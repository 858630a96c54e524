"""Files that are whole or refused: written beside their target, known by their hashes, checked when they are read."""
